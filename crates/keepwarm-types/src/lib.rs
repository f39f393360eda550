//! Newtypes and units that every keepwarm crate shares: ids, generations, revisions, byte and token
//! counts, states and outcomes, with their text forms and parse errors.
//!
//! This crate owns no behaviour beside parsing, printing and shard arithmetic; it knows nothing of
//! HTTP, disk or devices. One word per idea: the names are the glossary of the design.

mod count;
mod digest;
mod id;
mod state;
mod time;
mod version;

pub use count::{Bytes, ParseBytesError, Tokens};
pub use digest::{BlockChecksum, LayoutHash, ParseDigestError};
pub use id::{
    GpuIndex, InstanceId, LeaseId, NodeName, Owner, ParseIdError, SessionId, SessionKey, ShardCount, ShardId,
    TenantName, TxnId, WriteId, valid_name,
};
pub use state::{ColdReason, Durability, Outcome, Source, Tier};
pub use time::{Millis, Timestamp};
pub use version::{Birth, Epoch, Generation, Incarnation, ParseBirthError, PlacementSeq, Revision};

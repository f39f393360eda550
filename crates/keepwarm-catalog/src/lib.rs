//! Manifests, transcripts and tombstones on disk, group-committed; the only embedded database.
//!
//! One writer thread drains what is queued into one transaction, syncs it, and tells everybody at once. A
//! record is acknowledged only after its sync (`sync = always`). What is on disk survives a kill of the
//! process at any instruction; the block instances of a manifest live in memory alone and are not written.
//!
//! The registry's log is a second file beside it ([`RaftLog`]), because consensus syncs by its own clock.
//!
//! It knows records, not why they are written: that is the core's business.

mod disk;
mod open;
mod quota;
mod raft_log;
mod read;
mod transcript;
mod writer;

pub use open::{Catalog, CatalogSettings, OpenError, Recovered, Sync};
pub use raft_log::{LogDone, LogError, LogStep, RaftLog, Slot};
pub use read::{ReadError, Transcript};
pub use writer::{Done, GROUP_MAX, QUEUE_MAX, SubmitError};

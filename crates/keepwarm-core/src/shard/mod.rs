//! The sessions of one shard: every verb, staged and committed writes, leases, expiry, eviction.
//!
//! [`Shard`] takes an [`Event`] with the present time and answers with [`Command`]s. The shell carries
//! guards beside the events and memory beside the commands; here a block is its
//! [`BlockRef`](crate::session::BlockRef).
//!
//! At most one change of a session is on its way to the catalog. Later requests that depend on it wait
//! behind it in a bounded queue; reads are answered from the committed manifest at once.

mod change;
mod command;
mod cut;
mod entry;
mod event;
mod expiry;
mod handover;
mod lease;
mod lifecycle;
mod refusal;
mod state;
mod view;
mod write;

pub(crate) use handover::LeftPending;

pub use command::{Command, Record, Residence, Ticket, TranscriptChange};
pub use event::{
    Commit, Create, Cut, Event, Fork, ListQuery, PersistError, PlanWrite, Precondition, Request, RequestId,
    Turn, Verb, Write, WriteMode,
};
pub use refusal::Refusal;
pub use state::{
    BRANCHES_MAX, RETRY_AFTER, STAGE_TTL, Shard, ShardSettings, TOMBSTONE_TTL, TOMBSTONES_MAX, TXNS_MAX,
    Tombstone, WRITES_QUEUED_MAX,
};
pub use view::{Answer, Deleted, LeaseGrant, LeaseView, ReadGrant, SessionView, Staged, WritePlan, Written};

#[cfg(test)]
mod tests;

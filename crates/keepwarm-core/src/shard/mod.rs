//! The sessions of one shard: every verb, staged and committed writes, leases, expiry, eviction.
//!
//! [`Shard`](state::Shard) takes an [`Event`] with the present time and answers with [`Command`]s. The shell
//! carries guards beside the events and memory beside the commands; here a block is its [`BlockRef`].
//!
//! [`BlockRef`]: crate::session::BlockRef

mod command;
mod event;
mod refusal;
mod view;

pub use command::{Command, Record, Residence, Ticket, TranscriptChange};
pub use event::{
    Commit, Create, Cut, Event, Fork, ListQuery, PersistError, PlanWrite, Precondition, Request, RequestId,
    Turn, Verb, Write, WriteMode,
};
pub use refusal::Refusal;
pub use view::{Answer, Deleted, LeaseGrant, LeaseView, ReadGrant, SessionView, Staged, WritePlan, Written};

//! What a shard actor can be told.

use keepwarm_core::residency::EvictReason;
use keepwarm_core::shard::{Answer, PersistError, Record, Ticket, Verb};
use keepwarm_memory::Block;
use keepwarm_types::{Birth, SessionKey};
use tokio::sync::oneshot;

use crate::admission::Permit;
use crate::error::Error;

/// Everything a shard actor can be told.
#[expect(
    clippy::large_enum_variant,
    reason = "most messages are the large one; a box would cost an allocation each"
)]
pub(crate) enum ShardMsg {
    /// A verb on a session.
    Ask(Ask),
    /// The catalog's word on a ticket.
    Durable(Ticket, Result<(), (PersistError, Vec<Record>)>),
    /// The pinned actor proposes that a session go cold.
    Evict {
        /// Which.
        key: SessionKey,
        /// The life that is meant.
        birth: Birth,
        /// Why.
        why: EvictReason,
    },
    /// A deadline of the core's has passed.
    Tick,
    /// How many sessions are here.
    Count(oneshot::Sender<u64>),
    /// A test wants to see what a panic does.
    Panic,
}

/// A verb, the guards that its write brought, and the place to answer to.
pub(crate) struct Ask {
    pub(crate) key: SessionKey,
    pub(crate) verb: Verb,
    pub(crate) guards: Vec<Block>,
    /// Held until the answer is out.
    pub(crate) permit: Option<Permit>,
    pub(crate) reply: oneshot::Sender<Result<Answered, Error>>,
}

/// An answer, and guards of what it names: all parts' blocks for a lease or a read of everything, one
/// part's for a read, the tail for a plan.
pub(crate) struct Answered {
    pub(crate) answer: Box<Answer>,
    pub(crate) blocks: Vec<Block>,
}

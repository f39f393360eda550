//! What a shard actor can be told.

use std::sync::Arc;

use keepwarm_core::registry::{Member, ReplicaSet};
use keepwarm_core::replica::{CopyFailed, CopyId, Envelope, Role};
use keepwarm_core::residency::EvictReason;
use keepwarm_core::session::BlockRef;
use keepwarm_core::shard::{Answer, PersistError, Record, Ticket, Verb};
use keepwarm_memory::Block;
use keepwarm_types::{Birth, Generation, SessionKey};
use tokio::sync::oneshot;

use crate::admission::Permit;
use crate::error::Error;

/// Everything a shard actor can be told.
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
    /// Another node's replica says something.
    Peer(Envelope, Permit),
    /// The registry's set for this shard.
    Set(Arc<ReplicaSet>),
    /// In this generation's set this member is to leave, or nobody.
    Leaves(Generation, Option<Member>),
    /// The link to another node is there again.
    Linked(Member),
    /// Verified bytes came from the primary; answered once they are kept.
    Arrived(SessionKey, Vec<Block>, oneshot::Sender<()>),
    /// Bytes were copied to another node, or not; or fetched, and here they are.
    Copied(CopyId, Result<Vec<Block>, CopyFailed>),
    /// Another node's replica wants these bytes: guards of all of them, or nothing.
    Lend(Vec<BlockRef>, Birth, oneshot::Sender<Option<Vec<Block>>>),
    /// The registry's answer to a round.
    RegistryConfirmed(u64),
    /// The registry did not take what was proposed in this generation.
    ProposalFailed(Generation),
    /// A deadline of the core's has passed.
    Tick,
    /// What is here.
    Count(oneshot::Sender<ShardFigures>),
    /// A test wants to see what a panic does.
    Panic,
}

/// What a shard actor has.
#[derive(Debug, Clone)]
pub(crate) struct ShardFigures {
    pub(crate) sessions: u64,
    pub(crate) role: Role,
    pub(crate) set: Arc<ReplicaSet>,
    /// Sessions with fewer copies than they should have; a primary's.
    pub(crate) under_replicated: u64,
    /// Sessions whose bytes would be missed if this node stopped now.
    pub(crate) needed: u64,
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

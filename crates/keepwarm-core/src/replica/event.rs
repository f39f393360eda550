//! What can happen to a replica, and what it wants done.

use std::sync::Arc;

use keepwarm_types::{Birth, Generation, InstanceId, Millis, SessionKey, ShardCount, ShardId};

use super::message::Envelope;
use crate::registry::{Change, Member, ReplicaSet};
use crate::session::BlockRef;
use crate::shard::{self, Answer, PersistError, Record, Refusal, Request, RequestId, Ticket};

/// What a replica is told at its start.
#[derive(Debug, Clone)]
pub struct ReplicaSettings {
    /// Which shard.
    pub shard: ShardId,
    /// How many there are.
    pub count: ShardCount,
    /// The process that it runs in.
    pub member: Member,
    /// How often this shard was begun in this process.
    pub begun: u32,
    /// Copies of each session's bytes.
    pub replication: usize,
    /// Whether writes are taken while fewer than `replication` nodes can hold.
    pub degraded: bool,
    /// How long a client waits for a change before it is told that the outcome is unknown, and for anything else
    /// before it is refused.
    pub write_deadline: Millis,
    /// Whether the registry has other nodes: a primary without secondaries then asks it before it answers.
    pub cluster: bool,
}

/// Names bytes on their way to a holder, or from one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyId(pub u64);

/// Why bytes did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyFailed {
    /// The receiver has no room.
    NoRoom,
    /// The other side does not have them any more, or they were damaged there.
    Gone,
    /// They are damaged here.
    Damaged,
    /// The other side cannot be reached.
    Unreachable,
}

/// One thing that happened.
#[derive(Debug)]
pub enum ReplicaEvent {
    /// Somebody asks for something.
    Request(Request),
    /// Another replica says something.
    Peer(Envelope),
    /// The registry's set; an older one than is known is ignored.
    Set(Arc<ReplicaSet>),
    /// The link to a node is there again: what it did not answer is sent again.
    Linked(Member),
    /// The catalog has the records of this ticket, safely.
    Persisted(Ticket),
    /// The catalog could not take the records of this ticket, which come back.
    PersistFailed(Ticket, PersistError, Vec<Record>),
    /// Verified bytes came from the primary for a session, each with one name that belongs to the replica now.
    Arrived(SessionKey, Vec<InstanceId>),
    /// This node's memory wants to be rid of a session's bytes. The answer is the session's next residence, or
    /// [`ReplicaCommand::Stays`]; where another node is asked, it may be none.
    Evict(SessionKey, Birth),
    /// Bytes that were to be copied or fetched are there, or not. What was fetched has one name each.
    Copied(CopyId, Result<(), CopyFailed>),
    /// The registry confirmed that this generation is the present one, by a question asked after the round began.
    RegistryConfirmed {
        /// The round.
        round: u64,
    },
    /// The registry refused a change that was proposed in this generation, or did not answer; of a change that cedes the shard:
    /// it was certainly not made.
    ProposalFailed(Generation),
    /// In this generation's set this member is to leave, or nobody, as the registry's [`leavers`](crate::registry::leavers)
    /// says. Anew for each set.
    Leaves(Generation, Option<Member>),
    /// Time passed.
    Tick,
}

/// One effect, to be carried out in the order given.
#[derive(Debug)]
pub enum ReplicaCommand {
    /// What the shard wants; never a `Persist` or a `Reply`, which follow as the two below.
    Shard(shard::Command),
    /// Write these records in one transaction, then report.
    Persist(Ticket, Vec<Record>),
    /// Answer a request.
    Reply(RequestId, Result<Box<Answer>, Refusal>),
    /// Make this answer ready, guards included, and keep it until it is delivered or refused.
    Hold(RequestId, Result<Box<Answer>, Refusal>),
    /// Give the answer that is kept.
    Deliver(RequestId),
    /// Give this instead of the answer that is kept.
    Refuse(RequestId, Refusal),
    /// Tell another replica. It may get lost.
    Send(Envelope),
    /// Tell another replica what a session is: the envelope's [`Install`](super::Install) needs its transcript, read
    /// from the catalog in one look together with the manifest's stamp. Where the catalog has another stamp nothing is sent,
    /// and the replica comes back to it.
    SendWhole(Envelope),
    /// Copy these blocks to a holder.
    Copy {
        /// Names the copy.
        id: CopyId,
        /// To whom.
        to: Member,
        /// Whose blocks.
        key: SessionKey,
        /// Of which life.
        birth: Birth,
        /// Which.
        blocks: Vec<BlockRef>,
        /// Whether the receiver takes them only into room that it has to spare.
        spare: bool,
    },
    /// Fetch these blocks from a holder.
    Fetch {
        /// Names the copy.
        id: CopyId,
        /// From whom.
        from: Member,
        /// Whose blocks.
        key: SessionKey,
        /// Of which life.
        birth: Birth,
        /// Which.
        blocks: Vec<BlockRef>,
        /// Whether they are taken only into room that is to spare here.
        spare: bool,
    },
    /// The session does not leave this node's memory now.
    Stays(SessionKey),
    /// A secondary acknowledged a change so long after it was sent: for [`Pace`](crate::registry::Pace).
    Took(Member, Millis),
    /// Propose a change of the set, at the present generation.
    Propose(Change),
    /// Ask the registry, by a question that begins now, whether this generation is the present one.
    ConfirmRegistry {
        /// The round.
        round: u64,
    },
}

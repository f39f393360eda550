//! What can happen to a shard.

use std::sync::Arc;

use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, InstanceId, LeaseId, Millis, NodeName, SessionId, SessionKey,
    Tokens, TxnId, WriteId,
};

use super::command::{Record, Ticket};
use crate::registry::Member;
use crate::session::{BlockRef, Etag, Home, Labels, Layout, Protect, Stamp, TranscriptDelta};

/// Names a request among those in flight at one shard; minted by the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// One thing that happened.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "made and taken once each; a box would cost an allocation per request"
)]
pub enum Event {
    /// Somebody asks for something.
    Request(Request),
    /// The catalog has the records of this ticket, safely.
    Persisted(Ticket),
    /// The catalog could not take the records of this ticket, which come back.
    PersistFailed(Ticket, PersistError, Vec<Record>),
    /// Time passed: expire staged bytes, leases, sessions and tombstones.
    Tick,
}

/// Why records could not be persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PersistError {
    /// They are certainly not on disk, and never will be (disk full before anything was written, closed).
    NotApplied,
    /// They may be on disk (an error while syncing).
    Unknown,
    /// Fewer nodes than `replication` can hold the bytes, and the spec refuses that.
    TooFewHolders,
}

/// A verb on a session, with its place to answer to.
#[derive(Debug)]
pub struct Request {
    /// Where the answer goes.
    pub id: RequestId,
    /// Whose session.
    pub key: SessionKey,
    /// What to do.
    pub verb: Verb,
}

/// What a write demands of the state that it meets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Precondition {
    /// The session must be at exactly this entity tag (`If-Match`, `if_revision`).
    pub etag: Option<Etag>,
    /// The lease under which the write comes; needed while the session is leased.
    pub lease: Option<LeaseId>,
    /// Makes a repeated write get its first answer.
    pub write_id: Option<WriteId>,
}

/// How a write meets the part's present bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    /// From `offset` on: in tokens for paged and window parts, in bytes for `bytes` parts.
    Append {
        /// Where the new bytes begin.
        offset: u64,
    },
    /// All of the part.
    Replace,
}

/// Asks, before any byte is taken, whether a write could succeed now and how to lay its blocks.
#[derive(Debug, Clone)]
pub struct PlanWrite {
    /// Name of the part.
    pub part: String,
    /// Where it goes.
    pub mode: WriteMode,
    /// What it demands.
    pub precondition: Precondition,
    /// Bytes that will come, where known.
    pub body: Option<Bytes>,
    /// Staged for this transaction, or committed at once.
    pub txn: Option<TxnId>,
}

/// The blocks of one part, complete and sealed in pinned memory.
#[derive(Debug, Clone)]
pub struct Write {
    /// Name of the part.
    pub part: String,
    /// The life that the plan met.
    pub birth: Birth,
    /// The instance whose bytes begin the first new block, where the plan named one.
    pub tail: Option<InstanceId>,
    /// Where the body began.
    pub mode: WriteMode,
    /// What it demands.
    pub precondition: Precondition,
    /// Staged for this transaction, or committed at once.
    pub txn: Option<TxnId>,
    /// Blocks of the part from block number `first_block` on; those before it stay as they are.
    pub first_block: u32,
    /// The new blocks, all full but the last.
    pub blocks: Vec<BlockRef>,
    /// Bytes of the part after the write, from its very beginning.
    pub length: Bytes,
    /// XXH3-128 over all the part's bytes, where the write covered all of them.
    pub digest: Option<BlockChecksum>,
    /// A digest over mode, lengths and checksums of the body, for the write id.
    pub asked: u64,
}

/// Turns a transaction's staged parts into one revision.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The transaction; without staged parts it can still commit a transcript.
    pub txn: TxnId,
    /// The session's length after it, in tokens.
    pub length_tokens: Tokens,
    /// Tokens and messages from the old length on.
    pub transcript: Option<TranscriptDelta>,
    /// What it demands.
    pub precondition: Precondition,
    /// A digest over what was asked, for the write id.
    pub asked: u64,
}

/// The end of a model's turn: the transcript alone, ahead of the bytes that a checkpoint brings.
#[derive(Debug, Clone)]
pub struct Turn {
    /// The lease that the executor holds.
    pub lease: LeaseId,
    /// The transcript's change.
    pub transcript: TranscriptDelta,
}

/// Where to cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// After so many tokens.
    Tokens(Tokens),
    /// After so many bytes, of a layout whose only part is `bytes`.
    Bytes(Bytes),
}

/// A new session.
#[derive(Debug, Clone)]
pub struct Create {
    /// What its bytes are.
    pub layout: Arc<Layout>,
    /// Its life, from the shell's randomness.
    pub birth: Birth,
    /// Protection after the last use.
    pub protect: Protect,
    /// Time to live after the last use.
    pub ttl: Option<Millis>,
    /// Names and values.
    pub labels: Labels,
}

/// A session that begins as a prefix of this one, in the same shard.
#[derive(Debug, Clone)]
pub struct Fork {
    /// The child's id, of the same tenant and shard.
    pub child: SessionId,
    /// The child's life, from the shell's randomness.
    pub birth: Birth,
    /// Prefix length; all of it where absent.
    pub length: Option<Tokens>,
    /// Labels of the child; the parent's where absent.
    pub labels: Option<Labels>,
    /// The child's transcript prefix, in messages, where the shell knows it (else all that fit `length`).
    pub keep_messages: Option<u32>,
    /// Listed among the parent's branches: a conversation that left the stored one.
    pub branch: bool,
    /// A fork made under the parent's lease (a branch made by the executor).
    pub lease: Option<LeaseId>,
}

/// Which sessions to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Only ids after this one.
    pub after: Option<SessionId>,
    /// At most so many.
    pub limit: usize,
    /// Only sessions with all of these labels.
    pub labels: Vec<(Box<str>, Box<str>)>,
}

/// Every verb that a shard knows.
#[derive(Debug)]
pub enum Verb {
    /// Make a session, or confirm the same one.
    Create(Create),
    /// Show it; no use.
    Get,
    /// Show those of the key's tenant in this shard, by id; the key's id is ignored.
    List(ListQuery),
    /// Plan a write.
    PlanWrite(PlanWrite),
    /// Stage or commit a part's bytes.
    Write(Write),
    /// Commit a transaction.
    Commit(Commit),
    /// Drop a transaction's staged bytes.
    Abort(TxnId),
    /// Commit a turn's transcript under a lease.
    Turn(Turn),
    /// Read a part's committed bytes: the answer's instances are pinned before any later release.
    Read {
        /// Name of the part.
        part: String,
    },
    /// Read all parts' committed bytes: for activation, export and checkpoint.
    ReadAll,
    /// Take the write lease and the manifest to run on.
    Activate {
        /// The lease's id, from the shell's randomness.
        lease: LeaseId,
        /// How long; clipped to the limits.
        ttl: Millis,
        /// Where it will run; kept as the session's home.
        home: Home,
    },
    /// Make a lease last longer.
    Renew {
        /// Which.
        lease: LeaseId,
        /// How long from now.
        ttl: Millis,
    },
    /// Give a lease back.
    Release {
        /// Which.
        lease: LeaseId,
    },
    /// Move the home (migrate).
    SetHome(Home),
    /// Note a use, so that protection and TTL count from now.
    Touch,
    /// Cut the session short.
    Truncate {
        /// Where.
        cut: Cut,
        /// What it demands.
        precondition: Precondition,
    },
    /// Begin another session as a prefix of this one.
    Fork(Fork),
    /// Commit that the bytes are gone: by eviction or with all its holders.
    GoCold {
        /// The life that is meant.
        birth: Birth,
        /// Why.
        reason: ColdReason,
        /// Evict even if leased, protected or used since (holders lost).
        force: bool,
    },
    /// Let another replica hold the bytes that are here; the replica carries it out, a shard alone cannot.
    Demote,
    /// Give the session's shard to the replica on this node; the replica carries it out, a shard alone cannot.
    Cede(NodeName),
    /// This node's copy of a block is damaged: the other holders' are the session's from now on, or where there is none
    /// it is cold (`corrupt`), whatever protects it. Done where the session does not name the block any more.
    Condemn {
        /// The life that is meant.
        birth: Birth,
        /// The damaged block.
        damaged: InstanceId,
    },
    /// Commit who holds the session's bytes; the replica asks this of itself.
    Place {
        /// The life that is meant.
        birth: Birth,
        /// The state that is meant.
        met: Stamp,
        /// Who has all of its bytes.
        holders: Arc<[Member]>,
        /// Instances that were fetched for this, with one name each: the manifest's once it is committed.
        brought: Vec<InstanceId>,
    },
    /// End the session.
    Delete,
    /// End a session whose making failed half-way: its id may be used again at once.
    Abandon,
}

impl Verb {
    /// Whether it may begin what ends where the shard's primary changes: a lease, a change or a transaction.
    #[must_use]
    pub const fn begins_something(&self) -> bool {
        !matches!(
            self,
            Self::Get
                | Self::List(_)
                | Self::Read { .. }
                | Self::ReadAll
                | Self::Renew { .. }
                | Self::Release { .. }
                | Self::SetHome(_)
                | Self::Touch
        )
    }

    /// Whether it reads or lays upon the session's bytes.
    #[must_use]
    pub const fn needs_bytes(&self) -> bool {
        match self {
            Self::PlanWrite(_)
            | Self::Write(_)
            | Self::Commit(_)
            | Self::Turn(_)
            | Self::Read { .. }
            | Self::ReadAll
            | Self::Activate { .. }
            | Self::Truncate { .. }
            | Self::Fork(_) => true,
            Self::Create(_)
            | Self::Get
            | Self::List(_)
            | Self::Abort(_)
            | Self::Renew { .. }
            | Self::Release { .. }
            | Self::SetHome(_)
            | Self::Touch
            | Self::GoCold { .. }
            | Self::Demote
            | Self::Cede(_)
            | Self::Condemn { .. }
            | Self::Place { .. }
            | Self::Delete
            | Self::Abandon => false,
        }
    }
}

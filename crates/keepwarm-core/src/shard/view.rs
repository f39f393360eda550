//! What a shard answers.

use std::sync::Arc;

use keepwarm_types::{
    Birth, Bytes, Epoch, Generation, LeaseId, Millis, Revision, SessionId, Timestamp, Tokens, TxnId,
};

use crate::session::{BlockRef, Etag, Home, Lease, Manifest, Part, Planes};

/// A successful answer.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The session as it is; `new` if this request made it.
    Session {
        /// The session.
        view: Box<SessionView>,
        /// Whether it was made just now.
        new: bool,
        /// Whether it is shorter than asked (a fork or a cut that fell inside a block).
        clipped: bool,
    },
    /// A page of sessions, by id.
    Page(Vec<SessionView>),
    /// How to lay a write.
    Plan(Box<WritePlan>),
    /// A revision was committed (or, by its write id, had been).
    Written(Written),
    /// Bytes are staged.
    Staged(Staged),
    /// What to read; its instances are there until the reader drops them.
    Read(Box<ReadGrant>),
    /// A lease was granted or renewed.
    Lease(Box<LeaseGrant>),
    /// The session has ended.
    Deleted(Deleted),
    /// Done, with nothing to say.
    Done,
}

/// A session and what the shard knows beside its manifest.
#[derive(Debug, Clone)]
pub struct SessionView {
    /// The committed manifest.
    pub manifest: Arc<Manifest>,
    /// Where it runs or last ran.
    pub home: Option<Home>,
    /// The lease in force.
    pub lease: Option<LeaseView>,
    /// When it was last read, written or run.
    pub last_used_at: Timestamp,
}

/// A lease without what would let its reader use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseView {
    /// Its id.
    pub id: LeaseId,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// How to lay the blocks of a write that would succeed now.
#[derive(Debug, Clone)]
pub struct WritePlan {
    /// The life that was met.
    pub birth: Birth,
    /// The revision that was met.
    pub revision: Revision,
    /// Number of the first new block.
    pub first_block: u32,
    /// Present tail whose first `tail_bytes` bytes begin the first new block (it is pinned for the planner).
    pub tail: Option<BlockRef>,
    /// How many of the tail's bytes to copy.
    pub tail_bytes: u32,
    /// Raw bytes in a full block.
    pub block_bytes: u64,
    /// The part, which says what a block's stored bytes are.
    pub part: Part,
    /// Bytes of the part before the first new block.
    pub base: Bytes,
    /// Planes of a plane-ordered part: a tail that is part full must be merged with the body plane by plane.
    pub planes: Option<Planes>,
    /// The body must have a whole multiple of this many bytes: one token's, or 1.
    pub unit: u64,
    /// The body must have exactly this many bytes (a snapshot).
    pub exact: Option<Bytes>,
    /// If the write id was seen: the first answer; nothing needs to be written.
    pub repeated: Option<Written>,
}

/// A committed write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Which life.
    pub birth: Birth,
    /// The shard's generation.
    pub generation: Generation,
    /// The revision that was made.
    pub revision: Revision,
    /// The session's length.
    pub length_tokens: Tokens,
    /// The part's length, for a write of one part.
    pub length: Bytes,
    /// The committed manifest.
    pub manifest: Arc<Manifest>,
}

/// Bytes that wait for their commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staged {
    /// For which transaction.
    pub txn: TxnId,
    /// The part's length once committed.
    pub length: Bytes,
    /// When they are dropped.
    pub expires_at: Timestamp,
}

/// A consistent snapshot to read.
#[derive(Debug, Clone)]
pub struct ReadGrant {
    /// The committed manifest.
    pub manifest: Arc<Manifest>,
    /// The part that was asked for; none for all of them.
    pub part: Option<usize>,
}

impl ReadGrant {
    /// The entity tag of what is read.
    #[must_use]
    pub fn etag(&self) -> Etag {
        self.manifest.etag()
    }
}

/// A lease, and the manifest that its holder runs on.
#[derive(Debug, Clone)]
pub struct LeaseGrant {
    /// The lease.
    pub lease: Lease,
    /// Whether the wish was clipped to the limits.
    pub clipped: bool,
    /// The manifest; its instances are there until the holder drops them.
    pub manifest: Arc<Manifest>,
    /// How long from now.
    pub ttl: Millis,
}

impl LeaseGrant {
    /// The lease's epoch.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.lease.epoch
    }
}

/// A session that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// Its id.
    pub id: SessionId,
    /// Which life.
    pub birth: Birth,
    /// Its last revision.
    pub revision: Revision,
    /// Bytes that it named; others may name some of them too.
    pub bytes: Bytes,
}

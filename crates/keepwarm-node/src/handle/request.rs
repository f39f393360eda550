//! What can be asked of a node, beside the shard's own verbs.

use std::sync::Arc;

use keepwarm_core::session::{Labels, Layout, Protect, TranscriptDelta};
use keepwarm_core::shard::{Precondition, WriteMode};
use keepwarm_memory::Block;
use keepwarm_types::{Bytes, GpuIndex, LeaseId, Millis, NodeName, SessionId, Tokens, TxnId};

/// A session to make.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Its id; minted here where absent.
    pub id: Option<SessionId>,
    /// What its bytes are.
    pub layout: Arc<Layout>,
    /// Protection after the last use.
    pub protect: Protect,
    /// Time to live after the last use.
    pub ttl: Option<Millis>,
    /// Names and values.
    pub labels: Labels,
    /// A session whose home the new one should share.
    pub near: Option<SessionId>,
}

/// A digest that the client says its body has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyDigest {
    /// XXH3-128, canonical big-endian bytes.
    Xxh3(u128),
    /// SHA-256.
    Sha256([u8; 32]),
}

/// A part's bytes to take.
#[derive(Debug, Clone)]
pub struct WriteRequest {
    /// Name of the part.
    pub part: String,
    /// Where they go.
    pub mode: WriteMode,
    /// What the write demands.
    pub precondition: Precondition,
    /// Staged for this transaction, or committed at once.
    pub txn: Option<TxnId>,
    /// Length of the body, where known.
    pub body: Option<Bytes>,
    /// Digest of the body, where given.
    pub digest: Option<BodyDigest>,
}

/// Which bytes of a part to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    /// Byte range of the (otherwise selected) representation, end exclusive.
    pub bytes: Option<(u64, u64)>,
    /// Tokens from..to, of paged and window parts; on block boundaries for plane-ordered parts' ends inside.
    pub tokens: Option<(u64, Option<u64>)>,
    /// Planes a..=b, of paged and window parts.
    pub planes: Option<(u32, u32)>,
}

/// A session to run.
#[derive(Debug, Clone, Default)]
pub struct ActivateRequest {
    /// On which node; where absent here, or where room is.
    pub node: Option<NodeName>,
    /// On which GPU; where it is warm, or where room is, if absent.
    pub gpu: Option<GpuIndex>,
    /// How long the lease lasts; the default where absent.
    pub ttl: Option<Millis>,
    /// Here or nowhere: without room here it is refused, whoever else has room.
    pub only_here: bool,
}

/// A fork to make.
#[derive(Debug, Clone, Default)]
pub struct ForkRequest {
    /// The child's id; minted here where absent. It must lie in the parent's shard to share memory; any id is taken.
    pub id: Option<SessionId>,
    /// Prefix length; all where absent.
    pub length: Option<Tokens>,
    /// The child's labels; the parent's where absent.
    pub labels: Option<Labels>,
    /// Messages of the transcript to keep, where the caller knows.
    pub keep_messages: Option<u32>,
    /// List the child among the parent's branches.
    pub branch: bool,
    /// The parent's lease, where the caller holds it.
    pub lease: Option<LeaseId>,
}

/// One part's new blocks at the end of a model's turn, sealed in HBM in the part's committed form.
#[derive(Debug, Clone)]
pub struct TurnPart {
    /// Index of the part in the layout.
    pub part: usize,
    /// Number of the first new block; those before it stay.
    pub first_block: u32,
    /// The new blocks, all full but the last.
    pub blocks: Vec<Block>,
    /// The part's length after the turn.
    pub length: Bytes,
}

/// The end of a model's turn.
#[derive(Debug, Clone)]
pub struct TurnRequest {
    /// The executor's lease.
    pub lease: LeaseId,
    /// The GPU that holds the blocks.
    pub gpu: GpuIndex,
    /// The transcript's change, committed before the answer's last event.
    pub transcript: TranscriptDelta,
    /// The state; it follows by checkpoint. Empty for a turn that ran uncached.
    pub parts: Vec<TurnPart>,
}

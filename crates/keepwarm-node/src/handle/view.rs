//! What a node answers, beside the shard's own answers.

use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::session::{Etag, Home, Lease, Manifest, Message};
use keepwarm_core::shard::{LeaseView, Staged, Written};
use keepwarm_memory::{Block, ScratchFigures};
use keepwarm_types::{
    Birth, Bytes, Durability, GpuIndex, Incarnation, Millis, NodeName, Outcome, Revision, SessionId, ShardId,
    Source, Tier, Timestamp, Tokens,
};

/// Bytes of a session in each tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierBytes {
    /// In GPUs of this node.
    pub hbm: Bytes,
    /// In pinned memory of this node.
    pub pinned: Bytes,
    /// On other nodes.
    pub peer: Bytes,
}

/// A session as clients see it.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// The committed manifest.
    pub manifest: Arc<Manifest>,
    /// Bytes per tier.
    pub tiers: TierBytes,
    /// The node that owns it.
    pub owner: NodeName,
    /// Where it runs or last ran.
    pub home: Option<Home>,
    /// Whether it has all promised copies.
    pub durability: Durability,
    /// The lease in force.
    pub lease: Option<LeaseView>,
    /// When it was last read, written or run.
    pub last_used_at: Timestamp,
}

/// A page of sessions.
#[derive(Debug, Clone)]
pub struct SessionPage {
    /// By id.
    pub sessions: Vec<SessionInfo>,
    /// Where the next page begins; none at the end.
    pub next: Option<SessionId>,
    /// Shards that did not answer.
    pub incomplete: Vec<ShardId>,
}

/// A write that went through.
#[derive(Debug, Clone)]
pub enum WriteDone {
    /// A revision was committed.
    Committed(Written, Durability),
    /// The bytes wait for their commit.
    Staged(Staged),
}

/// The verb's outcome and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What became of it.
    pub outcome: Outcome,
    /// Why, in a sentence; empty where there is nothing to explain.
    pub reason: String,
}

/// A session ready to run on a GPU.
#[derive(Debug)]
pub struct Activation {
    /// Accepted, or clipped (the lease is shorter than asked).
    pub verdict: Verdict,
    /// The write lease.
    pub lease: Lease,
    /// Where it runs.
    pub home: Home,
    /// Where the bytes were: `hbm` where nothing was moved, or all that was came from other GPUs of the node.
    pub source: Source,
    /// Bytes that were moved into this GPU.
    pub bytes_moved: Bytes,
    /// How long that took.
    pub duration: Duration,
    /// The manifest that it runs on.
    pub manifest: Arc<Manifest>,
    /// The blocks in HBM, per part, parallel to the manifest's; empty parts where the source is none.
    pub blocks: Vec<Vec<Block>>,
}

/// A turn whose transcript is committed.
#[derive(Debug, Clone)]
pub struct TurnDone {
    /// The transcript's revision.
    pub etag: Etag,
    /// The transcript's length.
    pub length: Tokens,
}

/// A checkpoint's result.
#[derive(Debug, Clone)]
pub struct CheckpointInfo {
    /// What became of it.
    pub verdict: Verdict,
    /// The committed manifest that the copies are of.
    pub manifest: Arc<Manifest>,
    /// One digest over the checksums of all blocks.
    pub checksum: u128,
}

/// Transcript of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TranscriptInfo {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Messages.
    pub messages: Vec<Message>,
}

/// One move of a session's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// When.
    pub at: Timestamp,
    /// From where: `hbm:0`, `pinned`, `client`, `prefill`.
    pub from: String,
    /// To where; `none` for a drop.
    pub to: String,
    /// How many bytes.
    pub bytes: Bytes,
    /// Why.
    pub why: &'static str,
}

/// Where a session's bytes are and how they came there.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// The session.
    pub session: SessionInfo,
    /// Bytes per GPU of this node.
    pub gpus: Vec<(GpuIndex, Bytes)>,
    /// The last moves, oldest first; at most 32.
    pub moves: Vec<Move>,
    /// Activations that found bytes, by source.
    pub hits: Vec<(Source, u64)>,
    /// Activations that found none, by reason.
    pub misses: Vec<(&'static str, u64)>,
}

/// Memory that a delete gave back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freed {
    /// Where.
    pub node: NodeName,
    /// In which tier.
    pub tier: Tier,
    /// How much: what another session or a reader still holds is not counted.
    pub bytes: Bytes,
    /// Whether it is zeroed already; if not, it is before any other tenant's use.
    pub scrubbed: bool,
}

/// A session that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Its id.
    pub id: SessionId,
    /// Which life.
    pub birth: Birth,
    /// Its last revision.
    pub revision: Revision,
    /// What was given back.
    pub freed: Vec<Freed>,
    /// Nodes that still have to.
    pub pending: Vec<NodeName>,
}

/// Whether a GPU serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuState {
    /// It does.
    Up,
    /// It is fenced until the process restarts: the reason.
    Fenced(String),
}

/// Figures of an arena.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ArenaInfo {
    /// Reserved at start.
    pub reserved: Bytes,
    /// In blocks that somebody holds.
    pub used: Bytes,
    /// Largest contiguous free piece.
    pub largest_free: Bytes,
    /// Share of the free bytes that cannot serve the largest block, 0 to 1.
    pub fragmentation: f64,
}

impl From<keepwarm_memory::ArenaFigures> for ArenaInfo {
    fn from(figures: keepwarm_memory::ArenaFigures) -> Self {
        Self {
            reserved: figures.reserved,
            used: figures.used,
            largest_free: figures.largest_free,
            fragmentation: figures.fragmentation,
        }
    }
}

/// Figures of scratch pools on a GPU: temporary memory of its streams, beside the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScratchInfo {
    /// Whose: `in` and `out` are the streams of work into the GPU and out of it, `links` those of all links that lead to it.
    pub stream: &'static str,
    /// What the pools have of the GPU.
    pub reserved: Bytes,
    /// The most that they had; of several, their sum.
    pub reserved_high: Bytes,
    /// What is in use.
    pub used: Bytes,
    /// The most that was; of several, their sum.
    pub used_high: Bytes,
}

impl ScratchInfo {
    pub(crate) fn sum(stream: &'static str, pools: &[ScratchFigures]) -> Self {
        let sum = |of: fn(&ScratchFigures) -> Bytes| pools.iter().map(of).sum();
        Self {
            stream,
            reserved: sum(|pool| pool.reserved),
            reserved_high: sum(|pool| pool.reserved_high),
            used: sum(|pool| pool.used),
            used_high: sum(|pool| pool.used_high),
        }
    }
}

/// Contexts of one model on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextInfo {
    /// The model.
    pub model: String,
    /// Contexts at work.
    pub busy: u32,
    /// Contexts idle.
    pub idle: u32,
    /// Bytes of their scratch.
    pub bytes: Bytes,
}

/// A GPU of this node.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// Its place in the spec.
    pub index: GpuIndex,
    /// The device, as the spec names it.
    pub device: String,
    /// Whether it serves.
    pub state: GpuState,
    /// Its memory.
    pub arena: ArenaInfo,
    /// Sessions resident.
    pub sessions: u64,
    /// Leases running.
    pub leases: u64,
    /// Its streams' temporary memory; nothing of a host device.
    pub scratch: Vec<ScratchInfo>,
    /// Contexts per model.
    pub contexts: Vec<ContextInfo>,
    /// Committed bytes that have no pinned copy yet.
    pub dirty: Bytes,
}

/// Pinned memory of this node.
#[derive(Debug, Clone)]
pub struct PinnedInfo {
    /// Its memory.
    pub arena: ArenaInfo,
    /// Whether its pages are locked; if not, why.
    pub locked: Result<(), String>,
    /// Sessions resident.
    pub sessions: u64,
}

/// A node of the cluster.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// Its name.
    pub name: NodeName,
    /// `up` or `draining`.
    pub status: &'static str,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Where it answers HTTP.
    pub http: String,
    /// Its GPUs.
    pub gpus: Vec<GpuInfo>,
    /// Its pinned memory.
    pub pinned: PinnedInfo,
    /// Whether stopping it now would cost no needed copy, and what speaks against it.
    pub safe_to_stop: Result<(), String>,
}

/// The cluster, as this node sees it.
#[derive(Debug, Clone)]
pub struct ClusterInfo {
    /// Its name.
    pub name: String,
    /// This node.
    pub here: NodeInfo,
    /// The others, as the registry has them.
    pub others: Vec<keepwarm_core::registry::NodeState>,
    /// Number of shards.
    pub shards: u32,
    /// Copies per session that the spec asks for.
    pub replication: u32,
    /// Shards with fewer replicas than promised.
    pub under_replicated_shards: u64,
    /// Sessions with fewer holders than promised.
    pub under_replicated_sessions: u64,
    /// Version of the spec.
    pub spec_version: u64,
    /// BLAKE3 of the spec.
    pub spec_hash: String,
    /// The registry's leader; none while there is none.
    pub registry_leader: Option<NodeName>,
}

/// A shard, as the shard map has it.
#[derive(Debug, Clone)]
pub struct ShardInfo {
    /// Which.
    pub id: ShardId,
    /// Its generation.
    pub generation: keepwarm_types::Generation,
    /// Its replicas, the owner first.
    pub replicas: Vec<NodeName>,
    /// Who is being filled.
    pub learner: Option<NodeName>,
    /// Sessions in it, where this node has a replica of it.
    pub sessions: Option<u64>,
}

/// Something an operator may want to see happen.
#[derive(Debug, Clone)]
pub struct NodeEvent {
    /// When.
    pub at: Timestamp,
    /// `move`, `placement`, `failure`, `session`.
    pub kind: &'static str,
    /// The session, where one is meant (tenant first).
    pub session: Option<keepwarm_types::SessionKey>,
    /// In a sentence.
    pub detail: String,
    /// Bytes moved, where some were.
    pub bytes: Bytes,
    /// How long it took.
    pub duration: Millis,
}

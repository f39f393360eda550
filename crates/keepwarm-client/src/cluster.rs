//! What operators see: nodes, GPUs, shards.

use std::collections::BTreeMap;

use keepwarm_types::{SessionId, ShardCount, ShardId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Figures of an arena, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Arena {
    /// Reserved at start.
    pub reserved_bytes: u64,
    /// In blocks that somebody holds.
    pub used_bytes: u64,
    /// Largest free piece.
    #[serde(default)]
    pub largest_free_bytes: u64,
    /// Share of the free bytes that are bound to one block size, 0 to 1.
    #[serde(default)]
    pub fragmentation: f64,
}

impl Arena {
    /// Share in use, 0 to 1.
    #[must_use]
    pub fn fill(&self) -> f64 {
        if self.reserved_bytes == 0 { 0.0 } else { self.used_bytes as f64 / self.reserved_bytes as f64 }
    }
}

/// Contexts of a model on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contexts {
    /// Which model.
    pub model: String,
    /// At work.
    pub busy: u32,
    /// Idle.
    pub idle: u32,
    /// Bytes of their scratch.
    pub bytes: u64,
}

/// Temporary memory of a GPU's streams, beside its arena, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// `in` and `out`: work into the GPU and out of it; `links`: what comes from other GPUs.
    pub stream: String,
    /// What its pools have of the GPU.
    pub reserved_bytes: u64,
    /// The most that they had.
    #[serde(default)]
    pub reserved_high_bytes: u64,
    /// In use.
    pub used_bytes: u64,
    /// The most that was.
    #[serde(default)]
    pub used_high_bytes: u64,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its place in the spec.
    pub gpu: u16,
    /// The device, as the spec names it.
    pub device: String,
    /// `up` or `fenced`.
    pub state: String,
    /// Why it is fenced.
    #[serde(default)]
    pub reason: Option<String>,
    /// Its memory.
    pub arena: Arena,
    /// Sessions resident.
    pub sessions: u64,
    /// Leases running.
    pub leases: u64,
    /// Its streams' temporary memory; nothing of a GPU that is the host's memory.
    #[serde(default)]
    pub scratch: Vec<Scratch>,
    /// Per model.
    #[serde(default)]
    pub contexts: Vec<Contexts>,
    /// Committed bytes without a pinned copy yet.
    #[serde(default)]
    pub dirty_bytes: u64,
}

/// Page-locked memory of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pinned {
    /// Its memory.
    pub arena: Arena,
    /// Whether its pages are locked.
    pub locked: bool,
    /// Why they are not.
    #[serde(default)]
    pub reason: Option<String>,
    /// Sessions resident.
    pub sessions: u64,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// `up` or `draining`.
    pub status: String,
    /// Which start of it.
    pub incarnation: u64,
    /// Where it answers.
    pub http: String,
    /// Its GPUs.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
    /// Its pinned memory.
    pub pinned: Option<Pinned>,
    /// Whether stopping it now would cost no needed copy.
    #[serde(default)]
    pub safe_to_stop: bool,
    /// What speaks against it.
    #[serde(default)]
    pub reason: Option<String>,
}

/// The spec that is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its version.
    pub version: u64,
    /// BLAKE3 of its text.
    pub hash: String,
}

/// The cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// Number of shards.
    pub shards: u32,
    /// Copies that the spec asks for.
    pub replication: u32,
    /// Shards with fewer replicas than promised.
    pub under_replicated_shards: u64,
    /// Sessions with fewer holders than promised.
    pub under_replicated_sessions: u64,
    /// The spec in force.
    pub spec: Spec,
    /// Who leads the registry; nobody while its voters elect.
    pub registry_leader: Option<String>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which.
    pub shard: u32,
    /// +1 at each change of its replicas.
    pub generation: u64,
    /// The owner first.
    pub replicas: Vec<String>,
    /// Who is being filled, to become a replica.
    #[serde(default)]
    pub learner: Option<String>,
    /// Sessions in it, where the node that was asked has a replica of it.
    pub sessions: Option<u64>,
}

/// Who owns which sessions, and where they answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMap {
    /// Every shard.
    pub shards: Vec<Shard>,
    /// The nodes that are not down, each with the address of its HTTP interface.
    #[serde(default)]
    pub nodes: BTreeMap<String, String>,
}

impl ShardMap {
    /// The shard of a session; none where the id is of no version that sessions have, or shards are missing.
    #[must_use]
    pub fn shard_of(&self, session: Uuid) -> Option<ShardId> {
        shard_of(self.shards.len(), session)
    }

    /// The node that owns a session; none while its shard has no owner.
    #[must_use]
    pub fn owner(&self, session: Uuid) -> Option<&str> {
        let shard = self.shard_of(session)?;
        let shard = self.shards.iter().find(|known| known.shard == shard.0)?;
        shard.replicas.first().map(String::as_str)
    }
}

/// The shard of a session in a map of so many.
pub(crate) fn shard_of(shards: usize, session: Uuid) -> Option<ShardId> {
    let count = ShardCount::new(shards as u64).ok()?;
    Some(count.shard_of(SessionId::new(session).ok()?))
}

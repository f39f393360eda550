//! What a gpu actor can be told.

use std::sync::Arc;

use keepwarm_core::session::Manifest;
use keepwarm_memory::{Block, BlockMut};
use keepwarm_types::{Birth, Bytes, GpuIndex, InstanceId, Owner, SessionKey, Source, Timestamp};
use tokio::sync::oneshot;

use super::near::Fetched;
use crate::admission::Permit;
use crate::error::Error;

/// A session's blocks in HBM, per part.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) blocks: Vec<Vec<Block>>,
    pub(crate) source: Source,
    pub(crate) moved: Bytes,
    /// How much of that came from which other GPU; the rest is from pinned memory.
    pub(crate) near: Vec<(GpuIndex, Bytes)>,
}

/// A turn's blocks, to stay resident.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Index of the part.
    pub(crate) part: usize,
    /// Number of the first new block; resident ones from there on are replaced.
    pub(crate) first_block: u32,
    pub(crate) blocks: Vec<Block>,
}

/// Everything a gpu actor can be told.
pub(crate) enum GpuMsg {
    /// Bring a session here, from these guards of its pinned blocks (all parts, in order).
    Load {
        manifest: Arc<Manifest>,
        sources: Vec<Block>,
        leased_until: Timestamp,
        permit: Permit,
        reply: oneshot::Sender<Result<Loaded, Error>>,
    },
    /// A load's copies have arrived, or not.
    Arrived {
        manifest: Arc<Manifest>,
        copies: Result<Fetched, Error>,
        leased_until: Timestamp,
        permit: Permit,
        reply: oneshot::Sender<Result<Loaded, Error>>,
    },
    /// Blocks to work in, for a lease holder or a load: how many of which size.
    Scratch {
        owner: Owner,
        sizes: Vec<(Bytes, usize)>,
        deadline: Timestamp,
        reply: oneshot::Sender<Result<Vec<BlockMut>, Error>>,
    },
    /// Keep a turn's blocks; they are dirty until [`GpuMsg::Clean`], and stay for that.
    Keep { key: SessionKey, birth: Birth, parts: Vec<Kept> },
    /// A turn's checkpoint is done with, one way or the other.
    Clean { key: SessionKey, birth: Birth, bytes: Bytes },
    /// The lease lasts until then.
    Leased { key: SessionKey, until: Timestamp },
    /// Let go of a session's life; says how many bytes that gave back.
    Drop { key: SessionKey, birth: Birth, reply: Option<oneshot::Sender<Bytes>> },
    /// Let go of a session unless it is leased or dirty; says how many bytes that gave back, or none.
    Demote { key: SessionKey, reply: oneshot::Sender<Option<Bytes>> },
    /// Guards of what a session has here.
    Guards { key: SessionKey, reply: oneshot::Sender<Vec<Block>> },
    /// Guards of those of these instances that are here, for a copy to another GPU.
    Lend { owner: Owner, instances: Vec<InstanceId>, reply: oneshot::Sender<Vec<Block>> },
    /// Bytes of these sessions here.
    Resident { keys: Vec<SessionKey>, reply: oneshot::Sender<Vec<Bytes>> },
    /// Time passed.
    Tick,
    /// A test wants to see what a panic does.
    Panic,
}

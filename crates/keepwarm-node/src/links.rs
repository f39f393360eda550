//! Who is where: the node's actors, for those that send to them.
//!
//! An actor that was restarted has a new reference here; messages to the old one fail at once, and a
//! request that was in its mailbox is answered by the drop of its reply port.

use std::sync::{OnceLock, PoisonError, RwLock};

use keepwarm_types::{GpuIndex, SessionKey, ShardCount, ShardId};
use ractor::ActorRef;

use crate::error::Error;
use crate::gpu::GpuMsg;
use crate::pinned::PinnedMsg;
use crate::router::RouterMsg;
use crate::shard::ShardMsg;

pub(crate) struct Links {
    pub(crate) count: ShardCount,
    shards: RwLock<Vec<ActorRef<ShardMsg>>>,
    gpus: RwLock<Vec<ActorRef<GpuMsg>>>,
    pinned: OnceLock<ActorRef<PinnedMsg>>,
    router: OnceLock<ActorRef<RouterMsg>>,
}

impl Links {
    pub(crate) fn new(count: ShardCount) -> Self {
        Self {
            count,
            shards: RwLock::default(),
            gpus: RwLock::default(),
            pinned: OnceLock::new(),
            router: OnceLock::new(),
        }
    }

    pub(crate) fn shard(&self, key: &SessionKey) -> Result<ActorRef<ShardMsg>, Error> {
        self.shard_at(self.count.shard_of(key.id)).ok_or_else(starting)
    }

    pub(crate) fn shard_at(&self, id: ShardId) -> Option<ActorRef<ShardMsg>> {
        self.shards.read().unwrap_or_else(PoisonError::into_inner).get(id.0 as usize).cloned()
    }

    pub(crate) fn shards(&self) -> Vec<ActorRef<ShardMsg>> {
        self.shards.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn gpu(&self, index: GpuIndex) -> Option<ActorRef<GpuMsg>> {
        self.gpus.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(index.0)).cloned()
    }

    pub(crate) fn gpus(&self) -> Vec<ActorRef<GpuMsg>> {
        self.gpus.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn pinned(&self) -> Result<&ActorRef<PinnedMsg>, Error> {
        self.pinned.get().ok_or_else(starting)
    }

    pub(crate) fn router(&self) -> Result<&ActorRef<RouterMsg>, Error> {
        self.router.get().ok_or_else(starting)
    }

    /// Sets or replaces the actor of a shard; shards are set in order at start.
    pub(crate) fn set_shard(&self, index: usize, actor: ActorRef<ShardMsg>) {
        place(&mut self.shards.write().unwrap_or_else(PoisonError::into_inner), index, actor);
    }

    /// Sets or replaces the actor of a GPU; GPUs are set in order at start.
    pub(crate) fn set_gpu(&self, index: usize, actor: ActorRef<GpuMsg>) {
        place(&mut self.gpus.write().unwrap_or_else(PoisonError::into_inner), index, actor);
    }

    pub(crate) fn set_pinned(&self, actor: ActorRef<PinnedMsg>) {
        assert!(self.pinned.set(actor).is_ok(), "the pinned actor is started once");
    }

    pub(crate) fn set_router(&self, actor: ActorRef<RouterMsg>) {
        assert!(self.router.set(actor).is_ok(), "the router is started once");
    }
}

fn place<T>(actors: &mut Vec<T>, index: usize, actor: T) {
    if index == actors.len() {
        actors.push(actor);
    } else {
        actors[index] = actor;
    }
}

fn starting() -> Error {
    Error::Unavailable { reason: "the node is starting".to_owned(), retry_after: keepwarm_types::Millis(500) }
}

//! Supervision.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keepwarm_config::DegradedWrites;
use keepwarm_core::registry::ReplicaSet;
use keepwarm_core::replica::{Replica, ReplicaSettings};
use keepwarm_core::residency::{Residency, ResidencySettings};
use keepwarm_memory::Arena;
use keepwarm_types::{Bytes, Generation, Millis, ShardId, Timestamp};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use crate::gpu::{GpuActor, GpuArgs, Near};
use crate::handle::Handle;
use crate::pinned::{PinnedActor, PinnedArgs};
use crate::router::{RouterActor, RouterArgs};
use crate::shard::{ShardActor, ShardArgs, ShardMsg};

/// Restarts of one actor in a process; after the last it stays down.
const RESTARTS_MAX: u32 = 5;

pub(super) struct NodeActor;

pub(super) struct NodeArgs {
    pub(super) handle: Handle,
    pub(super) pinned: Arena,
    pub(super) deadlines: Arc<Vec<Arc<AtomicU64>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Child {
    Shard(usize),
    Gpu(usize),
    Pinned,
    Router,
}

pub(super) struct NodeState {
    handle: Handle,
    deadlines: Arc<Vec<Arc<AtomicU64>>>,
    children: HashMap<ActorId, Child>,
    restarts: HashMap<Child, u32>,
}

impl Actor for NodeActor {
    type Msg = ();
    type State = NodeState;
    type Arguments = NodeArgs;

    async fn pre_start(&self, myself: ActorRef<()>, args: NodeArgs) -> Result<NodeState, ActorProcessingErr> {
        let NodeArgs { handle, pinned, deadlines } = args;
        let mut state = NodeState { handle, deadlines, children: HashMap::new(), restarts: HashMap::new() };
        let supervisor = myself.get_cell();
        let handle = state.handle.clone();
        let inner = handle.inner();
        let residency = residency(&state.handle, pinned.figures().reserved, false);
        let links = Arc::clone(&inner.links);
        let (low, metrics) = (inner.config.pinned.low, Arc::clone(&inner.metrics));
        let args = PinnedArgs { arena: pinned, residency, low, links, metrics };
        let (actor, _) = Actor::spawn_linked(None, PinnedActor, args, supervisor.clone()).await?;
        state.children.insert(actor.get_id(), Child::Pinned);
        inner.links.set_pinned(actor);
        let args = RouterArgs { boards: inner.boards.clone() };
        let (actor, _) = Actor::spawn_linked(None, RouterActor, args, supervisor.clone()).await?;
        state.children.insert(actor.get_id(), Child::Router);
        inner.links.set_router(actor);
        for index in 0..inner.boards.len() {
            state.start_gpu(index, &supervisor).await?;
        }
        for index in 0..inner.links.count.get() as usize {
            state.start_shard(index, &supervisor).await?;
        }
        Ok(state)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<()>,
        event: SupervisionEvent,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        let SupervisionEvent::ActorFailed(cell, error) = event else { return Ok(()) };
        let Some(child) = state.children.remove(&cell.get_id()) else { return Ok(()) };
        tracing::error!(?child, %error, "an actor failed");
        state.handle.note_failure(None, format!("actor {child:?} failed: {error}"));
        let restarts = state.restarts.entry(child).or_default();
        *restarts += 1;
        let again = *restarts <= RESTARTS_MAX;
        let supervisor = myself.get_cell();
        match child {
            Child::Gpu(index) if again => state.start_gpu(index, &supervisor).await?,
            Child::Gpu(index) => {
                let board = &state.handle.inner().boards[index];
                board.take_down();
                board.device().fence("its actor failed again and again");
            }
            // A replica that lost its bytes may not go on as the holder that it was: the node begins anew.
            Child::Shard(index) if again && !state.handle.in_cluster() => {
                state.start_shard(index, &supervisor).await?;
            }
            Child::Shard(_) | Child::Pinned | Child::Router => {
                state.handle.fail(format!("{child:?} failed: {error}"))
            }
        }
        Ok(())
    }
}

impl NodeState {
    async fn start_gpu(&mut self, index: usize, supervisor: &ActorCell) -> Result<(), ActorProcessingErr> {
        let inner = self.handle.inner();
        let board = Arc::clone(&inner.boards[index]);
        let capacity = board.device().arena().figures().reserved;
        let near = Near {
            index: board.index(),
            boards: inner.boards.clone(),
            links: Arc::clone(&inner.links),
            ways: Arc::clone(&inner.ways),
            metrics: Arc::clone(&inner.metrics),
        };
        let args = GpuArgs {
            board,
            residency: residency(&self.handle, capacity, true),
            metrics: Arc::clone(&inner.metrics),
            near,
        };
        let (actor, _) = Actor::spawn_linked(None, GpuActor, args, supervisor.clone()).await?;
        self.children.insert(actor.get_id(), Child::Gpu(index));
        inner.links.set_gpu(index, actor);
        Ok(())
    }

    /// Starts a shard from what the catalog has. In a cluster of one it owns itself at once; else the registry says.
    async fn start_shard(&mut self, index: usize, supervisor: &ActorCell) -> Result<(), ActorProcessingErr> {
        let inner = self.handle.inner();
        let id = ShardId(u32::try_from(index)?);
        let begun = self.restarts.get(&Child::Shard(index)).copied().unwrap_or(0);
        let settings = ReplicaSettings {
            shard: id,
            count: inner.links.count,
            member: inner.member(),
            begun,
            replication: inner.config.replication as usize,
            degraded: inner.config.degraded_writes == DegradedWrites::Allow,
            cluster: self.handle.in_cluster(),
            write_deadline: Millis(u64::try_from(inner.config.write_deadline.as_millis())?),
        };
        let (manifests, tombstones) = (inner.catalog.manifests(id)?, inner.catalog.tombstones(id)?);
        let core = Replica::new(settings, manifests, tombstones);
        let deadline = Arc::clone(&self.deadlines[index]);
        deadline.store(Timestamp::NEVER.0, Ordering::Relaxed);
        let args = ShardArgs { core, catalog: inner.catalog.clone(), handle: self.handle.clone(), deadline };
        let (actor, _) = Actor::spawn_linked(None, ShardActor, args, supervisor.clone()).await?;
        self.children.insert(actor.get_id(), Child::Shard(index));
        if !self.handle.in_cluster() {
            let alone = ReplicaSet {
                generation: Generation(inner.incarnation.0),
                replicas: vec![inner.member()],
                learner: None,
                lost_at: None,
            };
            actor.cast(ShardMsg::Set(Arc::new(alone)))?;
        }
        inner.links.set_shard(index, actor);
        Ok(())
    }
}

fn residency(handle: &Handle, capacity: Bytes, inclusive: bool) -> Residency {
    let config = &handle.inner().config;
    let tier = if inclusive { config.hbm } else { config.pinned };
    let shares = config.tenants.iter().map(|tenant| (tenant.name.clone(), tenant.share)).collect();
    // With more nodes than copies a set has replicas that hold no bytes and may take some.
    let movable = !inclusive && config.storing().count() > config.replication as usize;
    let (low, high) = (tier.low, tier.high);
    Residency::new(ResidencySettings { capacity, low, high, inclusive, movable, shares })
}

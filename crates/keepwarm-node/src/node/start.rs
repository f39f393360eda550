//! Starting and stopping.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use keepwarm_catalog::{Catalog, CatalogSettings, OpenError, Sync};
use keepwarm_config::{Config, SyncMode};
use keepwarm_core::registry::Member;
use keepwarm_memory::{CudaError, ReserveError, number_instances_for};
use keepwarm_transport::Sockets;
use keepwarm_types::NodeName;
use ractor::{Actor, ActorRef};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::actor::{NodeActor, NodeArgs};
use super::hardware::{self, Hardware};
use crate::clock::now;
use crate::cluster::{IncomingRelay, JoinError, join};
use crate::gpu::GpuMsg;
use crate::handle::{Handle, Inner, InnerParts};
use crate::pinned::PinnedMsg;
use crate::shard::ShardMsg;

/// How often deadlines are looked at. A lease may outlast its time by this much, never end early.
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two looks at figures for the metrics.
const METRICS_TICKS: u32 = 20;
/// How often a catalog with `sync = interval` is synced.
const SYNC_INTERVAL: Duration = Duration::from_millis(100);

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file has no such node.
    #[error("there is no node '{name}' in the configuration; it has: {known}")]
    UnknownNode {
        /// What was asked for.
        name: NodeName,
        /// What there is.
        known: String,
    },
    /// The node could not take its part in the cluster.
    #[error(transparent)]
    Cluster(#[from] JoinError),
    /// A device cannot be used.
    #[error("node '{node}': {key} = \"{value}\": {cause}")]
    Device {
        /// Which node.
        node: NodeName,
        /// The key that asks for it: `gpu[0].device`, `gpu[0].memory`, `pinned`.
        key: String,
        /// What the key says.
        value: String,
        /// Why.
        cause: Box<CudaError>,
    },
    /// Memory could not be reserved.
    #[error("node '{node}': {what}: {cause}")]
    Memory {
        /// Which node.
        node: NodeName,
        /// For what: `pinned`, `gpu[0].memory`.
        what: String,
        /// Why.
        cause: ReserveError,
    },
    /// The catalog could not be opened.
    #[error(transparent)]
    Catalog(#[from] OpenError),
    /// An actor did not start.
    #[error("the node's actors did not start: {0}")]
    Actors(String),
}

/// What a shutdown left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Requests that were still at work when the grace ended.
    pub unfinished: usize,
    /// Checkpoints that were still under way.
    pub checkpoints: usize,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    handle: Handle,
    actor: ActorRef<()>,
    ticker: JoinHandle<()>,
    failed: watch::Receiver<Option<String>>,
    relays: Option<mpsc::Receiver<IncomingRelay>>,
}

impl Node {
    /// Starts the node `name` of a configuration: reserves memory, opens the catalog, recovers the sessions.
    ///
    /// # Errors
    /// [`StartError`]: each names the key that is wrong and what to do.
    pub async fn start(config: Config, name: &NodeName) -> Result<Self, StartError> {
        Self::start_over(config, name, &Sockets::default()).await
    }

    /// [`Node::start`] with its links in a network that need not be the system's.
    ///
    /// # Errors
    /// [`StartError`]: each names the key that is wrong and what to do.
    pub async fn start_over(config: Config, name: &NodeName, sockets: &Sockets) -> Result<Self, StartError> {
        let known = || config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
        let node = config
            .node(name)
            .cloned()
            .ok_or_else(|| StartError::UnknownNode { name: name.clone(), known: known() })?;
        let Hardware { pinned, boards, faults } = hardware::open(&config, &node)?;
        let settings = CatalogSettings {
            cluster: config.name.clone(),
            shards: config.shards,
            sync: if config.sync == SyncMode::Always { Sync::Always } else { Sync::Interval(SYNC_INTERVAL) },
        };
        let (catalog, recovered) = match &node.data_dir {
            Some(folder) => Catalog::open(folder, &settings)?,
            None => Catalog::ephemeral(&settings)?,
        };
        let (fail, failed) = watch::channel(None);
        let joined = if config.is_cluster() {
            Some(join(&config, &node, &catalog, &recovered, sockets).await?)
        } else {
            None
        };
        let alone = || Member { node: name.clone(), incarnation: recovered.incarnation };
        let member = joined.as_ref().map_or_else(alone, |joined| joined.cluster.member().clone());
        number_instances_for(member.incarnation);
        let cluster = joined.as_ref().map(|joined| Arc::clone(&joined.cluster));
        let parts = InnerParts { config, node, catalog, member, cluster, boards, faults, fail };
        let handle = Handle::new(Inner::new(parts));
        let deadlines: Vec<_> =
            (0..handle.inner().links.count.get()).map(|_| Arc::new(AtomicU64::new(u64::MAX))).collect();
        let deadlines = Arc::new(deadlines);
        let args = NodeArgs { handle: handle.clone(), pinned, deadlines: Arc::clone(&deadlines) };
        let (actor, _) = Actor::spawn(None, NodeActor, args)
            .await
            .map_err(|error| StartError::Actors(error.to_string()))?;
        let ticker = tokio::spawn(tick(handle.clone(), deadlines));
        let relays = joined.map(|joined| joined.begin(&handle));
        handle.set_serving(true);
        Ok(Self { handle, actor, ticker, failed, relays })
    }

    /// The way in.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Requests that other nodes relay to this one, for the HTTP server; once, and only in a cluster of several.
    pub fn take_relays(&mut self) -> Option<mpsc::Receiver<IncomingRelay>> {
        self.relays.take()
    }

    /// Whether the node cannot go on because the cluster took it for failed: a new start joins again.
    #[must_use]
    pub fn superseded(&self) -> bool {
        self.handle.superseded()
    }

    /// Resolves when the node cannot go on, with the reason.
    pub async fn failed(&mut self) -> String {
        match self.failed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Stops in order: no new requests, those at work end, checkpoints end, actors, catalog. At most `grace`.
    pub async fn shutdown(self, grace: Duration) -> ShutdownReport {
        let deadline = Instant::now() + grace;
        self.handle.set_serving(false);
        self.handle.admission().close();
        let busy = || (self.handle.admission().busy(), self.handle.checkpoints_running());
        while busy() != (0, 0) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (unfinished, checkpoints) = busy();
        self.ticker.abort();
        for shard in self.handle.links().shards() {
            let _ = shard.drain();
        }
        self.actor.stop(None);
        self.actor.stop_children(None);
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if self.actor.wait(Some(left)).await.is_err() {
            tracing::warn!("the node's actors did not end in time");
        }
        if let Some(cluster) = self.handle.cluster_link() {
            cluster.leave().await;
        }
        ShutdownReport { unfinished, checkpoints }
    }
}

/// Wakes whoever has a deadline behind it.
async fn tick(handle: Handle, deadlines: Arc<Vec<Arc<AtomicU64>>>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for round in 0u32.. {
        ticks.tick().await;
        let at = now().0;
        for (index, deadline) in deadlines.iter().enumerate() {
            if deadline.load(Ordering::Relaxed) <= at {
                deadline.store(u64::MAX, Ordering::Relaxed);
                let shard = u32::try_from(index)
                    .ok()
                    .and_then(|id| handle.links().shard_at(keepwarm_types::ShardId(id)));
                if let Some(shard) = shard {
                    let _ = shard.cast(ShardMsg::Tick);
                }
            }
        }
        if let Ok(pinned) = handle.links().pinned() {
            let _ = pinned.cast(PinnedMsg::Tick);
        }
        for gpu in handle.links().gpus() {
            let _ = gpu.cast(GpuMsg::Tick);
        }
        if round.is_multiple_of(METRICS_TICKS) {
            handle.refresh_metrics().await;
        }
    }
}

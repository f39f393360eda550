//! What operators see: cluster, nodes, GPUs, shards, events, readiness.

use std::sync::PoisonError;

use futures::future::join_all;
use keepwarm_core::registry::ReplicaSet;
use keepwarm_core::replica::Role;
use keepwarm_core::shard::{Answer, Verb};
use keepwarm_memory::DeviceState;
use keepwarm_transport::Class;
use keepwarm_types::{Bytes, Generation, GpuIndex, SessionKey, ShardId};
use tokio::sync::{broadcast, oneshot};

use super::inner::{Handle, restarting, send};
use super::view::{
    ClusterInfo, ContextInfo, Explanation, GpuInfo, GpuState, NodeEvent, NodeInfo, PinnedInfo, ScratchInfo,
    ShardInfo,
};
use crate::error::Error;
use crate::gpu::{Board, GpuMsg};
use crate::pinned::PinnedMsg;
use crate::router::{RouterMsg, gpu_index};
use crate::shard::{ShardFigures, ShardMsg};

impl Handle {
    /// Where a session's bytes are and how they came there.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn explain(&self, key: &SessionKey) -> Result<Explanation, Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::Get, Vec::new(), Some(permit)).await?;
        let Answer::Session { view, .. } = *answered.answer else {
            return Err(Error::Internal("not a session".to_owned()));
        };
        let mut gpus = Vec::new();
        for (index, gpu) in self.links().gpus().into_iter().enumerate() {
            let (reply, bytes) = oneshot::channel();
            let asked = gpu.cast(GpuMsg::Resident { keys: vec![key.clone()], reply }).is_ok();
            if let (true, Ok(bytes)) = (asked, bytes.await) {
                gpus.push((gpu_index(index), bytes.first().copied().unwrap_or_default()));
            }
        }
        let (reply, history) = oneshot::channel();
        send(self.links().router()?, RouterMsg::Recall(key.clone(), reply), "the router")?;
        let history = history.await.map_err(|_| restarting("the router"))?;
        let session = self.info(*view).await;
        Ok(Explanation { session, gpus, moves: history.moves, hits: history.hits, misses: history.misses })
    }

    /// This node's GPUs.
    #[must_use]
    pub fn gpus(&self) -> Vec<GpuInfo> {
        let contexts = self.inner().contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let gpu = |(index, config): (usize, &keepwarm_config::GpuConfig)| {
            let (index, board) = (gpu_index(index), &self.inner().boards[index]);
            let (leases, sessions, dirty) = board.figures();
            GpuInfo {
                index,
                device: config.device.to_string(),
                state: match board.device().state() {
                    DeviceState::Up if board.healthy() => GpuState::Up,
                    DeviceState::Up => GpuState::Fenced("its actor failed again and again".to_owned()),
                    DeviceState::Fenced(reason) => GpuState::Fenced(reason),
                },
                arena: board.device().arena().figures().into(),
                sessions,
                leases,
                scratch: self.scratch_pools(board),
                contexts: contexts
                    .iter()
                    .filter(|((gpu, _), _)| *gpu == index)
                    .map(|(_, info)| info.clone())
                    .collect(),
                dirty,
            }
        };
        self.inner().node.gpus.iter().enumerate().map(gpu).collect()
    }

    /// Figures of the scratch pools on a GPU.
    fn scratch_pools(&self, board: &Board) -> Vec<ScratchInfo> {
        let Some(cuda) = board.device().as_cuda() else { return Vec::new() };
        let [into, out] = cuda.figures().scratch;
        let links = self.inner().ways.scratch(board.index());
        vec![
            ScratchInfo::sum("in", &[into]),
            ScratchInfo::sum("out", &[out]),
            ScratchInfo::sum("links", &links),
        ]
    }

    /// An executor reports its contexts of a model on a GPU.
    pub fn report_contexts(&self, gpu: GpuIndex, info: ContextInfo) {
        self.metrics().set_contexts(&info.model, gpu.0, "busy", info.busy.into());
        self.metrics().set_contexts(&info.model, gpu.0, "idle", info.idle.into());
        self.inner()
            .contexts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((gpu, info.model.clone()), info);
    }

    /// This node's pinned memory.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the node stops.
    pub async fn pinned(&self) -> Result<PinnedInfo, Error> {
        let (reply, info) = oneshot::channel();
        send(self.links().pinned()?, PinnedMsg::Info(reply), "pinned memory")?;
        info.await.map_err(|_| restarting("pinned memory"))
    }

    /// This node.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the node stops.
    pub async fn node(&self) -> Result<NodeInfo, Error> {
        let dirty = self.checkpoints_running();
        let pinned = self.pinned().await?;
        let needed: u64 = self.figures().await.iter().flatten().map(|figures| figures.needed).sum();
        let safe_to_stop = match (dirty, needed) {
            (0, 0) => Ok(()),
            (0, needed) => Err(format!(
                "{needed} sessions have their only copy of bytes here; they would come back cold"
            )),
            (dirty, _) => Err(format!("{dirty} checkpoints are under way")),
        };
        Ok(NodeInfo {
            name: self.name().clone(),
            status: if self.serving() { "up" } else { "draining" },
            incarnation: self.inner().incarnation,
            http: self.inner().node.http.clone(),
            gpus: self.gpus(),
            pinned,
            safe_to_stop,
        })
    }

    /// The cluster, as this node sees it; of other nodes, what the registry says.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the node stops.
    pub async fn cluster(&self) -> Result<ClusterInfo, Error> {
        let config = &self.inner().config;
        let figures = self.figures().await;
        let under_replicated_sessions =
            figures.iter().flatten().map(|figures| figures.under_replicated).sum();
        let (mut others, mut short, mut leader) = (Vec::new(), 0, Some(self.name().clone()));
        if let Some(cluster) = self.cluster_link() {
            let map = cluster.map();
            let promised = (config.replication as usize + 1).min(config.storing().count());
            let replicas = |shard| map.set(shard).map_or(0, |set| set.replicas.len());
            short = map.shards().filter(|shard| replicas(*shard) < promised).count() as u64;
            leader = cluster.registry().leader();
            others =
                map.nodes().iter().filter(|node| node.registration.node != *self.name()).cloned().collect();
        }
        Ok(ClusterInfo {
            name: config.name.clone(),
            here: self.node().await?,
            others,
            shards: config.shards.get(),
            replication: config.replication,
            under_replicated_shards: short,
            under_replicated_sessions,
            spec_version: config.version,
            spec_hash: config.hash.clone(),
            registry_leader: leader,
        })
    }

    /// What each shard actor has; nothing of one that is being started again.
    async fn figures(&self) -> Vec<Option<ShardFigures>> {
        let figures = self.links().shards().into_iter().map(|shard| async move {
            let (reply, figures) = oneshot::channel();
            let asked = shard.cast(ShardMsg::Count(reply)).is_ok();
            if asked { figures.await.ok() } else { None }
        });
        join_all(figures).await
    }

    /// The shard map; how many sessions a shard has is known where it has a replica here.
    pub async fn shards(&self) -> Vec<ShardInfo> {
        let map = self.cluster_link().map(|cluster| cluster.map());
        let info = |(id, figures): (u32, Option<ShardFigures>)| {
            let id = ShardId(id);
            let set = match &map {
                Some(map) => map.set(id),
                None => figures.as_ref().map(|figures| ReplicaSet::clone(&figures.set)),
            };
            let known = figures.filter(|figures| figures.role != Role::Idle);
            ShardInfo {
                id,
                generation: set.as_ref().map_or(Generation(0), |set| set.generation),
                learner: set
                    .as_ref()
                    .and_then(|set| set.learner.as_ref().map(|learner| learner.node.clone())),
                replicas: set.into_iter().flat_map(|set| set.replicas).map(|replica| replica.node).collect(),
                sessions: known.map(|figures| figures.sessions),
            }
        };
        (0..).zip(self.figures().await).map(info).collect()
    }

    /// What happens, from now on; a reader that lags behind the buffer is told how much it missed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.inner().events.subscribe()
    }

    /// Whether the node serves (`full`: with every copy in place).
    ///
    /// # Errors
    /// The reasons why not.
    pub async fn ready(&self, full: bool) -> Result<(), Vec<String>> {
        let mut reasons = Vec::new();
        if full && self.in_cluster() {
            match self.cluster().await {
                Ok(info) if info.under_replicated_shards > 0 => {
                    reasons.push(format!("{} shards lack replicas", info.under_replicated_shards));
                }
                Ok(info) if info.under_replicated_sessions > 0 => {
                    reasons.push(format!("{} sessions lack copies", info.under_replicated_sessions));
                }
                Ok(_) => {}
                Err(error) => reasons.push(error.to_string()),
            }
        }
        if !self.serving() {
            reasons.push("the node is starting or stopping".to_owned());
        }
        if !self.inner().boards.is_empty() && self.inner().boards.iter().all(|board| !board.healthy()) {
            reasons.push("every GPU is fenced".to_owned());
        }
        let checkpoints = self.checkpoints_running();
        if full && checkpoints > 0 {
            reasons.push(format!("{checkpoints} checkpoints are under way"));
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    /// Brings the gauges up to date.
    pub(crate) async fn refresh_metrics(&self) {
        let (mut leases, mut resident) = (0, 0);
        for gpu in self.gpus() {
            let tier = format!("hbm:{}", gpu.index);
            self.metrics().set_tier(&tier, &gpu.arena);
            self.metrics().set_scratch(&tier, &gpu.scratch);
            leases += gpu.leases;
            resident += gpu.sessions;
        }
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics().set_leases(signed(leases));
        self.metrics().set_sessions("hbm", signed(resident));
        if let Ok(pinned) = self.pinned().await {
            self.metrics().set_tier("pinned", &pinned.arena);
            self.metrics().set_sessions("warm", signed(pinned.sessions));
        }
        let figures = self.figures().await;
        let owned = || figures.iter().flatten().filter(|figures| figures.role == Role::Primary);
        let all: u64 = owned().map(|figures| figures.sessions).sum();
        self.metrics().set_sessions("all", signed(all));
        let short: u64 = owned().map(|figures| figures.under_replicated).sum();
        let leads = self.cluster_link().is_none_or(|c| c.registry().leader().as_ref() == Some(self.name()));
        self.metrics().set_cluster(signed(short), leads);
        for peer in self.cluster_link().map(|cluster| cluster.transport().peers()).unwrap_or_default() {
            let classes = Class::ALL.into_iter().zip(peer.bytes);
            let bytes: Vec<_> = classes.map(|(class, (out, back))| (class.word(), out + back)).collect();
            self.metrics().set_peer(peer.node.as_str(), peer.rtt, &bytes);
        }
    }

    /// Bytes that this node's tiers have in use: HBM and pinned.
    pub async fn used(&self) -> (Bytes, Bytes) {
        let hbm = self.gpus().iter().map(|gpu| gpu.arena.used).sum();
        let pinned = self.pinned().await.map(|info| info.arena.used).unwrap_or_default();
        (hbm, pinned)
    }
}

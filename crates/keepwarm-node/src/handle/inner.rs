//! What all handles of a node share, and how they reach its actors.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use keepwarm_catalog::Catalog;
use keepwarm_config::{Config, NodeConfig};
use keepwarm_core::registry::{Fitness, Member, Pace};
use keepwarm_core::session::{Manifest, State};
use keepwarm_core::shard::{Refusal, Verb};
use keepwarm_memory::{Block, BlockMut, Device, FaultPlan};
use keepwarm_types::{Bytes, Durability, GpuIndex, Incarnation, Millis, NodeName, Owner, SessionKey};
use ractor::ActorRef;
use tokio::sync::{broadcast, oneshot, watch};

use super::view::{ContextInfo, Move, NodeEvent};
use crate::admission::{Admission, Permit};
use crate::book::Book;
use crate::clock::now;
use crate::cluster::Cluster;
use crate::disk::DiskWatch;
use crate::error::Error;
use crate::gpu::{Board, Loaded, Ways};
use crate::links::Links;
use crate::metrics::Metrics;
use crate::pinned::{PinnedMsg, Pool, ROOM_WAIT, Reserve};
use crate::router::RouterMsg;
use crate::shard::{Answered, Ask, ShardMsg};
use crate::uploads::Uploads;

/// How long another node's bytes wait for room here.
const REPLICA_ROOM_WAIT: Millis = Millis(500);
/// Events that a slow reader may be behind before it misses some.
const EVENTS_KEPT: usize = 1024;

/// What a node is made of, before its actors.
pub(crate) struct InnerParts {
    pub(crate) config: Config,
    pub(crate) node: NodeConfig,
    pub(crate) catalog: Catalog,
    pub(crate) member: Member,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) boards: Vec<Arc<Board>>,
    pub(crate) faults: Vec<Arc<FaultPlan>>,
    pub(crate) fail: watch::Sender<Option<String>>,
}

/// Everything that handles share.
pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) node: NodeConfig,
    pub(crate) name: NodeName,
    pub(crate) catalog: Catalog,
    pub(crate) incarnation: Incarnation,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) boards: Vec<Arc<Board>>,
    pub(crate) links: Arc<Links>,
    /// Between its GPUs.
    pub(crate) ways: Arc<Ways>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) book: Book,
    pub(super) admission: Admission,
    pub(super) events: broadcast::Sender<NodeEvent>,
    /// The write-behind of each session that has one; true once it is done with.
    pub(super) checkpoints: Mutex<HashMap<SessionKey, watch::Receiver<bool>>>,
    /// Contexts that executors have reported, per GPU.
    pub(super) contexts: Mutex<HashMap<(GpuIndex, String), ContextInfo>>,
    faults: Vec<Arc<FaultPlan>>,
    serving: AtomicBool,
    pub(crate) disk: DiskWatch,
    pub(crate) uploads: Uploads,
    /// How long the members of this node's sets take to acknowledge changes.
    pub(crate) pace: Mutex<Pace>,
    /// Whether this process may begin anew: the cluster went on without it.
    superseded: AtomicBool,
    fail: watch::Sender<Option<String>>,
}

impl Inner {
    pub(crate) fn new(parts: InnerParts) -> Self {
        Self {
            name: parts.node.name.clone(),
            links: Arc::new(Links::new(parts.config.shards)),
            ways: Arc::default(),
            metrics: Arc::default(),
            book: Book::new(&parts.config.tenants),
            admission: Admission::new(),
            events: broadcast::channel(EVENTS_KEPT).0,
            checkpoints: Mutex::default(),
            contexts: Mutex::default(),
            serving: AtomicBool::new(false),
            disk: DiskWatch::default(),
            uploads: Uploads::default(),
            pace: Mutex::new(Pace::new(now())),
            superseded: AtomicBool::new(false),
            config: parts.config,
            node: parts.node,
            catalog: parts.catalog,
            incarnation: parts.member.incarnation,
            cluster: parts.cluster,
            boards: parts.boards,
            faults: parts.faults,
            fail: parts.fail,
        }
    }
}

impl Inner {
    /// This process, as manifests and sets name it.
    pub(crate) fn member(&self) -> Member {
        Member { node: self.name.clone(), incarnation: self.incarnation }
    }
}

/// The way into a node; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    inner: Arc<Inner>,
}

/// A handle that keeps nothing of the node alive.
pub(crate) struct WeakHandle(Weak<Inner>);

impl WeakHandle {
    pub(crate) fn upgrade(&self) -> Option<Handle> {
        self.0.upgrade().map(|inner| Handle { inner })
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.inner.name)
    }
}

impl Handle {
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn downgrade(&self) -> WeakHandle {
        WeakHandle(Arc::downgrade(&self.inner))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    pub(crate) fn links(&self) -> &Links {
        &self.inner.links
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.inner.admission
    }

    /// This node's name.
    #[must_use]
    pub fn name(&self) -> &NodeName {
        &self.inner.name
    }

    /// The configuration that the node runs by.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The node's metrics, to be added to and to be shown.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    /// Injects faults into a GPU, for tests and drills; none where there is no such GPU.
    #[must_use]
    pub fn faults(&self, gpu: GpuIndex) -> Option<Arc<FaultPlan>> {
        self.inner.faults.get(usize::from(gpu.0)).cloned()
    }

    /// Flips a bit of a session's pinned bytes, for tests and drills.
    ///
    /// # Errors
    /// [`Error`] where it has none that can be read.
    pub async fn flip_pinned_bit(&self, key: &SessionKey) -> Result<(), Error> {
        let answered = self.ask(key, Verb::ReadAll, Vec::new(), None).await?;
        let first = answered.blocks.first();
        let first = first.ok_or_else(|| Error::Internal(format!("{key} has no pinned bytes")))?;
        keepwarm_memory::flip_bit(first, 0);
        Ok(())
    }

    /// Makes a GPU's actor panic, for tests and drills.
    pub fn panic_gpu(&self, gpu: GpuIndex) {
        if let Some(gpu) = self.links().gpu(gpu) {
            let _ = gpu.cast(crate::gpu::GpuMsg::Panic);
        }
    }

    /// Makes the actor of a session's shard panic, for tests and drills.
    pub fn panic_shard(&self, key: &SessionKey) {
        if let Ok(shard) = self.links().shard(key) {
            let _ = shard.cast(ShardMsg::Panic);
        }
    }

    /// What this node can do beside holding what it has, for the registry's plan.
    pub(crate) fn fitness(&self) -> Fitness {
        Fitness {
            leads: self.inner.boards.iter().any(|board| board.healthy()),
            learns: self.inner.disk.is_well(),
        }
    }

    /// Who takes this node's changes much more slowly than others do.
    pub(crate) fn slow(&self) -> Vec<Member> {
        self.inner.pace.lock().unwrap_or_else(PoisonError::into_inner).slow(now())
    }

    pub(crate) fn set_serving(&self, serving: bool) {
        self.inner.serving.store(serving, Ordering::SeqCst);
    }

    pub(super) fn serving(&self) -> bool {
        self.inner.serving.load(Ordering::SeqCst)
    }

    /// The cluster went on without this process, which can begin anew and join again.
    pub(crate) fn supersede(&self, reason: String) {
        self.inner.superseded.store(true, Ordering::SeqCst);
        self.fail(reason);
    }

    pub(crate) fn superseded(&self) -> bool {
        self.inner.superseded.load(Ordering::SeqCst)
    }

    pub(crate) fn fail(&self, reason: String) {
        self.set_serving(false);
        self.inner.fail.send_replace(Some(reason));
    }

    /// A client's permit.
    pub(crate) fn admit(&self) -> Result<Permit, Error> {
        self.inner.admission.client()
    }

    /// Sends a verb with its guards to the session's shard and waits for the answer.
    pub(crate) async fn ask(
        &self,
        key: &SessionKey,
        verb: Verb,
        guards: Vec<Block>,
        permit: Option<Permit>,
    ) -> Result<Answered, Error> {
        let changes = !matches!(
            verb,
            Verb::Get | Verb::List(_) | Verb::PlanWrite(_) | Verb::Read { .. } | Verb::ReadAll | Verb::Touch
        );
        let (reply, answer) = oneshot::channel();
        let shard = self.links().shard(key)?;
        send(&shard, ShardMsg::Ask(Ask { key: key.clone(), verb, guards, permit, reply }), "the shard")?;
        answer.await.unwrap_or_else(|_| {
            // The shard ended with the request in its hands.
            Err(if changes { Refusal::OutcomeUnknown.into() } else { restarting("the shard") })
        })
    }

    /// Pinned blocks, waited for up to a limit.
    pub(crate) async fn reserve_pinned(
        &self,
        owner: &Owner,
        pool: Pool,
        sizes: Vec<(Bytes, usize)>,
    ) -> Result<Vec<BlockMut>, Error> {
        let (reply, blocks) = oneshot::channel();
        // Another node waits for this answer: an eviction that is under way may come in time, no more.
        let wait = match pool {
            Pool::ReplicaIn | Pool::Spare => REPLICA_ROOM_WAIT,
            Pool::Client | Pool::Restore | Pool::SpillIn => ROOM_WAIT,
        };
        let deadline = now() + wait;
        let reserve = Reserve { owner: owner.clone(), pool, sizes, deadline, reply };
        send(self.links().pinned()?, PinnedMsg::Reserve(reserve), "pinned memory")?;
        blocks.await.map_err(|_| restarting("pinned memory"))?
    }

    pub(crate) fn device(&self, gpu: GpuIndex) -> Result<Arc<dyn Device>, Error> {
        let board = self.inner.boards.get(usize::from(gpu.0));
        board.map(|board| Arc::clone(board.device())).ok_or_else(|| no_gpu(gpu, self.inner.boards.len()))
    }

    /// A session's bytes by tier; `peer` is one copy on other nodes, if there is any.
    pub(super) fn tiers(&self, manifest: &Manifest, hbm: Bytes) -> super::view::TierBytes {
        let (me, bytes) = (self.inner.member(), manifest.stored_bytes());
        let here = manifest.holders.contains(&me);
        let elsewhere = manifest.holders.iter().any(|holder| *holder != me);
        super::view::TierBytes {
            hbm,
            pinned: if here { bytes } else { Bytes::ZERO },
            peer: if elsewhere { bytes } else { Bytes::ZERO },
        }
    }

    /// Whether a session has all the copies that the spec promises.
    #[must_use]
    pub fn durability(&self, manifest: &Manifest) -> Durability {
        let full = manifest.holders.len() >= self.inner.config.replication as usize;
        if full || matches!(manifest.state, State::Cold(_)) { Durability::Full } else { Durability::Degraded }
    }

    /// Whether a write's bytes have all promised copies now: none is left where the session has gone cold between a write
    /// and its repetition.
    #[must_use]
    pub(crate) fn written_durability(&self, manifest: &Manifest) -> Durability {
        match manifest.state {
            State::Warm => self.durability(manifest),
            State::Cold(_) => Durability::Degraded,
        }
    }

    /// A session has ended: nothing of it is remembered but its tombstone.
    pub(crate) fn ended(&self, key: SessionKey) {
        self.inner.book.end(&key.tenant);
        self.emit("session", Some(&key), "ended".to_owned(), Bytes::ZERO, Duration::ZERO);
        if let Ok(router) = self.links().router() {
            let _ = router.cast(RouterMsg::Forget(key));
        }
    }

    /// Remembers and tells a move of a session's bytes.
    pub(crate) fn note_move(
        &self,
        key: &SessionKey,
        from: &str,
        to: &str,
        bytes: Bytes,
        why: &'static str,
        took: Duration,
    ) {
        let moved = Move { at: now(), from: from.to_owned(), to: to.to_owned(), bytes, why };
        if let Ok(router) = self.links().router() {
            let _ = router.cast(RouterMsg::Moved(key.clone(), moved));
        }
        self.emit("move", Some(key), format!("{from} to {to}: {why}"), bytes, took);
    }

    /// Remembers and tells where a load's bytes came from.
    pub(super) fn note_loaded(
        &self,
        key: &SessionKey,
        gpu: GpuIndex,
        loaded: &Loaded,
        why: &'static str,
        took: Duration,
    ) {
        let to = format!("hbm:{gpu}");
        let near: Bytes = loaded.near.iter().map(|(_, bytes)| *bytes).sum();
        for (from, bytes) in &loaded.near {
            let from = format!("hbm:{from}");
            self.metrics().moved(&from, &to, *bytes);
            self.note_move(key, &from, &to, *bytes, why, took);
        }
        let rest = loaded.moved.saturating_sub(near);
        if rest > Bytes::ZERO {
            self.metrics().moved("pinned", "hbm", rest);
            self.note_move(key, "pinned", &to, rest, why, took);
        }
    }

    /// Tells a failure.
    pub(crate) fn note_failure(&self, key: Option<&SessionKey>, detail: String) {
        self.emit("failure", key, detail, Bytes::ZERO, Duration::ZERO);
    }

    fn emit(
        &self,
        kind: &'static str,
        session: Option<&SessionKey>,
        detail: String,
        bytes: Bytes,
        took: Duration,
    ) {
        let duration = Millis(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        // Nobody listening is no error.
        let _ = self.inner.events.send(NodeEvent {
            at: now(),
            kind,
            session: session.cloned(),
            detail,
            bytes,
            duration,
        });
    }

    /// Write-behinds under way.
    pub(crate) fn checkpoints_running(&self) -> usize {
        self.inner.checkpoints.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Sends to an actor; one that has ended is being started again.
pub(super) fn send<T: ractor::Message>(actor: &ActorRef<T>, message: T, who: &str) -> Result<(), Error> {
    actor.cast(message).map_err(|_| restarting(who))
}

pub(super) fn restarting(who: &str) -> Error {
    Error::Unavailable { reason: format!("{who} is being started again"), retry_after: Millis(500) }
}

pub(super) fn no_gpu(gpu: GpuIndex, count: usize) -> Error {
    Error::InvalidField {
        field: "gpu".to_owned(),
        reason: format!("there is no GPU {gpu}: the node has {count}, from 0"),
    }
}

//! Starting a node's registry, and the handle to it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use keepwarm_catalog::{LogStep, RaftLog, ReadError, Slot};
use keepwarm_core::registry::{Entry, HealthReport, Refused, Registration, Registry, Response};
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::Version;
use openraft::{Config, SnapshotPolicy};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::link::RegistryLink;
use crate::log_store::{LogStore, write};
use crate::machine::Machine;
use crate::network::Network;
use crate::propose::{PROPOSALS_MAX, ProposeError};
use crate::raft_types::{Raft, raft_id};
use crate::settings::{Settings, SettingsError};
use crate::shared::{Shared, Standing, millis, wall};

/// Entries between two snapshots: each some 100 bytes, so that a log is a few hundred KiB.
const SNAPSHOT_EVERY: u64 = 2000;
/// Entries kept behind a snapshot, for voters that are a little behind.
const KEEP: u64 = 1000;
/// Entries in one message; bytes bound it too.
const APPEND_MAX: u64 = 256;
/// A snapshot is sent whole within this.
const SNAPSHOT_MS: u64 = 10_000;
/// Reports that wait for the leader's loop: a thousand nodes' of one round.
const REPORTS_MAX: usize = 1024;
/// Between two tries to register.
const REGISTER_PAUSE: Duration = Duration::from_millis(50);
/// One try to register.
const REGISTER_TRY: Duration = Duration::from_secs(1);

/// Why a registry could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The spec does not allow it.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The log is damaged.
    #[error("{0}; restore it from a copy, or move the data_dir away: the node then joins with an empty disk")]
    Log(#[from] ReadError),
    /// The log is of another cluster.
    #[error("{path} belongs to cluster {found:032x}, not {expected:032x}: choose another data_dir")]
    OtherCluster {
        /// The file.
        path: String,
        /// What it says.
        found: u128,
        /// What the spec says.
        expected: u128,
    },
    /// The group could not be started.
    #[error("the registry cannot start: {0}")]
    Group(String),
}

/// A node's part of the registry.
#[derive(Debug)]
pub struct RegistryNode;

/// The handle to a node's registry; clones share it. The registry runs until [`RegistryHandle::shutdown`], or until
/// the last handle is dropped.
#[derive(Clone)]
pub struct RegistryHandle {
    running: Arc<Running>,
}

struct Running {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    log: RaftLog,
}

impl Running {
    fn take_tasks(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for task in self.take_tasks() {
            task.abort();
        }
    }
}

impl RegistryNode {
    /// Starts: reads the log, and founds, joins or follows in the background.
    ///
    /// # Errors
    /// [`StartError`]: each says what to do.
    pub async fn start(
        settings: Settings,
        log: RaftLog,
        link: Arc<dyn RegistryLink>,
    ) -> Result<RegistryHandle, StartError> {
        settings.check()?;
        own(&settings, &log).await?;
        let (registry, _) = watch::channel(Arc::new(Registry::new(settings.registry)));
        let (reports, incoming) = mpsc::channel(REPORTS_MAX);
        let network = Network { link, cluster: settings.cluster_id };
        let id = raft_id(&settings.node, settings.disk);
        let votes = settings.votes();
        let raft = if votes {
            let (disk, publish, shape) = (log.clone(), registry.clone(), settings.registry);
            let opened = tokio::task::spawn_blocking(move || {
                Ok::<_, ReadError>((LogStore::open(disk.clone())?, Machine::open(disk, shape, publish)?))
            });
            let (store, machine) = opened.await.map_err(|error| StartError::Group(error.to_string()))??;
            let config = Arc::new(config(&settings)?);
            let raft = Raft::new(id, config, network.clone(), store, machine);
            Some(raft.await.map_err(|error| StartError::Group(error.to_string()))?)
        } else {
            None
        };
        let standing = if votes {
            Standing::Waiting { why: "it has just started".to_owned() }
        } else {
            Standing::Follower
        };
        let shared = Arc::new(Shared {
            settings,
            id,
            network,
            raft,
            registry,
            standing: watch::channel(standing).0,
            reports,
            hint: Mutex::default(),
            membership: tokio::sync::Mutex::default(),
            room: Semaphore::new(PROPOSALS_MAX),
            started: Instant::now(),
        });
        let mut tasks = vec![tokio::spawn(Arc::clone(&shared).lead(incoming))];
        if votes {
            tasks.push(tokio::spawn(Arc::clone(&shared).observe()));
            tasks.push(tokio::spawn(Arc::clone(&shared).take_part()));
        } else {
            tasks.push(tokio::spawn(Arc::clone(&shared).follow()));
        }
        Ok(RegistryHandle { running: Arc::new(Running { shared, tasks: Mutex::new(tasks), log }) })
    }
}

/// The log is this cluster's, or becomes it.
async fn own(settings: &Settings, log: &RaftLog) -> Result<(), StartError> {
    let expected = settings.cluster_id;
    match log.value(Slot::Cluster)?.map(|bytes| <[u8; 16]>::try_from(bytes).map(u128::from_le_bytes)) {
        Some(Ok(found)) if found == expected => Ok(()),
        Some(Ok(found)) => Err(StartError::OtherCluster { path: log.path().to_string(), found, expected }),
        Some(Err(_)) => {
            Err(ReadError::Damaged(format!("the cluster's id in {} is no id", log.path())).into())
        }
        None => write(log, vec![LogStep::Put(Slot::Cluster, expected.to_le_bytes().to_vec())])
            .await
            .map_err(|error| StartError::Group(error.to_string())),
    }
}

fn config(settings: &Settings) -> Result<Config, StartError> {
    let timers = settings.timers;
    let config = Config {
        cluster_name: settings.cluster.clone(),
        heartbeat_interval: millis(timers.heartbeat),
        election_timeout_min: millis(timers.election_min),
        election_timeout_max: millis(timers.election_max),
        install_snapshot_timeout: SNAPSHOT_MS,
        max_payload_entries: APPEND_MAX,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: KEEP,
        ..Config::default()
    };
    config.validate().map_err(|error| StartError::Group(error.to_string()))
}

impl RegistryHandle {
    fn shared(&self) -> &Arc<Shared> {
        &self.running.shared
    }

    /// The registry as applied here, on nodes that do not vote too. It may be behind the group: see
    /// [`RegistryHandle::confirm`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Registry>> {
        self.shared().registry.subscribe()
    }

    /// How this node takes part.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.shared().standing.subscribe()
    }

    /// Proposes an entry, at whoever leads, and gives what it answered when it was applied. A dropped future gives up
    /// the answer, not the entry.
    ///
    /// # Errors
    /// [`ProposeError::Unavailable`]: certainly not proposed. [`ProposeError::Unknown`]: it may yet be applied.
    pub async fn propose(&self, entry: Entry, deadline: Duration) -> Result<Response, ProposeError> {
        self.shared().propose(entry, deadline).await
    }

    /// Waits until this node has applied everything that was acknowledged to anybody before this call, and gives the
    /// version. A dropped future changes nothing.
    ///
    /// # Errors
    /// [`ProposeError::Unavailable`] where no leader could confirm it in time.
    pub async fn confirm(&self, deadline: Duration) -> Result<u64, ProposeError> {
        self.shared().confirm(deadline).await
    }

    /// Who leads, as far as is known here.
    #[must_use]
    pub fn leader(&self) -> Option<NodeName> {
        self.shared().leader()
    }

    /// Registers this process until it is registered and that is applied here. However often it asks, one process
    /// gets one incarnation, unless it was declared failed meanwhile. A dropped future may leave it registered.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub async fn register(
        &self,
        registration: Registration,
        deadline: Duration,
    ) -> Result<Incarnation, RegisterError> {
        let until = Instant::now() + deadline;
        let node = registration.node.clone();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let entry = Entry::Register { registration: registration.clone(), at: wall() };
            let error = match self.propose(entry, left.min(REGISTER_TRY)).await {
                Ok(Response::Registered(incarnation)) => {
                    let mut seen = self.watch();
                    let here = |registry: &Arc<Registry>| {
                        registry.node(&node).is_some_and(|node| node.incarnation >= incarnation)
                    };
                    return match timeout_at(until, seen.wait_for(here)).await {
                        Ok(Ok(_)) => Ok(incarnation),
                        _ => Err(RegisterError::Behind(incarnation)),
                    };
                }
                Ok(Response::Refused(refused)) => return Err(RegisterError::Refused(refused)),
                Ok(Response::Done) => ProposeError::Unknown,
                Err(error) => error,
            };
            if Instant::now() + REGISTER_PAUSE >= until {
                return Err(RegisterError::NoAnswer(error));
            }
            tokio::time::sleep(REGISTER_PAUSE).await;
        }
    }

    /// Tells the leader whom this node has not heard. Never blocks; a report that cannot be sent is lost, and the next
    /// one replaces it.
    pub fn report(&self, report: HealthReport) {
        let _ = self.shared().reports.try_send(report);
    }

    /// Answers a request of another node, whose name the link has verified, in the version that the link speaks. A dropped
    /// future may have done what was asked.
    pub fn handle(&self, from: &NodeName, version: Version, request: Bytes) -> BoxFuture<'static, Bytes> {
        let (shared, from) = (Arc::clone(self.shared()), from.clone());
        Box::pin(async move {
            let answer = shared.handle(&from, &request).await;
            answer.encode(shared.settings.cluster_id, version)
        })
    }

    /// Stops, and gives the log's file back; others elect another leader where this one led. Clones of the handle answer `Unavailable` afterwards.
    pub async fn shutdown(self) {
        for task in self.running.take_tasks() {
            task.abort();
            // It was cancelled, as it should be.
            let _ = task.await;
        }
        if let Some(raft) = &self.shared().raft
            && let Err(error) = raft.shutdown().await
        {
            tracing::error!(%error, "the registry did not stop in order");
        }
        let log = self.running.log.clone();
        if tokio::task::spawn_blocking(move || log.close()).await.is_err() {
            tracing::error!("the registry's log did not close in order");
        }
    }
}

/// Why a process is not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The registry does not take it.
    #[error("this node cannot register: {0}")]
    Refused(Refused),
    /// Nobody answered in time.
    #[error("this node is not registered yet: {0}; a majority of the voters must run and reach each other")]
    NoAnswer(ProposeError),
    /// It is registered, but this node has not seen it applied.
    #[error(
        "this node is registered as incarnation {0}, but is behind and must not serve yet; a majority of the voters must run and reach each other"
    )]
    Behind(Incarnation),
}

//! Nodes in one process over links in memory that can be cut.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test binary uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use keepwarm_catalog::{Catalog, CatalogSettings, RaftLog, Sync};
use keepwarm_core::registry::{HealthReport, Registration, Registry, RegistrySettings, Unheard};
use keepwarm_registry::{
    Bootstrap, RegistryHandle, RegistryLink, RegistryLinkError, RegistryNode, Settings, Timers,
};
use keepwarm_types::{Incarnation, Millis, NodeName, ShardCount};
use keepwarm_wire::{Version, Versions};
use uuid::Uuid;

pub const CLUSTER: u128 = 0xfeed;
pub const LONG: Duration = Duration::from_secs(20);
pub const SHARDS: u64 = 64;

pub fn name(n: u16) -> NodeName {
    format!("n{n}").parse().unwrap()
}

#[derive(Default)]
pub struct Net {
    nodes: Mutex<BTreeMap<NodeName, RegistryHandle>>,
    cut: Mutex<BTreeSet<(NodeName, NodeName)>>,
    /// What nodes speak that do not speak all versions. A process keeps what it began with.
    spoken: Mutex<BTreeMap<NodeName, Versions>>,
    /// Requests that were answered, by the version that they and their answers had.
    carried: Mutex<BTreeMap<(u16, u16), u64>>,
}

struct Link {
    net: Arc<Net>,
    from: NodeName,
}

impl RegistryLink for Link {
    fn version(&self, to: &NodeName) -> Option<Version> {
        self.net.version(&self.from, to)
    }

    fn call(
        &self,
        to: &NodeName,
        request: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, RegistryLinkError>> {
        let to = to.clone();
        Box::pin(async move {
            let until = tokio::time::Instant::now() + deadline;
            if self.net.is_cut(&self.from, &to) {
                tokio::time::sleep_until(until).await;
                return Err(RegistryLinkError::Deadline(to));
            }
            let (Some(handle), Some(version)) = (self.net.get(&to), self.version(&to)) else {
                return Err(RegistryLinkError::Unreachable(to));
            };
            let asked = said(&request);
            let answer = tokio::time::timeout_at(until, handle.handle(&self.from, version, request)).await;
            if self.net.is_cut(&to, &self.from) {
                tokio::time::sleep_until(until).await;
                return Err(RegistryLinkError::Deadline(to));
            }
            if self.net.get(&to).is_none() {
                return Err(RegistryLinkError::Lost(to));
            }
            let answer = answer.map_err(|_| RegistryLinkError::Deadline(to))?;
            *self.net.carried.lock().unwrap().entry((asked, said(&answer))).or_default() += 1;
            Ok(answer)
        })
    }
}

/// The version that a message says it has.
fn said(message: &[u8]) -> u16 {
    u16::from_le_bytes([message[0], message[1]])
}

impl Net {
    /// Takes what was carried since the last time.
    pub fn carried(&self) -> BTreeMap<(u16, u16), u64> {
        std::mem::take(&mut *self.carried.lock().unwrap())
    }

    fn is_cut(&self, from: &NodeName, to: &NodeName) -> bool {
        self.cut.lock().unwrap().contains(&(from.clone(), to.clone()))
    }

    pub fn get(&self, name: &NodeName) -> Option<RegistryHandle> {
        self.nodes.lock().unwrap().get(name).cloned()
    }

    pub fn link(self: &Arc<Self>, from: NodeName) -> Arc<dyn RegistryLink> {
        Arc::new(Link { net: Arc::clone(self), from })
    }

    /// What two nodes speak with each other.
    fn version(&self, a: &NodeName, b: &NodeName) -> Option<Version> {
        let spoken = self.spoken.lock().unwrap();
        let of = |node| spoken.get(node).copied().unwrap_or_default();
        of(a).common(of(b)).ok()
    }

    /// From now on a node speaks these.
    pub fn speaks(&self, node: &NodeName, versions: Versions) {
        self.spoken.lock().unwrap().insert(node.clone(), versions);
    }

    /// Cuts a node off from all others, both ways.
    pub fn isolate(&self, node: &NodeName, others: &[NodeName]) {
        let mut cut = self.cut.lock().unwrap();
        for other in others.iter().filter(|other| *other != node) {
            cut.insert((node.clone(), other.clone()));
            cut.insert((other.clone(), node.clone()));
        }
    }

    /// Cuts one way alone.
    pub fn cut(&self, from: &NodeName, to: &NodeName) {
        self.cut.lock().unwrap().insert((from.clone(), to.clone()));
    }

    pub fn heal(&self) {
        self.cut.lock().unwrap().clear();
    }

    pub fn hears(&self, node: &NodeName, other: &NodeName) -> bool {
        self.get(other).is_some() && !self.is_cut(other, node)
    }
}

pub struct Cluster {
    pub net: Arc<Net>,
    pub voters: Vec<NodeName>,
    pub nodes: Vec<NodeName>,
    pub shards: u64,
}

pub fn disk(n: u16) -> Uuid {
    Uuid::from_u128(u128::from(n) + 1000)
}

impl Cluster {
    pub fn new(voters: u16, nodes: u16) -> Self {
        Self {
            net: Arc::default(),
            voters: (1..=voters).map(name).collect(),
            nodes: (1..=nodes).map(name).collect(),
            shards: SHARDS,
        }
    }

    pub fn settings(&self, n: u16, disk: Uuid, bootstrap: bool) -> Settings {
        Settings {
            node: name(n),
            disk,
            cluster: "test".to_owned(),
            cluster_id: CLUSTER,
            voters: self.voters.clone(),
            nodes: self.nodes.clone(),
            expected: self.nodes.len(),
            registry: RegistrySettings { shards: ShardCount::new(self.shards).unwrap(), replication: 2 },
            timers: Timers { poll: Duration::from_millis(200), ..Timers::default() },
            bootstrap: if bootstrap {
                Bootstrap::Allowed { cluster_id: CLUSTER }
            } else {
                Bootstrap::Forbidden
            },
        }
    }

    pub async fn start(&self, n: u16, disk: Uuid, bootstrap: bool, log: RaftLog) -> RegistryHandle {
        let settings = self.settings(n, disk, bootstrap);
        let handle = RegistryNode::start(settings, log, self.net.link(name(n))).await.unwrap();
        self.net.nodes.lock().unwrap().insert(name(n), handle.clone());
        handle
    }

    /// All nodes in memory; the first has the bootstrap file.
    pub async fn start_all(&self) {
        for n in 1..=self.nodes.len() as u16 {
            self.start(n, disk(n), n == 1, RaftLog::ephemeral().unwrap()).await;
        }
    }

    pub async fn register_all(&self) {
        for n in 1..=self.nodes.len() as u16 {
            self.register(n).await;
        }
    }

    pub async fn register(&self, n: u16) -> Incarnation {
        let handle = self.net.get(&name(n)).unwrap();
        handle.register(registration(n, disk(n)), LONG).await.unwrap()
    }

    /// As after kill -9: nobody reaches it any more, and it does nothing more.
    pub async fn kill(&self, n: u16) {
        let handle = self.net.nodes.lock().unwrap().remove(&name(n)).unwrap();
        handle.shutdown().await;
    }

    pub fn handle(&self, n: u16) -> RegistryHandle {
        self.net.get(&name(n)).unwrap()
    }

    /// The number of the node that leads and that a majority agrees upon.
    pub async fn leader(&self) -> u16 {
        let until = Instant::now() + LONG;
        loop {
            let alive: Vec<_> = self.net.nodes.lock().unwrap().clone().into_iter().collect();
            for (candidate, _) in &alive {
                let agree = alive.iter().filter(|(_, handle)| handle.leader().as_ref() == Some(candidate));
                if agree.count() * 2 > self.voters.len() && self.voters.contains(candidate) {
                    return candidate.as_str()[1..].parse().unwrap();
                }
            }
            assert!(Instant::now() < until, "no leader in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reports what each living node hears, every 50 ms, as a node would.
    pub fn report_health(&self) -> tokio::task::JoinHandle<()> {
        let (net, nodes) = (Arc::clone(&self.net), self.nodes.clone());
        tokio::spawn(async move {
            let mut silent: BTreeMap<(NodeName, NodeName), Instant> = BTreeMap::new();
            loop {
                for node in &nodes {
                    let Some(handle) = net.get(node) else { continue };
                    let registry = handle.watch().borrow().clone();
                    let Some(own) = registry.node(node) else { continue };
                    let mut unheard = Vec::new();
                    for other in registry.nodes() {
                        let peer = other.registration.node.clone();
                        if peer == *node {
                            continue;
                        }
                        let since = silent.entry((node.clone(), peer.clone())).or_insert_with(Instant::now);
                        if net.hears(node, &peer) {
                            *since = Instant::now();
                        } else if since.elapsed() >= Duration::from_millis(400) {
                            let silent = Millis(since.elapsed().as_millis() as u64);
                            unheard.push(Unheard { node: peer, incarnation: other.incarnation, silent });
                        }
                    }
                    handle.report(HealthReport {
                        unheard,
                        ..HealthReport::well(node.clone(), own.incarnation)
                    });
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    }
}

pub fn registration(n: u16, disk: Uuid) -> Registration {
    Registration {
        node: name(n),
        disk,
        peer: format!("10.0.0.{n}:7100"),
        http: format!("10.0.0.{n}:7000"),
        zone: format!("rack-{}", n % 3),
        stores: true,
        certificate: [0; 32],
        process: Uuid::new_v4(),
    }
}

/// Waits for the registry here to be so.
pub async fn seen(handle: &RegistryHandle, so: impl Fn(&Registry) -> bool) -> Arc<Registry> {
    let mut watch = handle.watch();
    let found = tokio::time::timeout(LONG, watch.wait_for(|registry| so(registry))).await;
    Arc::clone(&found.expect("the registry is not so in time").unwrap())
}

/// A log in a folder, and the disk's identity.
pub fn on_disk(folder: &Path) -> (RaftLog, Uuid) {
    let shards = ShardCount::new(SHARDS).unwrap();
    let settings = CatalogSettings { cluster: "test".to_owned(), shards, sync: Sync::Always };
    let (catalog, recovered) = Catalog::open(folder, &settings).unwrap();
    (catalog.raft_log().unwrap(), recovered.disk_id)
}

//! The demo's cluster: three node processes on this machine, by a `cluster.toml` as `keepwarm init` writes it.

use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use keepwarm_client::Client;
use keepwarm_config::{DeviceKind, LocalCluster};
use keepwarm_types::{Bytes, ShardCount};
use uuid::Uuid;

use super::server::{Server, ServerSpec};
use crate::commands::init;
use crate::failure::Failure;

/// Nodes of the cluster: the fewest of which one may die.
pub(crate) const NODES: u16 = 3;
/// Copies of each session's bytes.
pub(crate) const REPLICATION: u32 = 2;
/// How long the cluster may take until every shard has an owner and every promised copy is in place.
const WHOLE_MAX: Duration = Duration::from_secs(60);
/// Time between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(20);
/// Where free ports are looked for: below what Linux gives to outgoing connections.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Ids that are made in the search for one in a shard of a node: a third of all are.
const TRIES_MAX: usize = 10_000;

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub(crate) struct ClusterSpec {
    pub(crate) folder: PathBuf,
    /// What `--model` takes.
    pub(crate) model: String,
    /// The first nodes' devices.
    pub(crate) devices: Vec<DeviceKind>,
    /// Memory of each node's GPU.
    pub(crate) hbm: Bytes,
    /// Pinned memory of each node.
    pub(crate) pinned: Bytes,
}

/// A node, running or killed.
#[derive(Debug)]
struct Node {
    name: String,
    spec: ServerSpec,
    server: Option<Server>,
}

/// The cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    client: Client,
}

impl Cluster {
    /// Makes the files in a folder of its own, starts the nodes, and waits until they serve together.
    pub(crate) async fn start(spec: &ClusterSpec) -> Result<Self, Failure> {
        let shards = ShardCount::new(init::SHARDS).map_err(Failure::failed)?;
        let local = LocalCluster {
            replication: Some(REPLICATION),
            model: Some(init::named_model(&spec.model)?),
            devices: spec.devices.clone(),
            hbm: spec.hbm,
            pinned: spec.pinned,
            ..LocalCluster::new("demo", NODES, port_base()?, shards)
        };
        let made = init::found(&spec.folder, &local)?;
        let node = |made_node: &init::MadeNode| {
            let log = spec.folder.join(format!("{}.log", made_node.name));
            let spec = ServerSpec::node(&made.config, &made_node.name, log);
            Node { name: made_node.name.clone(), spec, server: None }
        };
        let mut nodes: Vec<_> = made.nodes.iter().map(node).collect();
        let servers = try_join_all(nodes.iter().map(|node| Server::start(&node.spec))).await?;
        let urls: Vec<_> = servers.iter().map(|server| server.client().url().to_owned()).collect();
        for (node, server) in nodes.iter_mut().zip(servers) {
            node.server = Some(server);
        }
        let (first, others) = urls.split_first().ok_or_else(|| Failure::failed("no nodes"))?;
        let client = others.iter().fold(Client::builder(first), |builder, url| builder.seed(url)).build()?;
        let cluster = Self { nodes, client };
        cluster.whole().await?;
        Ok(cluster)
    }

    /// A client that knows all nodes.
    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(|node| node.name.as_str())
    }

    /// Each node that runs: its name, address and process.
    pub(crate) fn running(&self) -> Vec<(&str, &str, u32)> {
        let running = self.nodes.iter().filter_map(|node| {
            let server = node.server.as_ref()?;
            Some((node.name.as_str(), server.client().url(), server.pid()?))
        });
        running.collect()
    }

    /// The name of a session's owner; none while its shard has none.
    pub(crate) async fn owner(&self, session: Uuid) -> Result<Option<String>, Failure> {
        Ok(self.client.shards().await?.owner(session).map(str::to_owned))
    }

    /// An id in a shard that a node owns.
    pub(crate) async fn mint(&self, node: &str) -> Result<Uuid, Failure> {
        let map = self.client.shards().await?;
        let mut ids = (0..TRIES_MAX).map(|_| Uuid::now_v7());
        let found = ids.find(|id| map.owner(*id) == Some(node));
        found.ok_or_else(|| Failure::failed(format!("{node} owns no shard")))
    }

    /// SIGKILL, without a word before.
    pub(crate) async fn kill(&mut self, name: &str) -> Result<(), Failure> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        match node.and_then(|node| node.server.take()) {
            Some(server) => server.kill().await,
            None => Err(Failure::failed(format!("{name} does not run"))),
        }
    }

    /// Starts every node that does not run, and waits until all promised copies are in place again.
    pub(crate) async fn refill(&mut self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        for node in &mut self.nodes {
            if node.server.is_none() {
                node.server = Some(Server::start(&node.spec).await?);
            }
        }
        self.whole().await?;
        Ok(begun.elapsed())
    }

    /// Waits until every node is up, and every shard and session has its copies.
    async fn whole(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let why = match self.client.cluster().await {
                Ok(cluster) => {
                    let down = cluster.nodes.iter().find(|node| node.status != "up");
                    let short = (cluster.under_replicated_shards, cluster.under_replicated_sessions);
                    match (down, short) {
                        (None, (0, 0)) if cluster.nodes.len() == self.nodes.len() => return Ok(()),
                        (Some(node), _) => format!("{} is {}", node.name, node.status),
                        (None, (shards, sessions)) => {
                            format!("{shards} shards and {sessions} sessions lack copies")
                        }
                    }
                }
                Err(error) => error.to_string(),
            };
            if begun.elapsed() > WHOLE_MAX {
                let seconds = WHOLE_MAX.as_secs();
                return Err(Failure::failed(format!("the cluster is not whole after {seconds} s: {why}")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Resolves when a node's process has ended by somebody else's hand, with its name and how.
    pub(crate) async fn ended(&mut self) -> (String, String) {
        let ends = self.nodes.iter_mut().filter_map(|node| {
            let (name, server) = (node.name.clone(), node.server.as_mut()?);
            Some(Box::pin(async move { (name, server.ended().await) }))
        });
        let ends: Vec<_> = ends.collect();
        if ends.is_empty() {
            return std::future::pending().await;
        }
        let ended = futures::future::select_all(ends).await.0;
        self.nodes.iter_mut().filter(|node| node.name == ended.0).for_each(|node| node.server = None);
        ended
    }

    /// Lets the nodes finish what they accepted, and ends them.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        let running = self.nodes.into_iter().filter_map(|node| node.server);
        try_join_all(running.map(Server::stop)).await?;
        Ok(())
    }
}

/// A base above which all ports of the nodes are free now.
fn port_base() -> Result<u16, Failure> {
    let free = |base: &u16| {
        (1..=NODES).all(|node| {
            TcpListener::bind(("127.0.0.1", base + node)).is_ok()
                && UdpSocket::bind(("127.0.0.1", base + 100 + node)).is_ok()
        })
    };
    // Two demos at a time begin at different places.
    let begin = (std::process::id() as usize * 8) % PORTS.len();
    let mut bases = PORTS.cycle().skip(begin).step_by(8).take(PORTS.len() / 8);
    bases.find(free).ok_or_else(|| Failure::failed("no ports are free on 127.0.0.1"))
}

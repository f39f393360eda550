//! Taking part: links, the registry, this process's registration, then its shards.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use keepwarm_catalog::{Catalog, OpenError, RaftLog, Recovered};
use keepwarm_config::{Bootstrap as BootstrapFile, Config, LoadError, NodeConfig};
use keepwarm_core::registry::{DetectorSettings, Member, Registration, RegistrySettings};
use keepwarm_registry::{
    Bootstrap, RegisterError, RegistryLink, RegistryLinkError, RegistryNode, Settings,
    StartError as RegistryError, Timers,
};
use keepwarm_transport::certificate::TlsPaths;
use keepwarm_transport::quic::{PathKind, QuicError, QuicSettings, QuicTransport, TlsMaterial};
use keepwarm_transport::{Class, Frame, LinkError, PeerId, Sockets, Transport};
use keepwarm_types::{Incarnation, Millis, NodeName};
use keepwarm_wire::{LayoutCache, Version, Versions, kinds};
use tokio::sync::{mpsc, watch as tokio_watch};

use super::{Cluster, IncomingRelay, inbound, watch};
use crate::clock::now;
use crate::handle::Handle;

/// How long a node waits at its start for the cluster to take it: the others may be starting too.
const REGISTER_DEADLINE: Duration = Duration::from_secs(120);
/// Relayed requests that wait to be served.
const RELAYS_MAX: usize = 256;

/// Why a node could not take its part.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The node's address for peers.
    #[error("node '{node}': peer = \"{address}\": {reason}: write HOST:PORT")]
    Address {
        /// Which node.
        node: NodeName,
        /// What is written.
        address: String,
        /// Why it is none.
        reason: String,
    },
    /// There is no bootstrap file.
    #[error("{0} is missing: copy it from where `keepwarm init` was run; it says which cluster this is")]
    NoBootstrap(PathBuf),
    /// The bootstrap file.
    #[error(transparent)]
    Bootstrap(#[from] LoadError),
    /// The links.
    #[error("node '{node}': {cause}")]
    Links {
        /// Which node.
        node: NodeName,
        /// Why.
        cause: QuicError,
    },
    /// The registry's log.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The cluster does not take it.
    #[error(transparent)]
    Register(#[from] RegisterError),
}

impl JoinError {
    /// Whether something that the node needs cannot be had: its address, its data folder, or the other nodes. Else
    /// the configuration is wrong.
    #[must_use]
    pub const fn is_unavailable(&self) -> bool {
        match self {
            Self::Address { .. } | Self::NoBootstrap(_) | Self::Bootstrap(_) => false,
            Self::Links { cause, .. } => matches!(cause, QuicError::Bind { .. }),
            Self::Log(_) => true,
            Self::Registry(cause) => !matches!(cause, RegistryError::Settings(_)),
            Self::Register(cause) => !matches!(cause, RegisterError::Refused(_)),
        }
    }
}

/// A node that is registered, and whose shards do not run yet.
pub(crate) struct Joined {
    pub(crate) cluster: Arc<Cluster>,
    relays: mpsc::Receiver<IncomingRelay>,
    suspect_after: Duration,
}

/// Takes this node's part in the cluster.
pub(crate) async fn join(
    config: &Config,
    node: &NodeConfig,
    catalog: &Catalog,
    recovered: &Recovered,
    sockets: &Sockets,
) -> Result<Joined, JoinError> {
    let bootstrap = BootstrapFile::of(config)?
        .ok_or_else(|| JoinError::NoBootstrap(config.path_of(BootstrapFile::FILE)))?;
    let cluster_id = bootstrap.id.as_u128();
    let listen = address(node).await?;
    let files = config.tls.as_ref().map(|tls| TlsPaths {
        ca: tls.ca.clone(),
        certificate: tls.dir.join(format!("{}.pem", node.name)),
        key: tls.dir.join(format!("{}.key", node.name)),
    });
    let tls = files.clone().map_or(TlsMaterial::LoopbackOnly, TlsMaterial::Files);
    // Links tell starts apart before the registry has given this one its number: by when they began.
    let local = PeerId { node: node.name.clone(), incarnation: Incarnation(now().0) };
    let (cluster, versions) = (config.name.clone(), Versions::ALL);
    let settings = QuicSettings { local, cluster, cluster_id, listen, tls, versions };
    let started = QuicTransport::start_over(settings, PathKind::Auto, sockets);
    let (transport, incoming) =
        started.map_err(|cause| JoinError::Links { node: node.name.clone(), cause })?;
    let links: Arc<dyn Transport> = Arc::clone(&transport) as _;
    let peers = config.nodes.iter().filter_map(|node| Some((node.name.clone(), node.peer.clone()?)));
    links.set_peers(peers.collect());
    let log = if node.data_dir.is_some() { catalog.raft_log()? } else { RaftLog::ephemeral()? };
    let link = Arc::new(OverLinks(Arc::clone(&links)));
    let registry =
        RegistryNode::start(registry_settings(config, node, recovered, cluster_id), log, link).await?;
    let begun = Arc::new(OnceLock::new());
    let inbound = tokio::spawn(inbound::run(incoming, registry.clone(), Arc::clone(&begun)));
    let certificate = transport.fingerprint();
    let renewing =
        files.map(|files| tokio::spawn(watch::renew(Arc::clone(&transport), files)).abort_handle());
    let registration = Registration {
        node: node.name.clone(),
        disk: recovered.disk_id,
        process: uuid::Uuid::new_v4(),
        peer: node.peer.clone().unwrap_or_default(),
        http: node.http.clone(),
        zone: node.zone.clone().unwrap_or_default(),
        stores: node.stores(),
        certificate,
    };
    tracing::info!(node = %node.name, "waiting for the cluster to take this node");
    let incarnation = match registry.register(registration, REGISTER_DEADLINE).await {
        Ok(incarnation) => incarnation,
        Err(error) => {
            inbound.abort();
            return Err(error.into());
        }
    };
    let map = registry.watch();
    let first = map.borrow().clone();
    let (relays, incoming_relays) = mpsc::channel(RELAYS_MAX);
    let cluster = Arc::new(Cluster {
        member: Member { node: node.name.clone(), incarnation },
        count: config.shards,
        transport: links,
        registry,
        map,
        told: tokio_watch::channel(first).0,
        layouts: LayoutCache::new(),
        handle: OnceLock::new(),
        relays,
        found: super::load::Found::default(),
        ceded: super::cede::Ceded::default(),
        reports: tokio_watch::channel(0).0,
        tasks: std::sync::Mutex::new([inbound.abort_handle()].into_iter().chain(renewing).collect()),
    });
    let _ = begun.set(Arc::clone(&cluster));
    Ok(Joined { cluster, relays: incoming_relays, suspect_after: config.suspect_after })
}

impl Joined {
    /// The node's actors run: shards may learn their sets, peers may speak to them.
    pub(crate) fn begin(self, handle: &Handle) -> mpsc::Receiver<IncomingRelay> {
        let Self { cluster, relays, suspect_after } = self;
        let _ = cluster.handle.set(handle.downgrade());
        let follow = tokio::spawn(watch::follow(Arc::clone(&cluster), handle.clone()));
        let report = tokio::spawn(watch::report(Arc::clone(&cluster), suspect_after));
        let mut tasks = cluster.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tasks.extend([follow.abort_handle(), report.abort_handle()]);
        relays
    }
}

async fn address(node: &NodeConfig) -> Result<SocketAddr, JoinError> {
    let written = node.peer.clone().unwrap_or_default();
    let wrong =
        |reason: String| JoinError::Address { node: node.name.clone(), address: written.clone(), reason };
    let mut found = tokio::net::lookup_host(&written).await.map_err(|error| wrong(error.to_string()))?;
    found.next().ok_or_else(|| wrong("it has no address".to_owned()))
}

fn registry_settings(
    config: &Config,
    node: &NodeConfig,
    recovered: &Recovered,
    cluster_id: u128,
) -> Settings {
    Settings {
        node: node.name.clone(),
        disk: recovered.disk_id,
        cluster: config.name.clone(),
        cluster_id,
        voters: config.voters().map(|node| node.name.clone()).collect(),
        nodes: config.nodes.iter().map(|node| node.name.clone()).collect(),
        expected: config.storing().count(),
        registry: RegistrySettings { shards: config.shards, replication: config.replication as usize },
        timers: Timers { detector: detector(config), ..Timers::default() },
        bootstrap: if node.voter { Bootstrap::Allowed { cluster_id } } else { Bootstrap::Forbidden },
    }
}

/// What the spec says of failures.
fn detector(config: &Config) -> DetectorSettings {
    let millis = |duration: Duration| Millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
    DetectorSettings {
        suspect_after: millis(config.suspect_after),
        give_up_after: config.give_up_after.map(millis),
        ..DetectorSettings::default()
    }
}

/// The registry's requests as calls over the links.
struct OverLinks(Arc<dyn Transport>);

impl RegistryLink for OverLinks {
    fn version(&self, to: &NodeName) -> Option<Version> {
        self.0.version(to)
    }

    fn call(
        &self,
        to: &NodeName,
        request: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, RegistryLinkError>> {
        let to = to.clone();
        Box::pin(async move {
            let frame = Frame { kind: kinds::REGISTRY, payload: request };
            match self.0.call(&to, Class::Ownership, frame, deadline).await {
                Ok(answer) => Ok(answer.payload),
                Err(LinkError::NotConnected(node) | LinkError::Full(node)) => {
                    Err(RegistryLinkError::Unreachable(node))
                }
                Err(LinkError::Deadline(node)) => Err(RegistryLinkError::Deadline(node)),
                Err(LinkError::Closed(_)) => Err(RegistryLinkError::Lost(to)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_config::SingleNode;
    use keepwarm_core::registry::Refused;
    use keepwarm_registry::ProposeError;
    use keepwarm_types::Bytes;

    use super::*;

    #[test]
    fn others_that_do_not_answer_are_no_fault_of_the_configuration() {
        let alone = JoinError::from(RegisterError::NoAnswer(ProposeError::Unknown));
        assert!(alone.is_unavailable() && alone.to_string().contains("a majority of the voters"), "{alone}");
        let behind = JoinError::from(RegisterError::Behind(Incarnation(3)));
        assert!(
            behind.is_unavailable() && behind.to_string().contains("a majority of the voters"),
            "{behind}"
        );
        let twice = JoinError::from(RegisterError::Refused(Refused::Unfit("the name is taken".into())));
        assert!(!twice.is_unavailable() && !twice.to_string().contains("majority"), "{twice}");
        let listen = "127.0.0.1:1".parse().unwrap();
        let taken = QuicError::Bind { address: listen, cause: std::io::ErrorKind::AddrInUse.into() };
        let links = |cause| JoinError::Links { node: "n1".parse().unwrap(), cause };
        assert!(links(taken).is_unavailable());
        assert!(!links(QuicError::Open(listen)).is_unavailable());
    }

    #[test]
    fn the_specs_times_are_the_detectors() {
        let node = SingleNode {
            name: "n1".parse().unwrap(),
            http: "127.0.0.1:0".to_owned(),
            gpus: Vec::new(),
            pinned: Bytes(1 << 20),
            data_dir: None,
            models: Vec::new(),
        };
        let mut config = Config::single(node);
        assert_eq!(detector(&config), DetectorSettings::default());
        config.suspect_after = Duration::from_millis(700);
        config.give_up_after = Some(Duration::from_secs(3600));
        let detector = detector(&config);
        assert_eq!((detector.suspect_after, detector.give_up_after), (Millis(700), Some(Millis(3_600_000))));
    }
}

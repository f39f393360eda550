//! Links over QUIC: one endpoint, one connection to each peer.
//!
//! Of two nodes the one with the lower name dials, so that there is never a choice between two connections. What
//! happens on a connection is in `connection`; this is who is dialled, who is up, and the trait.

mod connection;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use keepwarm_types::NodeName;
use keepwarm_wire::Frame;
use quinn::{Endpoint, EndpointConfig, TokioRuntime, TransportConfig, VarInt};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::certificate::CertificateError;
use crate::link::{ByteStream, Class, Counts, Incoming, LinkError, PeerId, PeerStatus, Transport};
use crate::socket::{Capped, FOUND_DATAGRAM_MAX, LOOPBACK_DATAGRAM, SAFE_DATAGRAM};
use crate::tls::Tls;
pub use crate::tls::TlsMaterial;

/// Events that wait for the node.
const INCOMING_MAX: usize = 1024;
/// Frames that wait for one peer.
const QUEUE_MAX: usize = 4096;
/// Streams that a peer may have open at once: its calls, batches of blocks and relayed requests.
const STREAMS_MAX: u32 = 1024;
/// Bytes in flight on one stream, and on one connection in all: at 1 GB/s and 10 ms a round trip 10 MiB are enough.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
/// A dead peer's connection ends after this.
const IDLE: Duration = Duration::from_secs(3);
/// The first packets of a connection, before the network has answered: well above one large datagram.
const FIRST_WINDOW: u64 = 1 << 20;
/// How long dialling may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(2);
/// Between two dials, at first and at most.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What a node's links are told.
#[derive(Debug, Clone)]
pub struct QuicSettings {
    /// This process.
    pub local: PeerId,
    /// Name of the cluster.
    pub cluster: String,
    /// Identity of the cluster.
    pub cluster_id: u128,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Which certificates to use.
    pub tls: TlsMaterial,
}

/// Why links could not be started.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The certificates.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// Without certificates, beyond this machine.
    #[error("peer address {0} is beyond loopback: name certificates in [tls]")]
    Open(SocketAddr),
    /// The socket.
    #[error("peer address {address} (UDP) cannot be bound: {cause}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
    /// The library.
    #[error("links cannot be started: {0}")]
    Tls(String),
}

/// A peer that this node knows of.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: String,
    pub(crate) up: Option<Up>,
    pub(crate) reason: Option<String>,
    pub(crate) heard: Option<Instant>,
    pub(crate) counts: Arc<Counts>,
    dialler: Option<AbortHandle>,
}

/// A connection that has said hello.
#[derive(Debug, Clone)]
pub(crate) struct Up {
    pub(crate) id: PeerId,
    pub(crate) connection: quinn::Connection,
    pub(crate) queue: mpsc::Sender<Frame>,
}

/// What all tasks of the links share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: QuicSettings,
    pub(crate) tls: Tls,
    pub(crate) endpoint: Endpoint,
    pub(crate) incoming: mpsc::Sender<Incoming>,
    peers: Mutex<BTreeMap<NodeName, Peer>>,
}

impl Shared {
    pub(crate) fn peers(&self) -> MutexGuard<'_, BTreeMap<NodeName, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn up(&self, node: &NodeName) -> Result<(Up, Arc<Counts>), LinkError> {
        let peers = self.peers();
        let peer = peers.get(node).ok_or_else(|| LinkError::NotConnected(node.clone()))?;
        let up = peer.up.clone().ok_or_else(|| LinkError::NotConnected(node.clone()))?;
        Ok((up, Arc::clone(&peer.counts)))
    }
}

/// Links over QUIC.
#[derive(Debug)]
pub struct QuicTransport {
    shared: Arc<Shared>,
    acceptor: AbortHandle,
}

impl QuicTransport {
    /// Binds and begins to accept; peers are dialled once they are set.
    ///
    /// # Errors
    /// [`QuicError`]: each says what to do.
    pub fn start(settings: QuicSettings) -> Result<(Arc<Self>, mpsc::Receiver<Incoming>), QuicError> {
        let tls = Tls::new(&settings.cluster, &settings.local.node, settings.tls.clone())?;
        if tls.loopback_only() && !settings.listen.ip().is_loopback() {
            return Err(QuicError::Open(settings.listen));
        }
        let bind = |cause| QuicError::Bind { address: settings.listen, cause };
        let socket = std::net::UdpSocket::bind(settings.listen).map_err(bind)?;
        let runtime = Arc::new(TokioRuntime);
        let socket = quinn::Runtime::wrap_udp_socket(&*runtime, socket).map_err(bind)?;
        let largest = if settings.listen.ip().is_loopback() { LOOPBACK_DATAGRAM } else { FOUND_DATAGRAM_MAX };
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(largest).map_err(|error| QuicError::Tls(error.to_string()))?;
        let endpoint =
            Endpoint::new_with_abstract_socket(config, None, Capped::new(socket, largest), runtime)
                .map_err(bind)?;
        let (send, receive) = mpsc::channel(INCOMING_MAX);
        let shared = Arc::new(Shared { settings, tls, endpoint, incoming: send, peers: Mutex::default() });
        shared.serve_with_present_certificates()?;
        let acceptor = tokio::spawn(connection::accept(Arc::clone(&shared))).abort_handle();
        Ok((Arc::new(Self { shared, acceptor }), receive))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.shared.endpoint.local_addr()
    }

    /// SHA-256 of the certificate in force; zeros where there is none.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        if self.shared.tls.loopback_only() {
            return [0; 32];
        }
        self.shared.tls.fingerprint()
    }

    /// Reads the certificates again; connections that are made from now on use them.
    ///
    /// # Errors
    /// [`QuicError`]: what was in force stays.
    pub fn reload(&self) -> Result<(), QuicError> {
        self.shared.tls.reload()?;
        self.shared.serve_with_present_certificates()
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn serve_with_present_certificates(&self) -> Result<(), QuicError> {
        let failed = |error: &dyn std::fmt::Display| QuicError::Tls(error.to_string());
        let server = self.tls.server().map_err(|error| failed(&error))?;
        let server =
            quinn::crypto::rustls::QuicServerConfig::try_from(server).map_err(|error| failed(&error))?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(server));
        config.transport_config(Arc::new(transport(self.settings.listen.ip().is_loopback())));
        self.endpoint.set_server_config(Some(config));
        Ok(())
    }

    pub(crate) fn client_config(&self, address: SocketAddr) -> Result<quinn::ClientConfig, String> {
        let client = self.tls.client().map_err(|error| error.to_string())?;
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).map_err(|e| e.to_string())?;
        let mut config = quinn::ClientConfig::new(Arc::new(client));
        config.transport_config(Arc::new(transport(address.ip().is_loopback())));
        Ok(config)
    }
}

/// Everything that has a default is set, so that no limit is a library's.
fn transport(loopback: bool) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(8))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .keep_alive_interval(Some(IDLE / 3))
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok())
        .datagram_receive_buffer_size(None);
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(FIRST_WINDOW);
    config.congestion_controller_factory(Arc::new(congestion));
    if loopback {
        config.initial_mtu(LOOPBACK_DATAGRAM).min_mtu(SAFE_DATAGRAM).mtu_discovery_config(None);
    } else {
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        discovery.upper_bound(FOUND_DATAGRAM_MAX);
        config.initial_mtu(SAFE_DATAGRAM).mtu_discovery_config(Some(discovery));
    }
    config
}

impl Transport for QuicTransport {
    fn local(&self) -> &PeerId {
        &self.shared.settings.local
    }

    fn send(&self, to: &NodeName, frame: Frame) -> Result<(), LinkError> {
        let (up, _) = self.shared.up(to)?;
        up.queue.try_send(frame).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LinkError::Full(to.clone()),
            mpsc::error::TrySendError::Closed(_) => LinkError::NotConnected(to.clone()),
        })
    }

    fn call(
        &self,
        to: &NodeName,
        class: Class,
        request: Frame,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Frame, LinkError>> {
        let (to, up) = (to.clone(), self.shared.up(to));
        Box::pin(async move {
            let (up, counts) = up?;
            let work = async {
                let mut stream = connection::open(&up, counts, class, connection::CALL, &request).await?;
                stream.finish();
                stream.read_frame().await
            };
            match tokio::time::timeout(deadline, work).await {
                Ok(done) => done,
                Err(_) => Err(LinkError::Deadline(to)),
            }
        })
    }

    fn open(
        &self,
        to: &NodeName,
        class: Class,
        header: Frame,
    ) -> BoxFuture<'_, Result<ByteStream, LinkError>> {
        let up = self.shared.up(to);
        Box::pin(async move {
            let (up, counts) = up?;
            connection::open(&up, counts, class, connection::STREAM, &header).await
        })
    }

    fn set_peers(&self, wanted: Vec<(NodeName, String)>) {
        let me = &self.shared.settings.local.node;
        let mut peers = self.shared.peers();
        let wanted: BTreeMap<_, _> = wanted.into_iter().filter(|(node, _)| node != me).collect();
        peers.retain(|node, peer| {
            let stays = wanted.get(node) == Some(&peer.address);
            if !stays {
                if let Some(dialler) = &peer.dialler {
                    dialler.abort();
                }
                if let Some(up) = &peer.up {
                    up.connection.close(VarInt::from_u32(0), b"not a peer any more");
                }
            }
            stays
        });
        for (node, address) in wanted {
            if peers.contains_key(&node) {
                continue;
            }
            let dials = *me < node;
            let dialler = dials.then(|| {
                tokio::spawn(dial(Arc::clone(&self.shared), node.clone(), address.clone())).abort_handle()
            });
            let reason = Some("it was not reached yet".to_owned());
            let counts = Arc::default();
            peers.insert(node, Peer { address, up: None, reason, heard: None, counts, dialler });
        }
    }

    fn disconnect(&self, node: &NodeName) {
        if let Some(up) = self.shared.peers().get(node).and_then(|peer| peer.up.as_ref()) {
            up.connection.close(VarInt::from_u32(5), b"taken for gone");
        }
    }

    fn peers(&self) -> Vec<PeerStatus> {
        let peers = self.shared.peers();
        let status = |(node, peer): (&NodeName, &Peer)| {
            let read = |counts: &[std::sync::atomic::AtomicU64; 6], at: usize| {
                counts[at].load(std::sync::atomic::Ordering::Relaxed)
            };
            PeerStatus {
                node: node.clone(),
                address: peer.address.clone(),
                up: peer.up.as_ref().map(|up| up.id.incarnation),
                reason: peer.reason.clone(),
                rtt: peer.up.as_ref().map(|up| up.connection.rtt()),
                last_heard: peer.heard,
                bytes: std::array::from_fn(|at| {
                    (read(&peer.counts.sent, at), read(&peer.counts.received, at))
                }),
            }
        };
        peers.iter().map(status).collect()
    }

    fn close(&self) {
        self.acceptor.abort();
        for peer in self.shared.peers().values() {
            if let Some(dialler) = &peer.dialler {
                dialler.abort();
            }
        }
        self.shared.endpoint.close(VarInt::from_u32(0), b"the node stops");
    }
}

/// Keeps a connection to a peer.
async fn dial(shared: Arc<Shared>, node: NodeName, address: String) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let began = Instant::now();
        let why = match tokio::time::timeout(DIAL_DEADLINE, connection::dial(&shared, &node, &address)).await
        {
            Ok(Ok(up)) => {
                backoff = BACKOFF_MIN;
                connection::run(&shared, up).await
            }
            Ok(Err(why)) => why,
            Err(_) => format!("no answer within {} s", DIAL_DEADLINE.as_secs()),
        };
        if let Some(peer) = shared.peers().get_mut(&node)
            && peer.up.is_none()
        {
            if peer.reason.as_ref() != Some(&why) {
                tracing::debug!(%node, %address, %why, "a peer is not reached");
            }
            peer.reason = Some(why);
        }
        // A tenth more or less, so that nodes that lost each other do not meet again and again in step.
        let jitter = f64::from(rand::random::<u16>()) / f64::from(u16::MAX);
        tokio::time::sleep(backoff.mul_f64(0.9 + 0.2 * jitter)).await;
        backoff = if began.elapsed() > BACKOFF_MAX { BACKOFF_MIN } else { (backoff * 2).min(BACKOFF_MAX) };
    }
}

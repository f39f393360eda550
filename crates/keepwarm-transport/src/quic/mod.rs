//! Links over QUIC: one endpoint, one connection to each peer.
//!
//! Of two nodes the one with the lower name dials, so that there is never a choice between two connections. What
//! happens on a connection is in `connection`; this is who is dialled, who is up, and the trait.

mod connection;
mod endpoint;
mod hello;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{FRAME_BYTES_MAX, Frame, FrameError, Version, Versions};
use quinn::{Endpoint, VarInt};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::AbortHandle;

use crate::certificate::CertificateError;
use crate::link::{Class, Incoming, LinkError, PeerId, PeerStatus, Transport, closed};
use crate::sockets::Sockets;
use crate::stream::{ByteStream, Counts, Kept};
pub use crate::tls::{TlsMaterial, TlsStore};
pub use endpoint::PathKind;
use endpoint::Window;
pub(crate) use endpoint::{IDLE, STREAM_WINDOW};

/// Events that wait for the node.
pub(crate) const INCOMING_MAX: usize = 1024;
/// Frames that wait for one peer.
pub(crate) const QUEUE_MAX: usize = 4096;
/// How long dialling may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(2);
/// How long opening a stream may wait for others to end.
const OPEN_DEADLINE: Duration = Duration::from_secs(10);
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
    /// Which versions are spoken: [`Versions::ALL`], or fewer where a new one is taken up in steps.
    pub versions: Versions,
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
    address: String,
    up: Option<Up>,
    reason: Option<String>,
    counts: Arc<Counts>,
    /// The latest start that was ever connected.
    latest: Incarnation,
    /// Events of one connection end before those of the next begin.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Dial now: the peer has shown itself, or its connection has ended.
    wake: Arc<Notify>,
    dialler: Option<AbortHandle>,
}

/// A connection that has said hello.
#[derive(Debug, Clone)]
pub(crate) struct Up {
    pub(crate) id: PeerId,
    pub(crate) version: Version,
    pub(crate) connection: quinn::Connection,
    pub(crate) queue: mpsc::Sender<Frame>,
    window: Arc<Window>,
    /// Room for streams of block bytes, and for relayed requests.
    bulk: Arc<Semaphore>,
    relays: Arc<Semaphore>,
}

/// What all tasks of the links share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: QuicSettings,
    path: PathKind,
    pub(crate) tls: Arc<TlsStore>,
    pub(crate) endpoint: Endpoint,
    pub(crate) incoming: mpsc::Sender<Incoming>,
    peers: Mutex<BTreeMap<NodeName, Peer>>,
}

impl Shared {
    pub(crate) fn peers(&self) -> MutexGuard<'_, BTreeMap<NodeName, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes why a peer is not up, and says so once for each reason.
    fn not_up(&self, node: &NodeName, why: String) {
        if let Some(peer) = self.peers().get_mut(node)
            && peer.up.is_none()
        {
            if peer.reason.as_ref() != Some(&why) {
                tracing::warn!(%node, address = %peer.address, %why, "a peer is not up");
            }
            peer.reason = Some(why);
        }
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
    /// Binds and begins to accept; peers are dialled once they are set. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`QuicError`]: each says what to do.
    pub fn start(settings: QuicSettings) -> Result<(Arc<Self>, mpsc::Receiver<Incoming>), QuicError> {
        Self::start_on(settings, PathKind::Auto)
    }

    /// [`QuicTransport::start`] where the way to the peers is known.
    ///
    /// # Errors
    /// [`QuicError`]: each says what to do.
    pub fn start_on(
        settings: QuicSettings,
        path: PathKind,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Incoming>), QuicError> {
        Self::start_over(settings, path, &Sockets::default())
    }

    /// [`QuicTransport::start_on`] in a network that need not be the system's.
    ///
    /// # Errors
    /// [`QuicError`]: each says what to do.
    pub fn start_over(
        settings: QuicSettings,
        path: PathKind,
        sockets: &Sockets,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Incoming>), QuicError> {
        let tls = Arc::new(TlsStore::open(&settings.cluster, &settings.local.node, settings.tls.clone())?);
        let endpoint = endpoint::bind(&settings, path, sockets, &tls)?;
        let path = path.of(settings.listen);
        let (send, receive) = mpsc::channel(INCOMING_MAX);
        let peers = Mutex::default();
        let shared = Arc::new(Shared { settings, path, tls, endpoint, incoming: send, peers });
        let acceptor = tokio::spawn(hello::accept(Arc::clone(&shared))).abort_handle();
        Ok((Arc::new(Self { shared, acceptor }), receive))
    }

    /// An endpoint and a way to dial with the same certificates and limits, and nothing of ours around them: what the
    /// links' speed is compared with.
    ///
    /// # Errors
    /// [`QuicError`]: each says what to do.
    #[doc(hidden)]
    pub fn bare(settings: &QuicSettings) -> Result<(Endpoint, quinn::ClientConfig), QuicError> {
        let tls = Arc::new(TlsStore::open(&settings.cluster, &settings.local.node, settings.tls.clone())?);
        let endpoint = endpoint::bind(settings, PathKind::Auto, &Sockets::default(), &tls)?;
        Ok((endpoint, endpoint::client(PathKind::Auto.of(settings.listen), &tls)?))
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

    /// What it shows and whom it trusts; outlives it, so that whoever watches the files can reload them.
    #[must_use]
    pub fn tls(&self) -> Arc<TlsStore> {
        Arc::clone(&self.shared.tls)
    }

    /// Reads the certificates again; connections that are made from now on use them.
    ///
    /// # Errors
    /// [`QuicError`]: what was in force stays.
    pub fn reload(&self) -> Result<(), QuicError> {
        Ok(self.shared.tls.reload()?)
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.close();
    }
}

impl Transport for QuicTransport {
    fn local(&self) -> &PeerId {
        &self.shared.settings.local
    }

    fn version(&self, peer: &NodeName) -> Option<Version> {
        self.shared.peers().get(peer).and_then(|peer| peer.up.as_ref()).map(|up| up.version)
    }

    fn send(&self, to: &NodeName, frame: Frame) -> Result<(), LinkError> {
        if frame.payload.len() > FRAME_BYTES_MAX {
            return Err(closed(FrameError::TooLong(frame.payload.len())));
        }
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
                let mut stream =
                    connection::open(&up, counts, class, connection::CALL, &request, None).await?;
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
        let (to, up) = (to.clone(), self.shared.up(to));
        Box::pin(async move {
            let (up, counts) = up?;
            let room = match class {
                Class::Relay => &up.relays,
                _ => &up.bulk,
            };
            let permit = tokio::time::timeout(OPEN_DEADLINE, Arc::clone(room).acquire_owned()).await;
            let permit = permit.map_err(|_| LinkError::Full(to))?.map_err(closed)?;
            let kept: Kept = Some(Arc::new((permit, up.window.share())));
            connection::open(&up, counts, class, connection::STREAM, &header, kept).await
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
            let wake = Arc::new(Notify::new());
            let dialling = dial(Arc::clone(&self.shared), node.clone(), address.clone(), Arc::clone(&wake));
            let peer = Peer {
                address,
                up: None,
                reason: Some("it was not reached yet".to_owned()),
                counts: Arc::default(),
                latest: Incarnation(0),
                turn: Arc::default(),
                wake,
                dialler: Some(tokio::spawn(dialling).abort_handle()),
            };
            peers.insert(node, peer);
        }
    }

    fn peers(&self) -> Vec<PeerStatus> {
        let status = |(node, peer): (&NodeName, &Peer)| PeerStatus {
            node: node.clone(),
            address: peer.address.clone(),
            up: peer.up.as_ref().map(|up| up.id.incarnation),
            version: peer.up.as_ref().map(|up| up.version),
            reason: peer.reason.clone().filter(|_| peer.up.is_none()),
            rtt: peer.up.as_ref().map(|up| up.connection.rtt()),
            last_heard: peer.counts.heard(),
            bytes: peer.counts.bytes(),
        };
        self.shared.peers().iter().map(status).collect()
    }

    fn disconnect(&self, node: &NodeName) {
        if let Some(up) = self.shared.peers().get(node).and_then(|peer| peer.up.as_ref()) {
            up.connection.close(VarInt::from_u32(5), b"taken for gone");
        }
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

/// Keeps a connection to a peer: dials it where this node has the lower name, else shows itself to it, so that the
/// peer dials, and at once after a new start of this node.
async fn dial(shared: Arc<Shared>, node: NodeName, address: String, wake: Arc<Notify>) {
    let dials = shared.settings.local.node < node;
    let mut backoff = BACKOFF_MIN;
    loop {
        let up = shared.peers().get(&node).is_some_and(|peer| peer.up.is_some());
        if up {
            // The connection is served by who made it, and its end wakes this.
            wake.notified().await;
            backoff = BACKOFF_MIN;
            continue;
        }
        let tried = tokio::time::timeout(DIAL_DEADLINE, hello::dial(&shared, &node, &address)).await;
        let why = match tried {
            Ok(Ok(Some(up))) => {
                backoff = BACKOFF_MIN;
                Some(connection::run(&shared, up).await)
            }
            // The peer knows that this node is there, and dials.
            Ok(Ok(None)) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some(format!("no answer from {address} (UDP) within {} s", DIAL_DEADLINE.as_secs())),
        };
        if let Some(why) = why {
            shared.not_up(&node, why);
        }
        // A tenth more or less, so that nodes that lost each other do not meet again and again in step.
        let jitter = f64::from(rand::random::<u16>()) / f64::from(u16::MAX);
        let woken = tokio::time::timeout(backoff.mul_f64(0.9 + 0.2 * jitter), wake.notified()).await.is_ok();
        backoff = if woken && dials { BACKOFF_MIN } else { (backoff * 2).min(BACKOFF_MAX) };
    }
}

//! The socket and every limit of QUIC: nothing is left to a library's default.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, Endpoint, EndpointConfig, TokioRuntime, TransportConfig, VarInt};

use super::{QuicError, QuicSettings};
use crate::socket::{Capped, FOUND_DATAGRAM_MAX, JUMBO_DATAGRAM, LOOPBACK_DATAGRAM, SAFE_DATAGRAM};
use crate::sockets::Sockets;
use crate::tls::TlsStore;

/// Streams that a peer may have open at once: its calls, batches of blocks and relayed requests.
pub(crate) const STREAMS_MAX: u32 = 1024;
/// Of them, those that carry block bytes and those that carry relayed requests, as this side opens them: the rest,
/// 1,024 - 64 - 512 = 448, is for calls.
pub(crate) const BULK_STREAMS_MAX: usize = 64;
pub(crate) const RELAY_STREAMS_MAX: usize = 512;
/// One-way streams of a peer: heartbeats and frames, and room for two that a later version may add.
const ONE_WAY_MAX: u32 = 4;
/// Bytes in flight on one stream: at 1 GB/s and 8 ms a round trip.
pub(crate) const STREAM_WINDOW: u32 = 8 << 20;
/// What heartbeats, frames and calls may have in flight whatever block bytes do: the frames' whole window, and half.
const CONTROL_WINDOW: u64 = 16 << 20;
/// Streams whose readers may all stand still before the connection's window has to grow.
const STREAMS_AT_REST: usize = 8;
/// Bytes sent and not acknowledged on one connection, whoever sent them.
const SEND_WINDOW: u64 = 64 << 20;
/// A dead peer's connection ends after this.
pub(crate) const IDLE: Duration = Duration::from_secs(3);
/// The first packets of a connection, before the network has answered: well above one large datagram.
const FIRST_WINDOW: u64 = 1 << 20;

/// What is known of the way to the peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathKind {
    /// [`PathKind::Loopback`] where the address listened on and the peer's are loopback, else [`PathKind::Unknown`].
    #[default]
    Auto,
    /// Within this machine: datagrams of 16,000 bytes.
    Loopback,
    /// An Ethernet of jumbo frames, all the way: up to 8,952 bytes, found by discovery.
    Jumbo,
    /// Anything: 1,200 bytes, and up to 1,452 where discovery finds that they pass.
    Unknown,
}

impl PathKind {
    /// What `Auto` means for a listening address.
    pub(crate) fn of(self, listen: SocketAddr) -> Self {
        match self {
            Self::Auto if listen.ip().is_loopback() => Self::Loopback,
            Self::Auto => Self::Unknown,
            chosen => chosen,
        }
    }

    /// Longest datagram.
    pub(crate) const fn datagram(self) -> u16 {
        match self {
            Self::Loopback => LOOPBACK_DATAGRAM,
            Self::Jumbo => JUMBO_DATAGRAM,
            Self::Auto | Self::Unknown => FOUND_DATAGRAM_MAX,
        }
    }
}

fn failed(error: impl std::fmt::Display) -> QuicError {
    QuicError::Tls(error.to_string())
}

/// Binds, with what this node shows and trusts.
pub(crate) fn bind(
    settings: &QuicSettings,
    path: PathKind,
    sockets: &Sockets,
    tls: &Arc<TlsStore>,
) -> Result<Endpoint, QuicError> {
    let listen = settings.listen;
    if tls.loopback_only() && !listen.ip().is_loopback() {
        return Err(QuicError::Open(listen));
    }
    let path = path.of(listen);
    let cannot = |cause| QuicError::Bind { address: listen, cause };
    let socket = sockets.bind(listen).map_err(cannot)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(path.datagram()).map_err(failed)?;
    let server = tls.server().map_err(failed)?;
    let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).map_err(failed)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(Arc::new(transport(path)));
    let capped = Capped::over(socket, path.datagram());
    Endpoint::new_with_abstract_socket(config, Some(server), capped, Arc::new(TokioRuntime)).map_err(cannot)
}

/// How to dial.
pub(crate) fn client(path: PathKind, tls: &Arc<TlsStore>) -> Result<quinn::ClientConfig, QuicError> {
    let client = tls.client().map_err(failed)?;
    let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).map_err(failed)?;
    let mut config = quinn::ClientConfig::new(Arc::new(client));
    config.transport_config(Arc::new(transport(path)));
    Ok(config)
}

fn transport(path: PathKind) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(ONE_WAY_MAX))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(window(0))
        .send_window(SEND_WINDOW)
        .keep_alive_interval(Some(IDLE / 3))
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok())
        .datagram_receive_buffer_size(None);
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(FIRST_WINDOW);
    config.congestion_controller_factory(Arc::new(congestion));
    match path {
        PathKind::Loopback => {
            config.initial_mtu(LOOPBACK_DATAGRAM).min_mtu(SAFE_DATAGRAM).mtu_discovery_config(None);
        }
        PathKind::Auto | PathKind::Jumbo | PathKind::Unknown => {
            let mut discovery = quinn::MtuDiscoveryConfig::default();
            discovery.upper_bound(path.datagram());
            config.initial_mtu(SAFE_DATAGRAM).mtu_discovery_config(Some(discovery));
        }
    }
    config
}

/// The connection's window while `open` streams are in readers' hands: even if all stand still, heartbeats and frames
/// pass. At most 16 MiB + 2 x (64 + 512) x 8 MiB, and then only if every reader of every stream stands still.
fn window(open: usize) -> VarInt {
    let streams = open.max(STREAMS_AT_REST) as u64;
    VarInt::from_u64(CONTROL_WINDOW + streams * u64::from(STREAM_WINDOW)).unwrap_or(VarInt::MAX)
}

/// A connection's window, that grows with the streams in readers' hands.
#[derive(Debug)]
pub(crate) struct Window {
    connection: Connection,
    open: Mutex<usize>,
}

/// One stream's part of a [`Window`].
pub(crate) struct Share(Arc<Window>);

impl Window {
    pub(crate) fn new(connection: Connection) -> Arc<Self> {
        Arc::new(Self { connection, open: Mutex::new(0) })
    }

    /// For a stream that is handed to a reader.
    pub(crate) fn share(self: &Arc<Self>) -> Share {
        self.change(|open| open + 1);
        Share(Arc::clone(self))
    }

    fn change(&self, by: impl Fn(usize) -> usize) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let before = window(*open);
        *open = by(*open);
        if window(*open) != before {
            self.connection.set_receive_window(window(*open));
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.change(|open| open.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use keepwarm_wire::Versions;

    use super::*;
    use crate::link::PeerId;
    use crate::quic::{QuicTransport, TlsMaterial};

    /// A side of a bare connection over loopback.
    fn side() -> (Endpoint, quinn::ClientConfig) {
        let local = PeerId { node: "a".parse().unwrap(), incarnation: keepwarm_types::Incarnation(1) };
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (tls, versions) = (TlsMaterial::LoopbackOnly, Versions::ALL);
        let cluster = "t".to_owned();
        QuicTransport::bare(&QuicSettings { local, cluster, cluster_id: 1, listen, tls, versions }).unwrap()
    }

    #[tokio::test]
    async fn loopback_carries_large_datagrams_in_batches_that_the_kernel_takes() {
        const LENGTH: usize = 64 << 20;
        let ((server, _), (client, config)) = (side(), side());
        let to = server.local_addr().unwrap();
        let receiving = tokio::spawn(async move {
            let connection = server.accept().await.unwrap().await.unwrap();
            let mut stream = connection.accept_uni().await.unwrap();
            let mut length = 0;
            while let Some(chunk) = stream.read_chunk(1 << 20, true).await.unwrap() {
                length += chunk.bytes.len();
            }
            (length, connection)
        });
        let connection = client.connect_with(config, to, "keepwarm").unwrap().await.unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&vec![7; LENGTH]).await.unwrap();
        stream.finish().unwrap();
        assert_eq!(receiving.await.unwrap().0, LENGTH);
        let stats = connection.stats();
        assert_eq!(stats.path.current_mtu, LOOPBACK_DATAGRAM, "{stats:?}");
        assert_eq!(stats.path.black_holes_detected, 0, "{stats:?}");
        let each = stats.udp_tx.bytes / stats.udp_tx.ios;
        assert!(
            each <= 4 * u64::from(LOOPBACK_DATAGRAM) && each > 2 * u64::from(LOOPBACK_DATAGRAM),
            "{stats:?}"
        );
    }

    #[test]
    fn a_path_is_loopback_only_where_the_address_is() {
        assert_eq!(PathKind::Auto.of("127.0.0.1:1".parse().unwrap()), PathKind::Loopback);
        assert_eq!(PathKind::Auto.of("10.0.0.1:1".parse().unwrap()), PathKind::Unknown);
        assert_eq!(PathKind::Jumbo.of("10.0.0.1:1".parse().unwrap()), PathKind::Jumbo);
    }
}

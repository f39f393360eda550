//! Where links' datagrams go: the system's UDP, or a network that a test has made.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// An unreliable socket of a network that is not the system's.
pub trait Datagrams: fmt::Debug + Send + Sync + 'static {
    /// Sends one datagram or loses it; never waits.
    ///
    /// # Errors
    /// What makes the socket useless; a datagram that nobody takes is no error.
    fn send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()>;

    /// Takes the next datagram: its length and its sender.
    fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>>;

    /// Where it is bound.
    ///
    /// # Errors
    /// What the network says.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// Binds a socket at an address.
pub type Bind = dyn Fn(SocketAddr) -> io::Result<Arc<dyn Datagrams>> + Send + Sync;

/// The network that links are bound in; by default the system's.
#[derive(Clone, Default)]
pub struct Sockets(Option<Arc<Bind>>);

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Sockets(made)" } else { "Sockets(system)" })
    }
}

impl Sockets {
    /// A network whose sockets this makes. Timers are tokio's, so a paused clock holds for the links too.
    #[must_use]
    pub fn made_by(bind: Arc<Bind>) -> Self {
        Self(Some(bind))
    }

    pub(crate) fn bind(&self, listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        match &self.0 {
            Some(bind) => Ok(Arc::new(Made(bind(listen)?))),
            None => TokioRuntime.wrap_udp_socket(std::net::UdpSocket::bind(listen)?),
        }
    }
}

/// A made socket as QUIC takes it: one datagram at a time, without marks for congestion.
#[derive(Debug)]
struct Made(Arc<dyn Datagrams>);

/// A made socket never waits.
#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Made {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.send(transmit.contents, transmit.destination)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let (Some(into), Some(meta)) = (bufs.first_mut(), meta.first_mut()) else {
            return Poll::Ready(Ok(0));
        };
        self.0.poll_receive(cx, into).map_ok(|(len, addr)| {
            *meta = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
            1
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

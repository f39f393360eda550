//! The simulated network's UDP, as the nodes' links take it.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use futures::FutureExt;
use keepwarm_transport::{Datagrams, Sockets};
use turmoil::net::UdpSocket;

/// Waits until a datagram is there.
type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// A socket of the host that is running.
struct Socket {
    socket: Arc<UdpSocket>,
    readable: Mutex<Option<Readable>>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.socket.fmt(f)
    }
}

/// Sockets of whichever host asks.
pub(super) fn sockets() -> Sockets {
    Sockets::made_by(Arc::new(|listen| {
        // A host has one address, and the network wants no more than the port.
        let bound = UdpSocket::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, listen.port())));
        let socket = bound.now_or_never().expect("binding does not wait")?;
        Ok(Arc::new(Socket { socket: Arc::new(socket), readable: Mutex::default() }) as Arc<dyn Datagrams>)
    }))
}

impl Datagrams for Socket {
    fn send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        self.socket.try_send_to(bytes, to).map(|_| ())
    }

    fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut waiting = self.readable.lock().unwrap();
        loop {
            // Whoever waits has the socket to itself.
            if let Some(readable) = waiting.as_mut() {
                ready!(readable.as_mut().poll(cx))?;
                *waiting = None;
            }
            match self.socket.try_recv_from(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return Poll::Ready(received),
            }
            let socket = Arc::clone(&self.socket);
            *waiting = Some(Box::pin(async move { socket.readable().await }));
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

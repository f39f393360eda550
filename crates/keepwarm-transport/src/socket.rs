//! Large datagrams: fewer bytes spent on headers, encryption and system calls.
//!
//! quinn hands the kernel up to ten segments at once; with large datagrams that is more than one UDP message may
//! have, the kernel refuses, and quinn takes that for loss. The wrapper here caps the number.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// Datagrams over loopback: 16,000 bytes in four segments reached 5.9 GB/s here, 1,452 bytes 1.5.
pub(crate) const LOOPBACK_DATAGRAM: u16 = 16_000;
/// Datagrams over jumbo frames: 9,000 bytes without IP's and UDP's headers; 7 segments reached 4.3 GB/s.
pub(crate) const JUMBO_DATAGRAM: u16 = 8_952;
/// Datagrams over a path that is not known: what every path carries.
pub(crate) const SAFE_DATAGRAM: u16 = 1_200;
/// As far as discovery goes on an unknown path: Ethernet's 1,500 without IP's and UDP's headers.
pub(crate) const FOUND_DATAGRAM_MAX: u16 = 1_452;
/// Longest UDP message: 65,535 without IP's and UDP's headers.
const MESSAGE_MAX: usize = 65_507;

/// A socket that offers no more segments than one message may have.
pub(crate) struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
}

impl Capped {
    /// For datagrams of up to `datagram` bytes.
    pub(crate) fn over(inner: Arc<dyn AsyncUdpSocket>, datagram: u16) -> Arc<dyn AsyncUdpSocket> {
        Arc::new(Self { inner, segments: (MESSAGE_MAX / usize::from(datagram)).max(1) })
    }
}

impl fmt::Debug for Capped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Capped({:?}, {} segments)", self.inner, self.segments)
    }
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_batch_of_segments_is_longer_than_a_message() {
        for datagram in [LOOPBACK_DATAGRAM, JUMBO_DATAGRAM, SAFE_DATAGRAM, FOUND_DATAGRAM_MAX] {
            let segments = (MESSAGE_MAX / usize::from(datagram)).max(1);
            assert!(segments * usize::from(datagram) <= MESSAGE_MAX, "{datagram}");
        }
    }
}

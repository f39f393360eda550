//! A client's request on its way to the owner: once, over the peer link, as the bytes that the client's own
//! connection would carry.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use keepwarm_transport::{ByteStream, Class, LinkError};
use keepwarm_types::{Millis, NodeName, TenantName};
use keepwarm_wire::control::RelayHeader;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use super::Cluster;
use crate::error::Error;

/// How long a stream to the owner may take to open.
const OPEN_DEADLINE: Duration = Duration::from_secs(2);
/// When a client may come again after its owner could not be reached: a take-over is a fraction of a second.
const RETRY_AFTER: Millis = Millis(300);

/// For whom a relayed request acts, as the node that the client asked has found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayedCaller {
    /// The tenant.
    pub tenant: TenantName,
    /// Whether it may make admin calls.
    pub admin: bool,
    /// The request's id, the same on both nodes.
    pub request_id: String,
}

/// A relayed request that came in.
#[derive(Debug)]
pub struct IncomingRelay {
    /// For whom it acts.
    pub caller: RelayedCaller,
    /// The node that relays it.
    pub from: NodeName,
    /// HTTP/1.1, one request.
    pub stream: RelayStream,
}

/// Bytes to and from another node, as a connection.
#[derive(Debug)]
pub struct RelayStream(ByteStream);

impl RelayStream {
    pub(super) const fn new(stream: ByteStream) -> Self {
        Self(stream)
    }
}

impl AsyncRead for RelayStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for RelayStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Cluster {
    /// Opens a way for one request to another node.
    pub(crate) async fn relay(&self, to: &NodeName, caller: &RelayedCaller) -> Result<RelayStream, Error> {
        let header = RelayHeader {
            tenant: caller.tenant.clone(),
            admin: caller.admin,
            request_id: caller.request_id.clone(),
            hops: 1,
        };
        let unreachable = |why: String| Error::Unavailable {
            reason: format!("node '{to}', which owns it, cannot be reached: {why}"),
            retry_after: RETRY_AFTER,
        };
        let version = self.transport.version(to).ok_or_else(|| LinkError::NotConnected(to.clone()));
        let version = version.map_err(|error| unreachable(error.to_string()))?;
        let frame = header.encode(version).map_err(|error| Error::Internal(error.to_string()))?;
        match timeout(OPEN_DEADLINE, self.transport.open(to, Class::Relay, frame)).await {
            Ok(Ok(stream)) => Ok(RelayStream::new(stream)),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(unreachable(format!("no answer within {} s", OPEN_DEADLINE.as_secs()))),
        }
    }
}

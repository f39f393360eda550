//! What a node needs of its links, and what comes in over them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{Frame, HEADER_BYTES, decode_header, encode_frame};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// What a message is for; the first is the most urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Whether a peer is there.
    Liveness,
    /// Who owns what: the registry, changes, take-overs.
    Ownership,
    /// Bytes that somebody waits for.
    Restore,
    /// Bytes of changes on their way to holders.
    Checkpoint,
    /// Clients' requests on their way to the owner.
    Relay,
    /// Everything that may take its time.
    Rebalance,
}

impl Class {
    /// All, the most urgent first.
    pub const ALL: [Self; 6] =
        [Self::Liveness, Self::Ownership, Self::Restore, Self::Checkpoint, Self::Relay, Self::Rebalance];

    pub(crate) const fn number(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The word that metrics use.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Ownership => "ownership",
            Self::Restore => "restore",
            Self::Checkpoint => "checkpoint",
            Self::Relay => "relay",
            Self::Rebalance => "rebalance",
        }
    }
}

/// One process of one node, as links tell processes apart: a later start has a higher incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerId {
    /// Which node.
    pub node: NodeName,
    /// Which start of it.
    pub incarnation: Incarnation,
}

/// Why something did not get through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is no link now; nothing was sent.
    #[error("node '{0}' is not connected")]
    NotConnected(NodeName),
    /// The queue to the peer is full; nothing was sent.
    #[error("the queue to node '{0}' is full")]
    Full(NodeName),
    /// No answer came in time; the request may have arrived.
    #[error("node '{0}' did not answer in time")]
    Deadline(NodeName),
    /// The link or stream broke; what was sent may have arrived.
    #[error("the link broke: {0}")]
    Closed(String),
}

/// A peer, as its link shows it.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// Which node.
    pub node: NodeName,
    /// Where it is dialled.
    pub address: String,
    /// The process that is connected; none while it is not up.
    pub up: Option<Incarnation>,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Round trip, while it is up.
    pub rtt: Option<Duration>,
    /// When anything was last heard of it.
    pub last_heard: Option<Instant>,
    /// Bytes sent and received on streams, by class.
    pub bytes: [(u64, u64); 6],
}

/// What comes in.
#[derive(Debug)]
pub enum Incoming {
    /// A peer is up.
    Up(PeerId),
    /// A peer is down, and why.
    Down(PeerId, String),
    /// A frame; in the order in which it was sent while a connection lasts.
    Frame(PeerId, Frame),
    /// A request that wants an answer.
    Call {
        /// Who asks.
        from: PeerId,
        /// How urgent it is.
        class: Class,
        /// What is asked.
        request: Frame,
        /// Takes the answer; dropping it tells the caller that there is none.
        answer: Responder,
    },
    /// A stream that a peer opened.
    Stream {
        /// Who opened it.
        from: PeerId,
        /// How urgent it is.
        class: Class,
        /// What it is for.
        header: Frame,
        /// Its bytes.
        stream: ByteStream,
    },
}

/// Takes the answer to a call.
#[derive(Debug)]
pub struct Responder(pub(crate) oneshot::Sender<Frame>);

impl Responder {
    /// Answers. A caller that has gone away needs none.
    pub fn send(self, answer: Frame) {
        let _ = self.0.send(answer);
    }
}

/// Links to all peers of one node.
pub trait Transport: Send + Sync + 'static {
    /// This process.
    fn local(&self) -> &PeerId;

    /// Queues a frame for a peer: in order, and lost where the connection ends.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`] or [`LinkError::Full`], at once.
    fn send(&self, to: &NodeName, frame: Frame) -> Result<(), LinkError>;

    /// Asks a peer, on a stream of its own. Dropping the future gives the answer up; the request may have arrived.
    ///
    /// # Errors
    /// [`LinkError`]; only [`LinkError::NotConnected`] says that nothing arrived.
    fn call(
        &self,
        to: &NodeName,
        class: Class,
        request: Frame,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Frame, LinkError>>;

    /// Opens a stream to a peer. Dropping the stream resets it.
    ///
    /// # Errors
    /// [`LinkError`].
    fn open(
        &self,
        to: &NodeName,
        class: Class,
        header: Frame,
    ) -> BoxFuture<'_, Result<ByteStream, LinkError>>;

    /// All other nodes and where they are; names are resolved again at each try.
    fn set_peers(&self, peers: Vec<(NodeName, String)>);

    /// Ends the connection to a peer that is known to be gone, so that nobody waits for it; it is dialled again.
    fn disconnect(&self, node: &NodeName);

    /// What the links show now.
    fn peers(&self) -> Vec<PeerStatus>;

    /// Ends all links.
    fn close(&self);
}

/// Bytes in both directions. Dropping it before its end resets it, which its other side sees as an error.
pub struct ByteStream {
    pub(crate) send: quinn::SendStream,
    pub(crate) receive: quinn::RecvStream,
    /// What it counts its bytes in.
    pub(crate) count: Arc<Counts>,
    pub(crate) class: Class,
    /// Whether the end was sent.
    finished: bool,
}

/// Bytes of a peer's streams, sent and received, by class.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) sent: [AtomicU64; 6],
    pub(crate) received: [AtomicU64; 6],
}

impl std::fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ByteStream({})", self.class.word())
    }
}

impl Drop for ByteStream {
    fn drop(&mut self) {
        if !self.finished {
            self.reset();
        }
    }
}

pub(crate) fn closed(error: impl std::fmt::Display) -> LinkError {
    LinkError::Closed(error.to_string())
}

/// Code of a stream that was given up.
const GIVEN_UP: u32 = 1;

impl ByteStream {
    pub(crate) const fn new(
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        count: Arc<Counts>,
        class: Class,
    ) -> Self {
        Self { send, receive, count, class, finished: false }
    }

    fn sent(&self, bytes: usize) {
        self.count.sent[usize::from(self.class.number())].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn received(&self, bytes: usize) {
        self.count.received[usize::from(self.class.number())].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The next bytes, at most `max`; none at the end. Cancel safe.
    ///
    /// # Errors
    /// [`LinkError::Closed`] where the other side reset it or the link broke.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, LinkError> {
        let chunk = self.receive.read_chunk(max, true).await.map_err(closed)?;
        let bytes = chunk.map(|chunk| chunk.bytes);
        self.received(bytes.as_ref().map_or(0, Bytes::len));
        Ok(bytes)
    }

    /// Sends bytes without copying them first. Not cancel safe: a part may have been sent.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), LinkError> {
        let length = chunk.len();
        self.send.write_chunk(chunk).await.map_err(closed)?;
        self.sent(length);
        Ok(())
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_frame(&mut self, frame: &Frame) -> Result<(), LinkError> {
        self.write_chunk(encode_frame(frame).map_err(closed)?).await
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// [`LinkError::Closed`] where it is none, or the stream ended before.
    pub async fn read_frame(&mut self) -> Result<Frame, LinkError> {
        let frame = read_frame(&mut self.receive).await?;
        self.received(HEADER_BYTES + frame.payload.len());
        Ok(frame)
    }

    /// No more bytes will be sent; those that were are delivered.
    pub fn finish(&mut self) {
        // An error means that it has ended already.
        let _ = self.send.finish();
        self.finished = true;
    }

    /// Gives it up in both directions.
    pub fn reset(&mut self) {
        let code = quinn::VarInt::from_u32(GIVEN_UP);
        // Errors mean that it has ended already.
        let _ = self.send.reset(code);
        let _ = self.receive.stop(code);
        self.finished = true;
    }
}

pub(crate) async fn read_frame(receive: &mut quinn::RecvStream) -> Result<Frame, LinkError> {
    let mut head = [0; HEADER_BYTES];
    receive.read_exact(&mut head).await.map_err(closed)?;
    let header = decode_header(&head).map_err(closed)?;
    let mut payload = BytesMut::zeroed(header.length());
    receive.read_exact(&mut payload).await.map_err(closed)?;
    header.frame(payload.freeze()).map_err(closed)
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let read = AsyncRead::poll_read(Pin::new(&mut self.receive), cx, buf);
        self.received(buf.filled().len() - before);
        read
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = AsyncWrite::poll_write(Pin::new(&mut self.send), cx, buf);
        if let Poll::Ready(Ok(length)) = &written {
            self.sent(*length);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.send), cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

//! Byte streams: two halves, over QUIC or in memory, that count what passes.
//!
//! A half that is dropped before its end resets the stream, so that the other side never takes a part for the whole.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use keepwarm_wire::{Frame, HEADER_BYTES, Version, decode_header, encode_frame};
use quinn::VarInt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio::time::Sleep;

use crate::link::{Class, LinkError, closed};
use crate::pipe::Pipe;

/// Code of a stream that was given up.
const GIVEN_UP: VarInt = VarInt::from_u32(1);
/// Longest piece that one read of an in-memory pipe into a caller's buffer takes.
const READ_BYTES_MAX: usize = 1 << 20;

/// What has passed between this node and a peer: bytes of streams by class, and when anything came last.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) sent: [AtomicU64; 6],
    pub(crate) received: [AtomicU64; 6],
    /// Nanoseconds after `epoch()` and one; zero: never.
    heard: AtomicU64,
}

fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

impl Counts {
    /// Something came.
    pub(crate) fn hear(&self) {
        let since = u64::try_from(epoch().elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        self.heard.fetch_max(since + 1, Ordering::Relaxed);
    }

    /// When something came last.
    pub(crate) fn heard(&self) -> Option<Instant> {
        let since = self.heard.load(Ordering::Relaxed).checked_sub(1)?;
        epoch().checked_add(Duration::from_nanos(since))
    }

    pub(crate) fn sent(&self, class: Class, bytes: usize) {
        self.sent[usize::from(class.number())].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, class: Class, bytes: usize) {
        self.received[usize::from(class.number())].fetch_add(bytes as u64, Ordering::Relaxed);
        self.hear();
    }

    /// Sent and received, by class.
    pub(crate) fn bytes(&self) -> [(u64, u64); 6] {
        std::array::from_fn(|at| {
            (self.sent[at].load(Ordering::Relaxed), self.received[at].load(Ordering::Relaxed))
        })
    }
}

/// Runs when the last half of a stream goes: room that it took in a window or among the open streams.
pub(crate) type Kept = Option<Arc<dyn Send + Sync>>;

enum From {
    Quic(quinn::RecvStream),
    Memory(Pipe, Option<Pin<Box<Sleep>>>),
}

enum To {
    Quic(quinn::SendStream),
    Memory(Pipe),
}

/// What comes. Dropping it before the end tells the writer to stop.
pub struct ReadHalf {
    from: From,
    counts: Arc<Counts>,
    class: Class,
    /// The end, or an error, was read.
    ended: bool,
    _kept: Kept,
}

/// What goes. Dropping it before [`WriteHalf::finish`] resets it, which its reader sees as an error.
pub struct WriteHalf {
    to: To,
    counts: Arc<Counts>,
    class: Class,
    /// It was finished or reset.
    ended: bool,
    _kept: Kept,
}

/// Bytes in both directions. Dropping it before its end resets it, which its other side sees as an error.
#[derive(Debug)]
pub struct ByteStream {
    read: ReadHalf,
    write: WriteHalf,
    version: Version,
}

impl std::fmt::Debug for ReadHalf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadHalf({})", self.class.word())
    }
}

impl std::fmt::Debug for WriteHalf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WriteHalf({})", self.class.word())
    }
}

impl Drop for ReadHalf {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        self.reset();
    }
}

impl ReadHalf {
    /// The next bytes, at most `max`, without a copy; none at the end. Cancel safe.
    ///
    /// # Errors
    /// [`LinkError::Closed`] where the other side reset it or the link broke.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, LinkError> {
        let read = match &mut self.from {
            From::Quic(stream) => {
                stream.read_chunk(max, true).await.map(|chunk| chunk.map(|chunk| chunk.bytes)).map_err(closed)
            }
            From::Memory(pipe, timer) => poll_fn(|cx| pipe.poll_read(cx, max, timer)).await,
        };
        self.note(&read);
        read
    }

    fn note(&mut self, read: &Result<Option<Bytes>, LinkError>) {
        match read {
            Ok(Some(bytes)) => self.counts.received(self.class, bytes.len()),
            Ok(None) | Err(_) => self.ended = true,
        }
    }

    /// Fills the buffer. Not cancel safe.
    ///
    /// # Errors
    /// [`LinkError::Closed`], also where the stream ends before.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), LinkError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let chunk = self.read_chunk(buffer.len() - filled).await?;
            let chunk = chunk.ok_or_else(|| closed("the stream ended in the middle of something"))?;
            buffer[filled..filled + chunk.len()].copy_from_slice(&chunk);
            filled += chunk.len();
        }
        Ok(())
    }

    /// Reads a frame. Not cancel safe.
    ///
    /// # Errors
    /// [`LinkError::Closed`] where it is none, or the stream ended before.
    pub async fn read_frame(&mut self) -> Result<Frame, LinkError> {
        let mut head = [0; HEADER_BYTES];
        self.read_exact(&mut head).await?;
        let header = decode_header(&head).map_err(closed)?;
        let mut payload = BytesMut::zeroed(header.length());
        self.read_exact(&mut payload).await?;
        header.frame(payload.freeze()).map_err(closed)
    }

    /// No more is wanted: the writer is told.
    pub fn stop(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        match &mut self.from {
            // An error means that it has ended already.
            From::Quic(stream) => drop(stream.stop(GIVEN_UP)),
            From::Memory(pipe, _) => pipe.stop(),
        }
    }
}

impl WriteHalf {
    /// Sends bytes without copying them first. Not cancel safe: a part may have been sent.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), LinkError> {
        let length = chunk.len();
        match &mut self.to {
            To::Quic(stream) => stream.write_chunk(chunk).await.map_err(closed)?,
            To::Memory(pipe) => {
                let mut chunk = chunk;
                while !chunk.is_empty() {
                    poll_fn(|cx| pipe.poll_write(cx, &mut chunk)).await?;
                }
            }
        }
        self.counts.sent(self.class, length);
        Ok(())
    }

    /// Sends a frame. Not cancel safe.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_frame(&mut self, frame: &Frame) -> Result<(), LinkError> {
        self.write_chunk(encode_frame(frame).map_err(closed)?).await
    }

    /// No more bytes will be sent; those that were are delivered.
    pub fn finish(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        match &mut self.to {
            // An error means that it has ended already.
            To::Quic(stream) => drop(stream.finish()),
            To::Memory(pipe) => pipe.finish(),
        }
    }

    /// Gives it up: what was not delivered is lost, and its reader gets an error.
    pub fn reset(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        match &mut self.to {
            To::Quic(stream) => drop(stream.reset(GIVEN_UP)),
            To::Memory(pipe) => pipe.fail("the other side reset the stream"),
        }
    }

    /// Waits until the other side has everything, or has gone.
    pub(crate) async fn delivered(&mut self) {
        if let To::Quic(stream) = &mut self.to {
            let _ = stream.stopped().await;
        }
    }
}

impl ByteStream {
    pub(crate) fn over_quic(
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        counts: Arc<Counts>,
        class: Class,
        version: Version,
    ) -> Self {
        Self::of(From::Quic(receive), To::Quic(send), counts, class, version)
    }

    pub(crate) fn in_memory(
        from: Pipe,
        to: Pipe,
        counts: Arc<Counts>,
        class: Class,
        version: Version,
    ) -> Self {
        Self::of(From::Memory(from, None), To::Memory(to), counts, class, version)
    }

    fn of(from: From, to: To, counts: Arc<Counts>, class: Class, version: Version) -> Self {
        Self {
            read: ReadHalf { from, counts: Arc::clone(&counts), class, ended: false, _kept: None },
            write: WriteHalf { to, counts, class, ended: false, _kept: None },
            version,
        }
    }

    /// The version that both ends speak in the frames on it.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// What both halves keep until they go.
    pub(crate) fn keep(&mut self, kept: Kept) {
        self.read._kept.clone_from(&kept);
        self.write._kept = kept;
    }

    /// Its two directions, each on its own.
    #[must_use]
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// See [`ReadHalf::read_chunk`].
    ///
    /// # Errors
    /// [`LinkError::Closed`] where the other side reset it or the link broke.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, LinkError> {
        self.read.read_chunk(max).await
    }

    /// See [`WriteHalf::write_chunk`].
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), LinkError> {
        self.write.write_chunk(chunk).await
    }

    /// See [`WriteHalf::write_frame`].
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn write_frame(&mut self, frame: &Frame) -> Result<(), LinkError> {
        self.write.write_frame(frame).await
    }

    /// See [`ReadHalf::read_frame`].
    ///
    /// # Errors
    /// [`LinkError::Closed`] where it is none, or the stream ended before.
    pub async fn read_frame(&mut self) -> Result<Frame, LinkError> {
        self.read.read_frame().await
    }

    /// How urgent it is, once that is known.
    pub(crate) fn rank(&mut self, class: Class, priority: i32) {
        (self.read.class, self.write.class) = (class, class);
        if let To::Quic(stream) = &self.write.to {
            // An error means that it has ended already.
            let _ = stream.set_priority(priority);
        }
    }

    pub(crate) async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), LinkError> {
        self.read.read_exact(buffer).await
    }

    pub(crate) async fn delivered(&mut self) {
        self.write.delivered().await;
    }

    /// No more bytes will be sent; those that were are delivered.
    pub fn finish(&mut self) {
        self.write.finish();
    }

    /// Gives it up in both directions.
    pub fn reset(&mut self) {
        self.write.reset();
        self.read.stop();
    }
}

fn io(error: LinkError) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let read = match &mut this.from {
            From::Quic(stream) => ready!(AsyncRead::poll_read(Pin::new(stream), cx, buf)),
            From::Memory(pipe, timer) => {
                let max = buf.remaining().min(READ_BYTES_MAX);
                ready!(pipe.poll_read(cx, max, timer)).map_err(io).map(|chunk| {
                    buf.put_slice(chunk.as_deref().unwrap_or_default());
                })
            }
        };
        let bytes = buf.filled().len() - before;
        this.counts.received(this.class, bytes);
        this.ended |= read.is_err() || bytes == 0;
        Poll::Ready(read)
    }
}

impl AsyncWrite for WriteHalf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let this = &mut *self;
        let written = match &mut this.to {
            To::Quic(stream) => ready!(AsyncWrite::poll_write(Pin::new(stream), cx, buf)),
            To::Memory(pipe) => {
                let mut chunk = Bytes::copy_from_slice(buf);
                ready!(pipe.poll_write(cx, &mut chunk)).map_err(io)
            }
        };
        if let Ok(length) = &written {
            this.counts.sent(this.class, *length);
        }
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}

//! One direction of an in-memory stream: bytes in order, a bound, an end, and a reset that is no end.
//!
//! A pipe may be slow (bytes arrive a while after they were sent) and may be cut (none arrive until it heals); it
//! knows nothing of nodes.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::time::{Instant, Sleep};

use crate::link::{LinkError, closed};

/// Bytes that wait for a reader: the window of a QUIC stream.
const PIPE_BYTES_MAX: usize = crate::quic::STREAM_WINDOW as usize;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    finished: bool,
    /// Why nothing more comes: its writer reset it, or the link broke.
    broken: Option<String>,
    /// The reader wants no more.
    stopped: bool,
    cut: bool,
    delay: Duration,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// One direction; shared by its two ends and by the network that may break it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pipe(Arc<Mutex<State>>);

impl Pipe {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether bytes arrive, and how late.
    pub(crate) fn shape(&self, cut: bool, delay: Duration) {
        let mut state = self.state();
        (state.cut, state.delay) = (cut, delay);
        state.wake();
    }

    /// Nothing more comes, and what waited is lost.
    pub(crate) fn fail(&self, why: &str) {
        let mut state = self.state();
        if state.broken.is_none() && !(state.finished && state.waiting.is_empty()) {
            state.broken = Some(why.to_owned());
            state.waiting.clear();
            state.bytes = 0;
        }
        state.wake();
    }

    /// The writer is done.
    pub(crate) fn finish(&self) {
        let mut state = self.state();
        state.finished = true;
        state.wake();
    }

    /// The reader wants no more.
    pub(crate) fn stop(&self) {
        let mut state = self.state();
        state.stopped = true;
        state.waiting.clear();
        state.bytes = 0;
        state.wake();
    }

    /// Whether both its ends are gone but for the network's.
    pub(crate) fn abandoned(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// Takes as much of `chunk` as there is room for, at least a byte, and says how much.
    pub(crate) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        chunk: &mut Bytes,
    ) -> Poll<Result<usize, LinkError>> {
        let mut state = self.state();
        if let Some(why) = &state.broken {
            return Poll::Ready(Err(closed(why)));
        }
        if state.stopped {
            return Poll::Ready(Err(closed("the reader gave the stream up")));
        }
        if state.finished {
            return Poll::Ready(Err(closed("the stream was finished before")));
        }
        let room = PIPE_BYTES_MAX.saturating_sub(state.bytes).min(chunk.len());
        if room == 0 && !chunk.is_empty() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let piece = chunk.split_to(room);
        let at = Instant::now() + state.delay;
        state.bytes += room;
        if room > 0 {
            state.waiting.push_back((at, piece));
        }
        if let Some(waker) = state.reader.take() {
            waker.wake();
        }
        Poll::Ready(Ok(room))
    }

    /// The next bytes, at most `max`; none at the end.
    pub(crate) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        max: usize,
        timer: &mut Option<Pin<Box<Sleep>>>,
    ) -> Poll<Result<Option<Bytes>, LinkError>> {
        let mut state = self.state();
        if let Some(why) = &state.broken {
            return Poll::Ready(Err(closed(why)));
        }
        state.reader = Some(cx.waker().clone());
        if state.cut {
            return Poll::Pending;
        }
        let finished = state.finished;
        let Some((at, chunk)) = state.waiting.front_mut() else {
            return if finished { Poll::Ready(Ok(None)) } else { Poll::Pending };
        };
        if *at > Instant::now() {
            let sleep = timer.insert(Box::pin(tokio::time::sleep_until(*at)));
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        let piece = chunk.split_to(max.min(chunk.len()));
        if !chunk.has_remaining() {
            state.waiting.pop_front();
        }
        state.bytes -= piece.len();
        if let Some(waker) = state.writer.take() {
            waker.wake();
        }
        Poll::Ready(Ok(Some(piece)))
    }
}

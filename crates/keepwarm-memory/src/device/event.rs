//! How far a stream has come, and futures that wait for a point of it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::DeviceError;

/// The point of no stream: it never comes.
const NEVER: u64 = u64::MAX;

/// A point of a stream; resolves once everything that was submitted to the stream before it has finished.
///
/// What finished has resolved its [`Transfer`](super::Transfer) and let its sources go. Whether it succeeded,
/// the transfer says. An event takes no place in the stream, so a full stream has room for it.
///
/// Cancel safe: dropping it changes nothing for the stream, and keeps nothing.
///
/// # Errors
/// Resolves to [`DeviceError::Fenced`] where the device was fenced before that work had finished, at once, even
/// if the stream hangs; and where it was fenced when the event was recorded.
#[derive(Debug)]
pub struct Event {
    progress: Arc<Progress>,
    at: u64,
    key: u64,
}

impl Event {
    /// Whether awaiting it would end at once: the work has finished, or the device is fenced.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.progress.lock().end(self.at).is_some()
    }
}

impl Future for Event {
    type Output = Result<(), DeviceError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let place = (self.at, self.key);
        let waker = context.waker().clone();
        let mut counts = self.progress.lock();
        let end = counts.end(self.at);
        // A waker is foreign code even as it drops: not under the lock.
        let before = match end {
            Some(_) => counts.waiters.remove(&place),
            None => counts.waiters.insert(place, waker),
        };
        drop(counts);
        drop(before);
        end.map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let waker = self.progress.lock().waiters.remove(&(self.at, self.key));
        drop(waker);
    }
}

#[derive(Debug, Default)]
struct Counts {
    submitted: u64,
    /// Stands still from the fence on: what ends later did not finish.
    finished: u64,
    fenced: Option<String>,
    events: u64,
    /// Who waits, by point and then by event; each belongs to an event that somebody holds.
    waiters: BTreeMap<(u64, u64), Waker>,
}

impl Counts {
    fn end(&self, at: u64) -> Option<Result<(), DeviceError>> {
        if self.finished >= at {
            return Some(Ok(()));
        }
        self.fenced.clone().map(|reason| Err(DeviceError::Fenced(reason)))
    }
}

/// How many submissions a stream took, and how many of them it has finished.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Counts>);

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a submission if `send` queues it; the order of the counts is that of the queue.
    pub(super) fn submit<E>(&self, send: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut counts = self.lock();
        send()?;
        counts.submitted += 1;
        Ok(())
    }

    /// The oldest unfinished submission has ended.
    pub(super) fn finish(&self) {
        let mut counts = self.lock();
        if counts.fenced.is_some() {
            return;
        }
        counts.finished += 1;
        let next = counts.finished + 1;
        let later = counts.waiters.split_off(&(next, 0));
        let due = std::mem::replace(&mut counts.waiters, later);
        drop(counts);
        due.into_values().for_each(Waker::wake);
    }

    /// Nothing more finishes; gives who waits, to be woken without a lock.
    #[must_use]
    pub(super) fn fence(&self, reason: &str) -> Vec<Waker> {
        let mut counts = self.lock();
        if counts.fenced.is_none() {
            counts.fenced = Some(reason.to_owned());
        }
        std::mem::take(&mut counts.waiters).into_values().collect()
    }

    /// The point behind all that was submitted so far.
    pub(super) fn record(self: &Arc<Self>) -> Event {
        let mut counts = self.lock();
        let at = if counts.fenced.is_some() { NEVER } else { counts.submitted };
        counts.events += 1;
        let key = counts.events;
        drop(counts);
        Event { progress: Arc::clone(self), at, key }
    }
}

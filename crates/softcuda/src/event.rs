//! Events: where a stream had come to when one was recorded. Owns times and clocks, not the waiting.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::error::{Answer, Code};
use crate::locks::lock;
use crate::races::Clock;
use crate::stream::Marker;

/// `CU_EVENT_DISABLE_TIMING`.
pub(crate) const DISABLE_TIMING: u32 = 2;

/// When a record was reached.
#[derive(Debug, Default)]
pub(crate) struct Record {
    at: Mutex<Option<Instant>>,
}

impl Record {
    pub(crate) fn reached(&self) {
        *lock(&self.at) = Some(Instant::now());
    }
}

/// The last record of an event.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) marker: Marker,
    pub(crate) clock: Clock,
    pub(crate) record: Arc<Record>,
}

/// An event of a context.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: usize,
    flags: u32,
    state: Mutex<Option<Recorded>>,
}

impl Event {
    pub(crate) fn new(context: usize, flags: u32) -> Self {
        Self { context, flags, state: Mutex::new(None) }
    }

    pub(crate) fn set(&self, recorded: Recorded) {
        *lock(&self.state) = Some(recorded);
    }

    /// The record that a wait issued now waits for.
    pub(crate) fn last(&self) -> Option<Recorded> {
        lock(&self.state).clone()
    }

    /// Milliseconds from one event to another.
    pub(crate) fn milliseconds(&self, end: &Self) -> Answer<f32> {
        if (self.flags | end.flags) & DISABLE_TIMING != 0 {
            return Err(Code::INVALID_HANDLE);
        }
        let (Some(from), Some(to)) = (self.last(), end.last()) else { return Err(Code::INVALID_HANDLE) };
        let (from, to) = (*lock(&from.record.at), *lock(&to.record.at));
        let (Some(from), Some(to)) = (from, to) else { return Err(Code::NOT_READY) };
        let forward = to.saturating_duration_since(from).as_secs_f32();
        Ok((forward - from.saturating_duration_since(to).as_secs_f32()) * 1e3)
    }
}

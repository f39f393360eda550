//! A context: what a program has on one device. Owns its streams, its errors and its peers.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use crate::error::{Answer, Code};
use crate::locks::lock;
use crate::stream::{Gate, Stream};

/// A context; in this library always a device's primary one.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) device: usize,
    pub(crate) handle: usize,
    pub(crate) gate: Arc<Gate>,
    /// Set by the fault that makes a device disappear; shared by all contexts of the device.
    pub(crate) lost: Arc<AtomicU32>,
    sticky: AtomicU32,
    pending: AtomicU32,
    pub(crate) destroyed: AtomicBool,
    pub(crate) streams: Mutex<Streams>,
    pub(crate) peers: Mutex<BTreeSet<usize>>,
}

/// The streams of a context.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) legacy: Option<Arc<Stream>>,
    pub(crate) per_thread: HashMap<ThreadId, Arc<Stream>>,
    /// By handle.
    pub(crate) made: HashMap<usize, Arc<Stream>>,
    /// Destroyed by the program, with work left to do that the context's synchronisations wait for.
    pub(crate) leaving: Vec<Arc<Stream>>,
}

impl Streams {
    /// Those that exist.
    pub(crate) fn all(&self) -> Vec<Arc<Stream>> {
        let made = self.made.values().chain(&self.leaving);
        self.legacy.iter().chain(self.per_thread.values()).chain(made).map(Arc::clone).collect()
    }

    /// Those that the legacy stream's rule is about, besides itself.
    pub(crate) fn blocking(&self) -> Vec<Arc<Stream>> {
        let others = self.per_thread.values().chain(self.made.values()).chain(&self.leaving);
        others.filter(|other| other.blocking).map(Arc::clone).collect()
    }

    /// Takes out what has left.
    pub(crate) fn gone(&mut self) -> Vec<Arc<Stream>> {
        self.leaving.extract_if(.., |stream| stream.all().is_done()).collect()
    }
}

impl Context {
    pub(crate) fn new(device: usize, handle: usize, gate: Arc<Gate>, lost: Arc<AtomicU32>) -> Self {
        Self {
            device,
            handle,
            gate,
            lost,
            sticky: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            destroyed: AtomicBool::new(false),
            streams: Mutex::default(),
            peers: Mutex::default(),
        }
    }

    /// The context's trouble: a sticky error each time, another one once.
    pub(crate) fn poll(&self) -> Answer<()> {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(Code::CONTEXT_IS_DESTROYED);
        }
        self.sick()?;
        match self.pending.swap(0, Ordering::AcqRel) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// Whether the context does no more work.
    pub(crate) fn sick(&self) -> Answer<()> {
        for state in [&self.lost, &self.sticky] {
            match state.load(Ordering::Acquire) {
                0 => {}
                code => return Err(Code(code)),
            }
        }
        Ok(())
    }

    /// The first sticky error stays.
    pub(crate) fn set_sticky(&self, code: Code) {
        let _ = self.sticky.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// An error that one later call reports.
    pub(crate) fn set_pending(&self, code: Code) {
        let _ = self.pending.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// As after a reset of the device.
    pub(crate) fn heal(&self) {
        self.sticky.store(0, Ordering::Release);
        self.pending.store(0, Ordering::Release);
        lock(&self.peers).clear();
    }

    /// Whether this context may touch a device's memory.
    pub(crate) fn reaches(&self, device: usize) -> bool {
        device == self.device || lock(&self.peers).contains(&device)
    }
}

//! A GPU's load, published by its actor and read by the router without a message.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use keepwarm_core::placement::GpuLoad;
use keepwarm_memory::{Arena, CudaClaim, Device, DeviceState};
use keepwarm_types::{Bytes, GpuIndex};

#[derive(Debug)]
pub(crate) struct Board {
    index: GpuIndex,
    device: Arc<dyn Device>,
    leases: AtomicU32,
    queue: AtomicU32,
    sessions: AtomicU64,
    dirty: AtomicU64,
    evictable: AtomicU64,
    /// Its actor failed too often.
    down: AtomicBool,
    /// Where an engine on the CPU works, if the device's memory is not the host's.
    workspace: Option<Arena>,
    /// Held for as long as the device is used.
    _claim: Option<CudaClaim>,
}

impl Board {
    pub(crate) fn new(index: GpuIndex, device: Arc<dyn Device>) -> Self {
        Self {
            index,
            device,
            leases: AtomicU32::new(0),
            queue: AtomicU32::new(0),
            sessions: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            evictable: AtomicU64::new(0),
            down: AtomicBool::new(false),
            workspace: None,
            _claim: None,
        }
    }

    /// The same, and no other process's.
    pub(crate) fn claimed(self, claim: CudaClaim) -> Self {
        Self { _claim: Some(claim), ..self }
    }

    /// The same, with a region of the host for engines that compute on the CPU.
    pub(crate) fn working_in(self, workspace: Option<Arena>) -> Self {
        Self { workspace, ..self }
    }

    pub(crate) fn workspace(&self) -> Option<&Arena> {
        self.workspace.as_ref()
    }

    pub(crate) const fn index(&self) -> GpuIndex {
        self.index
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    pub(crate) fn publish(
        &self,
        leases: usize,
        queue: usize,
        sessions: usize,
        dirty: Bytes,
        evictable: Bytes,
    ) {
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.leases.store(small(leases), Ordering::Relaxed);
        self.queue.store(small(queue), Ordering::Relaxed);
        self.sessions.store(sessions as u64, Ordering::Relaxed);
        self.dirty.store(dirty.0, Ordering::Relaxed);
        self.evictable.store(evictable.0, Ordering::Relaxed);
    }

    pub(crate) fn take_down(&self) {
        self.down.store(true, Ordering::Relaxed);
    }

    pub(crate) fn healthy(&self) -> bool {
        !self.down.load(Ordering::Relaxed) && self.device.state() == DeviceState::Up
    }

    /// Leases, sessions and dirty bytes.
    pub(crate) fn figures(&self) -> (u64, u64, Bytes) {
        let dirty = Bytes(self.dirty.load(Ordering::Relaxed));
        (self.leases.load(Ordering::Relaxed).into(), self.sessions.load(Ordering::Relaxed), dirty)
    }

    pub(crate) fn load(&self) -> GpuLoad {
        let figures = self.device.arena().figures();
        GpuLoad {
            index: self.index,
            healthy: self.healthy(),
            free: figures.reserved.saturating_sub(figures.used),
            evictable: Bytes(self.evictable.load(Ordering::Relaxed)),
            capacity: figures.reserved,
            quantises: self.device.quantises(),
            leases: self.leases.load(Ordering::Relaxed),
            queue: self.queue.load(Ordering::Relaxed),
        }
    }
}

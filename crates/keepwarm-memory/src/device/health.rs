//! Whether a device serves, and what its streams have done: what a fence ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use super::event::Progress;
use super::{DeviceError, DeviceState};
use crate::fault::FaultPlan;

/// Devices of this process so far.
static DEVICES: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
pub(super) struct Health {
    /// Which device of this process it is.
    pub(super) device: u64,
    state: Mutex<DeviceState>,
    pub(super) faults: Arc<FaultPlan>,
    /// Each stream's.
    pub(super) progress: [Arc<Progress>; 2],
}

impl Health {
    pub(super) fn new(faults: Arc<FaultPlan>) -> Self {
        let (device, state) = (DEVICES.fetch_add(1, Ordering::Relaxed), Mutex::new(DeviceState::Up));
        Self { device, state, faults, progress: <[Arc<Progress>; 2]>::default() }
    }

    pub(super) fn state(&self) -> DeviceState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    //= GUARANTEES.md#G9
    pub(super) fn fence(&self, reason: &str) {
        #[cfg(test)]
        if crate::fault::Planted::has(&self.faults.planted.fences_nothing) {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != DeviceState::Up {
            return;
        }
        tracing::warn!(reason, "device fenced");
        *state = DeviceState::Fenced(reason.to_owned());
        // Under the same lock, so that no work fails by this fence and then counts as finished before it.
        let waiting = self.progress.each_ref().map(|progress| progress.fence(reason));
        drop(state);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        match self.state() {
            DeviceState::Up => Ok(()),
            DeviceState::Fenced(reason) => Err(DeviceError::Fenced(reason)),
        }
    }

    /// Whether the next block may be taken as done: the device serves, and no test wants it to fail here.
    pub(super) fn next(&self) -> Result<(), DeviceError> {
        self.check()?;
        if self.faults.sticky_now() {
            let reason = "injected sticky error";
            self.fence(reason);
            return Err(DeviceError::Fenced(reason.to_owned()));
        }
        Ok(())
    }
}

//! Copies straight from one device's memory into another's, where the hardware has a way.

use std::fmt;
use std::sync::Arc;

use crossbeam_channel::Sender;

use super::batch::{Transfer, Work, enqueue};
#[cfg(feature = "cuda")]
use super::cuda::{ScratchFigures, Shown};
use super::event::Progress;
use super::health::Health;
use super::{DeviceError, DeviceState, Direction, Job, TransferError};

/// Why there is no link between two devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The hardware has no way, or the driver gives none: what is to go there goes through pinned memory.
    #[error("{from} does not reach {to} ({why}): copy through pinned memory")]
    NotPossible {
        /// Where bytes were to come from.
        from: String,
        /// Where they were to go.
        to: String,
        /// What stands against it.
        why: String,
    },
    /// One of the two serves nothing more.
    #[error("{device} is fenced: {reason}")]
    Fenced {
        /// Which.
        device: String,
        /// Why.
        reason: String,
    },
    /// The driver failed, or the system had no room.
    #[error("the link from {from} to {to} could not be made: {why}")]
    Failed {
        /// Where bytes were to come from.
        from: String,
        /// Where they were to go.
        to: String,
        /// What was said.
        why: String,
    },
}

/// One end of a link.
#[derive(Debug)]
pub(super) struct LinkEnd {
    pub(super) name: String,
    pub(super) health: Arc<Health>,
    /// The device context that its blocks lie in.
    pub(super) context: usize,
}

impl LinkEnd {
    pub(super) fn serves(&self) -> Result<(), LinkError> {
        match self.health.state() {
            DeviceState::Up => Ok(()),
            DeviceState::Fenced(reason) => Err(LinkError::Fenced { device: self.name.clone(), reason }),
        }
    }
}

/// A way from one device into another, with a stream of its own: neither waits for the other's other work, and no
/// [`Event`](super::Event) of either stands for what goes by it.
///
/// The copies are the source's work and the verification is the target's, and each answers for its own: a source that fails or
/// hangs is fenced and the transfer fails with [`DeviceError::Gone`], while the target serves on. No stream of one waits for a
/// stream of the other: what the target does with the bytes is issued when the source's event has passed.
///
/// Dropping it lets what was submitted run.
pub struct Link {
    pub(super) source: LinkEnd,
    pub(super) target: LinkEnd,
    pub(super) queue: Sender<Work>,
    pub(super) progress: Arc<Progress>,
    #[cfg(feature = "cuda")]
    pub(super) scratch: Arc<Shown>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({} -> {})", self.source.name, self.target.name)
    }
}

/// What a source's fence is to whoever waits for bytes at the target.
#[cfg(feature = "cuda")]
pub(super) fn source_gone(reason: String) -> DeviceError {
    DeviceError::Gone(format!("the device that the bytes come from is fenced: {reason}"))
}

impl Link {
    /// Copies a batch, verified at the target, as [`Device::submit`](super::Device::submit) does: as the same instances.
    ///
    /// # Errors
    /// [`TransferError`] at once where one of the two is fenced ([`DeviceError::Gone`] for the source), too much is under way, a
    /// block lies elsewhere ([`DeviceError::Shape`]), a target is too small or of another tenant; nothing was copied then. The
    /// transfer fails with [`DeviceError::Corrupt`], [`DeviceError::Gone`] or [`DeviceError::Fenced`].
    pub fn copy(&self, jobs: Vec<Job>) -> Result<Transfer, TransferError> {
        if let Err(cause) = self.check(&jobs) {
            return Err(TransferError { cause, targets: jobs.into_iter().map(|job| job.target).collect() });
        }
        enqueue(Direction::In, jobs, Work::Copy, &self.target.health, &self.progress, &self.queue)
    }

    fn check(&self, jobs: &[Job]) -> Result<(), DeviceError> {
        if let Err(LinkError::Fenced { device, reason }) = self.source.serves() {
            return Err(DeviceError::Gone(format!("{device} is fenced: {reason}")));
        }
        let ends = (Some(self.source.context), Some(self.target.context));
        let strays = |job: &&Job| (job.source.place().context, job.target.place().context) != ends;
        match jobs.iter().find(strays) {
            None => Ok(()),
            Some(Job { source, target }) => Err(DeviceError::Shape(format!(
                "{source:?} to {target:?} is no way from {} to {}",
                self.source.name, self.target.name
            ))),
        }
    }

    /// Figures of the scratch pool that it has on the target.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn scratch(&self) -> ScratchFigures {
        self.scratch.now()
    }
}

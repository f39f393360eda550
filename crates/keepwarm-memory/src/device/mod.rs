//! What a GPU must do for keepwarm: own an arena, and move blocks on streams of its own.
//!
//! A submission is one batch: the blocks of a restore or a checkpoint go in one call, are copied in order on
//! the stream of their direction, verified at the destination, and come back sealed as the same instances.
//! The job holds source and target guards until its copy has run, so memory is never reused under a
//! transfer; dropping the [`Transfer`] neither cancels the copy nor leaks: what arrives is given back.

mod host;
mod planes;

pub use host::{HostDevice, STREAM_QUEUE_MAX};
pub use planes::{PlaneShape, gather, scatter};

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::channel::oneshot;

use crate::arena::Arena;
use crate::checksum::Corrupt;
use crate::guard::{Block, BlockMut};

/// Which way a copy goes; each direction has a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From host memory into the device: a restore.
    In,
    /// From the device into host memory: a checkpoint.
    Out,
}

/// Whether a device serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceState {
    /// It does.
    Up,
    /// It had an error after which nothing it says can be trusted, or was fenced; the reason.
    Fenced(String),
}

/// Why a device did not do a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device is fenced; it serves nothing more in this process.
    #[error("the device is fenced: {0}")]
    Fenced(String),
    /// Its stream has as many submissions as it may have.
    #[error("the device's stream is full")]
    Busy,
    /// Bytes arrived with another checksum than they left with.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// A target is too small for its source.
    #[error("a target of {target} bytes cannot take {source_bytes}")]
    Size {
        /// The target's capacity.
        target: usize,
        /// The source's length.
        source_bytes: usize,
    },
}

/// One block to copy.
#[derive(Debug)]
pub struct Job {
    /// What to copy.
    pub source: Block,
    /// Where to.
    pub target: BlockMut,
}

/// A submission that failed; the targets come back.
#[derive(Debug)]
pub struct TransferError {
    /// Why.
    pub cause: DeviceError,
    /// The targets, in no particular state.
    pub targets: Vec<BlockMut>,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for TransferError {}

type Outcome = Result<Vec<Block>, TransferError>;

/// A submission under way; resolves to the copies, sealed, in the order of the jobs.
///
/// Cancel safe: dropping it leaves the copy to run, and gives the copies back when it has.
#[derive(Debug)]
pub struct Transfer(oneshot::Receiver<Outcome>);

impl Future for Transfer {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        Pin::new(&mut self.0).poll(context).map(|result| {
            result.unwrap_or_else(|oneshot::Canceled| {
                let cause = DeviceError::Fenced("its stream ended".to_owned());
                Err(TransferError { cause, targets: Vec::new() })
            })
        })
    }
}

/// A GPU, or what stands in for one.
pub trait Device: Send + Sync + fmt::Debug {
    /// The device as the spec names it.
    fn name(&self) -> &str;

    /// Its memory.
    fn arena(&self) -> &Arena;

    /// Whether it serves.
    fn state(&self) -> DeviceState;

    /// Takes it out of service for the rest of the process: every later submission is refused.
    fn fence(&self, reason: &str);

    /// Copies a batch on the stream of `direction`, verified at the destination.
    ///
    /// # Errors
    /// [`TransferError`] at once where the device is fenced or its stream full; nothing was copied then.
    fn submit(&self, direction: Direction, jobs: Vec<Job>) -> Result<Transfer, TransferError>;
}

#[cfg(test)]
mod tests;

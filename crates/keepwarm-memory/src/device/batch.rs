//! Batches of one kind on their way to a stream, and what comes back of them.

use std::pin::Pin;
use std::task::{Context, Poll};

use crossbeam_channel::{Sender, TrySendError};
use futures::channel::oneshot;

use super::event::Progress;
use super::fp8::{Dequantise, Quantise};
use super::health::Health;
use super::regions::{FromRegion, IntoRegion};
use super::steps::{Errand, FillJob, Step};
use super::{DeviceError, Direction, GatherJob, Job, ScatterJob, TransferError};
use crate::foreign::Seen;
use crate::guard::{Block, BlockMut};
use crate::ranges::{self, Label, Range};

/// Submissions that wait on one stream. Each is a session's restore or checkpoint, and the node lets 64 run
/// at once, so a full stream means that the device hangs.
pub const STREAM_QUEUE_MAX: usize = 256;
/// Why nothing more comes from a stream whose thread is gone.
pub(super) const STREAM_ENDED: &str = "its stream ended";

pub(super) type Outcome<T> = Result<Vec<T>, TransferError>;

/// A submission under way; resolves to what it made, in the order of the jobs: sealed blocks, or the targets of a
/// scatter, which can still be written.
///
/// Cancel safe: dropping it leaves the work to run, and gives the blocks back when it has.
#[derive(Debug)]
pub struct Transfer<T = Block>(oneshot::Receiver<Outcome<T>>);

impl<T> Future for Transfer<T> {
    type Output = Outcome<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome<T>> {
        Pin::new(&mut self.0).poll(context).map(|result| {
            result.unwrap_or_else(|oneshot::Canceled| {
                let cause = DeviceError::Fenced(STREAM_ENDED.to_owned());
                Err(TransferError { cause, targets: Vec::new() })
            })
        })
    }
}

/// One batch, and who waits for it.
pub(super) struct Submission<S: Step> {
    pub(super) jobs: Vec<S>,
    pub(super) done: oneshot::Sender<Outcome<S::Done>>,
    /// Ends when the batch is through, before that is told.
    pub(super) range: Range,
}

impl<S: Step> Submission<S> {
    fn into_targets(self) -> Vec<BlockMut> {
        self.jobs.into_iter().filter_map(S::into_target).collect()
    }
}

/// Who does batches of whatever kind.
pub(super) trait Run {
    fn run<S: Step>(&mut self, submission: Submission<S>);
}

/// What waits on a stream: one batch of one kind.
pub(super) enum Work {
    Copy(Submission<Job>),
    Fill(Submission<FillJob>),
    Gather(Submission<GatherJob>),
    Scatter(Submission<ScatterJob>),
    Quantise(Submission<Quantise>),
    Dequantise(Submission<Dequantise>),
    FromRegion(Submission<FromRegion>),
    IntoRegion(Submission<IntoRegion>),
}

impl Work {
    pub(super) fn run(self, by: &mut impl Run) {
        match self {
            Self::Copy(submission) => by.run(submission),
            Self::Fill(submission) => by.run(submission),
            Self::Gather(submission) => by.run(submission),
            Self::Scatter(submission) => by.run(submission),
            Self::Quantise(submission) => by.run(submission),
            Self::Dequantise(submission) => by.run(submission),
            Self::FromRegion(submission) => by.run(submission),
            Self::IntoRegion(submission) => by.run(submission),
        }
    }

    fn into_targets(self) -> Vec<BlockMut> {
        match self {
            Self::Copy(submission) => submission.into_targets(),
            Self::Fill(submission) => submission.into_targets(),
            Self::Gather(submission) => submission.into_targets(),
            Self::Scatter(submission) => submission.into_targets(),
            Self::Quantise(submission) => submission.into_targets(),
            Self::Dequantise(submission) => submission.into_targets(),
            Self::FromRegion(submission) => submission.into_targets(),
            Self::IntoRegion(submission) => submission.into_targets(),
        }
    }
}

/// Whether all of a batch may still be issued, now that its turn has come: what it works on may have ended since.
pub(super) fn due<S: Step>(jobs: &[S]) -> Result<(), DeviceError> {
    let mut seen = Seen::default();
    jobs.iter().try_for_each(|job| job.is_due(&mut seen))
}

/// What a profiler shows of a batch; nothing of an empty one.
fn label<S: Step>(direction: Direction, jobs: &[S]) -> Option<Label> {
    let Errand { work, from, to, owner } = jobs.first()?.errand();
    let word = if direction == Direction::In { "in" } else { "out" };
    Some(Label {
        work: format!("{work} {word}"),
        from: from.to_owned(),
        to: to.to_owned(),
        blocks: jobs.len(),
        bytes: jobs.iter().map(S::bytes).sum(),
        shared: jobs.iter().any(|job| job.errand().owner != owner),
        owner,
    })
}

/// Queues a batch that fits on a stream of a device that serves, or gives its targets back.
pub(super) fn enqueue<S: Step>(
    direction: Direction,
    jobs: Vec<S>,
    kind: fn(Submission<S>) -> Work,
    health: &Health,
    progress: &Progress,
    queue: &Sender<Work>,
) -> Result<Transfer<S::Done>, TransferError> {
    let (done, outcome) = oneshot::channel();
    let fits = |job: &S| {
        let keeps = job.keeps_owners();
        #[cfg(test)]
        let keeps = keeps || crate::fault::Planted::has(&health.faults.planted.knows_no_owner);
        job.check()?;
        if keeps { Ok(()) } else { Err(DeviceError::WrongOwner) }
    };
    let fit = health.check().and_then(|()| jobs.iter().try_for_each(fits));
    let range = ranges::begin(|| fit.as_ref().ok().and_then(|()| label(direction, &jobs)));
    let work = kind(Submission { jobs, done, range });
    if let Err(cause) = fit {
        return Err(TransferError { cause, targets: work.into_targets() });
    }
    let (cause, work) = match progress.submit(|| queue.try_send(work)) {
        Ok(()) => return Ok(Transfer(outcome)),
        Err(TrySendError::Full(work)) => (DeviceError::Busy, work),
        Err(TrySendError::Disconnected(work)) => (DeviceError::Fenced(STREAM_ENDED.to_owned()), work),
    };
    Err(TransferError { cause, targets: work.into_targets() })
}

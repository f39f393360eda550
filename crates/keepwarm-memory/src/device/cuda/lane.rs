//! A direction's stream: a thread that puts batches on it, and one that ends them as they pass. A link between devices is one
//! too, with batches that one device issues and another ends.
//!
//! The first never waits for the device, so the next batch's copies are queued while the last one's are verified.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use futures::channel::oneshot;

use super::context::{Context, Mark, Stream};
use super::driver::CudaError;
use super::kernels::Kernels;
use super::moves::moved;
use super::plan::{Desk, Lent, Plan, Stack};
use super::poll::{Passed, Poller};
use super::scratch::{Piece, Pieces, Shown};
use super::verify::{Unread, Verifier};
use crate::device::batch::{Outcome, Run, STREAM_ENDED, STREAM_QUEUE_MAX, Submission, Work, due};
use crate::device::event::Progress;
use crate::device::health::Health;
use crate::device::steps::Step;
use crate::device::{DeviceError, DeviceState, TransferError};
use crate::ranges::Range;

/// Batches that are on the stream or being verified. Two would keep the stream busy; more hide batches that are small.
const IN_FLIGHT_MAX: usize = 8;
/// Where each job's part of a batch's scratch begins: aligned for any load of a kernel.
const SCRATCH_ALIGN: usize = 16;
/// How often memory that a hanging device may still touch is asked for.
const STUCK_PAUSE: Duration = Duration::from_millis(50);

/// Says that a stream's thread ended, however it did, to whoever waits for its work.
struct Ending<'a>(&'a Progress);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.fence(STREAM_ENDED).into_iter().for_each(std::task::Waker::wake);
    }
}

/// What a lane needs of a device.
#[derive(Debug, Clone)]
pub(super) struct Side {
    pub(super) context: Arc<Context>,
    pub(super) health: Arc<Health>,
    pub(super) poller: Poller,
    pub(super) kernels: Option<Arc<Kernels>>,
}

/// The device that issues a batch, and what its fence is to whoever waits for the batch.
#[derive(Debug, Clone)]
struct Origin {
    health: Arc<Health>,
    fenced: fn(String) -> DeviceError,
}

impl Origin {
    fn check(&self) -> Result<(), DeviceError> {
        match self.health.state() {
            DeviceState::Up => Ok(()),
            DeviceState::Fenced(reason) => Err((self.fenced)(reason)),
        }
    }

    fn failed(&self, error: &CudaError) -> DeviceError {
        self.health.fence(&error.to_string());
        (self.fenced)(error.to_string())
    }
}

/// Starts a lane's threads: work is issued at the first side and ends at the second, and what the first one's fence is to it,
/// `fenced` says. They end when the sender has dropped and all is done.
pub(super) fn start(
    name: &str,
    (issues, fenced): (&Side, fn(String) -> DeviceError),
    ends: &Side,
    progress: &Arc<Progress>,
    scratch: &Arc<Shown>,
) -> Result<Sender<Work>, CudaError> {
    let verifier = Verifier::new(&ends.context, &ends.poller, ends.kernels.as_ref(), scratch)?;
    issues.context.enter()?;
    let stream = Arc::new(Stream::create(&issues.context)?);
    let (submit, work) = bounded(STREAM_QUEUE_MAX);
    let (send, flights) = bounded(IN_FLIGHT_MAX);
    let spawn = |name: String, run: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name).spawn(run).map(drop).map_err(CudaError::System)
    };
    let stack = Stack::reserve(&issues.context, issues.kernels.as_ref(), IN_FLIGHT_MAX)?;
    let origin = Origin { health: Arc::clone(&issues.health), fenced };
    let (target, poller) = (Arc::clone(&ends.health), issues.poller.clone());
    let (context, pieces) = (Arc::clone(&issues.context), Pieces::of(&stream));
    let issuer = Issuer {
        context: Arc::clone(&context),
        stream,
        origin,
        target,
        poller,
        flights: send,
        stack,
        pieces,
    };
    spawn(name.to_owned(), Box::new(move || issue_all(issuer, &work, &context)))?;
    let (ends, progress) = (ends.clone(), Arc::clone(progress));
    let end = move || end_all(&flights, &progress, &ends.context, &ends.health, &verifier);
    spawn(format!("{name}-ends"), Box::new(end))?;
    Ok(submit)
}

struct Issuer {
    context: Arc<Context>,
    stream: Arc<Stream>,
    origin: Origin,
    /// The device that it ends on.
    target: Arc<Health>,
    poller: Poller,
    flights: Sender<Box<dyn Flight>>,
    stack: Stack,
    pieces: Pieces,
}

/// What a batch has of its stream until it ends, for its kernels.
#[derive(Default)]
struct Tools {
    sheets: Option<Lent>,
    spare: Option<Desk>,
    scratch: Option<Piece>,
}

impl Issuer {
    /// Lends each job its part of scratch that is the batch's.
    fn lend<S: Step>(&mut self, jobs: &mut [S]) -> Result<Option<Piece>, DeviceError> {
        let sizes: Vec<_> =
            jobs.iter().map(|job| job.scratch_bytes().next_multiple_of(SCRATCH_ALIGN)).collect();
        let bytes = sizes.iter().sum::<usize>();
        if bytes == 0 {
            return Ok(None);
        }
        let piece = self.pieces.take(&self.context, bytes as u64).map_err(|error| match error {
            // What was asked for is refused, and nothing else: the device serves on.
            CudaError::Scratch { .. } => DeviceError::NoScratch(bytes),
            error => self.origin.failed(&error),
        })?;
        let mut at = 0;
        for (job, size) in jobs.iter_mut().zip(sizes) {
            job.lend(moved(piece.place(), at));
            at += size;
        }
        Ok(Some(piece))
    }

    /// Puts jobs on the stream; the tools are what they need of it, also where this fails.
    fn issue<S: Step>(&mut self, jobs: &mut [S], tools: &mut Tools) -> Result<(), DeviceError> {
        due(jobs)?;
        tools.scratch = self.lend(jobs)?;
        let mut plan = Plan::default();
        jobs.iter().for_each(|job| job.plan(&mut plan));
        tools.sheets = if plan.wants_sheets() { self.stack.lend() } else { None };
        let failed = |error| self.origin.failed(&error);
        tools.spare = self.stack.spare(plan.narrow_blocks(), tools.sheets.as_ref()).map_err(failed)?;
        let sheets = tools.sheets.as_mut().and_then(Lent::sheets);
        plan.issue(&self.stream, sheets, tools.spare.as_mut()).map_err(failed)
    }
}

fn issue_all(mut issuer: Issuer, queue: &Receiver<Work>, context: &Context) {
    if let Err(error) = context.enter() {
        issuer.origin.health.fence(&format!("a stream cannot use it: {error}"));
    }
    for work in queue {
        issuer.origin.health.faults.wait_while_hung();
        work.run(&mut issuer);
    }
}

impl Run for Issuer {
    fn run<S: Step>(&mut self, mut submission: Submission<S>) {
        let serve = self.origin.check().and_then(|()| self.target.check());
        let mut tools = Tools::default();
        let mut issued = serve.and_then(|()| self.issue(&mut submission.jobs, &mut tools));
        // What was put on the stream before an error still runs, and its memory stays until that has passed.
        let mark = self.stream.record().unwrap_or_else(|error| {
            issued = issued.clone().and(Err(self.origin.failed(&error)));
            // Fenced, nothing more is issued: what runs before the stream's end is this and what was before it.
            Mark::End(Arc::clone(&self.stream))
        });
        let passed = self.poller.watch(mark);
        #[cfg(test)]
        if crate::fault::Planted::has(&self.target.faults.planted.lets_go_early) {
            submission.jobs.iter_mut().for_each(S::let_go);
        }
        let Submission { jobs, done, range } = submission;
        let (done, origin) = (Some(done), self.origin.clone());
        let batch = Batch { jobs, done, origin, issued, passed, range, _tools: tools };
        // The thread that ends flights lives as long as this one sends.
        drop(self.flights.send(Box::new(batch)));
    }
}

/// A batch on the stream, of whatever kind.
trait Flight: Send {
    /// Waits until it has passed, verifies it, and answers; gives itself back where the device may still touch it.
    fn end(self: Box<Self>, health: &Health, verifier: &Verifier) -> Option<Box<dyn Flight>>;

    /// Whether the device is through with its memory.
    fn is_over(&self) -> bool;
}

struct Batch<S: Step> {
    jobs: Vec<S>,
    /// Until it is answered.
    done: Option<oneshot::Sender<Outcome<S::Done>>>,
    origin: Origin,
    issued: Result<(), DeviceError>,
    passed: Receiver<Passed>,
    range: Range,
    /// What its kernels read and write beside its blocks.
    _tools: Tools,
}

impl<S: Step> Batch<S> {
    fn refuse(mut self, cause: DeviceError) {
        let targets = self.jobs.into_iter().filter_map(S::into_target).collect();
        self.range.end();
        if let Some(done) = self.done.take() {
            drop(done.send(Err(TransferError { cause, targets })));
        }
    }

    /// Answers without the memory, which stays with this.
    fn strand(mut self: Box<Self>, health: &Health) -> Option<Box<dyn Flight>> {
        let fenced = self.origin.check().and_then(|()| health.check()).err();
        let cause = fenced.unwrap_or_else(|| DeviceError::Fenced(STREAM_ENDED.to_owned()));
        if let Some(done) = self.done.take() {
            drop(done.send(Err(TransferError { cause, targets: Vec::new() })));
        }
        Some(self)
    }
}

impl<S: Step> Flight for Batch<S> {
    fn end(self: Box<Self>, health: &Health, verifier: &Verifier) -> Option<Box<dyn Flight>> {
        #[cfg(test)]
        let asks = !crate::fault::Planted::has(&health.faults.planted.waits_for_nothing);
        #[cfg(not(test))]
        let asks = true;
        let passed = match asks.then(|| self.passed.recv()) {
            Some(Ok(Passed::Late) | Err(_)) => return self.strand(health),
            Some(Ok(Passed::Failed(error))) => Err((self.origin.fenced)(error.to_string())),
            Some(Ok(Passed::Done)) | None => Ok(()),
        };
        let serve = || self.origin.check().and_then(|()| health.check());
        let whole = self.issued.clone().and(passed).and_then(|()| serve());
        if let Err(cause) = whole {
            self.refuse(cause);
            return None;
        }
        let (mut runs, mut ends) = (Vec::new(), Vec::with_capacity(self.jobs.len()));
        for job in &self.jobs {
            let of_job = job.runs();
            let arrived = of_job.last().expect("every kind has a run of what arrived");
            if health.faults.flip_now()
                && let Err(Unread::Hangs) = verifier.flip(arrived)
            {
                return self.strand(health);
            }
            ends.push(of_job.len());
            runs.extend(of_job);
        }
        match verifier.checksums(&runs) {
            Ok(found) => {
                self.land(&ends, &found, health);
                None
            }
            Err(Unread::Failed(error)) => {
                health.fence(&error.to_string());
                self.refuse(DeviceError::Fenced(error.to_string()));
                None
            }
            Err(Unread::Hangs) => self.strand(health),
        }
    }

    fn is_over(&self) -> bool {
        // A second word, or none: the thread that asks is gone, and with it the device's work.
        !matches!(self.passed.try_recv(), Err(TryRecvError::Empty))
    }
}

impl<S: Step> Batch<S> {
    /// Seals job after job; at the first that is not sound the rest comes back.
    fn land(self, ends: &[usize], mut found: &[keepwarm_types::BlockChecksum], health: &Health) {
        let (mut made, mut targets, mut cause) = (Vec::with_capacity(ends.len()), Vec::new(), None);
        for (job, count) in self.jobs.into_iter().zip(ends) {
            let (of_job, rest) = found.split_at(*count);
            found = rest;
            if cause.is_some() {
                targets.extend(job.into_target());
                continue;
            }
            let ended = match health.next() {
                Ok(()) => job.land(of_job),
                Err(fenced) => Err((fenced, job.into_target())),
            };
            match ended {
                Ok(done) => made.push(done),
                Err((why, target)) => {
                    cause = Some(why);
                    targets.extend(target);
                }
            }
        }
        let outcome = match cause {
            None => Ok(made),
            Some(cause) => {
                targets.extend(made.into_iter().filter_map(S::regain));
                Err(TransferError { cause, targets })
            }
        };
        self.range.end();
        if let Some(done) = self.done {
            drop(done.send(outcome));
        }
    }
}

fn end_all(
    flights: &Receiver<Box<dyn Flight>>,
    progress: &Arc<Progress>,
    context: &Context,
    health: &Health,
    verifier: &Verifier,
) {
    let _ending = Ending(progress);
    if let Err(error) = context.enter() {
        health.fence(&format!("its work cannot be verified: {error}"));
    }
    let mut stuck: Vec<Box<dyn Flight>> = Vec::new();
    loop {
        let next = match stuck.is_empty() {
            true => flights.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => flights.recv_timeout(STUCK_PAUSE),
        };
        match next {
            Ok(flight) => {
                stuck.extend(flight.end(health, verifier));
                progress.finish();
            }
            Err(RecvTimeoutError::Disconnected) if stuck.is_empty() => return,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(STUCK_PAUSE),
            Err(RecvTimeoutError::Timeout) => {}
        }
        stuck.retain(|flight| !flight.is_over());
    }
}

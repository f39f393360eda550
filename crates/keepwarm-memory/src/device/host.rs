//! A "GPU" over host memory: the default device, and the reference that others are held against.
//!
//! Each direction has a stream: a thread with a FIFO, really asynchronous to whoever submits.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::batch::{Outcome, Run, STREAM_QUEUE_MAX, Submission, Work, due, enqueue};
use super::event::{Event, Progress};
use super::fp8::{Dequantise, Quantise};
use super::health::Health;
use super::link::{Link, LinkError};
use super::steps::{Ended, FillJob, Step};
use super::{
    DequantiseJob, Device, DeviceError, DeviceState, Direction, GatherJob, Job, QuantiseJob, RegionGatherJob,
    RegionRefusal, RegionScatterJob, ScatterJob, Transfer, TransferError, no_link, regions,
};
use crate::arena::{Arena, ArenaSettings};
use crate::fault::FaultPlan;
use crate::foreign::{Brought, ForeignRegion, Mapping, Peer, RegionError, SharedMapping};
use crate::guard::BlockMut;
use crate::region::ReserveError;

/// Threads that share one large batch.
const STRANDS_MAX: usize = 4;
/// Smaller batches are copied by the stream's own thread: waking another costs some tens of microseconds.
const STRAND_BYTES_MIN: usize = 4 << 20;

/// Runs batches of any kind.
struct Runner<'a> {
    health: &'a Arc<Health>,
    strands: &'a Sender<Arc<dyn Shared>>,
}

impl Run for Runner<'_> {
    fn run<S: Step>(&mut self, submission: Submission<S>) {
        let Submission { jobs, done, range } = submission;
        let outcome = match due(&jobs) {
            Ok(()) => run_all(jobs, self.health, self.strands),
            Err(cause) => {
                Err(TransferError { cause, targets: jobs.into_iter().filter_map(S::into_target).collect() })
            }
        };
        range.end();
        // Where nobody waits any more, what was made goes back to its arena right here.
        drop(done.send(outcome));
    }
}

/// A device over host memory.
#[derive(Debug)]
pub struct HostDevice {
    name: String,
    arena: Arena,
    health: Arc<Health>,
    streams: [Sender<Work>; 2],
}

impl HostDevice {
    /// Reserves the device's memory and starts its streams.
    ///
    /// # Errors
    /// [`ReserveError`] where the memory cannot be had.
    pub fn new(settings: &ArenaSettings, faults: Arc<FaultPlan>) -> Result<Self, ReserveError> {
        let arena = Arena::with_faults(settings, Some(Arc::clone(&faults)))?;
        let health = Arc::new(Health::new(faults));
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(format!("{}-{name}", settings.name))
                .spawn(work)
                .map_err(|cause| ReserveError::System { size: settings.bytes, cause })
        };
        let (strands, batches) = bounded::<Arc<dyn Shared>>(STRANDS_MAX);
        for _ in 1..strand_count() {
            let (batches, health) = (batches.clone(), Arc::clone(&health));
            start("strand", Box::new(move || batches.iter().for_each(|batch| batch.work(&health))))?;
        }
        let stream = |direction: Direction| {
            let name = if direction == Direction::In { "in" } else { "out" };
            let (send, receive) = bounded(STREAM_QUEUE_MAX);
            let (health, strands) = (Arc::clone(&health), strands.clone());
            start(name, Box::new(move || run(&receive, direction, &health, &strands)))?;
            Ok(send)
        };
        let streams = [stream(Direction::In)?, stream(Direction::Out)?];
        Ok(Self { name: settings.name.clone(), arena, health, streams })
    }

    /// Queues a batch that fits, or gives its targets back.
    fn enqueue<S: Step>(
        &self,
        direction: Direction,
        jobs: Vec<S>,
        kind: fn(Submission<S>) -> Work,
    ) -> Result<Transfer<S::Done>, TransferError> {
        let at = direction.place();
        enqueue(direction, jobs, kind, &self.health, &self.health.progress[at], &self.streams[at])
    }
}

impl Device for HostDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn state(&self) -> DeviceState {
        self.health.state()
    }

    fn fence(&self, reason: &str) {
        self.health.fence(reason);
    }

    fn submit(&self, direction: Direction, jobs: Vec<Job>) -> Result<Transfer, TransferError> {
        self.enqueue(direction, jobs, Work::Copy)
    }

    fn fill(
        &self,
        direction: Direction,
        targets: Vec<BlockMut>,
        byte: u8,
    ) -> Result<Transfer, TransferError> {
        let jobs = targets.into_iter().map(|target| FillJob { target, byte }).collect();
        self.enqueue(direction, jobs, Work::Fill)
    }

    fn gather(&self, direction: Direction, jobs: Vec<GatherJob>) -> Result<Transfer, TransferError> {
        self.enqueue(direction, jobs, Work::Gather)
    }

    fn scatter(
        &self,
        direction: Direction,
        jobs: Vec<ScatterJob>,
    ) -> Result<Transfer<BlockMut>, TransferError> {
        self.enqueue(direction, jobs, Work::Scatter)
    }

    fn quantises(&self) -> bool {
        true
    }

    fn quantise(&self, direction: Direction, jobs: Vec<QuantiseJob>) -> Result<Transfer, TransferError> {
        let steps = jobs.into_iter().map(|job| Quantise { job, via: None }).collect();
        self.enqueue(direction, steps, Work::Quantise)
    }

    fn dequantise(&self, direction: Direction, jobs: Vec<DequantiseJob>) -> Result<Transfer, TransferError> {
        let steps = jobs.into_iter().map(|job| Dequantise { job, via: None }).collect();
        self.enqueue(direction, steps, Work::Dequantise)
    }

    fn open_region(&self, peer: &Peer, brought: Brought) -> Result<ForeignRegion, RegionError> {
        if let DeviceState::Fenced(reason) = self.state() {
            return Err(RegionError::Fenced(reason));
        }
        let Brought::SharedMemory { fd, bytes } = brought else {
            return Err(RegionError::NotCuda(self.name.clone()));
        };
        ForeignRegion::open(peer, self.health.device, bytes, || {
            SharedMapping::open(&fd, bytes).map(|mapping| Box::new(mapping) as Box<dyn Mapping>)
        })
    }

    fn gather_from(
        &self,
        direction: Direction,
        jobs: Vec<RegionGatherJob>,
    ) -> Result<Transfer, RegionRefusal> {
        regions::gather_from(jobs, self.health.device, |steps| {
            self.enqueue(direction, steps, Work::FromRegion)
        })
    }

    fn scatter_into(
        &self,
        direction: Direction,
        jobs: Vec<RegionScatterJob>,
    ) -> Result<Transfer<()>, RegionRefusal> {
        regions::scatter_into(jobs, self.health.device, |steps| {
            self.enqueue(direction, steps, Work::IntoRegion)
        })
    }

    fn record(&self, direction: Direction) -> Event {
        self.health.progress[direction.place()].record()
    }

    fn link_to(&self, target: &dyn Device) -> Result<Link, LinkError> {
        Err(no_link(self, target))
    }
}

/// Says that a stream's thread ended, however it did, to whoever waits for its work.
struct Ending<'a>(&'a Progress);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.fence(super::batch::STREAM_ENDED).into_iter().for_each(Waker::wake);
    }
}

fn run(
    queue: &Receiver<Work>,
    direction: Direction,
    health: &Arc<Health>,
    strands: &Sender<Arc<dyn Shared>>,
) {
    let progress = &health.progress[direction.place()];
    let _ending = Ending(progress);
    for work in queue {
        health.faults.wait_while_hung();
        work.run(&mut Runner { health, strands });
        progress.finish();
    }
}

/// A batch that strands share: each takes the next job until none is left.
struct Batch<S: Step> {
    left: Mutex<std::iter::Enumerate<std::vec::IntoIter<S>>>,
    /// Room for every job's end, so that no strand waits to report one.
    ends: Sender<(usize, Ended<S>)>,
}

/// A batch of any kind, as a strand sees it.
trait Shared: Send + Sync {
    fn work(&self, health: &Health);
}

impl<S: Step> Shared for Batch<S> {
    fn work(&self, health: &Health) {
        loop {
            let next = self.left.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, step)) = next else { return };
            if self.ends.send((place, execute(step, health))).is_err() {
                return;
            }
        }
    }
}

fn execute<S: Step>(step: S, health: &Health) -> Ended<S> {
    match health.next() {
        Ok(()) => step.run(&health.faults),
        Err(cause) => Err((cause, step.into_target())),
    }
}

/// Does a batch, a large one with the help of the device's other strands, since one core hashes more slowly
/// than memory delivers.
fn run_all<S: Step>(
    jobs: Vec<S>,
    health: &Arc<Health>,
    strands: &Sender<Arc<dyn Shared>>,
) -> Outcome<S::Done> {
    let (count, bytes) = (jobs.len(), jobs.iter().map(S::bytes).sum::<usize>());
    let (ends, ended) = bounded(count);
    let batch = Arc::new(Batch { left: Mutex::new(jobs.into_iter().enumerate()), ends });
    if bytes >= STRAND_BYTES_MIN {
        for _ in 1..strand_count().min(count) {
            // A strand that is busy with another stream's batch is not waited for.
            let _ = strands.try_send(Arc::clone(&batch) as Arc<dyn Shared>);
        }
    }
    batch.work(health);
    drop(batch);
    let mut made: Vec<(usize, S::Done)> = Vec::with_capacity(count);
    let mut failed = None::<TransferError>;
    for (place, end) in ended.iter().take(count) {
        match (end, &mut failed) {
            (Ok(done), _) => made.push((place, done)),
            (Err((_, target)), Some(error)) => error.targets.extend(target),
            (Err((cause, target)), None) => {
                failed = Some(TransferError { cause, targets: target.into_iter().collect() });
            }
        }
    }
    if failed.is_none() && made.len() < count {
        health.fence("a copying thread ended");
        let cause = DeviceError::Fenced("a copying thread ended".to_owned());
        failed = Some(TransferError { cause, targets: Vec::new() });
    }
    if let Some(mut error) = failed {
        error.targets.extend(made.into_iter().filter_map(|(_, done)| S::regain(done)));
        return Err(error);
    }
    made.sort_unstable_by_key(|(place, _)| *place);
    Ok(made.into_iter().map(|(_, done)| done).collect())
}

/// Threads that share one large batch: as many as the machine has cores, at most [`STRANDS_MAX`].
fn strand_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(STRANDS_MAX)
}

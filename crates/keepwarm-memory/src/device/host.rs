//! A "GPU" over host memory: the default device, and the reference that others are held against.
//!
//! Each direction has a stream: a thread with a FIFO, really asynchronous to whoever submits.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use futures::channel::oneshot;

use super::{Device, DeviceError, DeviceState, Direction, Job, Outcome, Transfer, TransferError};
use crate::arena::{Arena, ArenaSettings};
use crate::checksum::{BlockHasher, Corrupt};
use crate::fault::FaultPlan;
use crate::guard::{Block, BlockMut};
use crate::region::ReserveError;

/// Submissions that wait on one stream. Each is a session's restore or checkpoint, and the node lets 64 run
/// at once, so a full stream means that the device hangs.
pub const STREAM_QUEUE_MAX: usize = 256;
/// Bytes that are copied and then hashed while they are still in the first-level cache; whole chunks.
const COPY_STEP: usize = 4 * crate::checksum::CHUNK_BYTES;

/// Threads that share one large batch.
const STRANDS_MAX: usize = 4;
/// Smaller batches are copied by the stream's own thread: waking another costs some tens of microseconds.
const STRAND_BYTES_MIN: usize = 4 << 20;

struct Submission {
    jobs: Vec<Job>,
    done: oneshot::Sender<Outcome>,
}

#[derive(Debug)]
struct Health {
    state: Mutex<DeviceState>,
    faults: Arc<FaultPlan>,
}

impl Health {
    fn state(&self) -> DeviceState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    //= GUARANTEES.md#G9
    fn fence(&self, reason: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == DeviceState::Up {
            tracing::warn!(reason, "device fenced");
            *state = DeviceState::Fenced(reason.to_owned());
        }
    }

    fn check(&self) -> Result<(), DeviceError> {
        match self.state() {
            DeviceState::Up => Ok(()),
            DeviceState::Fenced(reason) => Err(DeviceError::Fenced(reason)),
        }
    }
}

/// A device over host memory.
#[derive(Debug)]
pub struct HostDevice {
    name: String,
    arena: Arena,
    health: Arc<Health>,
    streams: [Sender<Submission>; 2],
}

impl HostDevice {
    /// Reserves the device's memory and starts its streams.
    ///
    /// # Errors
    /// [`ReserveError`] where the memory cannot be had.
    pub fn new(settings: &ArenaSettings, faults: Arc<FaultPlan>) -> Result<Self, ReserveError> {
        let arena = Arena::with_faults(settings, Some(Arc::clone(&faults)))?;
        let health = Arc::new(Health { state: Mutex::new(DeviceState::Up), faults });
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(format!("{}-{name}", settings.name))
                .spawn(work)
                .map_err(|cause| ReserveError::System { size: settings.bytes, cause })
        };
        let (strands, batches) = bounded::<Arc<Batch>>(STRANDS_MAX);
        for _ in 1..strand_count() {
            let (batches, health) = (batches.clone(), Arc::clone(&health));
            start("strand", Box::new(move || batches.iter().for_each(|batch| batch.work(&health))))?;
        }
        let stream = |direction: &str| {
            let (send, receive) = bounded(STREAM_QUEUE_MAX);
            let (health, strands) = (Arc::clone(&health), strands.clone());
            start(direction, Box::new(move || run(&receive, &health, &strands)))?;
            Ok(send)
        };
        let streams = [stream("in")?, stream("out")?];
        Ok(Self { name: settings.name.clone(), arena, health, streams })
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
        let refuse = |cause, jobs: Vec<Job>| TransferError {
            cause,
            targets: jobs.into_iter().map(|job| job.target).collect(),
        };
        if let Err(cause) = self.health.check() {
            return Err(refuse(cause, jobs));
        }
        let (done, outcome) = oneshot::channel();
        let stream = &self.streams[usize::from(direction == Direction::Out)];
        match stream.try_send(Submission { jobs, done }) {
            Ok(()) => Ok(Transfer(outcome)),
            Err(TrySendError::Full(submission)) => Err(refuse(DeviceError::Busy, submission.jobs)),
            Err(TrySendError::Disconnected(submission)) => {
                Err(refuse(DeviceError::Fenced("its stream ended".to_owned()), submission.jobs))
            }
        }
    }
}

fn run(queue: &Receiver<Submission>, health: &Arc<Health>, strands: &Sender<Arc<Batch>>) {
    for Submission { jobs, done } in queue {
        health.faults.wait_while_hung();
        // Nobody waits any more: the copies go back to their arena right here.
        drop(done.send(copy_all(jobs, health, strands)));
    }
}

/// A copy, or why there is none, with the target back.
type Copied = Result<Block, (DeviceError, BlockMut)>;

/// A batch that strands share: each takes the next job until none is left.
struct Batch {
    left: Mutex<std::iter::Enumerate<std::vec::IntoIter<Job>>>,
    /// Room for every job's end, so that no strand waits to report one.
    ends: Sender<(usize, Copied)>,
}

impl Batch {
    fn work(&self, health: &Health) {
        loop {
            let next = self.left.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, Job { source, target })) = next else { return };
            if self.ends.send((place, copy(&source, target, health))).is_err() {
                return;
            }
        }
    }
}

/// Copies a batch, a large one with the help of the device's other strands, since one core hashes more slowly
/// than memory delivers.
fn copy_all(jobs: Vec<Job>, health: &Arc<Health>, strands: &Sender<Arc<Batch>>) -> Outcome {
    let (count, bytes) = (jobs.len(), jobs.iter().map(|job| job.source.length()).sum::<usize>());
    let (ends, ended) = bounded(count);
    let batch = Arc::new(Batch { left: Mutex::new(jobs.into_iter().enumerate()), ends });
    if bytes >= STRAND_BYTES_MIN {
        for _ in 1..strand_count().min(count) {
            // A strand that is busy with another stream's batch is not waited for.
            let _ = strands.try_send(Arc::clone(&batch));
        }
    }
    batch.work(health);
    drop(batch);
    let mut copies: Vec<(usize, Block)> = Vec::with_capacity(count);
    let mut failed = None::<TransferError>;
    for (place, end) in ended.iter().take(count) {
        match (end, &mut failed) {
            (Ok(block), _) => copies.push((place, block)),
            (Err((_, target)), Some(error)) => error.targets.push(target),
            (Err((cause, target)), None) => failed = Some(TransferError { cause, targets: vec![target] }),
        }
    }
    if failed.is_none() && copies.len() < count {
        health.fence("a copying thread ended");
        let cause = DeviceError::Fenced("a copying thread ended".to_owned());
        failed = Some(TransferError { cause, targets: Vec::new() });
    }
    if let Some(error) = failed {
        return Err(error);
    }
    copies.sort_unstable_by_key(|(place, _)| *place);
    Ok(copies.into_iter().map(|(_, block)| block).collect())
}

/// Threads that share one large batch: as many as the machine has cores, at most [`STRANDS_MAX`].
fn strand_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(STRANDS_MAX)
}

fn copy(source: &Block, mut target: BlockMut, health: &Health) -> Copied {
    if let Err(cause) = health.check() {
        return Err((cause, target));
    }
    if health.faults.sticky_now() {
        health.fence("injected sticky error");
        return Err((DeviceError::Fenced("injected sticky error".to_owned()), target));
    }
    if target.capacity() < source.length() {
        let cause = DeviceError::Size { target: target.capacity(), source_bytes: source.length() };
        return Err((cause, target));
    }
    let flip = health.faults.flip_now();
    let mut hasher = BlockHasher::default();
    for (step, bytes) in source.raw().chunks(COPY_STEP).enumerate() {
        let at = step * COPY_STEP;
        target.write(at, bytes).expect("the capacity was checked, and steps leave no gap");
        if flip && step == 0 {
            let broken = bytes[0] ^ 1;
            target.write(at, &[broken]).expect("the byte was written just before");
        }
        hasher.update(&target.bytes()[at..at + bytes.len()]);
    }
    let (expected, found) = (source.checksum(), hasher.finish());
    if expected != found {
        return Err((Corrupt { instance: source.instance(), expected, found }.into(), target));
    }
    Ok(target.seal_copy(source))
}

//! Fill, gather, scatter and events: on the streams of the copies, by their rules.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures::FutureExt;
use keepwarm_types::{Birth, Bytes, Owner};
use proptest::prelude::{ProptestConfig, Strategy, any, proptest};

use super::{Bench, Kind, bench, on_each_device};
use crate::arena::Arena;
use crate::checksum::block_checksum;
use crate::device::{
    DeviceError, Direction, Event, GatherJob, Job, PlaneShape, STREAM_QUEUE_MAX, ScatterJob, TransferError,
    gather, scatter,
};
use crate::fault::flip_bit;
use crate::guard::{Block, BlockMut};

pub(super) const SHAPE: PlaneShape = PlaneShape { planes: 3, tokens_per_block: 8, token_bytes: 40 };
pub(super) const TOKENS: usize = 5;
pub(super) const KINDS: usize = 4;

pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within its deadline");
        std::thread::yield_now();
    }
}

pub(super) fn wait<F: Future + Unpin>(mut future: F) -> F::Output {
    let mut end = None;
    until("a future", || {
        end = (&mut future).now_or_never();
        end.is_some()
    });
    end.unwrap()
}

/// Whether it was woken.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn poll(event: &mut Event, flag: &Arc<Flag>) -> Poll<Result<(), DeviceError>> {
    Pin::new(event).poll(&mut Context::from_waker(&Waker::from(Arc::clone(flag))))
}

/// Gives whether a submission succeeded.
pub(super) type Ending = Box<dyn FnOnce() -> bool>;

impl Bench {
    pub(super) fn room(&self, arena: &Arena, bytes: usize) -> BlockMut {
        arena.allocate(&self.owner, Bytes(bytes.max(1) as u64), 1).unwrap().pop().unwrap()
    }

    pub(super) fn target(&self, bytes: usize) -> BlockMut {
        self.room(self.device.arena(), bytes)
    }

    pub(super) fn sealed(&self, bytes: &[u8]) -> Block {
        let mut block = self.room(&self.pinned, bytes.len());
        block.write(0, bytes).unwrap();
        block.seal(bytes.len()).unwrap()
    }

    pub(super) fn gather_job(&self) -> GatherJob {
        let sources = vec![self.sealed(&pattern(SHAPE.block_bytes()))];
        let target = self.target(SHAPE.packed_bytes(TOKENS));
        GatherJob { shape: SHAPE, sources, tokens: TOKENS, target }
    }

    pub(super) fn scatter_job(&self) -> ScatterJob {
        let source = self.sealed(&pattern(SHAPE.packed_bytes(TOKENS)));
        ScatterJob { shape: SHAPE, source, tokens: TOKENS, target: self.target(SHAPE.block_bytes()) }
    }

    /// Submits one job of the kind to the stream into the device.
    pub(super) fn start(&self, work: usize) -> Result<Ending, TransferError> {
        let device = &self.device;
        let sealed = match work {
            0 => device.fill(Direction::In, vec![self.target(100)], 7),
            1 => {
                let job = Job { source: self.sealed(b"copied"), target: self.target(100) };
                device.submit(Direction::In, vec![job])
            }
            2 => device.gather(Direction::In, vec![self.gather_job()]),
            _ => {
                let transfer = device.scatter(Direction::In, vec![self.scatter_job()])?;
                return Ok(Box::new(move || wait(transfer).is_ok()));
            }
        };
        sealed.map(|transfer| Box::new(move || wait(transfer).is_ok()) as Ending)
    }

    pub(super) fn used(&self) -> u64 {
        self.device.arena().figures().used.0 + self.pinned.figures().used.0
    }
}

pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

fn a_stream_does_all_kinds_in_the_order_of_their_submission(kind: Kind) {
    for (first, good) in (0..KINDS).flat_map(|first| (0..=KINDS).map(move |good| (first, good))) {
        let bench = bench(kind);
        bench.faults.hang(true);
        // The job after the first `good` fails, and all behind it: which these are is the order.
        bench.faults.sticky_after(good as u64);
        let started: Vec<_> = (0..KINDS)
            .map(|n| (bench.start((first + n) % KINDS).unwrap(), bench.device.record(Direction::In)))
            .collect();
        bench.faults.hang(false);
        for (n, (ending, event)) in started.into_iter().enumerate() {
            assert_eq!(ending(), n < good, "submission {n}, rotated by {first}, {good} succeed");
            let fenced = DeviceError::Fenced("injected sticky error".to_owned());
            assert_eq!(wait(event), if n < good { Ok(()) } else { Err(fenced) }, "event {n} of {good}");
        }
        until("memory of all kinds", || bench.used() == 0);
    }
}

fn an_event_resolves_after_the_work_before_it_and_not_earlier(kind: Kind) {
    let bench = bench(kind);
    let mut idle = bench.device.record(Direction::In);
    assert!(idle.is_done(), "nothing is before it");
    for _ in 0..3 {
        bench.faults.hang(true);
        let fill = bench.device.fill(Direction::In, vec![bench.target(100)], 1).unwrap();
        let scatter = bench.device.scatter(Direction::In, vec![bench.scatter_job()]).unwrap();
        let mut event = bench.device.record(Direction::In);
        let flag = Arc::new(Flag::default());
        assert_eq!(poll(&mut event, &flag), Poll::Pending);
        assert!(!event.is_done());
        assert_eq!(poll(&mut idle, &flag), Poll::Ready(Ok(())), "it was over before the stream hung");
        assert!(bench.device.record(Direction::Out).is_done(), "the other stream is idle");
        assert!(!flag.0.load(Ordering::SeqCst));
        bench.faults.hang(false);
        until("the wake", || flag.0.load(Ordering::SeqCst));
        assert!(event.is_done());
        assert_eq!(poll(&mut event, &flag), Poll::Ready(Ok(())));
        assert!(fill.now_or_never().is_some_and(|end| end.is_ok()), "the event came before the work");
        assert!(scatter.now_or_never().is_some_and(|end| end.is_ok()), "the event came before the work");
    }
}

fn many_events_wait_and_a_dropped_one_changes_nothing(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    let flag = Arc::new(Flag::default());
    let mut events = Vec::new();
    for _ in 0..50 {
        drop(bench.device.fill(Direction::In, vec![bench.target(100)], 1).unwrap());
        events.push(bench.device.record(Direction::In));
    }
    assert!(events.iter_mut().all(|event| poll(event, &flag).is_pending()));
    let held = Arc::strong_count(&flag);
    events = events.into_iter().enumerate().filter_map(|(n, event)| (n % 2 == 1).then_some(event)).collect();
    assert_eq!(held - Arc::strong_count(&flag), 25, "a dropped event leaves no waker");
    bench.faults.hang(false);
    for event in events {
        assert_eq!(wait(event), Ok(()));
    }
    until("the wakers", || Arc::strong_count(&flag) == 1);
    assert_eq!(bench.used(), 0, "an event means that the memory of dropped work is back");
}

//= GUARANTEES.md#G9
fn a_fence_ends_the_events_of_a_stream_that_hangs(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    drop(bench.device.fill(Direction::Out, vec![bench.target(100)], 1).unwrap());
    let (mut event, flag) = (bench.device.record(Direction::Out), Arc::new(Flag::default()));
    assert_eq!(poll(&mut event, &flag), Poll::Pending);
    bench.device.fence("it hangs");
    let fenced = Err(DeviceError::Fenced("it hangs".to_owned()));
    assert!(flag.0.load(Ordering::SeqCst), "the fence wakes who waits");
    assert_eq!(poll(&mut event, &flag), Poll::Ready(fenced.clone()));
    assert!(bench.used() > 0, "the work still holds its target");
    bench.faults.hang(false);
    until("the target", || bench.used() == 0);
    assert_eq!(wait(event), fenced, "what ends behind the fence did not finish");
}

fn a_fenced_device_refuses_every_kind_and_gives_targets_back(kind: Kind) {
    let bench = bench(kind);
    bench.device.fence("over");
    let fenced = DeviceError::Fenced("over".to_owned());
    for work in 0..KINDS {
        let Err(error) = bench.start(work) else { panic!("kind {work} was taken") };
        assert_eq!((error.cause, error.targets.len()), (fenced.clone(), 1));
    }
    let event = bench.device.record(Direction::In);
    assert!(event.is_done());
    assert_eq!(wait(event), Err(fenced));
    assert_eq!(bench.used(), 0);
}

fn a_full_stream_refuses_every_kind_and_gives_targets_back(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    let mut taken = 0;
    // The stream's thread takes one out before it hangs; only then is the queue full for good.
    until("a full stream", || {
        taken += usize::from(bench.device.fill(Direction::In, Vec::new(), 0).is_ok());
        taken > STREAM_QUEUE_MAX
    });
    for work in 0..KINDS {
        let Err(error) = bench.start(work) else { panic!("kind {work} was taken") };
        assert_eq!((error.cause, error.targets.len()), (DeviceError::Busy, 1));
    }
    let event = bench.device.record(Direction::In);
    assert!(!event.is_done());
    bench.faults.hang(false);
    assert_eq!(wait(event), Ok(()), "an event needs no place, and refused work does not count");
    assert_eq!(bench.used(), 0);
}

fn dropped_futures_of_every_kind_hold_their_memory_until_done(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    for work in 0..KINDS {
        drop(bench.start(work).unwrap());
    }
    let (device, pinned) = (bench.device.arena().figures().used, bench.pinned.figures().used);
    assert!(device > Bytes(0) && pinned > Bytes(0), "{device:?} {pinned:?}");
    let event = bench.device.record(Direction::In);
    bench.faults.hang(false);
    assert_eq!(wait(event), Ok(()));
    assert_eq!(bench.used(), 0);
    bench.device.arena().validate();
}

fn a_fill_makes_whole_blocks_of_new_instances(kind: Kind) {
    let bench = bench(kind);
    let targets = bench.device.arena().allocate(&bench.owner, Bytes(1 << 20), 4).unwrap();
    let blocks = wait(bench.device.fill(Direction::In, targets, 0xa5).unwrap()).unwrap();
    assert_eq!(blocks.len(), 4);
    for block in &blocks {
        let bytes = bench.read(block);
        assert!(bytes.len() == 1 << 20 && bytes.iter().all(|byte| *byte == 0xa5));
        assert_eq!(block.checksum(), block_checksum(&bytes));
        assert_eq!(blocks.iter().filter(|other| other.instance() == block.instance()).count(), 1);
    }
    drop(blocks);
    let odd = wait(bench.device.fill(Direction::In, vec![bench.target(5001)], 1).unwrap()).unwrap();
    assert_eq!(bench.read(&odd[0]), [1; 5001]);
}

//= GUARANTEES.md#G5
fn a_bit_flipped_in_any_kind_is_refused(kind: Kind) {
    for work in 0..KINDS {
        let bench = bench(kind);
        bench.faults.flip_after(0);
        assert!(!bench.start(work).unwrap()(), "kind {work}");
        assert!(bench.start(work).unwrap()(), "kind {work}: corruption does not fence");
    }
}

//= GUARANTEES.md#G5
fn broken_sources_do_not_come_out_as_sound_blocks(kind: Kind) {
    let bench = bench(kind);
    let job = bench.gather_job();
    // In a token that is not packed: the source is broken all the same.
    flip_bit(&job.sources[0], (SHAPE.block_bytes() - 1) as u64 * 8);
    let broken = job.sources[0].instance();
    let error = wait(bench.device.gather(Direction::In, vec![job]).unwrap()).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Corrupt(ref corrupt) if corrupt.instance == broken));
    assert_eq!(error.targets.len(), 1);
    let jobs = vec![bench.scatter_job(), bench.scatter_job()];
    flip_bit(&jobs[1].source, 3);
    let broken = jobs[1].source.instance();
    let error = wait(bench.device.scatter(Direction::In, jobs).unwrap()).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Corrupt(ref corrupt) if corrupt.instance == broken));
    assert_eq!(error.targets.len(), 2, "a scatter seals nothing: all of its targets come back");
}

fn what_does_not_fit_is_named_before_anything_is_written(kind: Kind) {
    let bench = bench(kind);
    let gathered = |change: &dyn Fn(&mut GatherJob)| {
        let mut jobs = vec![bench.gather_job(), bench.gather_job()];
        change(&mut jobs[1]);
        let error = bench.device.gather(Direction::In, jobs).unwrap_err();
        assert!(error.targets.len() == 2 && error.targets.iter().all(|target| target.written() == 0));
        error.cause.to_string()
    };
    let stranger = Owner { birth: Birth::from_random(2), ..bench.owner.clone() };
    assert!(gathered(&|job| job.tokens = 9).contains("9 tokens do not fit a block of 8"));
    assert!(gathered(&|job| job.shape.planes = 4).contains("the sources have 3 planes, the shape has 4"));
    assert!(gathered(&|job| job.sources.clear()).contains("the sources have 0 planes"));
    assert!(gathered(&|job| job.sources.push(bench.sealed(b"odd"))).contains("source 1 of 3 bytes"));
    assert!(gathered(&|job| job.shape.token_bytes = usize::MAX).contains("are no block"));
    assert!(gathered(&|job| job.shape.token_bytes = 0).contains("are no block"));
    assert!(gathered(&|job| job.target = bench.target(599)).contains("599 bytes cannot take 600"));
    let foreign = |job: &mut GatherJob| job.sources[0] = job.sources[0].share(stranger.birth);
    assert!(gathered(&foreign).contains("different owners"));

    let scattered = |change: &dyn Fn(&mut ScatterJob)| {
        let mut job = bench.scatter_job();
        change(&mut job);
        let error = bench.device.scatter(Direction::In, vec![job]).unwrap_err();
        assert!(error.targets.len() == 1 && error.targets[0].written() == 0);
        error.cause.to_string()
    };
    assert!(scattered(&|job| job.tokens = 4).contains("a packed source of 600 bytes, 4 tokens have 480"));
    assert!(scattered(&|job| job.tokens = 9).contains("9 tokens do not fit a block of 8"));
    assert!(scattered(&|job| job.shape.planes = 0).contains("are no block"));
    assert!(scattered(&|job| job.target = bench.target(959)).contains("959 bytes cannot take 960"));
    assert!(scattered(&|job| job.source = job.source.share(stranger.birth)).contains("different owners"));
    assert_eq!(bench.used(), 0);
}

/// What one case of the property test draws.
#[derive(Debug, Clone, Copy)]
struct Case {
    shape: PlaneShape,
    tokens: usize,
    /// Planes in the first of two sources.
    split: usize,
    /// What the scatter's target held before.
    byte: u8,
}

fn gather_and_scatter_agree_with_the_cpu(kind: Kind, case: Case) {
    let (bench, Case { shape, tokens, split, byte }) = (bench(kind), case);
    let working = pattern(shape.block_bytes());
    let (head, tail) = working.split_at(split.min(shape.planes) * shape.tokens_per_block * shape.token_bytes);
    let sources = [head, tail].into_iter().filter(|part| !part.is_empty());
    let sources = sources.map(|part| bench.sealed(part)).collect();
    let target = bench.target(shape.packed_bytes(tokens));
    let job = GatherJob { shape, sources, tokens, target };
    let packed = wait(bench.device.gather(Direction::Out, vec![job]).unwrap()).unwrap().pop().unwrap();
    let mut expected = vec![0; shape.packed_bytes(tokens)];
    gather(&shape, &working, tokens, &mut expected);
    assert_eq!(bench.read(&packed), expected);
    assert_eq!(packed.checksum(), block_checksum(&expected));

    // The same tenant's earlier bytes: the slot that was let go last is given next, and the other keeps its extent.
    let targets = vec![bench.target(shape.block_bytes()), bench.target(shape.block_bytes())];
    let mut filled = wait(bench.device.fill(Direction::In, targets, byte).unwrap()).unwrap();
    drop(filled.pop());
    let target = bench.target(shape.block_bytes());
    let job = ScatterJob { shape, source: packed, tokens, target };
    let back = wait(bench.device.scatter(Direction::In, vec![job]).unwrap()).unwrap().pop().unwrap();
    let mut expected_back = vec![byte; shape.block_bytes()];
    scatter(&shape, &expected, tokens, &mut expected_back);
    let sum = block_checksum(&expected_back);
    assert_eq!(bench.read(&back.seal_hashed(sum)), expected_back);
}

fn case() -> impl Strategy<Value = Case> {
    let numbers = (1usize..8, 1usize..40, 1usize..300, 0usize..100, 0usize..8, any::<u8>());
    numbers.prop_map(|(planes, tokens_per_block, token_bytes, share, split, byte)| {
        let shape = PlaneShape { planes, tokens_per_block, token_bytes };
        Case { shape, tokens: tokens_per_block * share / 99, split, byte }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn gather_and_scatter_do_what_the_cpu_functions_do(case in case()) {
        gather_and_scatter_agree_with_the_cpu(Kind::Host, case);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gather_and_scatter_on_cuda_do_what_the_cpu_functions_do(case in case()) {
        gather_and_scatter_agree_with_the_cpu(Kind::Cuda, case);
    }
}

on_each_device! {
    a_stream_does_all_kinds_in_the_order_of_their_submission,
    an_event_resolves_after_the_work_before_it_and_not_earlier,
    many_events_wait_and_a_dropped_one_changes_nothing,
    a_fence_ends_the_events_of_a_stream_that_hangs,
    a_fenced_device_refuses_every_kind_and_gives_targets_back,
    a_full_stream_refuses_every_kind_and_gives_targets_back,
    dropped_futures_of_every_kind_hold_their_memory_until_done,
    a_fill_makes_whole_blocks_of_new_instances,
    a_bit_flipped_in_any_kind_is_refused,
    broken_sources_do_not_come_out_as_sound_blocks,
    what_does_not_fit_is_named_before_anything_is_written,
}

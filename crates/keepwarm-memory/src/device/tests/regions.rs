//! Regions of another process: on a host device and on a CUDA device, which takes handles of its driver's as well.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use futures::FutureExt;
use keepwarm_types::{Birth, Bytes, Owner};
use proptest::prelude::{ProptestConfig, Strategy, any};
use proptest::test_runner::TestRunner;

use super::peer::{Bringer, REGION, acts, image, shared_memory};
use super::streams::{until, wait};
use super::{Bench, Kind, bench};
use crate::checksum::block_checksum;
use crate::device::{
    DeviceError, DeviceState, Direction, PlaneShape, RegionFault, RegionGatherJob, RegionPlanes,
    RegionRefusal, RegionScatterJob, Transfer, gather, scatter,
};
use crate::foreign::{
    Brought, ForeignRegion, PEERS_MAX, Peer, REGION_BYTES_MAX, REGIONS_MAX, RegionError, RegionState,
};

pub(super) const SHAPE: PlaneShape = PlaneShape { planes: 4, tokens_per_block: 8, token_bytes: 40 };
pub(super) const TOKENS: usize = 5;

/// Who opens what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    HostShared,
    #[cfg(feature = "cuda")]
    CudaShared,
    #[cfg(feature = "cuda")]
    CudaHandle,
}

/// Makes a test of each function for each way.
macro_rules! on_each_way {
    ($($name:ident),* $(,)?) => {
        mod host { $(#[test] fn $name() { super::on(super::Way::HostShared, super::$name); })* }
        #[cfg(feature = "cuda")]
        mod cuda_shared { $(#[test] fn $name() { super::on(super::Way::CudaShared, super::$name); })* }
        #[cfg(feature = "cuda")]
        mod cuda_handle { $(#[test] fn $name() { super::on(super::Way::CudaHandle, super::$name); })* }
    };
}

/// A device, and a process that brings it memory.
pub(super) struct Scene {
    pub(super) way: Way,
    pub(super) bench: Bench,
    pub(super) bringer: Bringer,
    pub(super) peer: Peer,
    pub(super) region: ForeignRegion,
}

/// The test, or what the other process does.
fn on(way: Way, test: fn(Scene)) {
    if !acts() {
        let kind = match way {
            Way::HostShared => Kind::Host,
            #[cfg(feature = "cuda")]
            _ => Kind::Cuda,
        };
        test(scene(way, bench(kind)));
    }
}

pub(super) fn scene(way: Way, bench: Bench) -> Scene {
    let bringer = match way {
        #[cfg(feature = "cuda")]
        Way::CudaHandle => Bringer::start("cuda", &super::regions_cuda::uuid()),
        _ => Bringer::start("shared", ""),
    };
    let peer = bringer.peer();
    let region = bench.device.open_region(&peer, bringer.brings(REGION)).unwrap();
    assert_eq!((region.bytes(), region.state()), (Bytes(REGION as u64), RegionState::Open));
    Scene { way, bench, bringer, peer, region }
}

impl Scene {
    /// Planes from an offset on, each with a gap of seven bytes behind it.
    pub(super) fn planes(&self, offset: usize, planes: usize) -> RegionPlanes {
        let pitch = (SHAPE.tokens_per_block * SHAPE.token_bytes + 7) as u64;
        RegionPlanes { region: self.region.clone(), offset: offset as u64, pitch, planes }
    }

    pub(super) fn gather_job(&self) -> RegionGatherJob {
        let target = self.bench.target(SHAPE.packed_bytes(TOKENS));
        RegionGatherJob {
            shape: SHAPE,
            sources: vec![self.planes(1001, SHAPE.planes)],
            tokens: TOKENS,
            target,
        }
    }

    fn scatter_job(&self) -> RegionScatterJob {
        let source = self.bench.sealed(&image(9)[..SHAPE.packed_bytes(TOKENS)]);
        let (owner, targets) = (self.bench.owner.clone(), vec![self.planes(1001, SHAPE.planes)]);
        RegionScatterJob { shape: SHAPE, source, owner, tokens: TOKENS, targets }
    }

    pub(super) fn gather(&self) -> Result<Transfer, RegionRefusal> {
        self.bench.device.gather_from(Direction::Out, vec![self.gather_job()])
    }

    /// What both kinds of work answer: nothing is issued, and the target comes back.
    pub(super) fn is_refused(&self, state: RegionState) {
        let error = self.gather().unwrap_err();
        assert_eq!((error.cause, error.targets.len()), (RegionFault::NotOpen(state), 1));
        let error = self.bench.device.scatter_into(Direction::In, vec![self.scatter_job()]).unwrap_err();
        assert_eq!(error.cause, RegionFault::NotOpen(state));
        assert!(error.to_string().starts_with(&format!("the region is {state}: ")), "{error}");
    }

    pub(super) fn gathered_from(&self, bytes: &[u8]) -> Vec<u8> {
        let stride = SHAPE.tokens_per_block * SHAPE.token_bytes;
        let rows = (0..SHAPE.planes)
            .map(|plane| &bytes[1001 + plane * (stride + 7)..][..TOKENS * SHAPE.token_bytes]);
        rows.flatten().copied().collect()
    }

    pub(super) fn ends(&self) {
        until("the mapping's end", || self.region.gone().now_or_never().is_some());
        assert_eq!(self.region.state(), RegionState::Gone);
        self.is_refused(RegionState::Gone);
    }
}

/// What one case draws: a shape, tokens, planes in the first of two strips, where that begins, gaps, a seed.
type Case = (PlaneShape, usize, usize, usize, usize, u8);

fn case() -> impl Strategy<Value = Case> {
    let shape = (1usize..7, 1usize..24, 1usize..200);
    let shape = shape.prop_map(|(planes, tokens_per_block, token_bytes)| PlaneShape {
        planes,
        tokens_per_block,
        token_bytes,
    });
    (shape, 0usize..100, 0usize..7, 0usize..5000, 0usize..100, any::<u8>())
}

fn gathers_and_scatters_do_what_the_cpu_functions_do(mut scene: Scene) {
    let mut runner = TestRunner::new(ProptestConfig::with_cases(48));
    let bench = |scene: &mut Scene, case: Case| {
        let (shape, share, split, offset, gap, seed) = case;
        let (tokens, split) = (shape.tokens_per_block * share / 99, split.min(shape.planes));
        let stride = shape.tokens_per_block * shape.token_bytes;
        // The second strip has another gap, and begins where the first has ended.
        let second = offset + split * (stride + gap);
        let strip = |offset: usize, gap: usize, planes| RegionPlanes {
            region: scene.region.clone(),
            offset: offset as u64,
            pitch: (stride + gap) as u64,
            planes,
        };
        let strips = [strip(offset, gap, split), strip(second, 3, shape.planes - split)];
        let strips: Vec<_> = strips.into_iter().filter(|strip| strip.planes > 0).collect();
        let start = |plane: usize| match plane.checked_sub(split) {
            None => offset + plane * (stride + gap),
            Some(plane) => second + plane * (stride + 3),
        };
        let mut memory = image(seed);
        assert_eq!(scene.bringer.does(&format!("fill {seed}")), block_checksum(&memory).to_string());

        let working: Vec<u8> =
            (0..shape.planes).flat_map(|plane| memory[start(plane)..][..stride].to_vec()).collect();
        let mut expected = vec![0; shape.packed_bytes(tokens)];
        gather(&shape, &working, tokens, &mut expected);
        let target = scene.bench.target(shape.packed_bytes(tokens));
        let job = RegionGatherJob { shape, sources: strips.clone(), tokens, target };
        let packed =
            wait(scene.bench.device.gather_from(Direction::Out, vec![job]).unwrap()).unwrap().pop().unwrap();
        assert_eq!(scene.bench.read(&packed), expected);
        assert_eq!(packed.checksum(), block_checksum(&expected));
        scene.bringer.has(&memory);

        let other: Vec<u8> = expected.iter().map(|byte| !byte).collect();
        let (source, owner) = (scene.bench.sealed(&other), scene.bench.owner.clone());
        let job = RegionScatterJob { shape, source, owner, tokens, targets: strips };
        wait(scene.bench.device.scatter_into(Direction::In, vec![job]).unwrap()).unwrap();
        let mut back = working;
        scatter(&shape, &other, tokens, &mut back);
        for (plane, row) in back.chunks_exact(stride).enumerate() {
            memory[start(plane)..][..stride].copy_from_slice(row);
        }
        // All of it: what lies between and behind the planes is as it was.
        scene.bringer.has(&memory);
    };
    let shared = std::cell::RefCell::new(&mut scene);
    runner
        .run(&case(), |case| {
            bench(&mut shared.borrow_mut(), case);
            Ok(())
        })
        .unwrap();
}

fn a_closed_region_is_quarantined_until_its_process_gives_it_up(scene: Scene) {
    let clone = scene.region.clone();
    assert!(scene.region.gone().now_or_never().is_none());
    clone.close();
    assert_eq!(scene.region.state(), RegionState::Quarantined);
    scene.is_refused(RegionState::Quarantined);
    assert!(scene.region.gone().now_or_never().is_none(), "its process lives and has not closed it");
    scene.region.closed_by_peer();
    scene.ends();
    assert_eq!(scene.bench.used(), 0);
    assert_eq!(scene.bench.device.state(), DeviceState::Up);
}

fn operations_hold_a_region_that_was_closed(mut scene: Scene) {
    scene.bringer.does("fill 3");
    scene.bench.faults.hang(true);
    let (first, second) = (scene.gather().unwrap(), scene.gather().unwrap());
    drop(second);
    scene.region.closed_by_peer();
    assert_eq!(scene.region.state(), RegionState::Closing);
    scene.is_refused(RegionState::Closing);
    assert!(scene.region.gone().now_or_never().is_none());
    scene.bench.faults.hang(false);
    let block = wait(first).unwrap().pop().unwrap();
    assert_eq!(scene.bench.read(&block), scene.gathered_from(&image(3)));
    scene.ends();
}

fn a_process_that_is_killed_in_the_middle_takes_nothing_with_it(mut scene: Scene) {
    scene.bringer.does("fill 5");
    scene.bench.faults.hang(true);
    let transfer = scene.gather().unwrap();
    let scatter = scene.bench.device.scatter_into(Direction::Out, vec![scene.scatter_job()]).unwrap();
    scene.bringer.kill();
    assert!(!scene.peer.is_alive());
    scene.is_refused(RegionState::Closing);
    let error = scene.bench.device.open_region(&scene.peer, nothing()).unwrap_err();
    assert!(matches!(error, RegionError::PeerGone), "{error}");
    assert!(scene.region.gone().now_or_never().is_none(), "an operation is outstanding");
    scene.bench.faults.hang(false);
    // Their turn comes after its end: they are not issued.
    let gone = DeviceError::Gone("the process that brought the region has ended".to_owned());
    let error = wait(transfer).unwrap_err();
    assert_eq!((&error.cause, error.targets.len()), (&gone, 1));
    assert_eq!(error.targets[0].written(), 0);
    assert_eq!(wait(scatter).unwrap_err().cause, gone);
    drop(error);
    scene.ends();
    assert_eq!((scene.bench.device.state(), scene.bench.used()), (DeviceState::Up, 0));
}

fn a_process_that_is_killed_is_noticed_by_itself(mut scene: Scene) {
    scene.bringer.kill();
    until("the mapping's end", || scene.region.state() == RegionState::Gone);
    scene.ends();
}

fn a_process_that_has_closed_all_brings_nothing_more(scene: Scene) {
    let again = scene.bench.device.open_region(&scene.peer, scene.bringer.brings(REGION)).unwrap();
    // Dropping the last handle closes; the mapping stays until the process says so.
    let mut gone = Box::pin(again.gone());
    drop(again);
    assert!((&mut gone).now_or_never().is_none());
    scene.peer.closed();
    wait(gone);
    scene.ends();
    let error = scene.bench.device.open_region(&scene.peer, scene.bringer.brings(REGION)).unwrap_err();
    assert!(matches!(error, RegionError::PeerClosed), "{error}");
    // The same memory by another connection is another region.
    let peer = scene.bringer.peer();
    let region = scene.bench.device.open_region(&peer, scene.bringer.brings(REGION)).unwrap();
    assert_eq!((region.state(), scene.region.state()), (RegionState::Open, RegionState::Gone));
}

fn what_lies_outside_is_refused_before_anything_is_issued(mut scene: Scene) {
    let sum = scene.bringer.does("fill 1");
    let room = SHAPE.tokens_per_block * SHAPE.token_bytes;
    let refused = |planes: &dyn Fn(&mut RegionPlanes)| {
        let (mut gather, mut scatter) = (scene.gather_job(), scene.scatter_job());
        planes(&mut gather.sources[0]);
        planes(&mut scatter.targets[0]);
        let device = &scene.bench.device;
        let error = device.scatter_into(Direction::In, vec![scene.scatter_job(), scatter]).unwrap_err();
        let other = device.gather_from(Direction::Out, vec![scene.gather_job(), gather]).unwrap_err();
        assert_eq!(error.cause, other.cause);
        assert!(other.targets.len() == 2 && other.targets.iter().all(|target| target.written() == 0));
        error.cause
    };
    let last = (REGION - 3 * (room + 7) - room) as u64;
    for offset in [last + 1, u64::MAX, u64::MAX - 10] {
        let cause = refused(&|planes| planes.offset = offset);
        assert!(matches!(cause, RegionFault::Bounds { offset: o, .. } if o == offset), "{cause}");
    }
    assert!(matches!(refused(&|planes| planes.pitch = u64::MAX / 2), RegionFault::Bounds { .. }));
    assert_eq!(refused(&|planes| planes.pitch = 319), RegionFault::Pitch { pitch: 319, room: 320 });
    assert!(
        refused(&|planes| planes.planes = 3)
            .to_string()
            .contains("the regions have 3 planes, the shape has 4")
    );
    let cause = refused(&|planes| planes.planes = usize::MAX).to_string();
    assert!(cause.contains(" planes, the shape has 4"), "{cause}");

    let scattered = |change: &dyn Fn(&mut RegionScatterJob)| {
        let mut job = scene.scatter_job();
        change(&mut job);
        scene.bench.device.scatter_into(Direction::In, vec![job]).unwrap_err().to_string()
    };
    let stranger = Owner { birth: Birth::from_random(2), ..scene.bench.owner.clone() };
    assert!(scattered(&|job| job.owner = stranger.clone()).contains("different owners"));
    assert!(scattered(&|job| job.tokens = 4).contains("a packed source of 800 bytes, 4 tokens have 640"));
    assert!(scattered(&|job| job.shape.token_bytes = usize::MAX).contains("are no block"));
    let mut job = scene.gather_job();
    job.target = scene.bench.target(799);
    let error = scene.bench.device.gather_from(Direction::Out, vec![job]).unwrap_err().to_string();
    assert!(error.contains("799 bytes cannot take 800"), "{error}");
    let elsewhere = bench(Kind::Host);
    let error = elsewhere.device.gather_from(Direction::Out, vec![scene.gather_job()]).unwrap_err();
    assert_eq!(error.cause, RegionFault::Elsewhere);
    drop(error);

    // The last place that there is.
    let mut job = scene.gather_job();
    job.sources[0].offset = last;
    assert!(wait(scene.bench.device.gather_from(Direction::Out, vec![job]).unwrap()).is_ok());
    assert_eq!(
        (scene.bringer.does("read"), scene.bench.used()),
        (sum, 0),
        "something was written, or is held"
    );
}

fn planes_that_are_written_twice_are_refused_before_anything_is_issued(mut scene: Scene) {
    let sum = scene.bringer.does("fill 1");
    let used = (TOKENS * SHAPE.token_bytes) as u64;
    let with = |scene: &Scene, offset: u64, tokens: usize| {
        let mut job = scene.scatter_job();
        job.source = scene.bench.sealed(&image(9)[..SHAPE.packed_bytes(tokens)]);
        (job.tokens, job.targets[0].offset) = (tokens, offset);
        job
    };
    let scatter = |scene: &Scene, jobs| scene.bench.device.scatter_into(Direction::In, jobs);
    for (second, tokens) in [(1001, TOKENS), (1001 + used - 1, 1), (1001 - used + 1, TOKENS), (1001, 1)] {
        let error = scatter(
            &scene,
            vec![with(&scene, 1001, TOKENS), with(&scene, 9001, 1), with(&scene, second, tokens)],
        )
        .unwrap_err();
        let offset = second.max(1001);
        assert_eq!(error.cause, RegionFault::Twice { offset });
        assert!(error.to_string().contains(&format!("the bytes from {offset} of a region on")), "{error}");
    }
    // Two strips of one job.
    let mut job = scene.scatter_job();
    job.targets = vec![scene.planes(1001, 2), scene.planes(1001 + 327, 2)];
    assert_eq!(scatter(&scene, vec![job]).unwrap_err().cause, RegionFault::Twice { offset: 1001 + 327 });
    let mut job = scene.scatter_job();
    let shape = PlaneShape { planes: 190_000, tokens_per_block: 1, token_bytes: 1 };
    job.targets[0] = RegionPlanes { pitch: 1, planes: shape.planes, offset: 0, region: scene.region.clone() };
    (job.shape, job.tokens, job.source) = (shape, 1, scene.bench.sealed(&image(2)[..shape.planes]));
    let again = || RegionScatterJob {
        source: job.source.clone(),
        owner: job.owner.clone(),
        targets: job.targets.clone(),
        ..job
    };
    let planes = 6 * shape.planes;
    assert_eq!(
        scatter(&scene, (0..6).map(|_| again()).collect()).unwrap_err().cause,
        RegionFault::Planes(planes)
    );
    assert_eq!(scene.bringer.does("read"), sum, "something was written");

    // Where a plane's tokens end another may begin, and nothing is written by planes without tokens.
    let jobs = vec![with(&scene, 1001, TOKENS), with(&scene, 1001 + used, 3), with(&scene, 1001, 0)];
    assert!(wait(scatter(&scene, jobs).unwrap()).is_ok());
}

//= GUARANTEES.md#G5
fn a_bit_flipped_on_the_way_is_refused(scene: Scene) {
    scene.bench.faults.flip_after(0);
    let error = wait(scene.gather().unwrap()).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Corrupt(_)), "{error}");
    assert_eq!(error.targets.len(), 1);
    scene.bench.faults.flip_after(0);
    let job = scene.scatter_job();
    let instance = job.source.instance();
    let error = wait(scene.bench.device.scatter_into(Direction::In, vec![job]).unwrap()).unwrap_err();
    assert!(
        matches!(error.cause, DeviceError::Corrupt(ref corrupt) if corrupt.instance == instance),
        "{error}"
    );
    assert!(wait(scene.gather().unwrap()).is_ok(), "corruption does not fence");
}

fn a_process_that_writes_meanwhile_makes_no_block_that_is_not_what_it_says(mut scene: Scene) {
    scene.bringer.does("fill 0");
    scene.bringer.tell("scribble 200");
    assert_eq!(scene.bringer.hear(), "begins");
    let mut sound = 0;
    for _ in 0..50 {
        match wait(scene.gather().unwrap()) {
            Ok(blocks) => {
                assert_eq!(block_checksum(&scene.bench.read(&blocks[0])), blocks[0].checksum());
                sound += 1;
            }
            Err(error) => assert!(matches!(error.cause, DeviceError::Corrupt(_)), "{error}"),
        }
    }
    // The host reads each byte once.
    assert!(sound == 50 || scene.way != Way::HostShared, "{sound} of 50 were sound");
    scene.bringer.hear();
    assert!(wait(scene.gather().unwrap()).is_ok());
}

on_each_way! {
    gathers_and_scatters_do_what_the_cpu_functions_do,
    planes_that_are_written_twice_are_refused_before_anything_is_issued,
    a_closed_region_is_quarantined_until_its_process_gives_it_up,
    operations_hold_a_region_that_was_closed,
    a_process_that_is_killed_in_the_middle_takes_nothing_with_it,
    a_process_that_is_killed_is_noticed_by_itself,
    a_process_that_has_closed_all_brings_nothing_more,
    what_lies_outside_is_refused_before_anything_is_issued,
    a_bit_flipped_on_the_way_is_refused,
    a_process_that_writes_meanwhile_makes_no_block_that_is_not_what_it_says,
    a_fenced_device_opens_nothing_and_gives_mappings_back,
}

/// Shared memory that is as it should be and that nobody shares.
pub(super) fn nothing() -> Brought {
    Brought::SharedMemory { fd: OwnedFd::from(shared_memory(REGION, true)), bytes: Bytes(REGION as u64) }
}

#[test]
fn shared_memory_that_could_end_this_process_is_refused() {
    let (bench, myself) = (bench(Kind::Host), Peer::watch_process(std::process::id()).unwrap());
    let open = |file: File, bytes: u64| {
        let brought = Brought::SharedMemory { fd: OwnedFd::from(file), bytes: Bytes(bytes) };
        bench.device.open_region(&myself, brought)
    };
    let refused = |file: File, bytes: u64| open(file, bytes).unwrap_err();
    assert!(matches!(refused(shared_memory(REGION, false), 100), RegionError::Unsealed));
    let error = refused(shared_memory(5000, true), 5001).to_string();
    assert!(error.contains("is said to have 5001 bytes and has 5000:"), "{error}");
    let cut = shared_memory(REGION, false);
    cut.set_len(4096).unwrap();
    rustix::fs::fcntl_add_seals(&cut, rustix::fs::SealFlags::SHRINK).unwrap();
    assert!(matches!(refused(cut, REGION as u64), RegionError::Short { found: Bytes(4096), .. }));
    let sparse = shared_memory(4096, true);
    sparse.set_len(1 << 30).unwrap();
    assert!(matches!(refused(sparse, 4096), RegionError::Sparse { there: Bytes(4096), .. }));
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(&[1; 100]).unwrap();
    assert!(matches!(refused(file, 100), RegionError::NotShared(_)));
    assert!(matches!(refused(File::open("/proc/self/exe").unwrap(), 100), RegionError::NotShared(_)));
    // POSIX shared memory cannot be sealed.
    if let Ok(file) = tempfile::tempfile_in("/dev/shm") {
        file.set_len(4096).unwrap();
        assert!(matches!(refused(file, 100), RegionError::Unsealed));
    }
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(refused(File::from(OwnedFd::from(stream)), 100), RegionError::NotShared(_)));
    let sealed = shared_memory(REGION, true);
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    assert!(matches!(refused(sealed, 100), RegionError::NotShared("not to be written")));
    for bytes in [0, REGION_BYTES_MAX.0 + 1] {
        assert!(matches!(refused(shared_memory(4096, true), bytes), RegionError::Size(_)));
    }
    let brought = Brought::CudaIpc { handle: [0; 64], device: String::new(), bytes: Bytes(1) };
    assert!(matches!(bench.device.open_region(&myself, brought).unwrap_err(), RegionError::NotCuda(_)));

    // What was opened cannot be cut afterwards.
    let file = shared_memory(REGION, true);
    let region = open(file.try_clone().unwrap(), REGION as u64).unwrap();
    assert_eq!(file.set_len(0).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(region.state(), RegionState::Open);
}

#[test]
fn a_process_brings_as_many_regions_as_it_may() {
    let (bench, myself) = (bench(Kind::Host), Peer::watch_process(std::process::id()).unwrap());
    let open = || bench.device.open_region(&myself, nothing());
    let mut regions: Vec<_> = (0..REGIONS_MAX).map(|_| open().unwrap()).collect();
    assert!(matches!(open().unwrap_err(), RegionError::Regions));
    // Closed by us alone it still counts.
    regions[0].close();
    assert!(matches!(open().unwrap_err(), RegionError::Regions));
    regions[0].closed_by_peer();
    wait(Box::pin(regions[0].gone()));
    until("its place", || open().map(|region| regions.push(region)).is_ok());
}

#[test]
fn as_many_processes_bring_regions_as_may() {
    const CHILD: &str = "KEEPWARM_TEST_PEERS";
    if std::env::var_os(CHILD).is_none() {
        // In a process of its own: others of this one bring regions too.
        let test = std::thread::current().name().expect("a test's thread has its name").to_owned();
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let ended = again.args([test.as_str(), "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        return;
    }
    let watch = || Peer::watch_process(std::process::id());
    let mut peers: Vec<_> = (0..PEERS_MAX).map(|_| watch().unwrap()).collect();
    assert!(matches!(watch().unwrap_err(), RegionError::Peers));
    let bench = bench(Kind::Host);
    let region = bench.device.open_region(&peers[0], nothing()).unwrap();
    drop(peers.pop());
    until("a place", || watch().map(|peer| peers.push(peer)).is_ok());
    // One that nobody can bring more by is watched for as long as its region is mapped.
    drop(peers.remove(0));
    assert!(matches!(watch().unwrap_err(), RegionError::Peers));
    region.closed_by_peer();
    until("another place", || watch().is_ok());
}

fn a_fenced_device_opens_nothing_and_gives_mappings_back(scene: Scene) {
    scene.bench.device.fence("over");
    let error = scene.bench.device.open_region(&scene.peer, scene.bringer.brings(REGION)).unwrap_err();
    assert!(matches!(error, RegionError::Fenced(ref reason) if reason == "over"), "{error}");
    let error = scene.gather().unwrap_err();
    assert_eq!((error.cause, error.targets.len()), (DeviceError::Fenced("over".to_owned()).into(), 1));
    // Fenced by us, its driver is sound.
    scene.region.closed_by_peer();
    until("the mapping's end", || scene.region.state() == RegionState::Gone);
}

#[test]
fn a_process_that_is_gone_brings_nothing() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let number = child.id();
    child.wait().unwrap();
    assert!(matches!(Peer::watch_process(number).unwrap_err(), RegionError::PeerGone));
    assert!(matches!(Peer::watch_process(u32::MAX).unwrap_err(), RegionError::PeerGone));
}

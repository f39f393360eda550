//! The CUDA driver of the tests: softcuda, or a real one, and what only a CUDA device does.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::executor::block_on;
use keepwarm_types::{Birth, Bytes, Owner};
use softcuda::preload::{Preloaded, preload};

use super::Bench;
use super::planted::serves_nothing_more;
use super::streams::until;
use crate::arena::{Arena, ArenaSettings};
use crate::device::cuda::compiled_kernels;
use crate::device::{
    CudaDevice, CudaDriver, CudaSelector, DeviceError, DeviceState, Direction, GatherJob, Job, PlaneShape,
    TransferError,
};
use crate::fault::{FaultPlan, Planted};
use crate::guard::Block;
use crate::machine::MpsLimits;

/// Longer than any healthy event takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// `gpu`: the machine's own driver is used instead of softcuda.
pub(super) const DEVICE: &str = "KEEPWARM_TEST_DEVICE";
/// Set in a child process of a test: what it is to do.
pub(super) const CHILD: &str = "KEEPWARM_TEST_CHILD";

pub(super) struct Loaded {
    pub(super) driver: CudaDriver,
    /// Where it is softcuda.
    pub(super) soft: Option<Preloaded>,
}

/// Opens softcuda before the bindings look for a driver, unless a GPU is to be used.
pub(super) fn loaded() -> &'static Loaded {
    static LOADED: OnceLock<Loaded> = OnceLock::new();
    LOADED.get_or_init(|| {
        // A race ends the process, unless a test of the tests asks for its report.
        let races = std::env::var("SOFTCUDA_RACES").unwrap_or_else(|_| "abort".to_owned());
        let real = std::env::var(DEVICE).is_ok_and(|device| device == "gpu");
        let kernels = if real { PathBuf::new() } else { compiled_kernels() };
        let kernels = kernels.to_str().expect("the target folder's path is text");
        let mut settings = vec![("SOFTCUDA_RACES", races.as_str()), ("SOFTCUDA_KERNELS", kernels)];
        if std::env::var_os("SOFTCUDA_DEVICES").is_none() {
            settings.push(("SOFTCUDA_DEVICES", "gpus=2,uuids=process"));
        }
        let soft = (!real).then(|| preload(&settings).expect("softcuda is built with the tests"));
        Loaded { driver: CudaDriver::load().expect("the driver loads"), soft }
    })
}

pub(super) fn device(settings: &ArenaSettings, faults: Arc<FaultPlan>, patience: Duration) -> CudaDevice {
    let driver = &loaded().driver;
    CudaDevice::open(driver, &CudaSelector::Number(0), settings, faults, patience).expect("the device opens")
}

/// Orders a fault; tells whether this is softcuda, where that can be had.
#[must_use]
pub(super) fn order(fault: &str) -> bool {
    let Some(soft) = loaded().soft else {
        println!("skipped: a real driver takes no orders for faults");
        return false;
    };
    soft.order(fault).expect("softcuda knows the order");
    true
}

pub(super) fn bench_with(patience: Duration) -> Bench {
    let faults = Arc::new(FaultPlan::default());
    let settings =
        |name| ArenaSettings { extent: Bytes(1 << 20), ..ArenaSettings::new(name, Bytes(4 << 20)) };
    let device = device(&settings("hbm:0"), Arc::clone(&faults), patience);
    let pinned = device.page_locked(&settings("pinned")).unwrap();
    let owner = Owner { tenant: "acme".parse().unwrap(), birth: Birth::from_random(1) };
    Bench { owner, pinned, device: Arc::new(device), faults }
}

fn copy(bench: &Bench, sources: &[Block]) -> Result<Vec<Block>, TransferError> {
    let transfer = bench.device.submit(Direction::In, bench.jobs(sources))?;
    block_on(transfer)
}

#[test]
fn a_fault_of_the_driver_fences_with_its_reason() {
    // (what is ordered, what the reason must say): an error at the call, one that comes when the copy runs, a code that
    // no binding knows, a device that is gone, an event that cannot be asked for.
    let cases = [
        ("cuMemcpyHtoDAsync_v2 fail 1", "cuMemcpyHtoDAsync_v2 answered 1 (CUDA_ERROR_INVALID_VALUE)"),
        ("cuMemcpyHtoDAsync_v2 async-sticky 700", "700 (CUDA_ERROR_ILLEGAL_ADDRESS)"),
        ("cuMemcpyHtoDAsync_v2 sticky 214", "214 (CUDA_ERROR_ECC_UNCORRECTABLE)"),
        ("cuMemcpyHtoDAsync_v2 fail 4711", "4711 (unknown): a code that this driver does not explain"),
        ("lose 999", "999 (CUDA_ERROR_UNKNOWN)"),
        ("cuEventQuery sticky 719", "cuEventQuery answered 719 (CUDA_ERROR_LAUNCH_FAILED)"),
        ("cuEventRecord fail 2", "cuEventRecord answered 2 (CUDA_ERROR_OUT_OF_MEMORY)"),
    ];
    for (fault, reason) in cases {
        let bench = bench_with(PATIENCE);
        let source = bench.filled(3);
        assert!(copy(&bench, std::slice::from_ref(&source)).is_ok(), "before '{fault}'");
        if !order(fault) {
            return;
        }
        let error = copy(&bench, std::slice::from_ref(&source)).unwrap_err();
        assert!(matches!(error.cause, DeviceError::Fenced(_)), "{fault}: {error}");
        let DeviceState::Fenced(told) = bench.device.state() else { panic!("'{fault}' did not fence") };
        assert!(told.contains(reason), "'{fault}' told: {told}");
        assert_eq!(serves_nothing_more(&bench), Ok(()), "after '{fault}'");
        drop(source);
        drop(error);
        // At once, or as soon as what was issued has run.
        until("the memory", || bench.used() == 0);
        drop(bench);
        assert!(order("clear"));
        reset_after(fault);
    }
}

/// A context that was broken is used by the next test of this process: its last user must be gone first.
fn reset_after(fault: &str) {
    let settings = ArenaSettings { extent: Bytes(1 << 20), ..ArenaSettings::new("probe", Bytes(1 << 20)) };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let opened = CudaDevice::open(
            &loaded().driver,
            &CudaSelector::Number(0),
            &settings,
            Arc::new(FaultPlan::default()),
            PATIENCE,
        );
        match opened {
            Ok(_) => return,
            Err(error) => {
                assert!(Instant::now() < deadline, "the device never came back after '{fault}': {error}")
            }
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_device_that_hangs_is_fenced_and_keeps_what_it_may_still_write() {
    let bench = bench_with(Duration::from_millis(200));
    let source = bench.filled(7);
    if !order("hang") {
        return;
    }
    let transfer = bench.device.submit(Direction::In, bench.jobs(std::slice::from_ref(&source))).unwrap();
    drop(source);
    let error = block_on(transfer).unwrap_err();
    assert!(error.cause.to_string().contains("it hangs: an event has not passed within 200ms"), "{error}");
    assert!(error.targets.is_empty(), "memory came back that a copy may still write");
    assert!(bench.pinned.figures().used > Bytes(0), "memory was given back that a copy may still read");
    assert!(order("resume"));
    let deadline = Instant::now() + PATIENCE;
    while bench.pinned.figures().used > Bytes(0) || bench.device.arena().figures().used > Bytes(0) {
        assert!(Instant::now() < deadline, "the memory never came back");
        std::thread::yield_now();
    }
    assert!(matches!(bench.device.state(), DeviceState::Fenced(_)), "a device that hung serves again");
}

#[test]
fn memory_of_a_batch_without_an_event_stays_until_the_batch_has_run() {
    let bench = bench_with(PATIENCE);
    let source = bench.filled(7);
    if !order("hang; cuEventRecord fail 2") {
        return;
    }
    let transfer = bench.device.submit(Direction::In, bench.jobs(std::slice::from_ref(&source))).unwrap();
    drop(source);
    until("the fence", || bench.device.state() != DeviceState::Up);
    assert!(bench.pinned.figures().used > Bytes(0), "memory was given back that a copy may still read");
    assert!(order("resume"));
    let error = block_on(transfer).unwrap_err();
    assert!(error.to_string().contains("cuEventRecord answered 2"), "{error}");
    drop(error);
    assert_eq!(bench.used(), 0);
}

#[test]
fn a_batch_whose_verification_fails_is_answered_when_nothing_reads_it_any_more() {
    // The kernels of a checksum are two: the first one's launch succeeds, and what comes behind it does not.
    for fault in ["cuEventRecord fail 2 after=1", "cuLaunchKernel fail 1 after=1"] {
        let bench = bench_with(PATIENCE);
        let source = bench.filled(7);
        if !order(&format!("{fault}; cuLaunchKernel delay 100")) {
            return;
        }
        let error = copy(&bench, std::slice::from_ref(&source)).unwrap_err();
        assert_eq!(calls("operations"), calls("operations_done"), "after '{fault}'");
        assert!(matches!(error.cause, DeviceError::Fenced(_)), "{fault}: {error}");
        assert_eq!(serves_nothing_more(&bench), Ok(()), "after '{fault}'");
        assert!(order("clear"));
    }
}

#[test]
fn a_copy_that_turns_a_bit_is_refused_and_the_device_goes_on() {
    let bench = bench_with(PATIENCE);
    let source = bench.filled(9);
    if !order("cuMemcpyHtoDAsync_v2 corrupt 12345") {
        return;
    }
    let error = copy(&bench, std::slice::from_ref(&source)).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Corrupt(_)), "{error}");
    assert!(copy(&bench, &[source]).is_ok());
    assert_eq!(bench.device.state(), DeviceState::Up);
}

/// How often this process has called a function of softcuda's; how many `pools` there are, `operations` and `operations_done`.
pub(super) fn calls(symbol: &str) -> u64 {
    let statistics = loaded().soft.map(|soft| soft.statistics()).unwrap_or_default();
    let digits = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>();
    let symbol = format!("\"{symbol}\":");
    statistics.split_once(&symbol).map_or(0, |(_, rest)| digits(rest).parse().unwrap())
}

fn launches() -> u64 {
    calls("cuLaunchKernel")
}

/// The calls of a stream's work that a batch may make.
const CALLS: [&str; 14] = [
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyPeerAsync",
    "cuMemsetD8Async",
    "cuLaunchKernel",
    "cuEventRecord",
    "cuMemHostAlloc",
    "cuMemAlloc_v2",
    "cuMemAllocFromPoolAsync",
    "cuMemFreeAsync",
    "cuMemPoolTrimTo",
    "cuMemPoolGetAttribute",
];

/// Driver calls by name while `work` ran.
pub(super) fn counted(work: impl FnOnce()) -> Vec<(&'static str, u64)> {
    let before = CALLS.map(calls);
    work();
    let since = CALLS.iter().zip(before).map(|(symbol, before)| (*symbol, calls(symbol) - before));
    since.filter(|(_, count)| *count > 0).collect()
}

#[test]
fn a_batch_costs_as_many_driver_calls_whatever_its_length() {
    const BLOCK: usize = 64 << 10;
    const SHAPE: PlaneShape = PlaneShape { planes: 4, tokens_per_block: 16, token_bytes: 1024 };
    if loaded().soft.is_none() {
        println!("skipped: a real driver does not count its calls");
        return;
    }
    let costs = [2, 16].map(|blocks: usize| {
        let bench = bench_with(PATIENCE);
        let room = |arena: &Arena, count| arena.allocate(&bench.owner, Bytes(BLOCK as u64), count).unwrap();
        let sources: Vec<_> = room(&bench.pinned, blocks)
            .into_iter()
            .enumerate()
            .map(|(n, mut block)| {
                block.bytes_mut().fill(n as u8);
                block.seal(BLOCK).unwrap()
            })
            .collect();
        let mut there = Vec::new();
        let restore = counted(|| {
            let targets = room(bench.device.arena(), blocks);
            let jobs = sources.iter().cloned().zip(targets).map(|(source, target)| Job { source, target });
            there = block_on(bench.device.submit(Direction::In, jobs.collect()).unwrap()).unwrap();
        });
        let mut packed = Vec::new();
        let gather = counted(|| {
            let targets = room(bench.device.arena(), blocks);
            let job = |(source, target)| GatherJob { shape: SHAPE, sources: vec![source], tokens: 9, target };
            let jobs = there.iter().cloned().zip(targets).map(job).collect();
            packed = block_on(bench.device.gather(Direction::Out, jobs).unwrap()).unwrap();
        });
        assert!(packed.iter().all(|block| block.length() == SHAPE.packed_bytes(9)));
        [restore, gather]
    });
    assert_eq!(costs[0], costs[1], "a longer batch costs more calls");
    let launch = |work: &[(&str, u64)]| work.iter().any(|(symbol, _)| *symbol == "cuLaunchKernel");
    assert!(costs[0].iter().all(|work| launch(work)), "{:?}", costs[0]);
    let copied: Vec<_> = costs[0][1].iter().filter(|(symbol, _)| symbol.contains("Memcpy2D")).collect();
    assert!(copied.is_empty(), "planes were moved by copies: {copied:?}");
    assert!(costs[0][0].contains(&("cuMemcpyHtoDAsync_v2", 1)), "{:?}", costs[0][0]);
    let allocates = |(symbol, _): &(&str, u64)| symbol.contains("Alloc");
    assert!(!costs[0].iter().flatten().any(allocates), "memory was allocated on the way: {:?}", costs[0]);
    println!("restore {:?}, gather {:?}", costs[0][0], costs[0][1]);
}

#[test]
fn a_device_hashes_its_own_bytes_and_without_kernels_they_are_read_back() {
    for (fault, hashes) in [("clear", true), ("cuModuleLoadData fail 218", false)] {
        if !order(fault) {
            return;
        }
        let bench = bench_with(PATIENCE);
        let (sources, before) = ([bench.filled(1), bench.filled(2)], launches());
        let copies = copy(&bench, &sources).unwrap();
        assert_eq!(launches() > before, hashes, "after '{fault}'");
        bench.faults.flip_after(0);
        let error = copy(&bench, &sources).unwrap_err();
        assert!(matches!(error.cause, DeviceError::Corrupt(_)), "{error}");
        assert_eq!(copies[1].checksum(), sources[1].checksum());
    }
}

#[test]
fn what_cannot_be_given_back_neither_panics_nor_fences() {
    let bench = bench_with(PATIENCE);
    let source = bench.filled(9);
    if !order(
        "cuEventDestroy_v2 fail 4 times=0; cuMemFree_v2 fail 4 times=0; cuStreamDestroy_v2 fail 4 times=0",
    ) {
        return;
    }
    for _ in 0..3 {
        assert!(copy(&bench, std::slice::from_ref(&source)).is_ok());
    }
    assert_eq!(bench.device.state(), DeviceState::Up);
}

#[test]
fn devices_and_memory_that_are_not_there_are_named() {
    let open = |selector: &CudaSelector, bytes: u64| {
        let settings = ArenaSettings::new("hbm:0", Bytes(bytes));
        let opened = CudaDevice::open(&loaded().driver, selector, &settings, Arc::default(), PATIENCE);
        opened.unwrap_err().to_string()
    };
    let error = open(&CudaSelector::Number(99), 4 << 20);
    assert!(error.starts_with("there is no cuda:99; the driver shows cuda:0 ("), "{error}");
    let gone = "MIG-0123abcd-0000-0000-0000-000000000000";
    let error = open(&CudaSelector::Uuid(gone.to_owned()), 4 << 20);
    assert!(error.starts_with(&format!("there is no {gone}; the driver shows cuda:0 (")), "{error}");
    let error = open(&CudaSelector::Number(0), 1 << 50);
    assert!(
        error.contains("1024TiB of cuda:0 were asked for") && error.contains("are free: ask for less"),
        "{error}"
    );
    let error = open(&CudaSelector::Number(0), 1);
    assert!(error.contains("an arena needs at least"), "{error}");
}

#[test]
fn a_limit_of_the_multi_process_service_caps_the_arena() {
    const NAME: &str = "a_limit_of_the_multi_process_service_caps_the_arena";
    if std::env::var_os(CHILD).is_some() {
        let open = |bytes| {
            let settings =
                ArenaSettings { extent: Bytes(1 << 20), ..ArenaSettings::new("hbm:0", Bytes(bytes)) };
            CudaDevice::open(&loaded().driver, &CudaSelector::Number(0), &settings, Arc::default(), PATIENCE)
        };
        let error = open(9 << 20).map(drop).map_err(|error| (error.is_about_memory(), error.to_string()));
        println!("told: {error:?}");
        let found = open(8 << 20).unwrap().found().clone();
        println!("budget: {}", found.budget(&MpsLimits::from_environment().unwrap_or_default()).0);
        return;
    }
    let limit = |value| child(NAME, value, &[("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", value)]);
    let said = limit("1=1M,0=8M");
    assert!(said.contains("told: Err((true, \"9MiB of cuda:0 were asked for; CUDA_MPS_PINNED"), "{said}");
    assert!(said.contains("budget: 8388608\n"), "{said}");
    // The limit of another device, one above what there is, and one that nobody understands.
    for other in ["1=1M", "0=900G", "a lot"] {
        let said = limit(other);
        assert!(said.contains("told: Ok(())") && !said.contains("budget: 8388608\n"), "{other}: {said}");
    }
}

#[test]
fn a_device_is_found_by_its_uuid() {
    let driver = &loaded().driver;
    let found = driver.devices().unwrap();
    let settings = ArenaSettings::new("hbm:0", Bytes(4 << 20));
    let uuid = CudaSelector::Uuid(format!("GPU-{}", found[0].uuid));
    let device = CudaDevice::open(driver, &uuid, &settings, Arc::default(), PATIENCE).unwrap();
    assert_eq!(device.found(), &found[0]);
    assert!(found[0].memory > Bytes(0) && !found[0].name.is_empty() && driver.version().unwrap() >= 12_000);
}

#[test]
fn a_claimed_device_is_nobody_elses_until_the_claim_ends() {
    let found = &loaded().driver.devices().unwrap()[0];
    let claim = found.claim().unwrap();
    let error = found.claim().unwrap_err().to_string();
    assert!(error.contains("is in use already"), "{error}");
    drop(claim);
    assert!(found.claim().is_ok());
}

/// A test of this module again, as [`child_of`] does it.
fn child(test: &str, word: &str, environment: &[(&str, &str)]) -> String {
    child_of(module_path!(), test, word, environment)
}

/// A test of that module again in a process of its own, with that environment; what it printed.
pub(super) fn child_of(module: &str, test: &str, word: &str, environment: &[(&str, &str)]) -> String {
    let path = format!("{}::{test}", module.split_once("::").unwrap().1);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([path.as_str(), "--exact", "--nocapture"]).env(CHILD, word);
    let ended = command.envs(environment.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    let complained = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.contains("1 passed"), "{word}: {said}\n{complained}");
    said + &complained
}

#[test]
fn a_driver_that_will_not_do_says_what_to_do() {
    if std::env::var_os(CHILD).is_some() {
        preload(&[]).expect("softcuda is built with the tests");
        let opened = CudaDriver::load().and_then(|driver| {
            let settings = ArenaSettings::new("hbm:0", Bytes(4 << 20));
            CudaDevice::open(&driver, &CudaSelector::Number(0), &settings, Arc::default(), PATIENCE)
        });
        println!("told: {}", opened.unwrap_err());
        return;
    }
    let cases = [
        ("driver=11080", "the CUDA driver speaks CUDA 11.8, 12.0 is needed: install driver 525 or newer"),
        ("pools=0", "cuda:0 has no stream-ordered memory pools"),
        ("init_error=999", "cuInit answered 999 (CUDA_ERROR_UNKNOWN)"),
    ];
    for (machine, told) in cases {
        let said =
            child("a_driver_that_will_not_do_says_what_to_do", machine, &[("SOFTCUDA_DEVICES", machine)]);
        assert!(said.contains(told), "{machine}: {said}");
    }
}

/// The test of the tests: with the wait for events taken out, the driver sees the race and verification the poison.
#[test]
fn a_copy_that_is_not_waited_for_does_not_pass_for_sound() {
    const NAME: &str = "a_copy_that_is_not_waited_for_does_not_pass_for_sound";
    let Some(word) = std::env::var_os(CHILD) else {
        let races = ("SOFTCUDA_RACES", "report");
        let said = child(NAME, "as it is", &[races]);
        assert!(!said.contains("softcuda: race") && said.contains("came as sound"), "{said}");
        let said = child(NAME, "planted", &[races]);
        assert!(said.contains("softcuda: race") && said.contains("came as corrupt"), "{said}");
        return;
    };
    let bench = bench_with(PATIENCE);
    if word == "planted" {
        Planted::plant(&bench.faults.planted.waits_for_nothing);
    }
    let source = bench.filled(5);
    assert!(order("cuMemcpyHtoDAsync_v2 delay 1000"), "this test is softcuda's");
    match copy(&bench, &[source]) {
        Ok(_) => println!("came as sound"),
        Err(TransferError { cause: DeviceError::Corrupt(_), .. }) => println!("came as corrupt"),
        Err(error) => panic!("{error}"),
    }
}

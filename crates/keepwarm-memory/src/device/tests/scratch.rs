//! Scratch pools of a CUDA device: grown once, trimmed before they give up, gone with the device.

use std::sync::Arc;
use std::time::Duration;

use futures::executor::block_on;
use keepwarm_types::{Birth, Bytes, Owner};

use super::Bench;
use super::driver::{PATIENCE, calls, counted, device, loaded, order};
use super::streams::until;
use crate::arena::ArenaSettings;
use crate::device::{
    CudaDevice, CudaError, CudaSelector, Device, DeviceError, DeviceState, Direction, Job, TransferError,
};
use crate::fault::FaultPlan;
use crate::guard::Block;

/// Words of 8 bytes that there is room for from the start in tests: one for each 4 KiB that are hashed at once.
const FIRST: Bytes = Bytes(8 << 10);
/// Blocks whose chunks have more words than that, and fewer than twice as many.
const MANY: usize = 50;

fn settings(name: &str) -> ArenaSettings {
    ArenaSettings { extent: Bytes(8 << 20), ..ArenaSettings::new(name, Bytes(16 << 20)) }
}

fn bench_with(patience: Duration) -> (Bench, Arc<CudaDevice>) {
    let faults = Arc::new(FaultPlan::default());
    let device = Arc::new(device(&settings("hbm:0"), Arc::clone(&faults), patience));
    let pinned = device.page_locked(&settings("pinned")).unwrap();
    let owner = Owner { tenant: "acme".parse().unwrap(), birth: Birth::from_random(1) };
    (Bench { owner, pinned, device: Arc::clone(&device) as Arc<dyn Device>, faults }, device)
}

fn copy(bench: &Bench, blocks: usize) -> Result<Vec<Block>, TransferError> {
    let sources: Vec<_> = (0..blocks).map(|n| bench.filled(n as u8)).collect();
    block_on(bench.device.submit(Direction::In, bench.jobs(&sources))?)
}

/// Calls for device memory while `work` ran.
fn asked(work: impl FnOnce()) -> Vec<(&'static str, u64)> {
    let is_memory =
        |(symbol, _): &(&str, u64)| ["Alloc", "Free", "Pool"].iter().any(|word| symbol.contains(word));
    counted(work).into_iter().filter(is_memory).collect()
}

#[test]
fn scratch_grows_to_what_is_needed_and_then_nothing_is_allocated() {
    let (bench, device) = bench_with(PATIENCE);
    for pool in device.figures().scratch {
        assert!(pool.used >= FIRST && pool.used_high >= pool.used && pool.reserved >= pool.used, "{pool:?}");
    }
    let before = device.figures().scratch[0];
    let warmed = asked(|| drop(copy(&bench, MANY).unwrap()));
    let after = device.figures().scratch[0];
    assert!(after.used.0 >= 2 * FIRST.0 && after.reserved >= before.reserved, "{after:?}");
    assert!(after.used_high >= after.used && after.reserved_high >= after.reserved, "{after:?}");
    if loaded().soft.is_none() {
        println!("skipped: a real driver does not count its calls");
        return;
    }
    // The new piece is had before the old one goes, so both count in the high mark.
    assert_eq!((after.used, after.used_high), (Bytes(2 * FIRST.0), Bytes(3 * FIRST.0)));
    assert!(warmed.contains(&("cuMemAllocFromPoolAsync", 1)), "{warmed:?}");
    assert!(
        warmed.contains(&("cuMemFreeAsync", 1))
            && !warmed.iter().any(|(symbol, _)| *symbol == "cuMemAlloc_v2")
    );
    let work = [MANY, 1, MANY / 2, MANY + 5];
    let warm = asked(|| work.iter().for_each(|blocks| drop(copy(&bench, *blocks).unwrap())));
    assert_eq!(warm, [], "memory was allocated on the hot path");
    assert_eq!(device.figures().scratch[0], after);
}

#[test]
fn a_pool_that_has_no_more_is_trimmed_and_asked_once_more() {
    let (bench, device) = bench_with(PATIENCE);
    if !order("cuMemAllocFromPoolAsync fail 2") {
        return;
    }
    let asked = asked(|| assert_eq!(copy(&bench, MANY).unwrap().len(), MANY));
    assert!(asked.contains(&("cuMemAllocFromPoolAsync", 2)), "{asked:?}");
    assert!(asked.contains(&("cuMemPoolTrimTo", 1)), "{asked:?}");
    assert_eq!(device.figures().scratch[0].used, Bytes(2 * FIRST.0));
    assert_eq!(device.state(), DeviceState::Up);
}

#[test]
fn a_device_without_more_scratch_works_with_what_it_has() {
    let (bench, device) = bench_with(PATIENCE);
    if !order("cuMemAllocFromPoolAsync fail 2 times=0") {
        return;
    }
    let first = asked(|| assert_eq!(copy(&bench, MANY).unwrap().len(), MANY));
    assert!(
        first.contains(&("cuMemAllocFromPoolAsync", 2)) && first.contains(&("cuMemPoolTrimTo", 1)),
        "{first:?}"
    );
    assert_eq!(asked(|| drop(copy(&bench, MANY).unwrap())), [], "it was asked again");
    assert_eq!((device.figures().scratch[0].used, device.state()), (FIRST, DeviceState::Up));
    // One that is too long for it is read back, and verified all the same.
    let long = || {
        let block = |arena: &crate::arena::Arena| {
            arena.allocate(&bench.owner, Bytes(6 << 20), 1).unwrap().pop().unwrap()
        };
        let mut source = block(&bench.pinned);
        source.bytes_mut().fill(3);
        let job = Job { source: source.seal(6 << 20).unwrap(), target: block(bench.device.arena()) };
        block_on(bench.device.submit(Direction::In, vec![job]).unwrap())
    };
    let read = calls("cuMemcpyDtoHAsync_v2");
    assert!(long().is_ok());
    assert!(calls("cuMemcpyDtoHAsync_v2") > read);
    for work in [&(|| copy(&bench, MANY)) as &dyn Fn() -> _, &long] {
        bench.faults.flip_after(0);
        assert!(matches!(work().unwrap_err().cause, DeviceError::Corrupt(_)));
    }
}

#[test]
fn a_device_without_any_scratch_is_refused_at_its_start() {
    let open = || {
        let settings = settings("hbm:0");
        CudaDevice::open(&loaded().driver, &CudaSelector::Number(0), &settings, Arc::default(), PATIENCE)
    };
    for (fault, told) in [
        (
            "cuMemAllocFromPoolAsync fail 2 times=0",
            "cuda:0 has no 8KiB of scratch memory, also after its pool was trimmed",
        ),
        (
            "cuMemAllocFromPoolAsync fail 801",
            "cuMemAllocFromPoolAsync answered 801 (CUDA_ERROR_NOT_SUPPORTED)",
        ),
        ("cuMemPoolCreate fail 1", "cuMemPoolCreate answered 1 (CUDA_ERROR_INVALID_VALUE)"),
        ("cuMemPoolSetAttribute fail 1", "cuMemPoolSetAttribute answered 1 (CUDA_ERROR_INVALID_VALUE)"),
    ] {
        // The driver starts first.
        loaded();
        if !order(fault) {
            return;
        }
        let error = open().unwrap_err();
        assert!(error.to_string().contains(told), "{fault}: {error}");
        assert_eq!(error.is_about_memory(), matches!(error, CudaError::Scratch { .. }));
        assert!(order("clear"));
        assert_eq!(calls("pools"), 0, "a pool was left after '{fault}'");
    }
    assert!(open().is_ok());
}

#[test]
fn another_error_of_the_pool_fences() {
    for fault in
        ["cuMemAllocFromPoolAsync fail 719", "cuMemFreeAsync fail 719", "cuMemPoolGetAttribute fail 719"]
    {
        let (bench, device) = bench_with(PATIENCE);
        if !order(fault) {
            return;
        }
        let error = copy(&bench, MANY).unwrap_err();
        assert!(matches!(error.cause, DeviceError::Fenced(_)), "{fault}: {error}");
        assert!(matches!(device.state(), DeviceState::Fenced(reason) if reason.contains("answered 719")));
        assert_eq!(super::planted::serves_nothing_more(&bench), Ok(()));
    }
}

#[test]
fn pools_go_with_their_device_and_stay_with_one_that_hangs() {
    let (bench, device) = bench_with(Duration::from_millis(200));
    if loaded().soft.is_none() {
        println!("skipped: a real driver does not count its calls");
        return;
    }
    assert_eq!(calls("pools"), 2);
    drop((bench, device));
    until("the pools' end", || calls("pools") == 0);

    let (bench, device) = bench_with(Duration::from_millis(200));
    let (freed, destroyed) = (calls("cuMemFreeAsync"), calls("cuMemPoolDestroy"));
    assert!(order("hang"));
    let error = copy(&bench, 1).unwrap_err();
    assert!(error.cause.to_string().contains("it hangs"), "{error}");
    drop((error, bench, device));
    assert_eq!((calls("cuMemFreeAsync"), calls("cuMemPoolDestroy"), calls("pools")), (freed, destroyed, 2));
    assert!(order("resume"));
    // The stream that had work keeps its own until that has passed.
    until("a pool's end", || calls("cuMemPoolDestroy") > destroyed);
}

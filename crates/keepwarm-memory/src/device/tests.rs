//! One suite for every device: the host's, and CUDA's over softcuda or, with `KEEPWARM_TEST_DEVICE=gpu`, over a GPU.

#[cfg(feature = "cuda")]
mod driver;
mod fp8;
#[cfg(feature = "cuda")]
mod link;
mod peer;
mod planted;
#[cfg(feature = "nvtx")]
mod ranges;
mod regions;
#[cfg(feature = "cuda")]
mod regions_cuda;
#[cfg(feature = "cuda")]
mod scratch;
mod streams;

use std::sync::Arc;
use std::time::Duration;

use futures::executor::block_on;
use keepwarm_types::{Birth, Bytes, Owner};

use super::{Device, DeviceError, DeviceState, Direction, HostDevice, Job, STREAM_QUEUE_MAX};
use crate::arena::{Arena, ArenaSettings};
use crate::fault::FaultPlan;
use crate::guard::{Block, GuardError};

const BLOCK: u64 = 100_000;

/// Which device a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Makes a test of each function for each device.
macro_rules! on_each_device {
    ($($name:ident),* $(,)?) => {
        mod host {
            $(#[test] fn $name() { super::$name($crate::device::tests::Kind::Host); })*
        }

        #[cfg(feature = "cuda")]
        mod cuda {
            $(#[test] fn $name() { super::$name($crate::device::tests::Kind::Cuda); })*
        }
    };
}
use on_each_device;

struct Bench {
    owner: Owner,
    pinned: Arena,
    device: Arc<dyn Device>,
    faults: Arc<FaultPlan>,
}

fn bench(kind: Kind) -> Bench {
    let faults = Arc::new(FaultPlan::default());
    let settings = |name: &str| ArenaSettings {
        name: name.to_owned(),
        bytes: Bytes(4 << 20),
        extent: Bytes(1 << 20),
        lock: false,
    };
    let (pinned, hbm) = (settings("pinned"), settings("hbm:0"));
    let (pinned, device): (_, Arc<dyn Device>) = match kind {
        Kind::Host => {
            let device = HostDevice::new(&hbm, Arc::clone(&faults)).unwrap();
            (Arena::reserve(&pinned).unwrap(), Arc::new(device))
        }
        #[cfg(feature = "cuda")]
        Kind::Cuda => {
            let device = driver::device(&hbm, Arc::clone(&faults), driver::PATIENCE);
            (device.page_locked(&pinned).unwrap(), Arc::new(device))
        }
    };
    let owner = Owner { tenant: "acme".parse().unwrap(), birth: Birth::from_random(1) };
    Bench { owner, pinned, device, faults }
}

impl Bench {
    fn filled(&self, byte: u8) -> Block {
        let mut block = self.pinned.allocate(&self.owner, Bytes(BLOCK), 1).unwrap().pop().unwrap();
        block.bytes_mut().fill(byte);
        block.seal(BLOCK as usize).unwrap()
    }

    /// A block's bytes, wherever it lies; a device's are copied out.
    fn read(&self, block: &Block) -> Vec<u8> {
        if block.is_on_host() {
            return block.bytes(&self.owner).unwrap().to_vec();
        }
        assert_eq!(block.bytes(&self.owner), Err(GuardError::OnDevice));
        let target = self.pinned.allocate(&self.owner, block.capacity(), 1).unwrap().pop().unwrap();
        let job = Job { source: block.clone(), target };
        let copies = block_on(self.device.submit(Direction::Out, vec![job]).unwrap()).unwrap();
        copies[0].bytes(&self.owner).unwrap().to_vec()
    }

    fn jobs(&self, sources: &[Block]) -> Vec<Job> {
        let targets = self.device.arena().allocate(&self.owner, Bytes(BLOCK), sources.len()).unwrap();
        sources.iter().cloned().zip(targets).map(|(source, target)| Job { source, target }).collect()
    }
}

fn a_batch_arrives_verified_as_the_same_instances(kind: Kind) {
    let bench = bench(kind);
    let sources: Vec<_> = (1..=3).map(|byte| bench.filled(byte)).collect();
    let copies = block_on(bench.device.submit(Direction::In, bench.jobs(&sources)).unwrap()).unwrap();
    for (source, copy) in sources.iter().zip(&copies) {
        assert_eq!((source.instance(), source.checksum()), (copy.instance(), copy.checksum()));
        assert_eq!(source.bytes(&bench.owner).unwrap(), bench.read(copy));
        assert_eq!(copy.arena(), "hbm:0");
    }
}

fn a_bit_flipped_on_the_way_is_refused_and_the_memory_comes_back(kind: Kind) {
    let bench = bench(kind);
    let sources = [bench.filled(1), bench.filled(2)];
    bench.faults.flip_after(1);
    let error = block_on(bench.device.submit(Direction::In, bench.jobs(&sources)).unwrap()).unwrap_err();
    assert!(
        matches!(error.cause, DeviceError::Corrupt(ref corrupt) if corrupt.instance == sources[1].instance())
    );
    drop(error);
    assert_eq!(bench.device.arena().figures().used, Bytes(0));
    assert_eq!(bench.device.state(), DeviceState::Up, "corruption in transit does not fence");
}

fn after_a_sticky_error_the_device_serves_nothing_more(kind: Kind) {
    let bench = bench(kind);
    let sources = [bench.filled(1)];
    bench.faults.sticky_after(0);
    let error = block_on(bench.device.submit(Direction::In, bench.jobs(&sources)).unwrap()).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Fenced(_)));
    let error = bench.device.submit(Direction::In, bench.jobs(&sources)).unwrap_err();
    assert!(matches!(error.cause, DeviceError::Fenced(_)));
    assert_eq!(error.targets.len(), 1, "the guards come back");
    assert_eq!(planted::serves_nothing_more(&bench), Ok(()));
}

fn a_dropped_transfer_holds_its_memory_until_the_copy_has_run(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    let source = bench.filled(9);
    let transfer = bench.device.submit(Direction::Out, bench.jobs(std::slice::from_ref(&source))).unwrap();
    drop(transfer);
    drop(source);
    assert!(bench.device.arena().figures().used > Bytes(0), "the running job holds its target");
    assert!(bench.pinned.figures().used > Bytes(0), "and its source");
    bench.faults.hang(false);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while bench.device.arena().figures().used > Bytes(0) || bench.pinned.figures().used > Bytes(0) {
        assert!(std::time::Instant::now() < deadline, "the copy's memory never came back");
        std::thread::yield_now();
    }
}

fn a_full_stream_says_busy(kind: Kind) {
    let bench = bench(kind);
    bench.faults.hang(true);
    let mut transfers = Vec::new();
    let error = loop {
        match bench.device.submit(Direction::In, Vec::new()) {
            Ok(transfer) => transfers.push(transfer),
            Err(error) => break error,
        }
        assert!(transfers.len() <= STREAM_QUEUE_MAX + 1, "the queue has no bound");
    };
    assert_eq!(error.cause, DeviceError::Busy);
    bench.faults.hang(false);
}

fn a_failing_allocator_is_an_error_value(kind: Kind) {
    let bench = bench(kind);
    bench.faults.fail_allocations(true);
    assert!(bench.device.arena().allocate(&bench.owner, Bytes(BLOCK), 1).is_err());
    bench.faults.fail_allocations(false);
    assert!(bench.device.arena().allocate(&bench.owner, Bytes(BLOCK), 1).is_ok());
}

on_each_device! {
    a_batch_arrives_verified_as_the_same_instances,
    a_bit_flipped_on_the_way_is_refused_and_the_memory_comes_back,
    after_a_sticky_error_the_device_serves_nothing_more,
    a_dropped_transfer_holds_its_memory_until_the_copy_has_run,
    a_full_stream_says_busy,
    a_failing_allocator_is_an_error_value,
}

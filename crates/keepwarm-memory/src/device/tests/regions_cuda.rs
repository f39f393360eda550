//! Handles of a GPU's memory that another process exports, and what a driver refuses or keeps.
#![allow(unsafe_code, reason = "the other process calls the driver as an engine does")]

use std::time::Duration;

use cudarc::driver::sys;
use futures::FutureExt;
use keepwarm_types::Bytes;
use softcuda::preload::preload;

use super::driver::{DEVICE, bench_with, calls, counted, loaded, order};
use super::peer::{Bringer, REGION, acts, image};
use super::regions::{Way, nothing, scene};
use super::streams::{until, wait};
use super::{Kind, bench};
use crate::device::{DeviceError, DeviceState, Direction, Job};
use crate::foreign::{Brought, Peer, RegionError, RegionState};

/// The UUID of the tests' GPU, without a prefix.
pub(super) fn uuid() -> String {
    loaded().driver.devices().unwrap()[0].uuid.clone()
}

/// Memory that this process exports.
pub(super) struct Exported {
    address: u64,
    handle: sys::CUipcMemHandle,
}

/// A call of the driver's that works.
macro_rules! cu {
    ($name:ident($($argument:expr),*)) => {
        // SAFETY: places that live through the call, and handles and addresses that this process made.
        assert_eq!(unsafe { sys::$name($($argument),*) }, sys::CUresult::CUDA_SUCCESS, stringify!($name))
    };
}

impl Exported {
    pub(super) fn new() -> Self {
        if std::env::var_os(DEVICE).is_none_or(|device| device != "gpu") {
            preload(&[]).expect("softcuda is built with the tests");
        }
        let (mut device, mut context, mut address) = (0, std::ptr::null_mut(), 0);
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        cu!(cuInit(0));
        cu!(cuDeviceGet(&raw mut device, 0));
        cu!(cuDevicePrimaryCtxRetain(&raw mut context, device));
        cu!(cuCtxSetCurrent(context));
        cu!(cuMemAlloc_v2(&raw mut address, REGION));
        cu!(cuIpcGetMemHandle(&raw mut handle, address));
        Self { address, handle }
    }
}

impl super::peer::Memory for Exported {
    fn name(&self) -> String {
        self.handle.reserved.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
    }

    fn fill(&mut self, bytes: &[u8]) {
        cu!(cuMemcpyHtoDAsync_v2(self.address, bytes.as_ptr().cast(), bytes.len(), std::ptr::null_mut()));
        cu!(cuStreamSynchronize(std::ptr::null_mut()));
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION];
        cu!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), self.address, REGION, std::ptr::null_mut()));
        cu!(cuStreamSynchronize(std::ptr::null_mut()));
        bytes
    }

    fn free(&mut self) {
        cu!(cuMemFree_v2(self.address));
    }
}

#[test]
fn handles_that_are_of_no_use_say_what_to_do() {
    if acts() {
        return;
    }
    let (bench, own) = (bench(Kind::Cuda), uuid());
    let mut bringer = Bringer::start("cuda", &own);
    let peer = bringer.peer();
    let refused = |brought: Brought| bench.device.open_region(&peer, brought).unwrap_err();
    let error = refused(bringer.brings(REGION + 1));
    assert!(
        matches!(error, RegionError::Short { asked: Bytes(200_001), found } if found < Bytes(200_001)),
        "{error}"
    );
    let closed = calls("cuIpcCloseMemHandle");

    // Another GPU, said so and not said so.
    let other = "00112233-4455-6677-8899-aabbccddeeff";
    let elsewhere = Bringer::start("cuda", other);
    let error = refused(elsewhere.brings(REGION)).to_string();
    assert!(
        error.contains(&format!("the memory lies on GPU GPU-{other}, this device is GPU {own}")),
        "{error}"
    );
    let Brought::CudaIpc { handle, bytes, .. } = elsewhere.brings(REGION) else { panic!("a handle") };
    let lie = |handle| Brought::CudaIpc { handle, device: own.clone(), bytes };
    for handle in [handle, [7; 64]] {
        let error = refused(lie(handle));
        assert!(matches!(error, RegionError::Handle(_)), "{error}");
        assert!(error.to_string().contains("cuIpcOpenMemHandle_v2 answered 1"), "{error}");
    }

    // Memory that was freed, a process that is gone.
    bringer.does("free");
    let error = refused(bringer.brings(REGION));
    assert!(matches!(error, RegionError::Handle(_)) && error.to_string().contains("it is stale"), "{error}");
    let orphan = bringer.brings(REGION);
    bringer.kill();
    assert!(matches!(refused(orphan), RegionError::PeerGone));

    // None of this harms the device, and nothing was left open.
    assert_eq!(calls("cuIpcCloseMemHandle"), closed);
    assert_eq!(bench.device.state(), DeviceState::Up);
    let block = bench.filled(1);
    let target = bench.target(block.length());
    assert!(wait(bench.device.submit(Direction::In, vec![Job { source: block, target }]).unwrap()).is_ok());
}

#[test]
fn planes_of_another_process_cost_as_many_driver_calls_whatever_their_number() {
    if acts() {
        return;
    }
    if loaded().soft.is_none() {
        println!("skipped: a real driver does not count its calls");
        return;
    }
    let scene = scene(Way::CudaHandle, bench(Kind::Cuda));
    let cost = |count| {
        let jobs = (0..count).map(|_| scene.gather_job()).collect();
        counted(|| drop(wait(scene.bench.device.gather_from(Direction::Out, jobs).unwrap()).unwrap()))
    };
    let (few, many) = (cost(2), cost(64));
    assert_eq!(few, many);
    let launched = few.iter().any(|(symbol, _)| *symbol == "cuLaunchKernel");
    assert!(launched && !few.iter().any(|(symbol, _)| symbol.contains("Memcpy")), "{few:?}");
}

#[test]
fn a_device_that_hangs_keeps_the_regions_that_it_may_still_touch() {
    if acts() {
        return;
    }
    let mut scene = scene(Way::CudaHandle, bench_with(Duration::from_millis(200)));
    let second = scene.bench.device.open_region(&scene.peer, scene.bringer.brings(REGION)).unwrap();
    if !order("hang") {
        return;
    }
    let error = wait(scene.gather().unwrap()).unwrap_err();
    assert!(error.cause.to_string().contains("it hangs"), "{error}");
    scene.bringer.kill();
    until("the end of its process", || second.state() == RegionState::Quarantined);
    assert_eq!(scene.region.state(), RegionState::Closing, "a copy may still touch it");
    assert!(scene.region.gone().now_or_never().is_none());
    let error = scene.bench.device.open_region(&Peer::watch_process(std::process::id()).unwrap(), nothing());
    assert!(error.unwrap_err().to_string().contains("the device is fenced: it hangs"));
    assert!(order("resume"));
    until("the mappings' end", || {
        [&scene.region, &second].iter().all(|region| region.state() == RegionState::Gone)
    });
}

#[test]
fn work_of_a_process_that_ended_is_issued_no_more_and_what_was_issued_runs() {
    if acts() {
        return;
    }
    let mut scene = scene(Way::CudaHandle, bench(Kind::Cuda));
    scene.bringer.does("fill 5");
    let issued = calls("cuEventRecord");
    if !order("hang") {
        return;
    }
    let before = scene.gather().unwrap();
    until("its issue", || calls("cuEventRecord") > issued);
    scene.bench.faults.hang(true);
    let behind = scene.gather().unwrap();
    scene.bringer.kill();
    let launched = calls("cuLaunchKernel");
    scene.bench.faults.hang(false);
    until("its turn", || calls("cuEventRecord") > issued + 1);
    assert_eq!(calls("cuLaunchKernel"), launched, "it was issued");
    assert!(order("resume"));
    let block = wait(before).unwrap().pop().unwrap();
    assert_eq!(scene.bench.read(&block), scene.gathered_from(&image(5)));
    assert!(matches!(wait(behind).unwrap_err().cause, DeviceError::Gone(_)));
    scene.ends();
}

#[test]
fn what_the_driver_does_not_give_back_stays_in_quarantine() {
    if acts() {
        return;
    }
    let scene = scene(Way::CudaHandle, bench(Kind::Cuda));
    let closed = calls("cuIpcCloseMemHandle");
    if !order("cuIpcCloseMemHandle fail 4") {
        return;
    }
    scene.region.closed_by_peer();
    until("the attempt", || calls("cuIpcCloseMemHandle") > closed);
    until("the mapping's return", || scene.region.state() == RegionState::Quarantined);
    assert!(scene.region.gone().now_or_never().is_none(), "it is mapped");
    scene.is_refused(RegionState::Quarantined);
}

#[test]
fn shared_memory_that_the_driver_does_not_lock_is_not_kept() {
    let (bench, myself) = (bench(Kind::Cuda), Peer::watch_process(std::process::id()).unwrap());
    if !order("cuMemHostRegister_v2 fail 2") {
        return;
    }
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("memfd:keepwarm-test").count();
    let error = bench.device.open_region(&myself, nothing()).unwrap_err();
    assert!(error.to_string().contains("cuMemHostRegister_v2 answered 2"), "{error}");
    assert_eq!((maps(), bench.device.state()), (0, DeviceState::Up));
    let region = bench.device.open_region(&myself, nothing()).unwrap();
    assert_eq!(maps(), 1);
    region.closed_by_peer();
    until("the mapping's end", || region.state() == RegionState::Gone);
    assert_eq!(maps(), 0);
}

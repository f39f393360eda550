//! Faults on order, and machines that are not well.

use cudarc::driver::sys;

use crate::driver::{NULL, alloc, event, fault, open, statistics, stream};
use crate::process::run;

#[test]
fn calls_fail_on_order() {
    run(&[("SOFTCUDA_FAULTS", "cuMemAlloc_v2 fail 2 after=1")], || {
        open(0);
        let (at, stream) = (alloc(100), stream());
        let mut more = 0;
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut more, 1)), Err(2), "the second, by the environment");
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut more, 1)), Ok(()));
        fault("cuMemsetD8Async async 719").expect("an order");
        assert_eq!(stream.fill(at, 1, 100), Ok(()));
        assert_eq!(stream.sync(), Err(719), "reported later");
        assert_eq!(stream.sync(), Ok(()), "once");
        assert_eq!(stream.copy_out(at, 1), Ok(vec![0xCB]), "and nothing was filled");
        fault("cuMemcpyHtoDAsync_v2 corrupt 11").expect("an order");
        stream.copy_in(at, &[0; 4]).expect("a copy");
        assert_eq!(stream.copy_out(at, 4), Ok(vec![0, 8, 0, 0]));
        assert_eq!(statistics()["faults_injected"], 3);
        assert_eq!(fault("cuNothing fail 2"), Err(1));
        fault("cuMemsetD8Async fail 1 times=0; clear").expect("orders");
        assert_eq!(stream.fill(at, 1, 100), Ok(()));
        fault("cuStreamSynchronize sticky 214").expect("an order");
        assert_eq!((stream.sync(), stream.sync(), stream.fill(at, 0, 1)), (Err(214), Err(214), Err(214)));
        let mut text = std::ptr::null();
        cu!(cuGetErrorString(sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE, &raw mut text)).expect("a text");
        let text = unsafe { std::ffi::CStr::from_ptr(text) };
        assert_eq!(text, c"uncorrectable ECC error encountered");
    })
    .passed()
    .said("'cuNothing' is no symbol of this library");
}

#[test]
fn an_asynchronous_sticky_fault_ends_the_context_at_its_place() {
    run(&[], || {
        open(0);
        let (at, stream) = (alloc(100), stream());
        stream.fill(at, 1, 100).expect("a fill");
        let hold = stream.hold();
        fault("cuMemsetD8Async async-sticky 214").expect("an order");
        stream.fill(at, 2, 100).expect("the call itself is fine");
        assert_eq!(cu!(cuStreamQuery(stream.0)), Err(600), "and so is the context until then");
        drop(hold);
        assert_eq!((stream.sync(), stream.sync()), (Err(214), Err(214)));
    })
    .passed();
}

#[test]
fn orders_hold_for_calls_that_issue_nothing_too() {
    run(&[], || {
        open(0);
        fault("cuMemAlloc_v2 delay 20; cuMemFree_v2 async 719; cuDeviceGetCount async 46").expect("orders");
        let began = std::time::Instant::now();
        let at = alloc(1);
        assert!(began.elapsed().as_millis() >= 20);
        assert_eq!(cu!(cuMemFree_v2(at)), Ok(()));
        assert_eq!((NULL.sync(), NULL.sync()), (Err(719), Ok(())), "told by the next call");
        let mut count = 0;
        assert_eq!(cu!(cuDeviceGetCount(&raw mut count)), Err(46), "which has no context to tell it later");
    })
    .passed();
}

#[test]
fn a_hung_device_goes_on_when_it_is_resumed() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
        open(1);
        let (theirs, other) = (alloc(100), stream());
        open(0);
        let (at, stream, done) = (alloc(100), stream(), event());
        fault("hang device=0").expect("an order");
        stream.fill(at, 1, 100).expect("a fill");
        stream.record(done);
        other.fill(theirs, 2, 100).expect("a fill");
        assert_eq!(other.sync(), Ok(()), "the other device runs");
        assert_eq!(cu!(cuEventQuery(done)), Err(600));
        fault("resume device=0").expect("an order");
        assert_eq!(stream.copy_out(at, 100), Ok(vec![1; 100]));
        assert_eq!(fault("hang device=2"), Err(1));
    })
    .passed()
    .said("there is no device 2");
}

#[test]
fn a_hung_device_can_be_reset() {
    run(&[], || {
        open(0);
        let (at, stream) = (alloc(100), stream());
        fault("cuMemsetD8Async delay 3600000").expect("an order");
        stream.fill(at, 1, 100).expect("a fill");
        cu!(cuDevicePrimaryCtxReset_v2(0)).expect("a reset does not wait for a delay");
        let (at, stream) = (alloc(100), crate::driver::stream());
        fault("hang").expect("an order");
        stream.fill(at, 1, 100).expect("a fill");
        cu!(cuDevicePrimaryCtxReset_v2(0)).expect("nor for a device that hangs");
        assert_eq!(stream.sync(), Err(400));
        fault("resume").expect("an order");
        assert_eq!(NULL.sync(), Ok(()));
    })
    .passed();
}

#[test]
fn a_device_disappears_at_work() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
        open(1);
        let other = stream();
        open(0);
        let (at, stream) = (alloc(100), stream());
        fault("lose device=0").expect("an order");
        assert_eq!((stream.fill(at, 1, 1), stream.sync()), (Err(999), Err(999)));
        let mut context = std::ptr::null_mut();
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 0)), Err(999));
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 1)), Ok(()));
        cu!(cuCtxSetCurrent(context)).expect("the other device");
        assert_eq!(other.sync(), Ok(()), "is there");
    })
    .passed();
}

#[test]
fn a_machine_may_have_no_driver_an_old_one_or_no_gpu() {
    run(&[("SOFTCUDA_DEVICES", "driver=missing")], || assert_eq!(cu!(cuInit(0)), Err(34))).passed();
    run(&[("SOFTCUDA_DEVICES", "init_error=803")], || assert_eq!(cu!(cuInit(0)), Err(803))).passed();
    run(&[("SOFTCUDA_DEVICES", "gpus=0")], || assert_eq!(cu!(cuInit(0)), Err(100))).passed();
    run(&[("SOFTCUDA_DEVICES", "gpus=1,driver=11040")], || {
        let mut version = 0;
        cu!(cuDriverGetVersion(&raw mut version)).expect("before cuInit too");
        assert_eq!(version, 11_040);
        open(0);
        let mut context = std::ptr::null_mut();
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 1)), Err(101));
    })
    .passed();
    run(&[("SOFTCUDA_DEVICES", "gpu=1")], || assert_eq!(cu!(cuInit(0)), Err(1)))
        .passed()
        .said("'gpu=1' is not known");
    run(&[("SOFTCUDA_FAULTS", "cuInit fail 999")], || {
        assert_eq!((cu!(cuInit(0)), cu!(cuInit(0))), (Err(999), Ok(())));
    })
    .passed();
    run(&[], || {
        let mut count = 0;
        assert_eq!(cu!(cuDeviceGetCount(&raw mut count)), Err(3), "cuInit comes first");
        cu!(cuInit(0)).expect("cuInit");
        assert_eq!(NULL.sync(), Err(201), "there is no context");
    })
    .passed();
}

#[test]
fn one_gpu_of_several_can_be_ill() {
    let environment = [
        ("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB"),
        ("SOFTCUDA_FAULTS", "cuDevicePrimaryCtxRetain fail 46 device=1 times=0; * delay 1 device=0 times=2"),
    ];
    run(&environment, || {
        open(0);
        let mut context = std::ptr::null_mut();
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 1)), Err(46));
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 0)), Ok(()));
        fault("clear").expect("an order");
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&raw mut context, 1)), Ok(()));
    })
    .passed();
}

#[test]
fn a_primary_context_lives_as_long_as_it_is_held() {
    run(&[], || {
        let first = open(0);
        let second = open(0);
        assert_eq!(first, second);
        let state = || {
            let (mut flags, mut active) = (7, 7);
            cu!(cuDevicePrimaryCtxGetState(0, &raw mut flags, &raw mut active)).expect("a state");
            (flags, active)
        };
        cu!(cuDevicePrimaryCtxSetFlags_v2(0, 4)).expect("flags");
        assert_eq!(state(), (4, 1));
        cu!(cuDevicePrimaryCtxRelease_v2(0)).expect("released");
        assert_eq!((state().1, NULL.sync()), (1, Ok(())));
        cu!(cuDevicePrimaryCtxRelease_v2(0)).expect("released");
        assert_eq!((state().1, NULL.sync()), (0, Err(201)));
        assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), Err(201), "once too often");
        let (mut bytes, mut bus) = (0, [0 as std::ffi::c_char; 16]);
        cu!(cuDeviceTotalMem_v2(&raw mut bytes, 0)).expect("a size");
        assert_eq!(bytes, 64 << 20);
        cu!(cuDeviceGetPCIBusId(bus.as_mut_ptr(), 16, 0)).expect("a bus");
        assert_eq!(unsafe { std::ffi::CStr::from_ptr(bus.as_ptr()) }, c"0000:01:00.0");
        assert_eq!(cu!(cuDeviceGetPCIBusId(bus.as_mut_ptr(), 4, 0)), Err(1), "no room");
    })
    .passed();
}

#[test]
fn a_mig_instance_is_a_device_of_its_own() {
    run(&[("SOFTCUDA_DEVICES", "gpus=1,memory=64MiB,mig=2")], || {
        open(0);
        let (mut count, mut free, mut total) = (0, 0, 0);
        cu!(cuDeviceGetCount(&raw mut count)).expect("a count");
        cu!(cuMemGetInfo_v2(&raw mut free, &raw mut total)).expect("figures");
        assert_eq!((count, total), (1, 32 << 20), "the first one, without CUDA_VISIBLE_DEVICES");
        let (mut whole, mut instance) = (sys::CUuuid { bytes: [0; 16] }, sys::CUuuid { bytes: [0; 16] });
        cu!(cuDeviceGetUuid(&raw mut whole, 0)).expect("the GPU's");
        cu!(cuDeviceGetUuid_v2(&raw mut instance, 0)).expect("the instance's");
        assert_ne!(whole.bytes, instance.bytes);
    })
    .passed();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("machine.toml");
    let text = "[[gpu]]\nname = \"Big\"\nmemory = \"64MiB\"\n[[gpu]]\nmig = [{ profile = \"1g\", memory = \"8MiB\", \
                uuid = \"MIG-00112233-4455-6677-8899-aabbccddeeff\" }]\n";
    std::fs::write(&path, text).expect("a description");
    let environment = [
        ("SOFTCUDA_DEVICES", path.to_str().expect("a plain path")),
        ("CUDA_VISIBLE_DEVICES", "MIG-00112233-4455-6677-8899-aabbccddeeff,0"),
    ];
    run(&environment, || {
        open(0);
        let mut name = [0 as std::ffi::c_char; 64];
        cu!(cuDeviceGetName(name.as_mut_ptr(), 64, 0)).expect("a name");
        assert_eq!(unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }, c"softcuda MIG 1g");
        cu!(cuDeviceGetName(name.as_mut_ptr(), 64, 1)).expect("a name");
        assert_eq!(unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }, c"Big");
    })
    .passed();
}

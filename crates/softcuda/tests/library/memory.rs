//! Budgets, poison, bounds, pools, page-locking, rows, peers.

use cudarc::driver::sys;

use crate::driver::{NULL, alloc, event, fault, open, pinned, statistics, stream, until};
use crate::process::run;

fn free_and_total() -> (usize, usize) {
    let (mut free, mut total) = (0, 0);
    cu!(cuMemGetInfo_v2(&raw mut free, &raw mut total)).expect("figures");
    (free, total)
}

#[test]
fn a_budget_is_kept_and_nothing_leaks() {
    run(&[], || {
        open(0);
        assert_eq!(free_and_total(), (64 << 20, 64 << 20));
        let mut at = 0;
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut at, (64 << 20) + 1)), Err(2));
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut at, 0)), Err(1));
        let (first, second) = (alloc(32 << 20), alloc(32 << 20));
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut at, 1)), Err(2));
        assert_eq!(free_and_total().0, 0);
        let live = statistics();
        assert_eq!(
            (&live["live"]["device_allocations"], &live["live"]["device_bytes"]),
            (&2.into(), &(64 << 20).into())
        );
        cu!(cuMemFree_v2(first)).expect("freed");
        assert_eq!(cu!(cuMemFree_v2(first)), Err(1), "twice");
        assert_eq!(cu!(cuMemFree_v2(second + 512)), Err(1), "not its start");
        cu!(cuMemFree_v2(second)).expect("freed");
        cu!(cuMemFree_v2(0)).expect("nothing to free");
        assert_eq!(free_and_total().0, 64 << 20);
        assert_eq!(statistics()["live"]["device_allocations"], 0);
    })
    .passed();
}

#[test]
fn memory_is_poison_before_it_is_written_and_after_it_is_freed() {
    run(&[("SOFTCUDA_RACES", "off")], || {
        open(0);
        let stream = stream();
        assert_eq!(stream.copy_out(alloc(100), 100), Ok(vec![0xCB; 100]));
        assert_eq!(pinned(10).bytes(), [0xC9; 10]);
        // The same address again: what was there is poison, not the last owner's.
        let mut at = 0;
        cu!(cuMemAllocAsync(&raw mut at, 100, stream.0)).expect("memory");
        stream.fill(at, 1, 100).expect("a fill");
        cu!(cuMemFreeAsync(at, stream.0)).expect("freed");
        assert_eq!(stream.sync(), Ok(()));
        let mut again = 0;
        cu!(cuMemAllocAsync(&raw mut again, 100, stream.0)).expect("memory");
        assert_eq!((again, stream.copy_out(again, 100)), (at, Ok(vec![0xCB; 100])));
        assert_eq!(stream.sync(), Ok(()));
        assert_eq!(cu!(cuMemFreeAsync(at + 512, stream.0)), Err(1));
    })
    .passed();
}

/// A fresh process, since the error stays.
fn fails_when_it_runs(work: impl FnOnce(u64) -> Result<(), u32>) {
    open(0);
    let at = alloc(100);
    assert_eq!(work(at), Ok(()), "the call itself is fine");
    assert_eq!(cu!(cuCtxSynchronize()), Err(700));
    assert_eq!(NULL.sync(), Err(700), "it is sticky");
    let mut more = 0;
    assert_eq!(cu!(cuMemAlloc_v2(&raw mut more, 1)), Err(700), "for every call");
    let mut device = 0;
    assert_eq!(cu!(cuDeviceGet(&raw mut device, 0)), Ok(()), "that needs the context");
    cu!(cuDevicePrimaryCtxReset_v2(0)).expect("a reset");
    assert_eq!(alloc(100), at, "as new");
}

#[test]
fn accesses_behind_the_end_are_a_sticky_700() {
    run(&[], || fails_when_it_runs(|at| NULL.fill(at, 0, 101))).passed().said("cuMemsetD8Async #");
    run(&[], || fails_when_it_runs(|at| NULL.copy_in(at + 50, &[0; 51]))).passed();
    run(&[], || fails_when_it_runs(|at| NULL.copy(at, at + 1, 100))).passed();
    run(&[], || fails_when_it_runs(|at| NULL.copy_out_pinned(pinned(101), at))).passed();
    run(&[], || {
        fails_when_it_runs(|at| {
            // Freed before the copy runs, though live when it is issued.
            let late = stream();
            let hold = late.hold();
            late.copy(at, at + 50, 50)?;
            let other = stream();
            cu!(cuMemFreeAsync(at, other.0))?;
            other.sync()?;
            drop(hold);
            until("the copy runs", || cu!(cuStreamQuery(late.0)) != Err(600));
            Ok(())
        });
    })
    .passed();
}

fn new_pool() -> sys::CUmemoryPool {
    let properties = sys::CUmemPoolProps {
        allocType: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        handleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 },
        win32SecurityAttributes: std::ptr::null_mut(),
        maxSize: 0,
        usage: 0,
        reserved: [0; 54],
    };
    let mut pool = std::ptr::null_mut();
    cu!(cuMemPoolCreate(&raw mut pool, &raw const properties)).expect("a pool");
    pool
}

#[test]
fn pools_keep_what_their_threshold_says() {
    run(&[], || {
        open(0);
        let stream = stream();
        let pool = new_pool();
        let take = |bytes| {
            let mut at = 0;
            cu!(cuMemAllocFromPoolAsync(&raw mut at, bytes, pool, stream.0)).map(|()| at)
        };
        let mut threshold = u64::MAX;
        let kind = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        cu!(cuMemPoolSetAttribute(pool, kind, (&raw mut threshold).cast())).expect("a threshold");
        let first = take(48 << 20).expect("memory");
        assert_eq!(take(48 << 20), Err(2));
        cu!(cuMemFreeAsync(first, stream.0)).expect("freed");
        let again = take(48 << 20).expect("what the pool kept, in stream order");
        cu!(cuMemFreeAsync(again, stream.0)).expect("freed");
        assert_eq!(stream.sync(), Ok(()));
        assert_eq!(free_and_total().0, 16 << 20, "the pool keeps it");
        let mut other = 0;
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut other, 17 << 20)), Err(2));
        cu!(cuMemPoolTrimTo(pool, 1 << 20)).expect("trimmed");
        assert_eq!(free_and_total().0, 63 << 20);
        let mut reserved = 0_u64;
        let kind = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        cu!(cuMemPoolGetAttribute(pool, kind, (&raw mut reserved).cast())).expect("a figure");
        assert_eq!(reserved, 1 << 20);
        cu!(cuMemPoolDestroy(pool)).expect("it goes");
        assert_eq!(free_and_total().0, 64 << 20);
    })
    .passed();
}

#[test]
fn a_pool_goes_when_its_last_allocation_does() {
    run(&[], || {
        open(0);
        let stream = stream();
        let (pool, mut at) = (new_pool(), 0);
        cu!(cuMemAllocFromPoolAsync(&raw mut at, 1 << 20, pool, stream.0)).expect("memory");
        cu!(cuMemPoolDestroy(pool)).expect("it is to go");
        assert_eq!(free_and_total().0, 63 << 20, "still in use");
        let mut more = 0;
        assert_eq!(
            cu!(cuMemAllocFromPoolAsync(&raw mut more, 1, pool, stream.0)),
            Err(400),
            "no more from it"
        );
        cu!(cuMemFreeAsync(at, stream.0)).expect("freed");
        assert_eq!(stream.sync(), Ok(()));
        assert_eq!(free_and_total().0, 64 << 20);
        assert_eq!(statistics()["live"]["pools"], 0);
    })
    .passed();
}

#[test]
fn a_device_without_pools_says_so() {
    run(&[("SOFTCUDA_DEVICES", "memory=64MiB,pools=0")], || {
        open(0);
        let (mut value, mut at) = (7, 0);
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        cu!(cuDeviceGetAttribute(&raw mut value, attribute, 0)).expect("an attribute");
        assert_eq!((value, cu!(cuMemAllocAsync(&raw mut at, 1, NULL.0))), (0, Err(801)));
    })
    .passed();
}

#[test]
fn the_programs_own_memory_is_page_locked_by_registration() {
    run(&[], || {
        open(0);
        let (stream, device) = (stream(), alloc(100));
        let mut own = vec![1_u8; 100];
        let at = own.as_mut_ptr();
        cu!(cuMemHostRegister_v2(at.cast(), 100, 0)).expect("registered");
        assert_eq!(cu!(cuMemHostRegister_v2(at.wrapping_add(50).cast(), 10, 0)), Err(712));
        let hold = stream.hold();
        cu!(cuMemcpyHtoDAsync_v2(device, at.cast(), 100, stream.0)).expect("a copy");
        unsafe { at.write(9) };
        drop(hold);
        assert_eq!(stream.copy_out(device, 100).expect("bytes")[..2], [9, 1], "taken when the copy ran");
        let mut seen = 0;
        cu!(cuMemHostGetDevicePointer_v2(&raw mut seen, at.cast(), 0)).expect("its device address");
        assert_eq!(seen, at as u64);
        cu!(cuMemHostUnregister(at.cast())).expect("unregistered");
        assert_eq!(cu!(cuMemHostUnregister(at.cast())), Err(713));
        let locked = pinned(10);
        cu!(cuMemFreeHost(locked.at.cast())).expect("freed");
        assert_eq!(cu!(cuMemFreeHost(locked.at.cast())), Err(1));
    })
    .passed();
}

#[test]
fn rows_are_copied_with_their_pitches() {
    run(&[], || {
        open(0);
        let (stream, from, to) = (stream(), alloc(1000), alloc(1000));
        let bytes: Vec<u8> = (0..100).collect();
        stream.copy_in(from, &bytes).expect("bytes");
        stream.fill(to, 0, 1000).expect("zeros");
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let mut copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 2,
            srcY: 1,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: 10,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: 4,
            WidthInBytes: 3,
            Height: 4,
        };
        cu!(cuMemcpy2DAsync_v2(&raw const copy, stream.0)).expect("a copy");
        let rows = stream.copy_out(to, 17).expect("bytes");
        assert_eq!(rows, [12, 13, 14, 0, 22, 23, 24, 0, 32, 33, 34, 0, 42, 43, 44, 0, 0]);
        fault("cuMemcpy2DAsync_v2 corrupt 24").expect("an order");
        cu!(cuMemcpy2DAsync_v2(&raw const copy, stream.0)).expect("a copy");
        assert_eq!(
            stream.copy_out(to, 9).expect("bytes"),
            [12, 13, 14, 0, 23, 23, 24, 0, 32],
            "one bit, in one row"
        );
        copy.dstPitch = 2;
        assert_eq!(
            cu!(cuMemcpy2DAsync_v2(&raw const copy, stream.0)),
            Err(1),
            "rows wider than their distance"
        );
        let mut pageable = [0_u8; 100];
        copy.dstMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_HOST;
        (copy.dstHost, copy.dstPitch) = (pageable.as_mut_ptr().cast(), 4);
        assert_eq!(cu!(cuMemcpy2DAsync_v2(&raw const copy, stream.0)), Err(801), "not modelled, and said");
    })
    .passed()
    .said("page-lock it");
}

#[test]
fn bytes_go_from_gpu_to_gpu() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB,peers=none")], || {
        let there = open(1);
        let theirs = alloc(100);
        let here = open(0);
        let (own, stream) = (alloc(100), stream());
        stream.fill(own, 7, 100).expect("a fill");
        cu!(cuMemcpyPeerAsync(theirs, there, own, here, 100, stream.0)).expect("a copy");
        assert_eq!(stream.sync(), Ok(()));
        cu!(cuCtxSetCurrent(there)).expect("the other context");
        assert_eq!(NULL.copy_out(theirs, 100), Ok(vec![7; 100]));
        let mut can = 7;
        cu!(cuDeviceCanAccessPeer(&raw mut can, 0, 1)).expect("an answer");
        assert_eq!((can, cu!(cuCtxEnablePeerAccess(here, 0))), (0, Err(217)));
    })
    .passed();
}

#[test]
fn addresses_tell_what_they_are() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
        open(1);
        let (at, host) = (alloc(1000), pinned(10));
        let (mut base, mut bytes) = (0, 0);
        cu!(cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, at + 999)).expect("a range");
        assert_eq!((base, bytes), (at, 1000));
        assert_eq!(cu!(cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, at + 1000)), Err(500));
        let attribute = |kind, at: u64| {
            let mut value = 0_u32;
            cu!(cuPointerGetAttribute((&raw mut value).cast(), kind, at)).map(|()| value)
        };
        let memory_type = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        assert_eq!((attribute(memory_type, at), attribute(memory_type, host.at as u64)), (Ok(2), Ok(1)));
        assert_eq!(attribute(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at), Ok(1));
        assert_eq!(attribute(memory_type, 4096), Err(1));
    })
    .passed();
}

#[test]
fn calls_without_a_stream_use_the_legacy_one_and_wait_where_the_driver_does() {
    run(&[], || {
        open(0);
        let (a, b, host) = (alloc(12), alloc(12), pinned(12));
        cu!(cuMemsetD32_v2(a, 0x0102_0304, 3)).expect("words");
        cu!(cuMemsetD32Async(a + 4, 7, 1, NULL.0)).expect("a word");
        assert_eq!(cu!(cuMemsetD32Async(a + 2, 7, 1, NULL.0)), Err(1), "not on a word's boundary");
        cu!(cuMemcpyDtoD_v2(b, a, 12)).expect("a copy");
        cu!(cuMemcpyDtoH_v2(host.at.cast(), b, 12)).expect("a copy that waits");
        assert_eq!(host.bytes(), [4, 3, 2, 1, 7, 0, 0, 0, 4, 3, 2, 1]);
        host.fill(9);
        cu!(cuMemcpyHtoD_v2(b, host.at.cast(), 12)).expect("a copy that waits");
        host.fill(0);
        cu!(cuMemsetD8_v2(b, 8, 1)).expect("a byte");
        assert_eq!(NULL.copy_out(b, 2), Ok(vec![8, 9]));
        assert_eq!(NULL.copy_in(0, &[1]), Err(1), "nowhere");
        assert_eq!(NULL.copy_in(b, &[]), Ok(()), "nothing");
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn a_device_has_a_pool_that_can_be_replaced() {
    run(&[], || {
        open(0);
        let (mut default, mut current) = (std::ptr::null_mut(), std::ptr::null_mut());
        cu!(cuDeviceGetDefaultMemPool(&raw mut default, 0)).expect("a pool");
        cu!(cuDeviceGetMemPool(&raw mut current, 0)).expect("a pool");
        assert_eq!((current, cu!(cuMemPoolDestroy(default))), (default, Err(1)));
        let own = new_pool();
        cu!(cuDeviceSetMemPool(0, own)).expect("replaced");
        let mut at = 0;
        cu!(cuMemAllocAsync(&raw mut at, 512, NULL.0)).expect("memory");
        let mut used = 0_u64;
        let kind = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        cu!(cuMemPoolGetAttribute(own, kind, (&raw mut used).cast())).expect("a figure");
        assert_eq!(used, 512);
        cu!(cuMemPoolDestroy(own)).expect("it goes");
        cu!(cuDeviceGetMemPool(&raw mut current, 0)).expect("a pool");
        assert_eq!(current, default, "the default takes its place");
    })
    .passed();
}

#[test]
fn many_threads_share_a_device_and_leave_nothing() {
    const THREADS: u8 = 6;
    run(&[], || {
        let context = open(0) as usize;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                std::thread::spawn(move || {
                    cu!(cuCtxSetCurrent(context as *mut _)).expect("it is current");
                    let (stream, other, done) = (stream(), stream(), event());
                    for round in 0..100_usize {
                        let bytes = 1 + round * 37;
                        let pattern = vec![thread ^ u8::try_from(round).expect("small"); bytes];
                        let (mut first, mut second) = (0, 0);
                        cu!(cuMemAllocAsync(&raw mut first, bytes, stream.0)).expect("memory");
                        cu!(cuMemAllocAsync(&raw mut second, bytes, stream.0)).expect("memory");
                        stream.copy_in(first, &pattern).expect("a copy");
                        stream.record(done);
                        other.wait(done);
                        other.copy(second, first, bytes).expect("a copy");
                        cu!(cuMemFreeAsync(first, other.0)).expect("freed");
                        assert_eq!(other.copy_out(second, bytes).expect("bytes"), pattern, "round {round}");
                        cu!(cuMemFreeAsync(second, stream.0)).expect("freed");
                    }
                    cu!(cuEventDestroy_v2(done)).expect("it goes");
                    for gone in [stream, other] {
                        cu!(cuStreamDestroy_v2(gone.0)).expect("it goes");
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no panic");
        }
        cu!(cuCtxSynchronize()).expect("all of it");
        let now = statistics();
        for what in ["device_allocations", "streams", "events"] {
            assert_eq!(now["live"][what], 0, "{what}: {now}");
        }
        assert_eq!((free_and_total().0, &now["races"]["count"]), (64 << 20, &0.into()));
    })
    .passed();
}

//! What is asynchronous, what waits for what, and what a host function may do.

use std::sync::mpsc;

use cudarc::driver::sys;

use crate::driver::{
    NULL, Stream, alloc, blocking_stream, event, fault, open, pinned, statistics, stream, until,
};
use crate::process::run;

#[test]
fn page_locked_copies_move_when_they_run() {
    run(&[("SOFTCUDA_RACES", "off")], || {
        open(0);
        let (stream, device, from, to) = (stream(), alloc(100), pinned(100), pinned(100));
        from.fill(1);
        let hold = stream.hold();
        stream.copy_in_pinned(device, from).expect("a copy in");
        stream.copy_out_pinned(to, device).expect("a copy out");
        let done = event();
        stream.record(done);
        assert_eq!(cu!(cuEventQuery(done)), Err(600));
        assert_eq!(cu!(cuStreamQuery(stream.0)), Err(600));
        // Changed after the call and before the copy.
        from.fill(2);
        assert_eq!(to.bytes(), [0xC9; 100], "poison until the copy runs");
        drop(hold);
        cu!(cuEventSynchronize(done)).expect("it comes");
        assert_eq!(cu!(cuEventQuery(done)), Ok(()));
        assert_eq!(stream.sync(), Ok(()));
        assert_eq!(cu!(cuStreamQuery(stream.0)), Ok(()));
        assert_eq!(to.bytes(), [2; 100]);
    })
    .passed();
}

#[test]
fn pageable_bytes_are_taken_when_the_call_is_made() {
    run(&[], || {
        open(0);
        let (stream, device) = (stream(), alloc(100));
        let hold = stream.hold();
        let mut from = vec![1; 100];
        stream.copy_in(device, &from).expect("a copy in");
        from.fill(2);
        drop(hold);
        assert_eq!(stream.copy_out(device, 100), Ok(vec![1; 100]));
    })
    .passed();
}

#[test]
fn a_host_function_may_not_call_the_driver() {
    run(&[], || {
        open(0);
        let (stream, (sender, receiver)) = (stream(), mpsc::channel());
        let call = move || sender.send((cu!(cuCtxSynchronize()), cu!(cuInit(0)))).expect("the test waits");
        stream.host(call).expect("a host function");
        let (synchronised, started) = receiver.recv().expect("it runs");
        assert_eq!((synchronised, started), (Err(800), Err(800)));
        assert_eq!(stream.sync(), Ok(()), "the context is none the worse");
    })
    .passed();
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_and_they_for_it() {
    run(&[], || {
        open(0);
        let (blocking, free) = (blocking_stream(), stream());
        let (device, other) = (alloc(100), alloc(100));
        let hold = blocking.hold();
        blocking.fill(device, 1, 100).expect("a fill");
        // Behind the blocking stream, and the second blocking stream behind that.
        NULL.fill(device, 2, 100).expect("a fill");
        let behind = blocking_stream();
        behind.fill(device, 3, 100).expect("a fill");
        free.fill(other, 4, 100).expect("a fill");
        assert_eq!(free.copy_out(other, 100), Ok(vec![4; 100]), "takes no part");
        for waiting in [NULL, behind] {
            assert_eq!(cu!(cuStreamQuery(waiting.0)), Err(600));
        }
        drop(hold);
        assert_eq!(behind.copy_out(device, 100), Ok(vec![3; 100]));
        let mut flags = 7;
        cu!(cuStreamGetFlags(free.0, &raw mut flags)).expect("flags");
        assert_eq!(flags, 1);
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn events_tell_times_and_unrecorded_ones_are_done() {
    run(&[], || {
        open(0);
        let (stream, first, second, never) = (stream(), event(), event(), event());
        assert_eq!(cu!(cuEventQuery(never)), Ok(()));
        let mut milliseconds = -1.0;
        assert_eq!(cu!(cuEventElapsedTime_v2(&raw mut milliseconds, first, never)), Err(400));
        fault("cuMemsetD8Async delay 20").expect("an order");
        stream.record(first);
        stream.fill(alloc(1), 0, 1).expect("a fill");
        stream.record(second);
        let hold = stream.hold();
        cu!(cuEventSynchronize(second)).expect("it comes");
        cu!(cuEventElapsedTime_v2(&raw mut milliseconds, first, second)).expect("a time");
        assert!(milliseconds >= 20.0, "{milliseconds}");
        stream.record(second);
        assert_eq!(cu!(cuEventElapsedTime_v2(&raw mut milliseconds, first, second)), Err(600));
        drop(hold);
        assert_eq!(stream.sync(), Ok(()));
        cu!(cuEventDestroy_v2(first)).expect("it goes");
        assert_eq!(cu!(cuEventQuery(first)), Err(400));
        cu!(cuStreamDestroy_v2(stream.0)).expect("it goes");
        assert_eq!(stream.sync(), Err(400));
    })
    .passed();
}

#[test]
fn a_destroyed_stream_does_what_it_was_given() {
    run(&[], || {
        let context = open(0);
        let (stream, device, done) = (stream(), alloc(100), event());
        let hold = stream.hold();
        stream.fill(device, 5, 100).expect("a fill");
        stream.record(done);
        cu!(cuStreamDestroy_v2(stream.0)).expect("it goes");
        // The context's synchronisation waits for it all the same.
        let waiter = std::thread::spawn({
            let context = context as usize;
            move || {
                cu!(cuCtxSetCurrent(context as *mut _)).expect("it is current");
                cu!(cuCtxSynchronize())
            }
        });
        assert_eq!(cu!(cuEventQuery(done)), Err(600));
        assert!(!waiter.is_finished());
        drop(hold);
        assert_eq!(waiter.join().expect("no panic"), Ok(()));
        // Were it not waited for, this would be a race, whichever comes first.
        assert_eq!(crate::driver::stream().copy_out(device, 100), Ok(vec![5; 100]));
        assert_eq!(cu!(cuEventQuery(done)), Ok(()));
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn each_thread_has_its_own_context_and_default_stream() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
        let (second, first) = (open(1), open(0));
        let device = || {
            let mut device = 7;
            cu!(cuCtxGetDevice(&raw mut device)).map(|()| device)
        };
        cu!(cuCtxPushCurrent_v2(second)).expect("pushed");
        assert_eq!(device(), Ok(1));
        assert_eq!(std::thread::spawn(device).join().expect("no panic"), Err(201), "another thread has none");
        let mut popped = std::ptr::null_mut();
        cu!(cuCtxPopCurrent_v2(&raw mut popped)).expect("popped");
        assert_eq!((popped, device()), (second, Ok(0)));
        // Handle 2 is the calling thread's own stream: what holds it does not hold another thread's.
        let own = Stream(std::ptr::without_provenance_mut(2));
        let hold = own.hold();
        let (first, elsewhere) = (first as usize, alloc(1));
        let other = std::thread::spawn(move || {
            cu!(cuCtxSetCurrent(first as *mut _)).expect("it is current");
            let own = Stream(std::ptr::without_provenance_mut(2));
            own.fill(elsewhere, 1, 1).expect("a fill");
            own.sync()
        });
        assert_eq!(other.join().expect("no panic"), Ok(()));
        assert_eq!(cu!(cuStreamQuery(own.0)), Err(600));
        drop(hold);
        assert_eq!(own.sync(), Ok(()));
    })
    .passed();
}

#[test]
fn a_full_stream_blocks_its_caller_and_nobody_else() {
    const ROOM: u64 = 1 << 16;
    run(&[("SOFTCUDA_RACES", "off")], || {
        let context = open(0) as usize;
        let (full, other, at) = (stream(), stream(), alloc(1));
        let hold = full.hold();
        until("the worker is at the host function", || statistics()["operations"] == 1);
        let full_stream = full.0 as usize;
        let caller = std::thread::spawn(move || {
            cu!(cuCtxSetCurrent(context as *mut _)).expect("it is current");
            for _ in 0..ROOM + 10 {
                Stream(full_stream as *mut _).fill(at, 1, 1).expect("a fill");
            }
        });
        until("the stream is full", || statistics()["operations"].as_u64() >= Some(ROOM));
        assert_eq!(other.copy_out(at, 1), Ok(vec![0xCB]));
        assert!(!caller.is_finished(), "ten more than there is room for");
        drop(hold);
        caller.join().expect("no panic");
        assert_eq!(full.copy_out(at, 1), Ok(vec![1]));
    })
    .passed();
}

#[test]
fn streams_tell_what_they_are() {
    run(&[], || {
        let context = open(0);
        let (mut least, mut greatest, mut priority, mut capturing) =
            (7, 7, 7, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        cu!(cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)).expect("a range");
        let (mut made, mut of, mut current) =
            (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        cu!(cuStreamCreateWithPriority(&raw mut made, 1, greatest - 10)).expect("a stream");
        cu!(cuStreamGetPriority(made, &raw mut priority)).expect("its priority");
        assert_eq!((least, priority), (0, greatest), "the nearest in the range");
        cu!(cuStreamIsCapturing(made, &raw mut capturing)).expect("an answer");
        assert_eq!(capturing, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
        cu!(cuStreamGetCtx(made, &raw mut of)).expect("its context");
        cu!(cuCtxGetCurrent(&raw mut current)).expect("the current context");
        assert_eq!((of, current), (context, context));
        let (first, second, mut milliseconds) = (event(), event(), -1.0);
        cu!(cuEventRecordWithFlags(first, made, 0)).expect("a record");
        cu!(cuEventRecordWithFlags(second, made, 0)).expect("a record");
        cu!(cuEventSynchronize(second)).expect("it comes");
        cu!(cuEventElapsedTime(&raw mut milliseconds, first, second)).expect("a time");
        assert!(milliseconds >= 0.0);
    })
    .passed();
}

#[test]
fn an_event_of_one_gpu_orders_a_stream_of_another() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
        let there = open(1);
        let (writer, done, theirs) = (stream(), event(), alloc(100));
        let here = open(0);
        let (reader, own) = (stream(), alloc(100));
        cu!(cuCtxSetCurrent(there)).expect("the other context");
        let hold = writer.hold();
        writer.fill(theirs, 3, 100).expect("a fill");
        writer.record(done);
        cu!(cuCtxSetCurrent(here)).expect("this context");
        assert_eq!(cu!(cuEventRecord(done, reader.0)), Err(400), "its records are its own device's");
        reader.wait(done);
        cu!(cuMemcpyPeerAsync(own, here, theirs, there, 100, reader.0)).expect("a copy");
        drop(hold);
        assert_eq!(reader.copy_out(own, 100), Ok(vec![3; 100]));
    })
    .passed()
    .did_not_say("race");
}

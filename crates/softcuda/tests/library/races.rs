//! Races that are found, and orders that are none.

use crate::driver::{alloc, event, host_access, module, open, pinned, shape, statistics, stream, until};
use crate::kernels::compiled;
use crate::process::run;

/// A fill in one stream and a copy in another; with or without an event between them.
fn fill_then_copy(ordered: bool) -> Vec<u8> {
    open(0);
    let (writer, reader, done) = (stream(), stream(), event());
    let at = alloc(100);
    let hold = writer.hold();
    writer.fill(at, 7, 100).expect("a fill");
    writer.record(done);
    if ordered {
        reader.wait(done);
        drop(hold);
        return reader.copy_out(at, 100).expect("bytes");
    }
    let bytes = reader.copy_out(at, 100).expect("bytes");
    drop(hold);
    assert_eq!(writer.sync(), Ok(()));
    bytes
}

#[test]
fn without_its_event_a_copy_reads_poison_and_is_reported() {
    run(&[], || {
        assert_eq!(fill_then_copy(false), [0xCB; 100]);
        let races = statistics()["races"].clone();
        assert_eq!(races["count"], 1);
        let race = &races["found"][0];
        assert_eq!(
            (&race["kind"], &race["offset"], &race["bytes"]),
            (&"write after read".into(), &0.into(), &100.into())
        );
        for (side, symbol) in [("earlier", "cuMemcpyDtoHAsync_v2 #"), ("later", "cuMemsetD8Async #")] {
            assert!(race[side].as_str().is_some_and(|name| name.starts_with(symbol)), "{race}");
        }
    })
    .passed()
    .said("race (write after read): cuMemcpyDtoHAsync_v2 #")
    .said("on stream 0 of device 0: nothing orders them, at bytes 0..100 of");
    run(&[("SOFTCUDA_RACES", "off")], || assert_eq!(fill_then_copy(false), [0xCB; 100]))
        .passed()
        .did_not_say("race");
    let aborted = run(&[("SOFTCUDA_RACES", "abort")], || drop(fill_then_copy(false)));
    assert!(!aborted.through, "it goes on");
    aborted.said("race (write after read)");
}

#[test]
fn with_its_event_there_is_no_race() {
    run(&[], || {
        assert_eq!(fill_then_copy(true), [7; 100]);
        assert_eq!(statistics()["races"]["count"], 0);
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn a_race_is_found_where_the_timing_was_kind() {
    run(&[], || {
        open(0);
        let (writer, reader, at) = (stream(), stream(), alloc(100));
        writer.fill(at, 7, 100).expect("a fill");
        // Done by now, but no call of the program has seen that.
        until("the fill is done", || statistics()["operations_done"] == 1);
        assert_eq!(reader.copy_out(at, 100), Ok(vec![7; 100]));
        assert_eq!(statistics()["races"]["count"], 1);
        // Other bytes of the same allocation are no matter.
        assert_eq!((writer.sync(), reader.sync()), (Ok(()), Ok(())));
        writer.fill(at, 8, 50).expect("a fill");
        reader.fill(at + 50, 8, 50).expect("a fill");
        assert_eq!((writer.sync(), reader.sync()), (Ok(()), Ok(())));
        assert_eq!(statistics()["races"]["count"], 1);
    })
    .passed()
    .said("race (read after write)");
}

#[test]
fn the_host_orders_what_it_waited_for() {
    run(&[], || {
        open(0);
        let (a, b, done, at) = (stream(), stream(), event(), alloc(100));
        a.fill(at, 1, 100).expect("a fill");
        assert_eq!(a.sync(), Ok(()));
        b.fill(at, 2, 100).expect("a fill");
        b.record(done);
        until("the event is reached", || cu!(cuEventQuery(done)) != Err(600));
        a.fill(at, 3, 100).expect("a fill");
        cu!(cuCtxSynchronize()).expect("all of it");
        b.fill(at, 4, 100).expect("a fill");
        assert_eq!(b.sync(), Ok(()));
        assert_eq!(statistics()["races"]["count"], 0);
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn memory_freed_in_another_stream_races_with_its_use() {
    run(&[], || {
        open(0);
        let (a, b, mut at) = (stream(), stream(), 0);
        cu!(cuMemAllocAsync(&raw mut at, 100, a.0)).expect("memory");
        assert_eq!(a.sync(), Ok(()));
        let hold = b.hold();
        a.fill(at, 1, 100).expect("a fill");
        cu!(cuMemFreeAsync(at, b.0)).expect("freed");
        assert_eq!(a.sync(), Ok(()), "the fill comes first here, by luck");
        drop(hold);
        assert_eq!(b.sync(), Ok(()));
        assert_eq!(statistics()["races"]["count"], 1);
    })
    .passed();
}

#[test]
fn the_hosts_own_accesses_count_where_they_are_declared() {
    run(&[], || {
        open(0);
        let (stream, host, at) = (stream(), pinned(100), alloc(100));
        host.fill(1);
        host_access(host.at, 100, true).expect("declared");
        stream.copy_in_pinned(at, host).expect("a copy");
        host.fill(2);
        host_access(host.at, 100, true).expect("declared");
        assert_eq!(stream.sync(), Ok(()));
        assert_eq!(statistics()["races"]["count"], 1, "written while the copy may read");
        host_access(host.at, 100, true).expect("declared");
        assert_eq!(statistics()["races"]["count"], 1, "and no more after the wait");
        assert_eq!(host_access(host.at, 101, true), Err(1));
    })
    .passed()
    .said("host write (host)");
}

#[test]
fn a_kernel_that_runs_over_two_registrations_touches_both() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let (module, a, b) = (module(&["set"]).expect("a module"), stream(), stream());
        let mut own = vec![0_u32; 64];
        let at = own.as_mut_ptr().cast::<u8>();
        for half in [at, at.wrapping_add(128)] {
            cu!(cuMemHostRegister_v2(half.cast(), 128, 0)).expect("registered");
        }
        module.launch("set", shape(1, 64), a, &[at as u64, 1]).expect("a launch");
        b.fill(at.wrapping_add(128) as u64, 2, 128).expect("a fill");
        cu!(cuCtxSynchronize()).expect("both");
        assert_eq!(statistics()["races"]["count"], 1);
    })
    .passed();
}

#[test]
fn kernels_race_by_the_bytes_that_they_touch() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let module = module(&["set", "count"]).expect("a module");
        let (a, b, at) = (stream(), stream(), alloc(1000));
        a.fill(at, 0, 1000).expect("zeros");
        assert_eq!(a.sync(), Ok(()));
        let both = |name: &str, first: u64, second: u64| {
            module.launch(name, shape(1, 64), a, &[first, 1]).expect("a launch");
            module.launch(name, shape(1, 64), b, &[second, 1]).expect("a launch");
            cu!(cuCtxSynchronize()).expect("both");
            statistics()["races"]["count"].as_u64()
        };
        assert_eq!(both("set", at, at + 256), Some(0), "neighbours");
        assert_eq!(both("count", at, at), Some(0), "atomics");
        assert_eq!(both("set", at, at + 252), Some(1), "four bytes in common");
        assert_eq!(statistics()["races"]["found"][0]["bytes"], 4);
    })
    .passed()
    .said("cuLaunchKernel set #");
}

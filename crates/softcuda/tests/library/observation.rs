//! Traces, statistics, and which symbols there are.

use std::collections::BTreeSet;
use std::process::Command;

use cudarc::driver::sys;

use crate::driver::{alloc, open, pinned, statistics, stream};
use crate::process::{in_child, run};

#[test]
fn a_trace_shows_copies_beside_one_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace-%p.jsonl");
    run(&[("SOFTCUDA_TRACE", path.to_str().expect("a plain path"))], || {
        open(0);
        let (a, b, at, host) = (stream(), stream(), alloc(1000), pinned(100));
        // Each is held until both have begun.
        let meeting = std::sync::Arc::new(std::sync::Barrier::new(2));
        for stream in [a, b] {
            let meeting = std::sync::Arc::clone(&meeting);
            let meet = move || {
                meeting.wait();
            };
            stream.host(meet).expect("a host function");
        }
        a.copy_in_pinned(at, host).expect("a copy");
        assert_eq!((a.sync(), b.sync()), (Ok(()), Ok(())));
        let mut more = 0;
        assert_eq!(cu!(cuMemAlloc_v2(&raw mut more, 1 << 40)), Err(2));
    })
    .passed();
    if in_child() {
        return;
    }
    let traces: Vec<_> = std::fs::read_dir(folder.path()).expect("the folder").collect();
    let [Ok(trace)] = &traces[..] else { panic!("{traces:?}") };
    let text = std::fs::read_to_string(trace.path()).expect("a trace");
    assert!(!trace.file_name().to_string_lossy().contains('%'), "{trace:?}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect();
    let of = |kind: &str, symbol: &str| {
        lines.iter().filter(|line| line["kind"] == kind && line["symbol"] == symbol).collect::<Vec<_>>()
    };
    let times = |line: &serde_json::Value| (line["begin_ns"].as_u64(), line["end_ns"].as_u64());
    let [first, second] = of("operation", "cuLaunchHostFunc")[..] else { panic!("{text}") };
    assert_ne!(first["stream"], second["stream"]);
    assert!(times(first).0 < times(second).1 && times(second).0 < times(first).1, "{first} {second}");
    let [copy] = of("operation", "cuMemcpyHtoDAsync_v2")[..] else { panic!("{text}") };
    assert_eq!((&copy["bytes"], &copy["device"]), (&100.into(), &0.into()));
    let [refused] = of("call", "cuMemAlloc_v2")[1..] else { panic!("{text}") };
    assert_eq!(refused["code"], 2);
}

#[test]
fn settings_that_cannot_be_followed_are_refused() {
    run(&[("SOFTCUDA_TRACE", "/proc/nowhere/trace")], || assert_eq!(cu!(cuInit(0)), Err(1)))
        .passed()
        .said("SOFTCUDA_TRACE: '/proc/nowhere/trace'");
    run(&[("SOFTCUDA_RACES", "perhaps")], || assert_eq!(cu!(cuInit(0)), Err(1)))
        .passed()
        .said("use report, abort or off");
    run(&[("SOFTCUDA_KERNEL_ORDER", "sideways")], || assert_eq!(cu!(cuInit(0)), Err(1)))
        .passed()
        .said("use up or down");
    run(&[("SOFTCUDA_FAULTS", "cuInit explode")], || assert_eq!(cu!(cuInit(0)), Err(1)))
        .passed()
        .said("'explode' is no action");
}

#[test]
fn statistics_count_calls_and_what_lives() {
    run(&[], || {
        open(0);
        let (stream, host) = (stream(), pinned(100));
        stream.fill(alloc(10), 0, 10).expect("a fill");
        assert_eq!(stream.sync(), Ok(()));
        let now = statistics();
        assert_eq!((&now["calls"]["cuMemsetD8Async"], &now["calls"]["cuInit"]), (&1.into(), &1.into()));
        let live = &now["live"];
        assert_eq!(
            (&live["streams"], &live["pinned_bytes"], &live["contexts"]),
            (&1.into(), &100.into(), &1.into())
        );
        assert_eq!(now["devices"][0]["memory"], 64 << 20);
        cu!(cuMemFreeHost(host.at.cast())).expect("freed");
        cu!(cuDevicePrimaryCtxRelease_v2(0)).expect("released");
        let live = statistics()["live"].clone();
        for what in ["streams", "pinned_allocations", "device_allocations", "contexts", "events"] {
            assert_eq!(live[what], 0, "{what}: {live}");
        }
        assert_eq!(stream.sync(), Err(201), "the context is gone");
    })
    .passed();
}

#[test]
fn what_is_not_modelled_is_not_there() {
    run(&[], || {
        let library = unsafe { sys::culib() };
        for name in ["cuGraphCreate", "cuMemAllocManaged", "cuMemAddressReserve", "cuCtxCreate_v2"] {
            let found = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
            assert!(found.is_err(), "{name} is there");
        }
    })
    .passed();
}

/// Symbols that cannot be ordered to fail, since they do not touch the driver's state.
const BESIDES: &[&str] = &[
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "softcudaFault",
    "softcudaHostAccess",
    "softcudaSet",
    "softcudaStatistics",
];

#[test]
fn the_list_of_symbols_is_what_the_library_exports() {
    let built = softcuda::layout::beside_this_program().expect("the library");
    let output = Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(built).output();
    let output = output.expect("nm, which comes with g++, lists the library's symbols");
    let text = String::from_utf8_lossy(&output.stdout);
    let exported: BTreeSet<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    let listed: BTreeSet<&str> = softcuda::symbols::ALL.iter().chain(BESIDES).copied().collect();
    assert_eq!(exported, listed);
}

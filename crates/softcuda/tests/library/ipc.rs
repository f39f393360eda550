//! Memory between processes.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use cudarc::driver::sys;

use crate::driver::{alloc, open, stream};
use crate::process::{again, run};

/// The handle, for the other process: hexadecimal.
const HANDLE: &str = "SOFTCUDA_TEST_HANDLE";
/// Set where the other process keeps the memory open.
const KEEP: &str = "SOFTCUDA_TEST_KEEP";

fn text(handle: &sys::CUipcMemHandle) -> String {
    handle.reserved.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
}

fn handle(text: &str) -> sys::CUipcMemHandle {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    for (place, byte) in handle.reserved.iter_mut().enumerate() {
        *byte =
            u8::from_str_radix(&text[place * 2..place * 2 + 2], 16).expect("hexadecimal") as std::ffi::c_char;
    }
    handle
}

fn opened(handle: sys::CUipcMemHandle) -> Result<u64, u32> {
    let mut at = 0;
    cu!(cuIpcOpenMemHandle_v2(&raw mut at, handle, 1)).map(|()| at)
}

/// The other process: reads what is there, and writes something else.
fn import(text: &str) {
    open(0);
    let handle = handle(text);
    let at = match opened(handle) {
        Ok(at) => at,
        Err(code) => {
            println!("refused with {code}");
            return;
        }
    };
    if std::env::var_os(KEEP).is_some() {
        // Until the exporter has freed it: its poison is seen here.
        println!("ready");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).expect("the exporter says when");
        println!("read {:x?}", stream().copy_out(at, 2).expect("bytes"));
        return;
    }
    let stream = stream();
    println!("read {:?}", stream.copy_out(at + 1000, 3).expect("bytes"));
    stream.copy_in(at + 1000, &[4, 5, 6]).expect("a copy");
    assert_eq!(stream.sync(), Ok(()));
    cu!(cuIpcCloseMemHandle(at)).expect("closed");
    assert_eq!(cu!(cuIpcCloseMemHandle(at)), Err(1), "twice");
}

/// Exports memory and ends.
fn export_and_end() {
    open(0);
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    cu!(cuIpcGetMemHandle(&raw mut handle, alloc(100))).expect("a handle");
    println!("handle {}", text(&handle));
}

fn other(handle: &str, environment: &[(&str, &str)]) -> (String, String) {
    let mut process = again("ipc::two_processes_share_memory");
    process.env(HANDLE, handle).envs(environment.iter().copied());
    let output = process.output().expect("the other process starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    (stdout.into_owned(), stderr.into_owned())
}

#[test]
fn two_processes_share_memory() {
    run(&[], || {
        if let Ok(text) = std::env::var(HANDLE) {
            return if text == "make one" { export_and_end() } else { import(&text) };
        }
        open(0);
        // So that the shared one does not lie on a page's start.
        let (_first, at, stream) = (alloc(100), alloc(5000), stream());
        stream.copy_in(at + 1000, &[1, 2, 3]).expect("a copy");
        assert_eq!(stream.sync(), Ok(()));
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        cu!(cuIpcGetMemHandle(&raw mut handle, at)).expect("a handle");
        assert_eq!(opened(handle), Err(201), "not in the process that made it");
        assert!(other(&text(&handle), &[]).0.contains("read [1, 2, 3]"));
        assert_eq!(stream.copy_out(at + 1000, 3), Ok(vec![4, 5, 6]));

        let elsewhere = [("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB"), ("CUDA_VISIBLE_DEVICES", "1")];
        let (stdout, stderr) = other(&text(&handle), &elsewhere);
        assert!(stdout.contains("refused with 1") && stderr.contains("on another device"), "{stderr}");
        let mut keeper = again("ipc::two_processes_share_memory");
        keeper.env(HANDLE, text(&handle)).env(KEEP, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = keeper.spawn().expect("the other process starts");
        let mut lines = BufReader::new(keeper.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.is_ok_and(|line| line == "ready")), "the memory is open there");
        cu!(cuMemFree_v2(at)).expect("freed");
        keeper.stdin.take().expect("piped").write_all(b"freed\n").expect("it listens");
        assert!(lines.any(|line| line.is_ok_and(|line| line == "read [fd, fd]")), "poison");
        assert!(keeper.wait().expect("it ends").success());

        let (stdout, stderr) = other(&text(&handle), &[]);
        assert!(stdout.contains("refused with 1") && stderr.contains("was freed"), "{stderr}");
        let nonsense = sys::CUipcMemHandle { reserved: [7; 64] };
        assert!(other(&text(&nonsense), &[]).1.contains("no memory handle of softcuda"));

        let (stdout, _) = other("make one", &[]);
        let orphan =
            stdout.lines().find_map(|line| line.strip_prefix("handle ")).expect("a handle").to_owned();
        let (stdout, stderr) = other(&orphan, &[]);
        assert!(stdout.contains("refused with 1") && stderr.contains("is gone"), "{stderr}");

        let (mut pooled, mut none) = (0, sys::CUipcMemHandle { reserved: [0; 64] });
        cu!(cuMemAllocAsync(&raw mut pooled, 100, stream.0)).expect("memory");
        assert_eq!(cu!(cuIpcGetMemHandle(&raw mut none, pooled)), Err(1), "pools have handles of their own");
    })
    .passed();
}

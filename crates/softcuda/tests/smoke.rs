//! Real cudarc code on the built library: copies there and back, a memset, an event between two streams.

use std::path::PathBuf;
use std::process::Command;

use cudarc::driver::CudaContext;

/// Set in the child, whose loader finds the library laid out as the driver's.
const CHILD: &str = "SOFTCUDA_SMOKE_CHILD";

fn built_library() -> PathBuf {
    let mut folder = std::env::current_exe().expect("this test has a path");
    while folder.pop() {
        let built = folder.join("libsoftcuda.so");
        if built.is_file() {
            return built;
        }
    }
    panic!("libsoftcuda.so is not beside this test: run `cargo build -p softcuda` in the same profile first");
}

#[test]
fn cudarc_copies_through_two_streams() {
    if std::env::var_os(CHILD).is_some() {
        return copy_through_two_streams();
    }
    let folder = tempfile::tempdir().expect("a folder");
    softcuda::layout::lay_out(&built_library(), folder.path()).expect("the library is laid out");
    let output = Command::new(std::env::current_exe().expect("this test has a path"))
        .args(["--exact", "cudarc_copies_through_two_streams", "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", folder.path())
        .env("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")
        .output()
        .expect("the child starts");
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn copy_through_two_streams() {
    assert_eq!(CudaContext::device_count().expect("devices are counted"), 2);
    let context = CudaContext::new(1).expect("the second device opens");
    let first = context.new_stream().expect("a stream");
    let second = context.new_stream().expect("a stream");
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|index| (index % 251) as u8).collect();
    let device = first.clone_htod(&bytes).expect("bytes go there");
    let written = first.record_event(None).expect("an event");
    second.wait(&written).expect("the event is waited for");
    assert_eq!(second.clone_dtoh(&device).expect("bytes come back"), bytes);
    let zeros = second.alloc_zeros::<u8>(4096).expect("zeroed memory");
    assert_eq!(second.clone_dtoh(&zeros).expect("zeros come back"), vec![0; 4096]);
    assert!(first.alloc_zeros::<u8>(65 << 20).is_err(), "more than the device has was given");
}

//! Kernels on the CPU: what they compute, and what they may not do.

use std::path::PathBuf;

use cudarc::driver::sys;

use crate::driver::{Shape, alloc, module, open, pinned, shape, statistics, stream};
use crate::process::{in_child, run};

/// The compiled kernels of `kernels.cu`, for as long as this lives.
pub(crate) struct Compiled {
    _folder: Option<tempfile::TempDir>,
    path: String,
}

impl Compiled {
    pub(crate) fn path(&self) -> &str {
        &self.path
    }
}

pub(crate) fn compiled(defines: &[&str]) -> Compiled {
    if in_child() {
        // The parent has done it.
        return Compiled { path: std::env::var("SOFTCUDA_KERNELS").unwrap_or_default(), _folder: None };
    }
    let folder = tempfile::tempdir().expect("a folder");
    let object = folder.path().join("kernels.so");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/library/kernels.cu");
    let names = softcuda::kernels::compile(&[source], &object, defines).expect("g++ compiles the kernels");
    assert!(names.contains(&"add".to_owned()), "{names:?}");
    Compiled { path: object.display().to_string(), _folder: Some(folder) }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// What a kernel of one parameter wrote to a place of so many words.
fn output(name: &str, shape: Shape, count: usize) -> Result<Vec<u32>, u32> {
    let (module, stream) = (module(&[name])?, stream());
    let out = alloc(count * 4);
    stream.fill(out, 0, count * 4)?;
    module.launch(name, shape, stream, &[out])?;
    Ok(words(&stream.copy_out(out, count * 4)?))
}

fn computes() {
    let (module, stream) = (module(&["total", "scale", "cube"]).expect("a module"), stream());
    let numbers: Vec<u8> = (0..100_000_u32).flat_map(u32::to_ne_bytes).collect();
    let (from, to) = (alloc(numbers.len()), alloc(4));
    stream.copy_in(from, &numbers).expect("numbers go there");
    stream.fill(to, 0, 4).expect("zero");
    module.launch("total", shape(40, 256), stream, &[from, to, 100_000]).expect("a launch");
    let sum = words(&stream.copy_out(to, 4).expect("the sum"))[0];
    assert_eq!(sum, (0..100_000_u32).fold(0, u32::wrapping_add));

    let warps = output("warps", shape(1, 64), 64 * 6).expect("shuffles and votes");
    for lane in 0..64_u32 {
        let own = &warps[lane as usize * 6..][..6];
        let (first, place) = (lane / 32 * 32, lane % 32);
        assert_eq!(own[0], first + (place + 31) % 32, "from the lane before");
        assert_eq!(own[1], first + (place ^ 5), "from the other lane");
        assert_eq!(own[2], if place % 8 == 7 { lane } else { lane + 1 }, "down, within eight");
        assert_eq!(own[3], 0x1111_1111, "the ballot");
        assert_eq!(own[4], 16, "counted over the block");
        assert_eq!(own[5], u32::from(lane < 32), "a vote of the warp");
    }
    let bytes =
        output("dynamic", Shape { grid: 3, block: 128, shared: 512 }, 3 * 128).expect("dynamic memory");
    assert_eq!(bytes[..128], (0..128).rev().collect::<Vec<u32>>());
    assert_eq!(bytes[256..], (256..384).rev().collect::<Vec<u32>>());
    let places = output("places", shape(2, 40), 80).expect("places");
    assert_eq!(places[79], 1_000_000 + 39 * 1000 + 2 * 100 + 40);
    assert_eq!(output("halves", shape(1, 1), 2).expect("halves"), [0x3e00, 3]);

    let sums = output("warpwise", shape(3, 64), 64).expect("sums");
    assert_eq!(sums[..4], [63 * 32, 0, 3, 2]);

    let cells = 4 * 6 * 6;
    let mut cube = alloc(cells * 4);
    stream.fill(cube, 0, cells * 4).expect("zeros");
    let parameters = [(&raw mut cube).cast()];
    module.launch_cube("cube", ([2, 3, 1], [2, 2, 6], 0), stream, &parameters).expect("a launch");
    assert_eq!(words(&stream.copy_out(cube, cells * 4).expect("cells")), vec![1; cells]);

    // A structure by value, whose bytes are taken at the launch.
    #[repr(C)]
    struct Factors {
        a: f32,
        b: [u64; 4],
    }
    let mut factors = Factors { a: 1.5, b: [0, 0, 0, 4] };
    let hold = stream.hold();
    let parameters = [(&raw mut factors).cast(), (&raw mut cube).cast()];
    module.launch_cube("scale", ([1; 3], [1; 3], 0), stream, &parameters).expect("a launch");
    (factors.a, factors.b) = (0.0, [0; 4]);
    drop(hold);
    assert_eq!(words(&stream.copy_out(cube, 4).expect("a product"))[0], 6.0_f32.to_bits());
    assert_eq!((factors.a, factors.b), (0.0, [0; 4]));
}

#[test]
fn threads_work_together() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        computes();
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn threads_work_together_on_the_portable_fibers() {
    let kernels = compiled(&["SOFTCUDA_UCONTEXT"]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        computes();
    })
    .passed();
}

#[test]
fn an_access_behind_the_end_is_a_sticky_700_that_names_its_thread() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let (module, stream) = (module(&["add"]).expect("a module"), stream());
        let (a, b, c) = (alloc(4000), alloc(4000), alloc(3996));
        for at in [a, b] {
            stream.fill(at, 0, 4000).expect("zeros");
        }
        module.launch("add", shape(8, 128), stream, &[a, b, c, 999]).expect("a launch");
        assert_eq!(stream.sync(), Ok(()));
        module.launch("add", shape(8, 128), stream, &[a, b, c, 1000]).expect("a launch");
        assert_eq!(stream.sync(), Err(700));
        assert_eq!(stream.fill(a, 0, 1), Err(700), "it is sticky");
    })
    .passed()
    .said("block (7, 0, 0), thread (103, 0, 0) writes 4 bytes at")
    .said("addr2line -Cfipe");
}

#[test]
fn page_locked_memory_is_reached_and_pageable_memory_is_not() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let (module, stream) = (module(&["add"]).expect("a module"), stream());
        let (device, host) = (alloc(4), pinned(4));
        host.fill(0);
        let pageable = [0_u32];
        module
            .launch("add", shape(1, 1), stream, &[host.at as u64, host.at as u64, device, 1])
            .expect("a launch");
        assert_eq!(stream.sync(), Ok(()));
        let pageable = pageable.as_ptr() as u64;
        module.launch("add", shape(1, 1), stream, &[pageable, pageable, device, 1]).expect("a launch");
        assert_eq!(stream.sync(), Err(700));
    })
    .passed()
    .said("reads 4 bytes");
}

#[test]
fn a_peers_memory_is_reached_where_that_was_enabled() {
    let kernels = compiled(&[]);
    let environment = [("SOFTCUDA_KERNELS", kernels.path()), ("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")];
    run(&environment, || {
        let other = open(1);
        let theirs = alloc(4);
        crate::driver::NULL.fill(theirs, 0, 4).expect("zero");
        assert_eq!(crate::driver::NULL.sync(), Ok(()));
        open(0);
        let (module, stream, own) = (module(&["add"]).expect("a module"), stream(), alloc(4));
        cu!(cuCtxEnablePeerAccess(other, 0)).expect("access is enabled");
        assert_eq!(cu!(cuCtxEnablePeerAccess(other, 0)), Err(704));
        module.launch("add", shape(1, 1), stream, &[theirs, theirs, own, 1]).expect("a launch");
        assert_eq!(stream.sync(), Ok(()));
        cu!(cuCtxDisablePeerAccess(other)).expect("access is disabled");
        module.launch("add", shape(1, 1), stream, &[theirs, theirs, own, 1]).expect("a launch");
        assert_eq!(stream.sync(), Err(700));
    })
    .passed();
}

#[test]
fn kernels_that_go_wrong_end_as_on_a_gpu() {
    let kernels = compiled(&[]);
    for (name, code, said) in [
        ("hangs", 702, "waits at __syncthreads for threads that never come"),
        ("asserts", 710, "assertion 'blockDim.x == 1' failed"),
        ("traps", 719, "__trap() was called"),
        ("misaligned", 716, "not a multiple of its size"),
        ("oversteps", 700, "thread (32, 0, 0) uses index 32 of a shorter array at"),
        ("quarrels", 719, "is at __any_sync while its warp is at __ballot_sync"),
    ] {
        let environment =
            [("SOFTCUDA_KERNELS", kernels.path()), ("KERNEL", name), ("CODE", &code.to_string())];
        run(&environment, || {
            open(0);
            let (name, code) = (std::env::var("KERNEL").expect("set"), std::env::var("CODE").expect("set"));
            assert_eq!(output(&name, shape(1, 64), 64), Err(code.parse().expect("a number")));
        })
        .passed()
        .said(said);
    }
}

#[test]
fn shared_memory_is_poison_at_first_and_a_missing_barrier_is_a_race() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        assert_eq!(output("unwritten", shape(2, 1), 4).expect("a run"), [0xC5C5_C5C5; 4]);
        let found = output("forgets", shape(1, 64), 64).expect("a run");
        assert_eq!(found, (0..64).map(|thread: u32| thread.saturating_sub(1)).collect::<Vec<_>>(), "by luck");
        let races = statistics()["races"].clone();
        assert_eq!((&races["count"], &races["found"][0]["bytes"]), (&1.into(), &4.into()), "one of a launch is told");
    })
    .passed()
    .said("race (read after write): block (0, 0, 0), thread (0, 0, 0) and block (0, 0, 0), thread (1, 0, 0) (the line:")
    .said("of the shared memory of cuLaunchKernel forgets #");
    run(&[("SOFTCUDA_KERNELS", kernels.path()), ("SOFTCUDA_KERNEL_ORDER", "down")], || {
        open(0);
        let found = output("forgets", shape(1, 64), 64).expect("a run");
        assert_eq!(found[1..], [0xC5C5_C5C5; 63]);
    })
    .passed()
    .said("race (write after read)");
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        output("halfhearted", Shape { grid: 1, block: 64, shared: 256 }, 64).expect("a run");
        assert_eq!(statistics()["races"]["count"], 1);
        output("halfhearted", Shape { grid: 2, block: 32, shared: 256 }, 64).expect("a run");
        assert_eq!(statistics()["races"]["count"], 1, "a warp alone needs no more");
        output("mixes", shape(1, 2), 2).expect("a run");
        assert_eq!(statistics()["races"]["count"], 2);
    })
    .passed()
    .said("race (atomic after read)");
    run(&[("SOFTCUDA_KERNELS", kernels.path()), ("SOFTCUDA_RACES", "off")], || {
        open(0);
        output("forgets", shape(1, 64), 64).expect("a run");
    })
    .passed()
    .did_not_say("race");
}

#[test]
fn kernels_that_are_not_there_are_not_found() {
    run(&[], || {
        open(0);
        assert_eq!(module(&["add"]).err(), Some(500));
    })
    .passed()
    .said("SOFTCUDA_KERNELS is not set");
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        assert_eq!(module(&["absent"]).err(), Some(500));
        let module = module(&["add"]).expect("a module");
        assert_eq!(module.launch("total", shape(1, 1), stream(), &[]), Err(500), "not in this module");
        assert_eq!(module.launch("add", shape(1, 1025), stream(), &[0; 4]), Err(1), "too many threads");
        let text = c"not PTX";
        let mut loaded = std::ptr::null_mut();
        assert_eq!(cu!(cuModuleLoadData(&raw mut loaded, text.as_ptr().cast())), Err(200));
    })
    .passed()
    .said("kernel 'absent' is in the PTX but not in SOFTCUDA_KERNELS");
}

#[test]
fn functions_go_with_their_module() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let module = module(&["traps"]).expect("a module");
        let (mut function, mut threads) = (std::ptr::null_mut(), 0);
        cu!(cuModuleGetFunction(&raw mut function, module.0, c"traps".as_ptr())).expect("a function");
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        cu!(cuFuncGetAttribute(&raw mut threads, most, function)).expect("an attribute");
        assert_eq!(threads, 1024);
        let dynamic = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        cu!(cuFuncSetAttribute(function, dynamic, 100 << 10)).expect("more shared memory");
        assert_eq!(cu!(cuFuncSetAttribute(function, dynamic, 1 << 20)), Err(1), "too much");
        cu!(cuModuleUnload(module.0)).expect("unloaded");
        assert_eq!(cu!(cuFuncGetAttribute(&raw mut threads, most, function)), Err(400));
        assert_eq!(cu!(cuModuleUnload(module.0)), Err(400));
    })
    .passed();
}

#[test]
fn a_kernel_that_spins_ends_with_its_context() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        open(0);
        let (module, stream, flag) = (module(&["spins"]).expect("a module"), stream(), alloc(4));
        stream.fill(flag, 0, 4).expect("zero");
        module.launch("spins", shape(1, 1), stream, &[flag]).expect("a launch");
        assert_eq!(cu!(cuStreamQuery(stream.0)), Err(600));
        cu!(cuDevicePrimaryCtxReset_v2(0)).expect("a reset");
        assert_eq!(crate::driver::stream().copy_out(alloc(1), 1), Ok(vec![0xCB]), "the context is as new");
    })
    .passed();
}

#[test]
fn sources_that_do_not_compile_are_refused_with_their_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let compile = |text: &str| {
        let source = folder.path().join("some.cu");
        std::fs::write(&source, text).expect("a source");
        softcuda::kernels::compile(&[source], &folder.path().join("out.so"), &[])
            .expect_err("refused")
            .to_string()
    };
    assert!(compile("extern \"C\" __global__ void f() { nothing(); }").contains("some.cu:1:"));
    assert!(compile("\n__global__ void f() {}").contains("some.cu:2: kernel 'f' is not extern \"C\""));
    assert!(compile("int f() { return 1; }").contains("no kernel in the sources"));
    assert!(!folder.path().join("out.so").exists());
    let twice = folder.path().join("some.cu");
    std::fs::write(&twice, "extern \"C\" __global__ void f() {}").expect("a source");
    let error = softcuda::kernels::compile(&[twice.clone(), twice], &folder.path().join("out.so"), &[]);
    assert!(error.expect_err("refused").to_string().contains("kernel 'f' is in"));
}

//! cudarc's safe layer as it is, unaware that there is no GPU.

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use crate::kernels::compiled;
use crate::process::run;

#[test]
fn copies_go_through_two_streams() {
    run(&[("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")], || {
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
    })
    .passed();
}

#[test]
fn a_kernel_is_launched() {
    let kernels = compiled(&[]);
    run(&[("SOFTCUDA_KERNELS", kernels.path())], || {
        let context = CudaContext::new(0).expect("the device opens");
        let stream = context.new_stream().expect("a stream");
        let ptx = Ptx::from_src(".version 8.0\n.visible .entry add(\n)\n{ }");
        let add = context.load_module(ptx).expect("a module").load_function("add").expect("its kernel");
        let ones = stream.clone_htod(&[1.0_f32; 1000]).expect("ones");
        let twos = stream.clone_htod(&[2.0_f32; 1000]).expect("twos");
        let mut sums = stream.alloc_zeros::<f32>(1000).expect("sums");
        let mut launch = stream.launch_builder(&add);
        launch.arg(&ones).arg(&twos).arg(&mut sums).arg(&1000_i32);
        unsafe { launch.launch(LaunchConfig::for_num_elems(1000)) }.expect("it is launched");
        assert_eq!(stream.clone_dtoh(&sums).expect("sums come back"), [3.0; 1000]);
    })
    .passed();
}

#[test]
fn a_library_that_the_program_opened_itself_is_the_one_that_cudarc_uses() {
    run(&[("LD_LIBRARY_PATH", "")], || {
        let built = softcuda::layout::beside_this_program().expect("the library");
        let path = std::ffi::CString::new(built.into_os_string().into_encoded_bytes()).expect("no NUL in it");
        let opened = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!opened.is_null());
        let context = CudaContext::new(0).expect("the device opens");
        assert_eq!(context.name().expect("a name"), "softcuda");
    })
    .passed();
}

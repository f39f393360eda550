//! A node on CUDA devices whose driver fails, one fault at a time, under load. softcuda takes the orders; each test has
//! devices of its own, since some do not recover.

use keepwarm_config::DeviceKind;
use keepwarm_core::session::{Fp8, Number};
use keepwarm_test_devices::softcuda;

use super::faults::{fault_under_load, run};
use super::*;

/// A node on two of softcuda's devices, from this number on.
pub(crate) async fn start_on(first: u32) -> Node {
    softcuda();
    let gpu = |number| GpuConfig { device: DeviceKind::Cuda(number), memory: Bytes(8 << 20) };
    let config = config_on(vec![gpu(first), gpu(first + 1)], None, 64 << 20);
    Node::start(config, &"n1".parse().unwrap()).await.unwrap()
}

/// Orders a fault of a device under load: it must be fenced, for that reason, and its sessions must go on at the other.
async fn fences(device: u32, order: &str, told: &str) {
    let node = start_on(device).await;
    let order = format!("{order} device={device}");
    let (node, (sessions, refused)) =
        fault_under_load(node, |_| softcuda().order(&order).expect("an order of softcuda's")).await;
    let handle = node.handle();
    assert!(!refused.is_empty(), "who asked for the fenced device is told");
    let GpuState::Fenced(reason) = &handle.gpus()[0].state else { panic!("'{order}' did not fence") };
    assert!(reason.contains(told), "'{order}' told: {reason}");
    assert_eq!(handle.gpus()[1].state, GpuState::Up);
    for (key, bytes, acked) in &sessions {
        let bytes = &bytes[..acked * TOKEN];
        assert!(read(&handle, key, Selection::default()).await.unwrap() == bytes);
        assert_eq!(run(&handle, key, None, bytes).await.unwrap(), GpuIndex(1), "the other one restores");
    }
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn an_uncorrectable_ecc_error_under_load() {
    fences(2, "cuMemcpyHtoDAsync_v2 sticky 214", "CUDA_ERROR_ECC_UNCORRECTABLE").await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_a_later_call_tells_under_load() {
    fences(4, "cuMemcpyHtoDAsync_v2 async-sticky 700", "CUDA_ERROR_ILLEGAL_ADDRESS").await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_disappears_under_load() {
    fences(6, "lose 999", "999").await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn an_event_for_which_there_is_no_memory_under_load() {
    fences(8, "cuEventRecord fail 2", "CUDA_ERROR_OUT_OF_MEMORY").await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_a_copy_to_another_gpu_under_load() {
    fences(18, "cuMemcpyPeerAsync async-sticky 700", "CUDA_ERROR_ILLEGAL_ADDRESS").await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_past_the_watchdog_under_load() {
    fences(10, "hang", "it hangs").await;
    softcuda().order("resume device=10").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_form_that_no_gpu_can_make_is_refused_at_once() {
    // Its driver takes orders once somebody has begun to use it.
    start_on(2).await.shutdown(DEADLINE).await;
    for device in [0, 1] {
        softcuda().order(&format!("cuModuleLoadData fail 218 device={device}")).unwrap();
    }
    let node = start_on(0).await;
    let handle = node.handle();
    let cold = |cold| CreateRequest {
        id: None,
        layout: Arc::new(layout(Order::Plane).with_cold(cold).unwrap()),
        protect: Protect::For(Millis(60_000)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    let error = handle.create(&tenant(), cold(Some(Fp8 { from: Number::F16 }))).await.unwrap_err();
    let Error::InvalidField { field, reason } = &error else { panic!("{error}") };
    assert!(field == "layout" && reason.contains("leave `cold` out"), "{error}");
    let (made, _) = handle.create(&tenant(), cold(None)).await.unwrap();
    let key = made.manifest.key.clone();
    append(&handle, &key, 0, &pattern(3, 32)).await.unwrap();
    assert_eq!(run(&handle, &key, Some(GpuIndex(0)), &pattern(3, 32)).await.unwrap(), GpuIndex(0));
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn a_corrupted_copy_is_refused_and_made_again() {
    let node = start_on(12).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    softcuda().order("cuMemcpyHtoDAsync_v2 corrupt 77 device=12").unwrap();
    let wish = ActivateRequest { gpu: Some(GpuIndex(0)), ..ActivateRequest::default() };
    let error = handle.activate(&key, wish.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { at: "restore", .. }), "{error}");
    assert_eq!(run(&handle, &key, Some(GpuIndex(0)), &pattern(3, 100)).await.unwrap(), GpuIndex(0));
    assert_eq!(handle.gpus()[0].state, GpuState::Up, "a wrong bit is no reason to give a device up");
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_has_no_room_for_the_arena_says_which_key_asks_for_it() {
    softcuda();
    let gpu = GpuConfig { device: DeviceKind::Cuda(14), memory: Bytes(2 << 30) };
    let error = Node::start(config_on(vec![gpu], None, 64 << 20), &"n1".parse().unwrap()).await.unwrap_err();
    let told = error.to_string();
    assert!(
        told.starts_with("node 'n1': gpu[0].memory = \"2GiB\": 2GiB of cuda:14 were asked for;"),
        "{told}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_on_one_device_are_told_and_the_first_goes_on() {
    let first = start_on(16).await;
    let gpu = GpuConfig { device: DeviceKind::Cuda(16), memory: Bytes(8 << 20) };
    let error = Node::start(config_on(vec![gpu], None, 64 << 20), &"n1".parse().unwrap()).await.unwrap_err();
    let told = error.to_string();
    assert!(told.starts_with("node 'n1': gpu[0].device = \"cuda:16\": cuda:16 ("), "{told}");
    assert!(told.contains("is in use already"), "{told}");
    let handle = first.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    run(&handle, &key, Some(GpuIndex(0)), &pattern(3, 100)).await.unwrap();
    first.shutdown(DEADLINE).await;
}

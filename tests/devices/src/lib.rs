//! The GPUs that tests of nodes run on, by `KEEPWARM_TEST_DEVICE`: `host` (where nothing is said), `softcuda`, or `gpu` for
//! the machine's own. One suite, three devices.

use std::sync::OnceLock;

use keepwarm_config::{DeviceKind, GpuConfig};
use keepwarm_types::Bytes;
use softcuda::preload::{Preloaded, preload};

/// Which devices tests run on.
const DEVICE: &str = "KEEPWARM_TEST_DEVICE";
/// The machine that softcuda plays where `SOFTCUDA_DEVICES` says nothing: its own in each process, so that tests do not take
/// each other's GPUs.
const MACHINE: &str = "gpus=20,memory=1GiB,uuids=process";

/// GPUs of a node, each with that much memory. A machine with one real GPU has no second: those are the host's.
#[must_use]
pub fn gpus(memory: Bytes, count: u32) -> Vec<GpuConfig> {
    let device = |index: u32| match kind().as_str() {
        "gpu" if index > 0 => DeviceKind::Host,
        "host" => DeviceKind::Host,
        _ => DeviceKind::Cuda(index),
    };
    if kind() == "softcuda" {
        softcuda();
    }
    (0..count).map(|index| GpuConfig { device: device(index), memory }).collect()
}

/// softcuda, as this process's driver.
///
/// # Panics
/// It was not built with the tests.
pub fn softcuda() -> Preloaded {
    static OPENED: OnceLock<Preloaded> = OnceLock::new();
    *OPENED.get_or_init(|| {
        let machine = std::env::var("SOFTCUDA_DEVICES").unwrap_or_else(|_| MACHINE.to_owned());
        let settings = [("SOFTCUDA_DEVICES", machine.as_str()), ("SOFTCUDA_RACES", "abort")];
        preload(&settings).expect("softcuda is built with the tests")
    })
}

fn kind() -> String {
    let kind = std::env::var(DEVICE).unwrap_or_else(|_| "host".to_owned());
    assert!(
        ["host", "softcuda", "gpu"].contains(&kind.as_str()),
        "{DEVICE}={kind}: use host, softcuda or gpu"
    );
    kind
}

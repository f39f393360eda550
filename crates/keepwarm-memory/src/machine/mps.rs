//! What the Multi-Process Service lets this process have, as its environment says (NVIDIA Multi-Process Service, "Client
//! Memory Limits" and "Execution Resource Provisioning").

use std::env;

use keepwarm_types::Bytes;

use super::same_uuid;

/// Devices in a list of limits.
pub const MPS_DEVICES_MAX: usize = 64;

const PINNED: &str = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT";
const THREADS: &str = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE";

/// Limits of the Multi-Process Service. They count as the variables say, whether or not its daemon runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MpsLimits {
    /// Memory that this process may have of a device: `CUDA_MPS_PINNED_DEVICE_MEM_LIMIT`.
    pub memory: Vec<(MpsDevice, Bytes)>,
    /// The share of a device's threads that it may use, in percent: `CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`.
    pub active_threads: Option<f64>,
}

/// Which device a limit is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MpsDevice {
    /// By the driver's number.
    Number(u32),
    /// By its UUID.
    Uuid(String),
}

/// A variable that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value:?}: {expected}")]
pub struct MpsError {
    variable: &'static str,
    value: String,
    expected: &'static str,
}

impl MpsLimits {
    /// The limits of this process's environment; none where it says nothing.
    ///
    /// # Errors
    /// [`MpsError`] names the variable and what it must look like.
    pub fn from_environment() -> Result<Self, MpsError> {
        let text = |variable| env::var_os(variable).map(|value| value.to_string_lossy().into_owned());
        Self::parse(text(PINNED).as_deref(), text(THREADS).as_deref())
    }

    /// The limits that these values of the two variables are.
    ///
    /// # Errors
    /// As [`from_environment`](Self::from_environment).
    pub fn parse(memory: Option<&str>, active_threads: Option<&str>) -> Result<Self, MpsError> {
        let memory = match memory.map(str::trim) {
            None | Some("") => Vec::new(),
            Some(text) => limits(text).ok_or_else(|| MpsError {
                variable: PINNED,
                value: text.to_owned(),
                expected: "a list such as 0=1G,1=512M is expected: devices, and memory in G or M",
            })?,
        };
        let active_threads = match active_threads.map(str::trim) {
            None | Some("") => None,
            Some(text) => {
                let percent =
                    text.parse().ok().filter(|percent| (0.0..=100.0).contains(percent) && *percent > 0.0);
                Some(percent.ok_or_else(|| MpsError {
                    variable: THREADS,
                    value: text.to_owned(),
                    expected: "a number above 0 and up to 100 is expected",
                })?)
            }
        };
        Ok(Self { memory, active_threads })
    }

    /// What this process may have of the device with that number and UUID; the smallest limit where there are several.
    #[must_use]
    pub fn memory_of(&self, number: u32, uuid: &str) -> Option<Bytes> {
        let is_it = |device: &MpsDevice| match device {
            MpsDevice::Number(other) => *other == number,
            MpsDevice::Uuid(other) => same_uuid(other, uuid),
        };
        self.memory.iter().filter(|(device, _)| is_it(device)).map(|(_, bytes)| *bytes).min()
    }
}

fn limits(text: &str) -> Option<Vec<(MpsDevice, Bytes)>> {
    let parts: Vec<_> = text.split(',').take(MPS_DEVICES_MAX + 1).collect();
    if parts.len() > MPS_DEVICES_MAX {
        return None;
    }
    let limit = |part: &&str| {
        let (device, bytes) = part.trim().split_once('=')?;
        let device = match device.trim() {
            uuid if uuid.starts_with("GPU-") || uuid.starts_with("MIG-") => MpsDevice::Uuid(uuid.to_owned()),
            number => MpsDevice::Number(number.parse().ok()?),
        };
        Some((device, size(bytes.trim())?))
    };
    parts.iter().map(limit).collect()
}

/// A number with `G` or `M` behind it, in powers of two.
fn size(text: &str) -> Option<Bytes> {
    let upper = text.to_ascii_uppercase();
    let upper = upper.strip_suffix('B').unwrap_or(&upper);
    let (digits, shift) = match upper.strip_suffix('G') {
        Some(digits) => (digits, 30),
        None => (upper.strip_suffix('M')?, 20),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(Bytes)
}

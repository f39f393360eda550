//! How a machine's GPUs are shared: what NVIDIA's management library says of them and of their instances, and what the
//! Multi-Process Service lets this process have.

#[cfg(any(feature = "nvml", test))]
mod ask;
mod mps;
#[cfg(feature = "nvml")]
mod nvml;
#[cfg(test)]
mod tests;

use keepwarm_types::Bytes;

pub use mps::{MPS_DEVICES_MAX, MpsDevice, MpsError, MpsLimits};

/// NVIDIA's management library (NVML, `libnvidia-ml.so.1`), as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nvml {
    /// It is not there, or does not start; why. Nothing needs it: the CUDA driver alone says what can be used.
    NotThere(String),
    /// What it says.
    There(NvmlReport),
}

/// What the management library says of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmlReport {
    /// The driver's version, such as `570.124.06` (`nvmlSystemGetDriverVersion`).
    pub driver: String,
    /// Its GPUs.
    pub gpus: Vec<NvmlDevice>,
    /// What it did not answer, and why: a GPU that is lost, a right that is missing.
    pub unanswered: Vec<String>,
}

/// A GPU, or an instance of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmlDevice {
    /// The library's number of it, in the order of the PCI bus; of an instance, its number on its GPU. CUDA may count otherwise.
    pub number: u32,
    /// What its maker calls it (`nvmlDeviceGetName`).
    pub name: String,
    /// Its UUID, with its prefix: `GPU-…` or `MIG-…` (`nvmlDeviceGetUUID`).
    pub uuid: String,
    /// Its memory, where it says (`nvmlDeviceGetMemoryInfo_v2`).
    pub memory: Option<NvmlMemory>,
    /// Processes that compute on it, as far as this process may see them (`nvmlDeviceGetComputeRunningProcesses_v3`).
    pub processes: Vec<NvmlProcess>,
    /// Whether it is cut into instances, where it can be (`nvmlDeviceGetMigMode`).
    pub mig: Option<MigMode>,
    /// Its instances (`nvmlDeviceGetMigDeviceHandleByIndex`). CUDA shows them, and not the GPU.
    pub instances: Vec<NvmlDevice>,
}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NvmlMemory {
    /// All of it.
    pub total: Bytes,
    /// What is used, by whomever.
    pub used: Bytes,
}

/// A process that uses a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NvmlProcess {
    /// Its number, in the name space of the process that asks.
    pub process: u32,
    /// What it uses, where the driver can tell.
    pub used: Option<Bytes>,
}

/// Whether a GPU is cut into instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigMode {
    /// Now.
    pub enabled: bool,
    /// After its next reset.
    pub pending: bool,
}

impl Nvml {
    /// Loads the library and asks it. Takes some tenths of a second the first time: not for an actor's thread.
    #[must_use]
    pub fn look() -> Self {
        #[cfg(feature = "nvml")]
        return nvml::look(nvml::LIBRARY);
        #[cfg(not(feature = "nvml"))]
        Self::NotThere("this keepwarm was built without the feature nvml".to_owned())
    }

    /// The device or the instance of that UUID, with a prefix or without.
    #[must_use]
    pub fn device(&self, uuid: &str) -> Option<&NvmlDevice> {
        let Self::There(report) = self else { return None };
        let all = report.gpus.iter().flat_map(|gpu| std::iter::once(gpu).chain(&gpu.instances));
        all.into_iter().find(|device| same_uuid(&device.uuid, uuid))
    }
}

/// Whether two UUIDs name one device, with prefixes or without.
pub(crate) fn same_uuid(one: &str, other: &str) -> bool {
    plain_uuid(one).eq_ignore_ascii_case(plain_uuid(other))
}

fn plain_uuid(uuid: &str) -> &str {
    uuid.strip_prefix("GPU-").or_else(|| uuid.strip_prefix("MIG-")).unwrap_or(uuid)
}

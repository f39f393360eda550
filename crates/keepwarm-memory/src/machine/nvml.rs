//! The library itself, loaded at run time by nvml-wrapper, whose results are numbers: codes that it does not know are answers
//! like others.

use std::ffi::OsStr;

use keepwarm_types::Bytes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml as Library};

use super::ask::{Answer, Silence, Source, Which, report};
use super::{MigMode, Nvml, NvmlMemory, NvmlProcess};

/// Its name where NVIDIA's driver is installed.
pub(super) const LIBRARY: &str = "libnvidia-ml.so.1";

/// Loads the library of that name and asks it.
pub(super) fn look(library: impl AsRef<OsStr>) -> Nvml {
    let library = library.as_ref();
    match Library::builder().lib_path(library).init() {
        Ok(loaded) => Nvml::There(report(&loaded)),
        Err(error) => {
            let why = match &error {
                NvmlError::LibloadingError(error) => error.to_string(),
                error => format!("{}: {error}", library.display()),
            };
            Nvml::NotThere(why)
        }
    }
}

impl From<NvmlError> for Silence {
    fn from(error: NvmlError) -> Self {
        match error {
            // A call that an older library lacks is something that it does not know of.
            NvmlError::NotSupported
            | NvmlError::NotFound
            | NvmlError::FunctionNotFound
            | NvmlError::FailedToLoadSymbol(_) => Self::NoSuch,
            error => Self::Failed(error.to_string()),
        }
    }
}

fn of(library: &Library, which: Which) -> Result<Device<'_>, NvmlError> {
    match which {
        Which::Gpu(gpu) => library.device_by_index(gpu),
        Which::Instance(gpu, at) => library.device_by_index(gpu)?.mig_device_by_index(at),
    }
}

impl Source for Library {
    fn driver(&self) -> Answer<String> {
        Ok(self.sys_driver_version()?)
    }

    fn gpus(&self) -> Answer<u32> {
        Ok(self.device_count()?)
    }

    fn instances(&self, gpu: u32) -> Answer<u32> {
        Ok(of(self, Which::Gpu(gpu))?.mig_device_count()?)
    }

    fn name(&self, which: Which) -> Answer<String> {
        Ok(of(self, which)?.name()?)
    }

    fn uuid(&self, which: Which) -> Answer<String> {
        Ok(of(self, which)?.uuid()?)
    }

    fn memory(&self, which: Which) -> Answer<NvmlMemory> {
        let memory = of(self, which)?.memory_info()?;
        // Reserved is what the driver keeps for itself: no more to be had than what others use.
        Ok(NvmlMemory {
            total: Bytes(memory.total),
            used: Bytes(memory.used.saturating_add(memory.reserved)),
        })
    }

    fn processes(&self, which: Which) -> Answer<Vec<NvmlProcess>> {
        let processes = of(self, which)?.running_compute_processes()?;
        let process = |info: nvml_wrapper::struct_wrappers::device::ProcessInfo| NvmlProcess {
            process: info.pid,
            used: match info.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
                UsedGpuMemory::Unavailable => None,
            },
        };
        Ok(processes.into_iter().map(process).collect())
    }

    fn mig(&self, gpu: u32) -> Answer<MigMode> {
        let mode = of(self, Which::Gpu(gpu))?.mig_mode()?;
        Ok(MigMode { enabled: mode.current == 1, pending: mode.pending == 1 })
    }
}

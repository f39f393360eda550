//! The driver library: found at run time, and called through a table of our own.
//!
//! cudarc finds and opens the library. Its bindings give results back as a closed enum, for which a code of a newer
//! driver is undefined behaviour; here a result is a number, and any number has an answer.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;
use keepwarm_types::Bytes;

use super::context::Context;
use super::scratch::PoolProperties;
use crate::machine::{MpsLimits, same_uuid};
use crate::region::ReserveError;

/// The oldest driver that is used, as `cuDriverGetVersion` says it: the first with every call of the table.
const VERSION_MIN: i32 = 12_000;
/// `CUDA_SUCCESS`.
const SUCCESS: u32 = 0;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: u32 = 2;
/// `CUDA_ERROR_NOT_READY`.
pub(super) const NOT_READY: u32 = 600;
/// Room for a device's name.
const NAME_BYTES: usize = 256;

/// Why a CUDA device cannot be used, or did not do something.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no driver library.
    #[error(
        "no CUDA driver was found (libcuda.so.1): install NVIDIA's driver, or let the loader find it; \"host\" needs none"
    )]
    NoDriver,
    /// The library lacks a call.
    #[error("the CUDA driver has no {0}: it is older than CUDA 12.0; install driver 525 or newer")]
    NoCall(&'static str),
    /// The driver is older than what is needed.
    #[error("the CUDA driver speaks CUDA {}.{}, 12.0 is needed: install driver 525 or newer", .0 / 1000, .0 % 1000 / 10)]
    Old(i32),
    /// There is no such device.
    #[error("there is no {asked}; the driver shows {shown}")]
    NoDevice {
        /// What was asked for.
        asked: CudaSelector,
        /// What there is.
        shown: String,
    },
    /// The device has no stream-ordered memory pools.
    #[error("{0} has no stream-ordered memory pools: its driver, or the mode that it runs in, is too old")]
    NoPools(String),
    /// More memory was asked for than there is.
    #[error(
        "{asked} of {device} were asked for; {free} of its {total} are free: ask for less, or end what else uses it"
    )]
    Memory {
        /// The device.
        device: String,
        /// What was asked for.
        asked: Bytes,
        /// What is free.
        free: Bytes,
        /// What it has.
        total: Bytes,
    },
    /// More memory was asked for than the Multi-Process Service lets this process have.
    #[error(
        "{asked} of {device} were asked for; CUDA_MPS_PINNED_DEVICE_MEM_LIMIT lets this process have {limit}: ask for less, or \
         raise the limit"
    )]
    Limited {
        /// The device.
        device: String,
        /// What was asked for.
        asked: Bytes,
        /// What this process may have.
        limit: Bytes,
    },
    /// There is no memory for what the device's own work needs.
    #[error(
        "cuda:{device} has no {asked} of scratch memory, also after its pool was trimmed: ask for a smaller arena, or end what \
         else uses it"
    )]
    Scratch {
        /// The driver's number of the device.
        device: i32,
        /// What was asked for.
        asked: Bytes,
    },
    /// The arena's settings, or what the system gave.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// Another process has claimed the device.
    #[error(
        "{device} ({uuid}) is in use already, by another node or another GPU of this one: give each a device of its own"
    )]
    Taken {
        /// The device.
        device: String,
        /// Its UUID.
        uuid: String,
    },
    /// The system refused a thread or a name.
    #[error("the system refused what the device needs: {0}")]
    System(std::io::Error),
    /// A call failed.
    #[error("{call} answered {code} ({name}): {text}")]
    Call {
        /// Which.
        call: &'static str,
        /// The driver's number.
        code: u32,
        /// What the driver calls it.
        name: String,
        /// What the driver says of it.
        text: String,
    },
}

impl CudaError {
    /// Whether less memory would have been enough.
    #[must_use]
    pub const fn is_about_memory(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Limited { .. } | Self::Scratch { .. } | Self::Reserve(_))
    }

    /// The driver's number, where it answered with one.
    #[must_use]
    pub const fn code(&self) -> Option<u32> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Which device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaSelector {
    /// By the driver's number.
    Number(u32),
    /// By its UUID, as `nvidia-smi -L` prints it: `GPU-…` or `MIG-…`.
    Uuid(String),
}

impl fmt::Display for CudaSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "cuda:{number}"),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// A device that the driver shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaFound {
    /// The driver's number of it.
    pub number: u32,
    /// What its maker calls it.
    pub name: String,
    /// Its UUID in hexadecimal with dashes, without a prefix.
    pub uuid: String,
    /// Its memory.
    pub memory: Bytes,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Whether it has stream-ordered memory pools.
    pub pools: bool,
}

impl CudaFound {
    /// What an arena of this process may have of the device at most: its memory, or less where a limit of the
    /// Multi-Process Service says so. What is free now, [`CudaDriver::free`] says.
    #[must_use]
    pub fn budget(&self, limits: &MpsLimits) -> Bytes {
        limits.memory_of(self.number, &self.uuid).map_or(self.memory, |limit| limit.min(self.memory))
    }

    /// Whether that is its UUID, with a prefix or without.
    pub(super) fn has_uuid(&self, uuid: &str) -> bool {
        same_uuid(&self.uuid, uuid)
    }
}

/// `CUDA_MEMCPY2D` of `cuda.h`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Copy2d {
    pub(super) from_x: usize,
    pub(super) from_y: usize,
    pub(super) from_kind: u32,
    pub(super) from_host: u64,
    pub(super) from_device: u64,
    pub(super) from_array: u64,
    pub(super) from_pitch: usize,
    pub(super) to_x: usize,
    pub(super) to_y: usize,
    pub(super) to_kind: u32,
    pub(super) to_host: u64,
    pub(super) to_device: u64,
    pub(super) to_array: u64,
    pub(super) to_pitch: usize,
    pub(super) bytes: usize,
    pub(super) rows: usize,
}

/// `CUipcMemHandle` of `cuda.h`, which is passed as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct ForeignHandle(pub(super) [u8; 64]);

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident($($argument:ty),*);)*) => {
        /// The calls that are used. Handles are words, results numbers.
        pub(super) struct Table {
            $($(#[$doc])* pub(super) $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        /// The calls' names, for errors.
        #[allow(non_upper_case_globals, dead_code, reason = "named as the calls are; some answers are not errors")]
        pub(super) mod names {
            $(pub(in crate::device::cuda) const $name: &str = stringify!($symbol);)*
        }

        impl Table {
            fn load() -> Result<Self, CudaError> {
                // SAFETY: opening a driver library runs its initialisers, which is what it is there for.
                if !unsafe { sys::is_culib_present() } {
                    return Err(CudaError::NoDriver);
                }
                // SAFETY: as above; it is there, so this does not panic.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($name: {
                        let symbol = concat!(stringify!($symbol), "\0").as_bytes();
                        // SAFETY: the type is the call's in `cuda.h` of CUDA 12, with handles as words.
                        let call = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> u32>(symbol)
                        };
                        *call.map_err(|_| CudaError::NoCall(stringify!($symbol)))?
                    },)*
                })
            }
        }
    };
}

table! {
    init = cuInit(u32);
    version = cuDriverGetVersion(*mut c_int);
    error_name = cuGetErrorName(u32, *mut *const c_char);
    error_text = cuGetErrorString(u32, *mut *const c_char);
    count = cuDeviceGetCount(*mut c_int);
    device = cuDeviceGet(*mut c_int, c_int);
    device_name = cuDeviceGetName(*mut c_char, c_int, c_int);
    device_uuid = cuDeviceGetUuid_v2(*mut [u8; 16], c_int);
    device_memory = cuDeviceTotalMem_v2(*mut usize, c_int);
    attribute = cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    retain = cuDevicePrimaryCtxRetain(*mut usize, c_int);
    release = cuDevicePrimaryCtxRelease_v2(c_int);
    set_current = cuCtxSetCurrent(usize);
    memory_info = cuMemGetInfo_v2(*mut usize, *mut usize);
    allocate = cuMemAlloc_v2(*mut u64, usize);
    free = cuMemFree_v2(u64);
    pool_create = cuMemPoolCreate(*mut usize, *const PoolProperties);
    pool_destroy = cuMemPoolDestroy(usize);
    pool_set = cuMemPoolSetAttribute(usize, c_int, *mut c_void);
    pool_get = cuMemPoolGetAttribute(usize, c_int, *mut c_void);
    pool_trim = cuMemPoolTrimTo(usize, usize);
    allocate_from = cuMemAllocFromPoolAsync(*mut u64, usize, usize, usize);
    free_in_order = cuMemFreeAsync(u64, usize);
    allocate_host = cuMemHostAlloc(*mut *mut c_void, usize, u32);
    free_host = cuMemFreeHost(*mut c_void);
    register = cuMemHostRegister_v2(*mut c_void, usize, u32);
    unregister = cuMemHostUnregister(*mut c_void);
    open_foreign = cuIpcOpenMemHandle_v2(*mut u64, ForeignHandle, u32);
    close_foreign = cuIpcCloseMemHandle(u64);
    address_range = cuMemGetAddressRange_v2(*mut u64, *mut usize, u64);
    pointer_attribute = cuPointerGetAttribute(*mut c_void, c_int, u64);
    stream_create = cuStreamCreate(*mut usize, u32);
    stream_destroy = cuStreamDestroy_v2(usize);
    stream_wait = cuStreamSynchronize(usize);
    stream_query = cuStreamQuery(usize);
    event_create = cuEventCreate(*mut usize, u32);
    event_destroy = cuEventDestroy_v2(usize);
    event_record = cuEventRecord(usize, usize);
    event_query = cuEventQuery(usize);
    copy_in = cuMemcpyHtoDAsync_v2(u64, u64, usize, usize);
    copy_out = cuMemcpyDtoHAsync_v2(u64, u64, usize, usize);
    copy_within = cuMemcpyDtoDAsync_v2(u64, u64, usize, usize);
    copy_between = cuMemcpyPeerAsync(u64, usize, u64, usize, usize, usize);
    can_peer = cuDeviceCanAccessPeer(*mut c_int, c_int, c_int);
    enable_peer = cuCtxEnablePeerAccess(usize, u32);
    copy_rows = cuMemcpy2DAsync_v2(*const Copy2d, usize);
    fill = cuMemsetD8Async(u64, u8, usize, usize);
    module_load = cuModuleLoadData(*mut usize, *const c_void);
    module_unload = cuModuleUnload(usize);
    function = cuModuleGetFunction(*mut usize, usize, *const c_char);
    launch = cuLaunchKernel(usize, u32, u32, u32, u32, u32, u32, u32, usize, *mut *mut c_void, *mut *mut c_void);
}

/// The driver, loaded and initialised; cheap to clone.
#[derive(Clone)]
pub struct CudaDriver(Arc<Table>);

impl fmt::Debug for CudaDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CudaDriver")
    }
}

/// A call of the table with its name for errors; the arguments are the caller's duty.
macro_rules! call {
    ($driver:expr, $name:ident($($argument:expr),*)) => {{
        let driver: &$crate::device::cuda::driver::CudaDriver = &$driver;
        // SAFETY: the pointers are to places that live through the call, sizes are theirs, and handles are this
        // driver's own and alive, by the types that hold them. Addresses of asynchronous work lie in memory whose
        // guards its flight holds until the work has run.
        let code = unsafe { (driver.table().$name)($($argument),*) };
        driver.answer($crate::device::cuda::driver::names::$name, code)
    }};
}
pub(super) use call;

impl CudaDriver {
    /// Finds the driver library and initialises it.
    ///
    /// # Errors
    /// [`CudaError`]: there is none, it is too old, or it does not start; each says what to do.
    pub fn load() -> Result<Self, CudaError> {
        let driver = Self(Arc::new(Table::load()?));
        let mut version = 0;
        call!(driver, version(&raw mut version))?;
        if version < VERSION_MIN {
            return Err(CudaError::Old(version));
        }
        call!(driver, init(0))?;
        Ok(driver)
    }

    pub(super) fn table(&self) -> &Table {
        &self.0
    }

    /// The CUDA version that the driver speaks: 1000 times the major plus ten times the minor.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn version(&self) -> Result<u32, CudaError> {
        let mut version = 0;
        call!(self, version(&raw mut version))?;
        Ok(version.unsigned_abs())
    }

    /// Says what a result means.
    pub(super) fn answer(&self, call: &'static str, code: u32) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        let word = |ask: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            let mut text = std::ptr::null();
            // SAFETY: the place lives through the call.
            let known = unsafe { ask(code, &raw mut text) } == SUCCESS && !text.is_null();
            // SAFETY: where the driver knows the code it gave a text of its own that lives as long as it does.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let unknown = || "a code that this driver does not explain".to_owned();
        let name = word(self.0.error_name).unwrap_or_else(|| "unknown".to_owned());
        let text = word(self.0.error_text).unwrap_or_else(unknown);
        Err(CudaError::Call { call, code, name, text })
    }

    /// The devices that the driver shows, by number.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn devices(&self) -> Result<Vec<CudaFound>, CudaError> {
        let mut count = 0;
        call!(self, count(&raw mut count))?;
        (0..count.unsigned_abs()).map(|number| self.found(number)).collect()
    }

    fn found(&self, number: u32) -> Result<CudaFound, CudaError> {
        let device = self.device(number)?;
        let mut name = [0_u8; NAME_BYTES];
        call!(self, device_name(name.as_mut_ptr().cast(), NAME_BYTES as c_int, device))?;
        let mut uuid = [0; 16];
        call!(self, device_uuid(&raw mut uuid, device))?;
        let mut memory = 0;
        call!(self, device_memory(&raw mut memory, device))?;
        let attribute = |which: sys::CUdevice_attribute| self.attribute(which, device);
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let pools = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let parts = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex);
        let memory = Bytes(memory as u64);
        let capability = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(CudaFound { number, name, uuid: parts.join("-"), memory, capability, pools: pools == 1 })
    }

    fn attribute(&self, which: sys::CUdevice_attribute, device: c_int) -> Result<c_int, CudaError> {
        let mut value = 0;
        call!(self, attribute(&raw mut value, which as c_int, device))?;
        Ok(value)
    }

    fn device(&self, number: u32) -> Result<c_int, CudaError> {
        let mut device = 0;
        call!(self, device(&raw mut device, number as c_int))?;
        Ok(device)
    }

    /// What the driver says of one device.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`] where there is none of that name, [`CudaError::Call`].
    pub fn find(&self, selector: &CudaSelector) -> Result<CudaFound, CudaError> {
        self.select(selector).map(|(found, _)| found)
    }

    /// Memory of a device that is free, and all that this process may have: what other processes use is not free, and a
    /// limit of the Multi-Process Service counts as the device's end. Makes a context for the moment, which takes the device
    /// some memory and the driver some tenths of a second.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn free(&self, selector: &CudaSelector) -> Result<(Bytes, Bytes), CudaError> {
        let (_, device) = self.select(selector)?;
        Context::retain(self, device)?.memory()
    }

    /// Finds a device and its handle.
    pub(super) fn select(&self, selector: &CudaSelector) -> Result<(CudaFound, c_int), CudaError> {
        let devices = self.devices()?;
        let is_it = |found: &&CudaFound| match selector {
            CudaSelector::Number(number) => found.number == *number,
            CudaSelector::Uuid(uuid) => found.has_uuid(uuid),
        };
        let Some(found) = devices.iter().find(is_it).cloned() else {
            let show = |found: &CudaFound| format!("cuda:{} ({}, {})", found.number, found.name, found.uuid);
            let shown: Vec<_> = devices.iter().map(show).collect();
            let shown = if shown.is_empty() { "no device".to_owned() } else { shown.join(", ") };
            return Err(CudaError::NoDevice { asked: selector.clone(), shown });
        };
        let device = self.device(found.number)?;
        Ok((found, device))
    }
}

//! Memory of other processes in a device's context: shared memory that is page-locked for it, and handles of the driver's.
//!
//! What cannot be given back, since the device hangs or failed, stays mapped, as the context's own memory does.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use keepwarm_types::Bytes;

use super::context::Context;
use super::driver::{CudaError, CudaFound, ForeignHandle, call};
use crate::foreign::{Brought, Mapping, RegionError, SharedMapping, Unmapped};

/// `CU_MEMHOSTREGISTER_PORTABLE`: page-locked for every context.
const PORTABLE: u32 = 1;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`: the only flag there is, and to be given.
const LAZY_PEER_ACCESS: u32 = 1;
/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`.
const DEVICE_ORDINAL: c_int = 9;

/// Opens what a process brought, on the calling thread.
pub(super) fn open(
    context: &Arc<Context>,
    found: &CudaFound,
    brought: Brought,
) -> Result<Box<dyn Mapping>, RegionError> {
    context.enter().map_err(|error| RegionError::Driver(error.to_string()))?;
    match brought {
        Brought::SharedMemory { fd, bytes } => {
            let shared = SharedMapping::open(&fd, bytes)?;
            Ok(Box::new(PageLocked::register(context, shared)?))
        }
        Brought::CudaIpc { handle, device, bytes } => {
            if !found.has_uuid(&device) {
                return Err(RegionError::OtherDevice { brought: device, own: found.uuid.clone() });
            }
            Ok(Box::new(Imported::open(context, handle, &device, bytes)?))
        }
    }
}

/// Gives something back, and says what became of that.
fn unmap(context: &Context, what: &str, give: impl FnOnce() -> Result<(), CudaError>) -> Unmapped {
    if context.is_hanging() {
        return Unmapped::Later;
    }
    match context.enter().and_then(|()| give()) {
        Ok(()) => Unmapped::Done,
        Err(error) => {
            tracing::warn!(device = context.device(), %error, "{what} of another process stays mapped");
            Unmapped::Never
        }
    }
}

/// Shared memory, page-locked so that copies run without the host's help.
#[derive(Debug)]
struct PageLocked {
    context: Arc<Context>,
    shared: SharedMapping,
}

impl PageLocked {
    fn register(context: &Arc<Context>, mut shared: SharedMapping) -> Result<Self, RegionError> {
        let (address, bytes) = (shared.address() as *mut c_void, shared.bytes() as usize);
        match call!(context.driver(), register(address, bytes, PORTABLE)) {
            Ok(()) => Ok(Self { context: Arc::clone(context), shared }),
            Err(error) => {
                shared.unmap();
                Err(RegionError::Driver(error.to_string()))
            }
        }
    }
}

impl Mapping for PageLocked {
    fn address(&self) -> u64 {
        self.shared.address()
    }

    fn bytes(&self) -> u64 {
        self.shared.bytes()
    }

    fn context(&self) -> Option<usize> {
        None
    }

    fn unmap(&mut self) -> Unmapped {
        let address = self.address() as *mut c_void;
        match unmap(&self.context, "shared memory", || call!(self.context.driver(), unregister(address))) {
            Unmapped::Done => self.shared.unmap(),
            other => other,
        }
    }
}

/// Memory of another process on this device.
#[derive(Debug)]
struct Imported {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

impl Imported {
    fn open(
        context: &Arc<Context>,
        handle: [u8; 64],
        device: &str,
        asked: Bytes,
    ) -> Result<Self, RegionError> {
        let driver = context.driver();
        let mut address = 0;
        call!(driver, open_foreign(&raw mut address, ForeignHandle(handle), LAZY_PEER_ACCESS))
            .map_err(|error| RegionError::Handle(error.to_string()))?;
        let mut opened = Self { context: Arc::clone(context), address, bytes: asked.0 };
        let checked = opened.check(device, asked);
        if checked.is_err() {
            opened.unmap();
        }
        checked.map(|()| opened)
    }

    /// Whether it lies on this device and is as long as was said.
    fn check(&self, device: &str, asked: Bytes) -> Result<(), RegionError> {
        let driver = self.context.driver();
        let refused = |error: CudaError| RegionError::Driver(error.to_string());
        let (mut base, mut bytes, mut ordinal) = (0, 0, -1 as c_int);
        call!(driver, pointer_attribute((&raw mut ordinal).cast(), DEVICE_ORDINAL, self.address))
            .map_err(refused)?;
        if ordinal != self.context.device() {
            let (brought, own) = (format!("cuda:{ordinal}"), device.to_owned());
            return Err(RegionError::OtherDevice { brought, own });
        }
        call!(driver, address_range(&raw mut base, &raw mut bytes, self.address)).map_err(refused)?;
        let behind = (base + bytes as u64).saturating_sub(self.address);
        if behind < asked.0 {
            return Err(RegionError::Short { asked, found: Bytes(behind) });
        }
        Ok(())
    }
}

impl Mapping for Imported {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn context(&self) -> Option<usize> {
        Some(self.context.number())
    }

    fn unmap(&mut self) -> Unmapped {
        unmap(&self.context, "device memory", || call!(self.context.driver(), close_foreign(self.address)))
    }
}

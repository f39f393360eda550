//! What the driver lends: a context, memory, streams, events. Each gives itself back, and never panics doing so.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use keepwarm_types::Bytes;

use super::driver::{Copy2d, CudaDriver, CudaError, NOT_READY, OUT_OF_MEMORY, call};
use super::moves::moved;
use crate::guard::Place;
use crate::region::Foreign;

/// `CU_STREAM_NON_BLOCKING`: no implicit order with the legacy stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`: nobody asks when.
const NO_TIMING: u32 = 2;
/// `CU_MEMHOSTALLOC_PORTABLE`: page-locked for every context, and cached, since the CPU hashes what lies there.
const PORTABLE: u32 = 1;
/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const KIND_HOST: u32 = 1;
const KIND_DEVICE: u32 = 2;
/// The longest pitch of one copy of rows, `CU_DEVICE_ATTRIBUTE_MAX_PITCH` of every GPU so far; less in tests, so that they go
/// both ways. A longer one, which another process can ask for, would be an error of the driver's and fence the device.
const PITCH_MAX: usize = if cfg!(test) { 2048 } else { (1 << 31) - 1 };

/// A device's primary context, retained; calls go to it from threads that [made it current](Self::enter).
#[derive(Debug)]
pub(super) struct Context {
    driver: CudaDriver,
    device: c_int,
    handle: usize,
    /// Events that are late and have not passed since.
    late: AtomicUsize,
}

impl Context {
    pub(super) fn retain(driver: &CudaDriver, device: c_int) -> Result<Arc<Self>, CudaError> {
        let mut handle = 0;
        call!(driver, retain(&raw mut handle, device))?;
        Ok(Arc::new(Self { driver: driver.clone(), device, handle, late: AtomicUsize::new(0) }))
    }

    /// Which it is, as [`Place`] names it.
    pub(super) const fn number(&self) -> usize {
        self.handle
    }

    /// Whose it is.
    pub(super) const fn driver(&self) -> &CudaDriver {
        &self.driver
    }

    /// Makes it this thread's.
    pub(super) fn enter(&self) -> Result<(), CudaError> {
        call!(self.driver, set_current(self.handle))
    }

    /// Memory that is free, and all that there is.
    pub(super) fn memory(&self) -> Result<(Bytes, Bytes), CudaError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        call!(self.driver, memory_info(&raw mut free, &raw mut total))?;
        Ok((Bytes(free as u64), Bytes(total as u64)))
    }

    /// An event is late.
    pub(super) fn hangs(&self) {
        self.late.fetch_add(1, Ordering::SeqCst);
    }

    /// One that was late has passed.
    pub(super) fn moves_again(&self) {
        self.late.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether an event is late.
    pub(super) fn is_hanging(&self) -> bool {
        self.late.load(Ordering::SeqCst) > 0
    }

    /// The driver's number of its device.
    pub(super) const fn device(&self) -> c_int {
        self.device
    }

    /// Gives something back to the driver. Not while the device hangs: such calls wait for it, and a node that stops would
    /// wait with them; what is kept goes back to the system with the process.
    pub(super) fn give_back(&self, what: &str, give: impl FnOnce() -> Result<(), CudaError>) {
        if self.is_hanging() {
            tracing::warn!(device = self.device, "{what} was not given back: the device hangs");
        } else if let Err(error) = give() {
            // There is nobody to tell, and the process may go on.
            tracing::warn!(device = self.device, %error, "{what} was not given back");
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.give_back("a context", || call!(self.driver, release(self.device)));
    }
}

/// A device's memory, reserved once and zeroed.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

impl DeviceMemory {
    /// # Errors
    /// [`CudaError::Memory`] where there is less than that, or another.
    pub(super) fn reserve(context: &Arc<Context>, device: &str, bytes: u64) -> Result<Self, CudaError> {
        let (free, total) = context.memory()?;
        let short = || CudaError::Memory { device: device.to_owned(), asked: Bytes(bytes), free, total };
        if bytes > free.0 {
            return Err(short());
        }
        let driver = &context.driver;
        let mut address = 0;
        let refused = |error: CudaError| if error.code() == Some(OUT_OF_MEMORY) { short() } else { error };
        call!(driver, allocate(&raw mut address, bytes as usize)).map_err(refused)?;
        let memory = Self { context: Arc::clone(context), address, bytes };
        let stream = Stream::create(context)?;
        stream.fill(memory.place(), 0, bytes as usize)?;
        stream.settle()?;
        Ok(memory)
    }

    /// Its place, for copies.
    pub(super) fn place(&self) -> Place {
        Place { address: self.address, region: self.address, context: Some(self.context.handle) }
    }
}

impl Foreign for DeviceMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn context(&self) -> Option<usize> {
        Some(self.context.handle)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let Self { context, address, .. } = self;
        context.give_back("device memory", || {
            context.enter().and_then(|()| call!(context.driver, free(*address)))
        });
    }
}

/// The host's memory, page-locked for every device and zeroed.
#[derive(Debug)]
pub(super) struct HostMemory {
    context: Arc<Context>,
    address: *mut c_void,
    bytes: u64,
}

// SAFETY: the pointer names memory that belongs to this value alone; what lies there is guarded by its users.
unsafe impl Send for HostMemory {}
// SAFETY: as above, and `&self` gives out numbers only.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub(super) fn reserve(context: &Arc<Context>, bytes: u64) -> Result<Self, CudaError> {
        context.enter()?;
        let mut address = std::ptr::null_mut();
        call!(context.driver, allocate_host(&raw mut address, bytes as usize, PORTABLE))?;
        // SAFETY: the driver gave so many bytes, and nobody else has them yet.
        unsafe { address.cast::<u8>().write_bytes(0, bytes as usize) };
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// Its place, for copies.
    pub(super) fn place(&self) -> Place {
        let address = self.address as u64;
        Place { address, region: address, context: None }
    }

    /// Its first bytes.
    ///
    /// # Safety
    /// No copy writes there while the slice lives.
    pub(super) unsafe fn head(&self, bytes: usize) -> &[u8] {
        assert!(bytes as u64 <= self.bytes, "{bytes} bytes lie outside the {} there are", self.bytes);
        // SAFETY: in bounds; the caller rules out writers.
        unsafe { std::slice::from_raw_parts(self.address.cast(), bytes) }
    }
}

impl Foreign for HostMemory {
    fn address(&self) -> u64 {
        self.address as u64
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn context(&self) -> Option<usize> {
        None
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let Self { context, address, .. } = self;
        context.give_back("page-locked memory", || {
            context.enter().and_then(|()| call!(context.driver, free_host(*address)))
        });
    }
}

/// A stream; its thread has [entered](Context::enter) the context.
#[derive(Debug)]
pub(in crate::device) struct Stream {
    context: Arc<Context>,
    handle: usize,
}

impl Stream {
    pub(super) fn create(context: &Arc<Context>) -> Result<Self, CudaError> {
        let mut handle = 0;
        call!(context.driver, stream_create(&raw mut handle, NON_BLOCKING))?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// The driver's handle, for calls that name the stream.
    pub(super) const fn handle(&self) -> usize {
        self.handle
    }

    /// Copies `bytes`; both ends must stay until an event behind it has passed.
    pub(super) fn copy(&self, to: Place, from: Place, bytes: usize) -> Result<(), CudaError> {
        let driver = &self.context.driver;
        let stream = self.handle;
        match (to.context, from.context) {
            _ if bytes == 0 => Ok(()),
            (Some(_), None) => call!(driver, copy_in(to.address, from.address, bytes, stream)),
            (None, Some(_)) => call!(driver, copy_out(to.address, from.address, bytes, stream)),
            (Some(there), Some(here)) if there == here => {
                call!(driver, copy_within(to.address, from.address, bytes, stream))
            }
            (Some(there), Some(here)) => {
                call!(driver, copy_between(to.address, there, from.address, here, bytes, stream))
            }
            // The driver has no call for it but that for rows, of which none may be longer than a pitch.
            (None, None) => (0..bytes).step_by(PITCH_MAX).try_for_each(|at| {
                let piece = PITCH_MAX.min(bytes - at);
                self.copy_rows((moved(to, at), piece), (moved(from, at), piece), piece, 1)
            }),
        }
    }

    /// Copies `rows` rows of `bytes`; each end has its place and its pitch, the bytes from one row to the next.
    pub(super) fn copy_rows(
        &self,
        (to, to_pitch): (Place, usize),
        (from, from_pitch): (Place, usize),
        bytes: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        if bytes == 0 || rows == 0 {
            return Ok(());
        }
        if to_pitch.max(from_pitch) > PITCH_MAX {
            let row = |row| self.copy(moved(to, row * to_pitch), moved(from, row * from_pitch), bytes);
            return (0..rows).try_for_each(row);
        }
        let mut copy = Copy2d { from_pitch, to_pitch, bytes, rows, ..Copy2d::default() };
        match from.context {
            None => (copy.from_kind, copy.from_host) = (KIND_HOST, from.address),
            Some(_) => (copy.from_kind, copy.from_device) = (KIND_DEVICE, from.address),
        }
        match to.context {
            None => (copy.to_kind, copy.to_host) = (KIND_HOST, to.address),
            Some(_) => (copy.to_kind, copy.to_device) = (KIND_DEVICE, to.address),
        }
        call!(self.context.driver, copy_rows(&raw const copy, self.handle))
    }

    /// Fills device memory with a byte.
    pub(super) fn fill(&self, at: Place, byte: u8, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        call!(self.context.driver, fill(at.address, byte, bytes, self.handle))
    }

    /// Launches a kernel of one of the context's modules with blocks of `threads`; parameters are copied by the call.
    pub(super) fn launch(
        &self,
        function: usize,
        (parts, rows): (u32, u32),
        threads: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let (parameters, extra) = (parameters.as_mut_ptr(), std::ptr::null_mut());
        call!(
            self.context.driver,
            launch(function, parts, rows, 1, threads, 1, 1, 0, self.handle, parameters, extra)
        )
    }

    /// Marks the point behind what was put in so far.
    pub(super) fn record(&self) -> Result<Mark, CudaError> {
        let mut handle = 0;
        call!(self.context.driver, event_create(&raw mut handle, NO_TIMING))?;
        let event = RecordedEvent { context: Arc::clone(&self.context), handle };
        call!(self.context.driver, event_record(event.handle, self.handle))?;
        Ok(Mark::Event(event))
    }

    /// Blocks until all of it has run, without a deadline: only while nobody depends on the device yet.
    pub(super) fn settle(&self) -> Result<(), CudaError> {
        call!(self.context.driver, stream_wait(self.handle))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Self { context, handle } = self;
        context.give_back("a stream", || {
            context.enter().and_then(|()| call!(context.driver, stream_destroy(*handle)))
        });
    }
}

/// A point of a stream.
#[derive(Debug)]
pub(super) enum Mark {
    /// Where an event was recorded.
    Event(RecordedEvent),
    /// Behind all that was put in: where no event could be recorded, and nothing more is put in.
    End(Arc<Stream>),
}

impl Mark {
    /// Whether it has passed; its thread has [entered](Context::enter) the context.
    pub(super) fn passed(&self) -> Result<bool, CudaError> {
        let asked = match self {
            Self::Event(event) => call!(event.context.driver, event_query(event.handle)),
            Self::End(stream) => call!(stream.context.driver, stream_query(stream.handle)),
        };
        match asked {
            Err(error) if error.code() == Some(NOT_READY) => Ok(false),
            answer => answer.map(|()| true),
        }
    }
}

/// A recorded event.
#[derive(Debug)]
pub(super) struct RecordedEvent {
    context: Arc<Context>,
    handle: usize,
}

impl Drop for RecordedEvent {
    fn drop(&mut self) {
        let Self { context, handle } = self;
        context.give_back("an event", || {
            context.enter().and_then(|()| call!(context.driver, event_destroy(*handle)))
        });
    }
}

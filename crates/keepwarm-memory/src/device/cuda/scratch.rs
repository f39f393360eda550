//! A stream's temporary memory: a pool of the driver's for it alone (CUDA Driver API, "Stream Ordered Memory Allocator"), and a
//! piece of it that grows to what the work needs and then stays.
//!
//! The pool keeps what it once had: its release threshold is at its maximum, so that no synchronisation gives memory back
//! that the next batch wants again. Where the device has no more the pool is trimmed once, and asked once more.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use keepwarm_types::Bytes;

use super::context::{Context, Stream};
use super::driver::{CudaError, OUT_OF_MEMORY, call};
use crate::guard::Place;

/// `CU_MEM_ALLOCATION_TYPE_PINNED` and `CU_MEM_LOCATION_TYPE_DEVICE`: memory of the device.
const PINNED: u32 = 1;
const ON_DEVICE: u32 = 1;
/// `CU_MEMPOOL_ATTR_…`: what the pool may keep, and its figures.
const RELEASE_THRESHOLD: c_int = 4;
const RESERVED: c_int = 5;
const RESERVED_HIGH: c_int = 6;
const USED: c_int = 7;
const USED_HIGH: c_int = 8;

/// `CUmemPoolProps` of `cuda.h`; what is not set is the driver's default.
#[repr(C)]
#[derive(Debug)]
pub(super) struct PoolProperties {
    allocation_type: u32,
    handle_types: u32,
    location_type: u32,
    location: c_int,
    security: *mut c_void,
    bytes_max: usize,
    reserved: [u8; 56],
}

/// Figures of a stream's scratch pool, as its driver counts them. All are zero where the device has no kernels: its bytes
/// are read back then, and need no memory there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScratchFigures {
    /// What the pool has of the device.
    pub reserved: Bytes,
    /// The most that it had.
    pub reserved_high: Bytes,
    /// What is in use.
    pub used: Bytes,
    /// The most that was.
    pub used_high: Bytes,
}

/// Figures where everybody can read them: asking for them is no call of the driver's, which might wait for a device that hangs.
#[derive(Debug, Default)]
pub(in crate::device) struct Shown(Mutex<ScratchFigures>);

impl Shown {
    pub(in crate::device) fn now(&self) -> ScratchFigures {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, figures: ScratchFigures) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }
}

/// A pool; nothing else allocates from it.
#[derive(Debug)]
struct Pool {
    context: Arc<Context>,
    handle: usize,
}

impl Pool {
    fn create(context: &Arc<Context>) -> Result<Self, CudaError> {
        let properties = PoolProperties {
            allocation_type: PINNED,
            handle_types: 0,
            location_type: ON_DEVICE,
            location: context.device(),
            security: std::ptr::null_mut(),
            bytes_max: 0,
            reserved: [0; 56],
        };
        let (mut handle, mut all) = (0, u64::MAX);
        call!(context.driver(), pool_create(&raw mut handle, &raw const properties))?;
        let pool = Self { context: Arc::clone(context), handle };
        call!(context.driver(), pool_set(pool.handle, RELEASE_THRESHOLD, (&raw mut all).cast()))?;
        Ok(pool)
    }

    /// So much of it, in the stream's order; trimmed and asked once more where there is not.
    fn allocate(&self, stream: &Stream, bytes: u64) -> Result<u64, CudaError> {
        let driver = self.context.driver();
        let ask = || {
            let mut address = 0;
            call!(driver, allocate_from(&raw mut address, bytes as usize, self.handle, stream.handle()))
                .map(|()| address)
        };
        let is_short = |error: &CudaError| error.code() == Some(OUT_OF_MEMORY);
        let asked = match ask() {
            Err(error) if is_short(&error) => {
                // Gives back what nobody has; what was freed and has not passed yet stays.
                call!(driver, pool_trim(self.handle, 0))?;
                ask()
            }
            answer => answer,
        };
        asked.map_err(|error| match is_short(&error) {
            true => CudaError::Scratch { device: self.context.device(), asked: Bytes(bytes) },
            false => error,
        })
    }

    fn figures(&self) -> Result<ScratchFigures, CudaError> {
        let ask = |which| -> Result<Bytes, CudaError> {
            let mut bytes = 0_u64;
            call!(self.context.driver(), pool_get(self.handle, which, (&raw mut bytes).cast()))?;
            Ok(Bytes(bytes))
        };
        Ok(ScratchFigures {
            reserved: ask(RESERVED)?,
            reserved_high: ask(RESERVED_HIGH)?,
            used: ask(USED)?,
            used_high: ask(USED_HIGH)?,
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Self { context, handle } = self;
        context.give_back("a scratch pool", || {
            context.enter().and_then(|()| call!(context.driver(), pool_destroy(*handle)))
        });
    }
}

/// A stream's temporary memory. What is in it counts for one batch's work on that stream.
#[derive(Debug)]
pub(super) struct Scratch {
    context: Arc<Context>,
    stream: Arc<Stream>,
    pool: Pool,
    address: u64,
    bytes: u64,
    shown: Arc<Shown>,
}

impl Scratch {
    /// A pool with so much in use from the start.
    ///
    /// # Errors
    /// [`CudaError::Scratch`] where there is not so much, [`CudaError::Call`].
    pub(super) fn reserve(
        context: &Arc<Context>,
        stream: &Arc<Stream>,
        bytes: u64,
        shown: &Arc<Shown>,
    ) -> Result<Self, CudaError> {
        let pool = Pool::create(context)?;
        let (context, stream, shown) = (Arc::clone(context), Arc::clone(stream), Arc::clone(shown));
        let mut scratch = Self { context, stream, pool, address: 0, bytes: 0, shown };
        scratch.grow(bytes)?;
        Ok(scratch)
    }

    /// Where it begins.
    pub(super) const fn address(&self) -> u64 {
        self.address
    }

    /// How much there is.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has at least so much from now on, for what is put on the stream after this; what was in it is lost. What there was
    /// stays as it is where that much cannot be had.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub(super) fn grow(&mut self, bytes: u64) -> Result<(), CudaError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let grown = self.pool.allocate(&self.stream, bytes);
        if let Ok(address) = grown {
            let before = std::mem::replace(&mut self.address, address);
            self.bytes = bytes;
            self.free(before)?;
        }
        self.shown.set(self.pool.figures()?);
        grown.map(drop)
    }

    fn free(&self, address: u64) -> Result<(), CudaError> {
        free(&self.context, &self.stream, address)
    }
}

/// In the stream's order: what uses it on the stream runs before.
fn free(context: &Context, stream: &Stream, address: u64) -> Result<(), CudaError> {
    match address {
        0 => Ok(()),
        _ => call!(context.driver(), free_in_order(address, stream.handle())),
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.context
            .give_back("scratch memory", || self.context.enter().and_then(|()| self.free(self.address)));
    }
}

/// Scratch for single batches of a stream, from a pool that is made for the first of them.
#[derive(Debug)]
pub(super) struct Pieces {
    stream: Arc<Stream>,
    pool: Option<Arc<Pool>>,
}

/// A batch's scratch on its device, until the batch ends; in the stream's order.
#[derive(Debug)]
pub(super) struct Piece {
    stream: Arc<Stream>,
    pool: Arc<Pool>,
    address: u64,
}

impl Pieces {
    pub(super) fn of(stream: &Arc<Stream>) -> Self {
        Self { stream: Arc::clone(stream), pool: None }
    }

    /// A piece of so many bytes, more than none.
    ///
    /// # Errors
    /// [`CudaError::Scratch`] where the device has not so much, [`CudaError::Call`].
    pub(super) fn take(&mut self, context: &Arc<Context>, bytes: u64) -> Result<Piece, CudaError> {
        let pool = match &self.pool {
            Some(pool) => Arc::clone(pool),
            None => Arc::clone(self.pool.insert(Arc::new(Pool::create(context)?))),
        };
        let address = pool.allocate(&self.stream, bytes)?;
        Ok(Piece { stream: Arc::clone(&self.stream), pool, address })
    }
}

impl Piece {
    /// Where it lies, as a reservation of its own.
    pub(super) fn place(&self) -> Place {
        let context = Some(self.pool.context.number());
        Place { address: self.address, region: self.address, context }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let context = &self.pool.context;
        context.give_back("a batch's scratch", || {
            context.enter().and_then(|()| free(context, &self.stream, self.address))
        });
    }
}

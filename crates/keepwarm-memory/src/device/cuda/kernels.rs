//! The kernels of `kernels/*.cu`: their PTX as it was committed, and launches over tables of descriptors.
//!
//! A launch is asynchronous. What its descriptors name, and the table itself, must stay until an event behind it has
//! passed: the flight that launches holds them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::context::{Context, HostMemory, Stream};
use super::driver::{CudaError, call};
use crate::checksum::CHUNK_BYTES;
use crate::fp8::Number;

#[cfg(test)]
pub(in crate::device) mod tests;

/// Threads of a block, `THREADS` of `kernels/keepwarm.cuh`.
const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: u64 = 8;
/// Descriptors side by side: `gridDim.y` has no room for more, and kernels stride over the rest.
const ROWS_MAX: usize = 65_535;
/// Blocks of one launch: some thirty for each multiprocessor of the largest GPUs, more only cost their start.
const BLOCKS_MAX: u64 = 4096;
/// Bytes that a warp moves at a time, `PIECE` of `kernels/planes.cu`.
const PIECE_BYTES: u64 = 2048;
/// Bytes that a block zeroes at a time: 16 for each thread.
const SWEEP_BYTES: u64 = 16 * THREADS as u64;

macro_rules! ptx {
    ($name:literal) => {
        concat!(include_str!(concat!("../../../../../kernels/ptx/", $name, ".ptx")), "\0")
    };
}

/// A kernel's descriptor: the layout is that of the structure of the same name in `kernels/`.
pub(super) trait Descriptor: Copy {
    /// Blocks of threads that have something to do for it.
    fn blocks(&self) -> u64;
}

/// Equal rows, moved from one pitch to another; lengths in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Move {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) from_pitch: u64,
    pub(super) to_pitch: u64,
    pub(super) bytes: u64,
    pub(super) rows: u64,
}

impl Descriptor for Move {
    fn blocks(&self) -> u64 {
        (self.bytes.div_ceil(PIECE_BYTES) * self.rows).div_ceil(WARPS)
    }
}

/// Bytes that become zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) at: u64,
    pub(super) bytes: u64,
}

impl Descriptor for Range {
    fn blocks(&self) -> u64 {
        self.bytes.div_ceil(SWEEP_BYTES)
    }
}

/// Equal rows of bytes, a pitch apart.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) at: u64,
    pub(super) pitch: u64,
    pub(super) bytes: u64,
    pub(super) rows: u64,
}

/// Rows of runs are named by runs, and are no kernel's own descriptors.
impl Descriptor for Rows {
    fn blocks(&self) -> u64 {
        1
    }
}

/// Bytes with one checksum.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// The address of its first [`Rows`], of which it has as many as have `bytes` together.
    pub(super) rows: u64,
    pub(super) bytes: u64,
    /// Room for a word for each chunk.
    pub(super) chunks: u64,
    /// Room for the checksum: 16 bytes, the low ones first.
    pub(super) checksum: u64,
}

impl Run {
    /// Its chunks.
    pub(super) const fn chunks_of(bytes: u64) -> u64 {
        bytes.div_ceil(CHUNK_BYTES as u64)
    }
}

impl Descriptor for Run {
    fn blocks(&self) -> u64 {
        Self::chunks_of(self.bytes).div_ceil(WARPS)
    }
}

/// The planes of numbers of a block, with a code for each number and a scale for each plane.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes {
    pub(super) numbers: u64,
    pub(super) codes: u64,
    pub(super) scales: u64,
    /// Numbers of a plane.
    pub(super) count: u64,
    pub(super) planes: u32,
    kind: u32,
}

impl Planes {
    /// Names them by where numbers, codes and scales begin.
    pub(super) const fn new(
        kind: Number,
        [numbers, codes, scales]: [u64; 3],
        count: u64,
        planes: u32,
    ) -> Self {
        let kind = match kind {
            Number::F32 => 0,
            Number::F16 => 1,
            Number::Bf16 => 2,
        };
        Self { numbers, codes, scales, count, planes, kind }
    }
}

impl Descriptor for Planes {
    fn blocks(&self) -> u64 {
        self.planes.into()
    }
}

/// Descriptors in page-locked memory, where kernels read them when they run: with unified addressing, which every 64-bit
/// driver has, by the host's addresses.
pub(super) struct Table<T> {
    memory: HostMemory,
    most: usize,
    count: usize,
    /// Blocks of the descriptor that has the most.
    blocks: u64,
    of: PhantomData<T>,
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} of {} descriptors)", self.count, self.most)
    }
}

impl<T: Descriptor> Table<T> {
    /// Room for so many.
    pub(super) fn reserve(context: &Arc<Context>, most: usize) -> Result<Self, CudaError> {
        // Nothing of zero bytes can be had.
        let memory = HostMemory::reserve(context, (most.max(1) * size_of::<T>()) as u64)?;
        Ok(Self { memory, most, count: 0, blocks: 0, of: PhantomData })
    }

    /// Replaces what is in it.
    ///
    /// # Safety
    /// No launch that reads it is still to run.
    ///
    /// # Panics
    /// If there are more than there is room for.
    pub(super) unsafe fn set(&mut self, descriptors: &[T]) {
        assert!(descriptors.len() <= self.most, "{} descriptors in {self:?}", descriptors.len());
        let to = self.memory.place().address as *mut T;
        // SAFETY: the memory has room for `most`, is aligned to pages and nobody's but this table's; the caller rules
        // out kernels that read it.
        unsafe { std::ptr::copy_nonoverlapping(descriptors.as_ptr(), to, descriptors.len()) };
        self.count = descriptors.len();
        self.blocks = descriptors.iter().map(Descriptor::blocks).max().unwrap_or(0);
    }

    /// Where one of them lies.
    pub(super) fn address(&self, index: usize) -> u64 {
        self.memory.place().address + (index * size_of::<T>()) as u64
    }

    /// Parts of a descriptor, and descriptors side by side. Any shape is right: kernels stride over what is left.
    fn grid(&self) -> (u32, u32) {
        let rows = self.count.min(ROWS_MAX);
        let parts = self.blocks.min(BLOCKS_MAX / rows.max(1) as u64).max(1);
        (parts as u32, rows as u32)
    }
}

/// The loaded kernels of a context.
pub(super) struct Kernels {
    context: Arc<Context>,
    modules: Vec<usize>,
    move_planes: usize,
    hash_chunks: usize,
    hash_runs: usize,
    scrub: usize,
    quantise: usize,
    dequantise: usize,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels({} modules)", self.modules.len())
    }
}

impl Kernels {
    /// Has the driver compile them for its device, which takes it some tens of milliseconds where it has not before.
    ///
    /// # Errors
    /// [`CudaError::Call`]: the driver refuses the PTX, or the device is older than compute capability 8.0.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, CudaError> {
        context.enter()?;
        // Of this type from the start, so that modules are given back where a later one fails.
        let mut kernels = Self {
            context: Arc::clone(context),
            modules: Vec::new(),
            move_planes: 0,
            hash_chunks: 0,
            hash_runs: 0,
            scrub: 0,
            quantise: 0,
            dequantise: 0,
        };
        let planes = kernels.module(ptx!("planes"))?;
        kernels.move_planes = kernels.function(planes, c"move_planes")?;
        let checksum = kernels.module(ptx!("checksum"))?;
        kernels.hash_chunks = kernels.function(checksum, c"hash_chunks")?;
        kernels.hash_runs = kernels.function(checksum, c"hash_runs")?;
        let scrub = kernels.module(ptx!("scrub"))?;
        kernels.scrub = kernels.function(scrub, c"scrub")?;
        let fp8 = kernels.module(ptx!("fp8"))?;
        kernels.quantise = kernels.function(fp8, c"quantise")?;
        kernels.dequantise = kernels.function(fp8, c"dequantise")?;
        Ok(kernels)
    }

    /// Loads PTX that ends with a NUL.
    fn module(&mut self, ptx: &'static str) -> Result<usize, CudaError> {
        let mut module = 0;
        call!(self.context.driver(), module_load(&raw mut module, ptx.as_ptr().cast()))?;
        self.modules.push(module);
        Ok(module)
    }

    fn function(&self, module: usize, name: &CStr) -> Result<usize, CudaError> {
        let mut function = 0;
        call!(self.context.driver(), function(&raw mut function, module, name.as_ptr()))?;
        Ok(function)
    }

    /// Gathers and scatters: no target overlaps another move's source or target.
    pub(super) fn move_planes(&self, stream: &Stream, moves: &Table<Move>) -> Result<(), CudaError> {
        launch(self.move_planes, stream, moves)
    }

    /// Zeroes ranges.
    pub(super) fn scrub(&self, stream: &Stream, ranges: &Table<Range>) -> Result<(), CudaError> {
        launch(self.scrub, stream, ranges)
    }

    /// Writes the checksum of each run, bit for bit that of [`crate::block_checksum`], and its chunks' before.
    pub(super) fn checksums(&self, stream: &Stream, runs: &Table<Run>) -> Result<(), CudaError> {
        launch(self.hash_chunks, stream, runs)?;
        launch(self.hash_runs, stream, runs)
    }

    /// Writes planes' scales and codes, bit for bit those of [`crate::fp8::quantise`].
    pub(super) fn quantise(&self, stream: &Stream, blocks: &Table<Planes>) -> Result<(), CudaError> {
        launch(self.quantise, stream, blocks)
    }

    /// Writes planes' numbers, bit for bit those of [`crate::fp8::dequantise`].
    pub(super) fn dequantise(&self, stream: &Stream, blocks: &Table<Planes>) -> Result<(), CudaError> {
        launch(self.dequantise, stream, blocks)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Self { context, modules, .. } = self;
        for module in modules {
            context.give_back("a module", || {
                context.enter().and_then(|()| call!(context.driver(), module_unload(*module)))
            });
        }
    }
}

fn launch<T: Descriptor>(function: usize, stream: &Stream, table: &Table<T>) -> Result<(), CudaError> {
    match table.count {
        0 => Ok(()),
        _ => launch_on(function, stream, table, table.grid()),
    }
}

fn launch_on<T: Descriptor>(
    function: usize,
    stream: &Stream,
    table: &Table<T>,
    grid: (u32, u32),
) -> Result<(), CudaError> {
    let (mut address, mut count) = (table.address(0), table.count as u32);
    let mut parameters: [*mut c_void; 2] = [(&raw mut address).cast(), (&raw mut count).cast()];
    stream.launch(function, grid, THREADS, &mut parameters)
}

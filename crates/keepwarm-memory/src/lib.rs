//! Arenas, block guards, devices and checksums: the only crate with `unsafe`.
//!
//! - [`Arena`]: memory reserved once, carved into extents of one block size each; gives out [`BlockMut`].
//! - [`BlockMut`] → [`Block`]: unique and mutable, then shared and immutable; given back on drop. A byte of
//!   state is reachable only through a guard that carries its tenant and birth.
//! - [`Device`]: what a GPU must do; [`HostDevice`] does it over host memory, with streams that are really
//!   asynchronous and faults that tests inject.
//! - [`Link`]: the way from one GPU's memory straight into another's, where there is one.
//! - [`ForeignRegion`]: memory that another process brings, gathered from and scattered into; [`Peer`] watches that process.
//! - [`Nvml`], [`MpsLimits`]: how a machine's GPUs are shared.
//! - [`block_checksum`]: the checksum that is verified wherever bytes cross a boundary.
//!
//! A panic in this crate is a bug in the book-keeping of memory; the process should not outlive it.

mod arena;
mod checksum;
mod device;
mod fault;
mod foreign;
pub mod fp8;
mod guard;
mod machine;
mod ranges;
mod region;
mod sync;

pub use arena::{Arena, ArenaFigures, ArenaSettings, BLOCK_ALIGN, EXTENT_BYTES, OutOfMemory};
pub use checksum::{BlockHasher, CHUNK_BYTES, Corrupt, block_checksum};
#[cfg(feature = "cuda")]
pub use device::{
    CUDA_PATIENCE, CudaClaim, CudaDevice, CudaDriver, CudaError, CudaFigures, CudaFound, CudaSelector,
    ScratchFigures,
};
pub use device::{
    DequantiseJob, Device, DeviceError, DeviceState, Direction, Event, GatherJob, HostDevice, Job, Link,
    LinkError, PlaneShape, QuantiseJob, RegionFault, RegionGatherJob, RegionPlanes, RegionRefusal,
    RegionScatterJob, SCATTER_PLANES_MAX, STREAM_QUEUE_MAX, ScatterJob, Transfer, TransferError, gather,
    scatter,
};
pub use fault::{FaultPlan, flip_bit};
pub use foreign::{
    Brought, ForeignRegion, PEERS_MAX, Peer, REGION_BYTES_MAX, REGIONS_MAX, RegionError, RegionState,
};
pub use guard::{Block, BlockMut, BlockView, GuardError, number_instances_for};
pub use machine::{
    MPS_DEVICES_MAX, MigMode, MpsDevice, MpsError, MpsLimits, Nvml, NvmlDevice, NvmlMemory, NvmlProcess,
    NvmlReport,
};
pub use region::{LockReport, ReserveError};

//! What a GPU must do for keepwarm: own an arena, and move blocks on streams of its own.
//!
//! A submission is one batch of one kind: the blocks of a restore or a checkpoint go in one call, are copied in
//! order on the stream of their direction, verified at the destination, and come back sealed as the same
//! instances. Fills, gathers and scatters take their turn on the same streams; an [`Event`] marks a point of
//! one. The job holds source and target guards until it has run, so memory is never reused under a
//! transfer; the same holds for [regions of other processes](ForeignRegion), which stay mapped; dropping the [`Transfer`] neither cancels the work nor leaks: what arrives is given back.

mod batch;
#[cfg(feature = "cuda")]
mod cuda;
mod event;
mod fp8;
mod health;
mod host;
mod link;
mod planes;
mod regions;
mod steps;

pub use batch::{STREAM_QUEUE_MAX, Transfer};
#[cfg(feature = "cuda")]
pub use cuda::{
    CUDA_PATIENCE, CudaClaim, CudaDevice, CudaDriver, CudaError, CudaFigures, CudaFound, CudaSelector,
    ScratchFigures,
};
pub use event::Event;
pub use fp8::{DequantiseJob, QuantiseJob};
pub use host::HostDevice;
pub use link::{Link, LinkError};
pub use planes::{PlaneShape, gather, scatter};
pub use regions::{
    RegionFault, RegionGatherJob, RegionPlanes, RegionRefusal, RegionScatterJob, SCATTER_PLANES_MAX,
};

use std::fmt;

use crate::arena::Arena;
use crate::checksum::Corrupt;
use crate::foreign::{Brought, ForeignRegion, Peer, RegionError};
use crate::guard::{Block, BlockMut, Place};

/// Which way a copy goes; each direction has a stream, and other work names the stream that it goes on by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From host memory into the device: a restore.
    In,
    /// From the device into host memory: a checkpoint.
    Out,
}

impl Direction {
    /// The place of its stream.
    fn place(self) -> usize {
        usize::from(self == Self::Out)
    }
}

/// Whether a device serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceState {
    /// It does.
    Up,
    /// It had an error after which nothing it says can be trusted, or was fenced; the reason.
    Fenced(String),
}

/// Why a device did not do a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device is fenced; it serves nothing more in this process.
    #[error("the device is fenced: {0}")]
    Fenced(String),
    /// Its stream has as many submissions as it may have.
    #[error("the device's stream is full")]
    Busy,
    /// Bytes arrived with another checksum than they left with.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// A target is too small for what goes into it.
    #[error("a target of {target} bytes cannot take {source_bytes}")]
    Size {
        /// The target's capacity.
        target: usize,
        /// The bytes that go into it: the source's length, or what the shape says.
        source_bytes: usize,
    },
    /// Planes, tokens and blocks of a gather or a scatter do not go together; what does not fit.
    #[error("the shape does not fit: {0}")]
    Shape(String),
    /// It would show one owner's bytes to another.
    #[error("source and target belong to different owners")]
    WrongOwner,
    /// The device has too little memory beside its arena for the work; others may fit, and this one later.
    #[error("the device has no {0} bytes of scratch memory")]
    NoScratch(usize),
    /// The device cannot do this kind of work at all; why.
    #[error("the device cannot: {0}")]
    Unsupported(String),
    /// What the bytes come from or go to serves no more, and this device does: the process that brought a region has ended.
    /// Nothing was issued.
    #[error("the other end is gone: {0}")]
    Gone(String),
}

/// One block to copy.
#[derive(Debug)]
pub struct Job {
    /// What to copy.
    pub source: Block,
    /// Where to.
    pub target: BlockMut,
}

/// Planes to pack into one block.
///
/// The sources lie one after another as if they were one working block of `shape`: each holds whole planes of
/// `tokens_per_block * token_bytes` bytes, together `shape.planes` of them.
#[derive(Debug)]
pub struct GatherJob {
    /// The shape of the working block.
    pub shape: PlaneShape,
    /// Its planes, in order; of the target's owner.
    pub sources: Vec<Block>,
    /// How many tokens of each plane are valid, at most `shape.tokens_per_block`.
    pub tokens: usize,
    /// Where to; room for `shape.packed_bytes(tokens)`.
    pub target: BlockMut,
}

/// A packed block to spread over the planes of a working block.
#[derive(Debug)]
pub struct ScatterJob {
    /// The shape of the working block.
    pub shape: PlaneShape,
    /// The packed block, `shape.packed_bytes(tokens)` long; of the target's owner.
    pub source: Block,
    /// How many tokens of each plane it has, at most `shape.tokens_per_block`.
    pub tokens: usize,
    /// The working block; room for `shape.block_bytes()`. What lies behind a plane's tokens stays as it is, but
    /// for what another tenant left there, which is zeroed.
    pub target: BlockMut,
}

/// A submission that failed; the targets come back.
#[derive(Debug)]
pub struct TransferError {
    /// Why.
    pub cause: DeviceError,
    /// The targets, in no particular state or order. Once work has begun, without those that were sealed before.
    pub targets: Vec<BlockMut>,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for TransferError {}

/// A GPU, or what stands in for one.
pub trait Device: Send + Sync + fmt::Debug {
    /// The device as the spec names it.
    fn name(&self) -> &str;

    /// Its memory.
    fn arena(&self) -> &Arena;

    /// Whether it serves.
    fn state(&self) -> DeviceState;

    /// Takes it out of service for the rest of the process: every later submission is refused.
    fn fence(&self, reason: &str);

    /// Copies a batch on the stream of `direction`, verified at the destination.
    ///
    /// # Errors
    /// [`TransferError`] at once where the device is fenced, its stream full, a target too small, or of another tenant than
    /// its source; nothing was copied then.
    fn submit(&self, direction: Direction, jobs: Vec<Job>) -> Result<Transfer, TransferError>;

    /// Fills each target to its capacity with `byte` on the stream of `direction`, and seals it as a new instance
    /// with the checksum that so many such bytes have.
    ///
    /// # Errors
    /// [`TransferError`] at once where the device is fenced or its stream full; nothing was written then. The
    /// transfer fails with [`DeviceError::Corrupt`] where memory did not take the bytes, or
    /// [`DeviceError::Fenced`].
    fn fill(&self, direction: Direction, targets: Vec<BlockMut>, byte: u8)
    -> Result<Transfer, TransferError>;

    /// Packs the planes of each job into one block on the stream of `direction`, as [`gather()`] does, and seals it
    /// as a new instance. The sources are verified first, the packed bytes afterwards.
    ///
    /// # Errors
    /// [`TransferError`] at once where the device is fenced, its stream full, or a job does not fit
    /// ([`DeviceError::Shape`], [`DeviceError::Size`], [`DeviceError::WrongOwner`]); nothing was written then. The
    /// transfer fails with [`DeviceError::Corrupt`] where a source or the packed bytes are broken, which names that
    /// source or the job's first, or with [`DeviceError::Fenced`].
    fn gather(&self, direction: Direction, jobs: Vec<GatherJob>) -> Result<Transfer, TransferError>;

    /// Spreads each job's packed block over the planes of its target on the stream of `direction`, as [`scatter()`]
    /// does, verified at the destination. The targets come back to be written on, all of them written.
    ///
    /// # Errors
    /// [`TransferError`] at once where the device is fenced, its stream full, or a job does not fit
    /// ([`DeviceError::Shape`], [`DeviceError::Size`], [`DeviceError::WrongOwner`]); nothing was written then. The
    /// transfer fails with [`DeviceError::Corrupt`] or [`DeviceError::Fenced`], and gives all targets back.
    fn scatter(
        &self,
        direction: Direction,
        jobs: Vec<ScatterJob>,
    ) -> Result<Transfer<BlockMut>, TransferError>;

    /// Whether it [quantises](Self::quantise) and [dequantises](Self::dequantise) at all.
    fn quantises(&self) -> bool;

    /// Writes the stored form of each job's raw block on the stream of `direction`, as [`quantise_block`] does, and seals it as
    /// the same instance with a checksum of its own. The source is verified, and what arrived is what was made.
    ///
    /// # Errors
    /// [`TransferError`] at once as for [`gather`](Self::gather), and [`DeviceError::Unsupported`] where the device has no
    /// kernels. The transfer fails with [`DeviceError::Corrupt`] where the source is broken or its stored form arrived as
    /// something else, with [`DeviceError::NoScratch`] where there is no room on the device to make it in, or with
    /// [`DeviceError::Fenced`].
    ///
    /// [`quantise_block`]: crate::fp8::quantise_block
    fn quantise(&self, direction: Direction, jobs: Vec<QuantiseJob>) -> Result<Transfer, TransferError>;

    /// Writes the raw form of each job's stored block on the stream of `direction`, as [`dequantise_block`] does, and seals it
    /// as the same instance with a checksum of its own. The stored form is verified where the numbers are made of it.
    ///
    /// # Errors
    /// As for [`quantise`](Self::quantise).
    ///
    /// [`dequantise_block`]: crate::fp8::dequantise_block
    fn dequantise(&self, direction: Direction, jobs: Vec<DequantiseJob>) -> Result<Transfer, TransferError>;

    /// Opens memory that another process brings, for gathers and scatters of this device. Shared memory is page-locked where
    /// the device is a GPU (`cuMemHostRegister`), a CUDA handle is opened in its context (`cuIpcOpenMemHandle`, CUDA Driver
    /// API). Maps as much as is asked for, and may wait for the driver: not for an actor's thread.
    ///
    /// # Errors
    /// [`RegionError`] says what is wrong with what was brought, and what to do; nothing is mapped then.
    fn open_region(&self, peer: &Peer, brought: Brought) -> Result<ForeignRegion, RegionError>;

    /// Packs planes of regions into one block for each job, on the stream of `direction`, as [`gather()`] does, and seals it
    /// as a new instance. All offsets and lengths are bytes. The regions stay mapped until it has run, whatever becomes of the
    /// transfer.
    ///
    /// # Errors
    /// [`RegionRefusal`] at once: a region is not open, planes lie outside of it or overlap, another device opened it, or as
    /// for [`gather`](Self::gather); nothing was written then. The transfer fails with [`DeviceError::Corrupt`] where what
    /// arrived is not what the region had when it was read, or has had since (its process wrote there meanwhile): the instance
    /// that it names is the one that would have been made. With [`DeviceError::Gone`] where a region's process had ended when
    /// the work's turn came. Or with [`DeviceError::Fenced`].
    fn gather_from(
        &self,
        direction: Direction,
        jobs: Vec<RegionGatherJob>,
    ) -> Result<Transfer, RegionRefusal>;

    /// Spreads each job's packed block over planes of regions on the stream of `direction`, as [`scatter()`] does, verified
    /// there; no other byte of the regions is touched. The regions stay mapped until it has run, whatever becomes of the
    /// transfer.
    ///
    /// # Errors
    /// [`RegionRefusal`] at once, as for [`gather_from`](Self::gather_from); nothing was written then. The transfer fails
    /// with [`DeviceError::Corrupt`] where the source is broken or the region does not have its bytes afterwards, or with
    /// [`DeviceError::Fenced`]; some of the planes may have been written then. With [`DeviceError::Gone`] as for a gather.
    fn scatter_into(
        &self,
        direction: Direction,
        jobs: Vec<RegionScatterJob>,
    ) -> Result<Transfer<()>, RegionRefusal>;

    /// Marks the point behind everything that was submitted to the stream of `direction` so far. Takes no place
    /// in the stream, so it is never refused; on a fenced device the event says so.
    fn record(&self, direction: Direction) -> Event;

    /// Makes a way from this device's memory straight into another's. It costs two threads, a stream on each of the two and
    /// some megabytes of page-locked memory, so it is made once and kept. May wait for the driver: not for an actor's thread.
    ///
    /// # Errors
    /// [`LinkError::NotPossible`] where there is none: the caller goes through pinned memory. [`LinkError::Fenced`],
    /// [`LinkError::Failed`].
    fn link_to(&self, target: &dyn Device) -> Result<Link, LinkError>;

    /// This device, if it is a CUDA device: for links.
    #[cfg(feature = "cuda")]
    fn as_cuda(&self) -> Option<&CudaDevice> {
        None
    }
}

/// What devices answer that no link goes from or to.
fn no_link(from: &dyn Device, to: &dyn Device) -> LinkError {
    let (from, to) = (from.name().to_owned(), to.name().to_owned());
    LinkError::NotPossible { from, to, why: "only between CUDA devices there are links".to_owned() }
}

#[cfg(test)]
mod tests;

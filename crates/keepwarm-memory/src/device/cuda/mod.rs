//! A CUDA device: its memory an arena, a stream for each direction, events that one thread asks for.
//!
//! ```text
//! submit ─► issuer (a thread each direction) ─► stream ─► event ─► poller (one thread) ─► ender (one each) ─► future
//! ```
//!
//! A batch is put on its stream as it is, its guards stay in the flight until the event behind it has passed, and only
//! then is it verified and sealed. Whatever the driver answers that is not success fences the device: an error of
//! one call may be that of an earlier one, and what ran since cannot be told from what did not (CUDA C++
//! Programming Guide, "Error Checking"). No type of the bindings leaves this module.

mod claim;
mod context;
mod driver;
mod foreign;
mod fp8;
mod kernels;
mod lane;
mod link;
mod moves;
mod plan;
mod poll;
mod scratch;
mod verify;

pub use claim::CudaClaim;
pub use driver::{CudaDriver, CudaError, CudaFound, CudaSelector};
#[cfg(test)]
pub(in crate::device) use kernels::tests::compiled as compiled_kernels;
pub(in crate::device) use moves::Moves;
pub use scratch::ScratchFigures;
pub(in crate::device) use scratch::Shown;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use keepwarm_types::Bytes;

use self::context::{Context, DeviceMemory, HostMemory, Stream};
use self::kernels::Kernels;
use self::lane::Side;
use self::poll::Poller;
use super::batch::{Submission, Work, enqueue};
use super::event::Event;
use super::fp8::{Dequantise, Quantise};
use super::health::Health;
use super::link::{Link, LinkError};
use super::steps::{FillJob, Step};
use super::{
    DequantiseJob, Device, DeviceError, DeviceState, Direction, GatherJob, Job, QuantiseJob, RegionGatherJob,
    RegionRefusal, RegionScatterJob, ScatterJob, Transfer, TransferError, no_link, regions,
};
use crate::arena::{Arena, ArenaSettings};
use crate::fault::FaultPlan;
use crate::foreign::{Brought, ForeignRegion, Peer, RegionError};
use crate::guard::BlockMut;
use crate::machine::MpsLimits;
use crate::region::Region;

/// How long an event may take before its device counts as hanging: a full queue of the largest batches on the
/// slowest link (256 of 64 MiB at 4 GB/s) takes some four seconds.
pub const CUDA_PATIENCE: Duration = Duration::from_secs(10);

/// A GPU behind NVIDIA's driver.
#[derive(Debug)]
pub struct CudaDevice {
    name: String,
    found: CudaFound,
    arena: Arena,
    side: Side,
    lanes: [Sender<Work>; 2],
    scratch: [Arc<Shown>; 2],
}

/// Figures of a CUDA device, beside those of its [arena](Device::arena).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaFigures {
    /// The scratch pool of the work into the device, and that of the work out of it.
    pub scratch: [ScratchFigures; 2],
}

/// A device's kernels. Without them it works as well, and its bytes are read back to be verified: so devices before
/// compute capability 8.0 serve too.
fn loaded(context: &Arc<Context>, found: &CudaFound) -> Option<Arc<Kernels>> {
    match Kernels::load(context) {
        Ok(kernels) => Some(Arc::new(kernels)),
        Err(error) => {
            tracing::warn!(device = found.number, capability = ?found.capability, %error, "no kernels: checksums will be slow");
            None
        }
    }
}

/// A limit of the Multi-Process Service caps what an arena may have. One that is not understood is the driver's to keep.
fn within_limits(found: &CudaFound, selector: &CudaSelector, asked: Bytes) -> Result<(), CudaError> {
    let limits = MpsLimits::from_environment().unwrap_or_else(|error| {
        tracing::warn!(%error, "a limit of the Multi-Process Service is not honoured");
        MpsLimits::default()
    });
    match limits.memory_of(found.number, &found.uuid) {
        Some(limit) if asked > limit => {
            Err(CudaError::Limited { device: selector.to_string(), asked, limit })
        }
        _ => Ok(()),
    }
}

impl CudaDevice {
    /// Reserves the device's memory and starts its streams. An event that has not passed after `patience`
    /// ([`CUDA_PATIENCE`] where nothing speaks for another) fences the device.
    ///
    /// # Errors
    /// [`CudaError`]: there is no such device, it has not so much memory, or cannot do what is needed.
    pub fn open(
        driver: &CudaDriver,
        selector: &CudaSelector,
        settings: &ArenaSettings,
        faults: Arc<FaultPlan>,
        patience: Duration,
    ) -> Result<Self, CudaError> {
        let (found, device) = driver.select(selector)?;
        if !found.pools {
            return Err(CudaError::NoPools(selector.to_string()));
        }
        within_limits(&found, selector, settings.bytes)?;
        let context = Context::retain(driver, device)?;
        let arena = Arena::over(settings, Some(Arc::clone(&faults)), |bytes| {
            DeviceMemory::reserve(&context, &selector.to_string(), bytes)
                .map(|memory| Region::foreign(Box::new(memory)))
        })?;
        let health = Arc::new(Health::new(faults));
        let poller = Poller::start(&settings.name, &context, &health, patience)?;
        let kernels = loaded(&context, &found);
        let (scratch, side) = (<[Arc<Shown>; 2]>::default(), Side { context, health, poller, kernels });
        let lane = |direction: Direction, word: &str| {
            let (name, at) = (format!("{}-{word}", settings.name), direction.place());
            let issues = (&side, DeviceError::Fenced as fn(String) -> DeviceError);
            lane::start(&name, issues, &side, &side.health.progress[at], &scratch[at])
        };
        let lanes = [lane(Direction::In, "in")?, lane(Direction::Out, "out")?];
        Ok(Self { name: settings.name.clone(), found, arena, side, lanes, scratch })
    }

    /// What the driver says of it.
    #[must_use]
    pub fn found(&self) -> &CudaFound {
        &self.found
    }

    /// Figures of now; never waits for the device.
    #[must_use]
    pub fn figures(&self) -> CudaFigures {
        CudaFigures { scratch: self.scratch.each_ref().map(|shown| shown.now()) }
    }

    /// An arena in the host's memory, page-locked for every device of this driver: copies between it and a device run
    /// without the host's help, and are read and written when they run.
    ///
    /// # Errors
    /// [`CudaError`] where the settings make no arena or so much cannot be locked.
    pub fn page_locked(&self, settings: &ArenaSettings) -> Result<Arena, CudaError> {
        Arena::over(settings, None, |bytes| {
            HostMemory::reserve(&self.side.context, bytes).map(|memory| Region::foreign(Box::new(memory)))
        })
    }

    /// How long one plain copy of so many bytes takes between page-locked memory and the device, unverified: what the link
    /// can do, for figures to be held against. Reserves both ends for the moment, and waits for the device.
    ///
    /// # Errors
    /// [`CudaError`] where there is no room for the ends.
    pub fn time_plain_copy(&self, direction: Direction, bytes: Bytes) -> Result<Duration, CudaError> {
        self.side.context.enter()?;
        let there = DeviceMemory::reserve(&self.side.context, &self.name, bytes.0)?;
        let here = HostMemory::reserve(&self.side.context, bytes.0)?;
        let stream = Stream::create(&self.side.context)?;
        let (to, from) = match direction {
            Direction::In => (there.place(), here.place()),
            Direction::Out => (here.place(), there.place()),
        };
        let begun = Instant::now();
        stream.copy(to, from, bytes.0 as usize)?;
        stream.settle()?;
        Ok(begun.elapsed())
    }

    /// Gives the jobs back unless the device has no kernels: then their targets.
    fn needs_kernels<T>(&self, jobs: Vec<T>, target: fn(T) -> BlockMut) -> Result<Vec<T>, TransferError> {
        if self.side.kernels.is_some() {
            return Ok(jobs);
        }
        let cause = DeviceError::Unsupported(format!("{} takes none of keepwarm's kernels", self.name));
        Err(TransferError { cause, targets: jobs.into_iter().map(target).collect() })
    }

    fn enqueue<S: Step>(
        &self,
        direction: Direction,
        jobs: Vec<S>,
        kind: fn(Submission<S>) -> Work,
    ) -> Result<Transfer<S::Done>, TransferError> {
        let at = direction.place();
        enqueue(direction, jobs, kind, &self.side.health, &self.side.health.progress[at], &self.lanes[at])
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn state(&self) -> DeviceState {
        self.side.health.state()
    }

    fn fence(&self, reason: &str) {
        self.side.health.fence(reason);
    }

    fn submit(&self, direction: Direction, jobs: Vec<Job>) -> Result<Transfer, TransferError> {
        self.enqueue(direction, jobs, Work::Copy)
    }

    fn fill(
        &self,
        direction: Direction,
        targets: Vec<BlockMut>,
        byte: u8,
    ) -> Result<Transfer, TransferError> {
        let jobs = targets.into_iter().map(|target| FillJob { target, byte }).collect();
        self.enqueue(direction, jobs, Work::Fill)
    }

    fn gather(&self, direction: Direction, jobs: Vec<GatherJob>) -> Result<Transfer, TransferError> {
        self.enqueue(direction, jobs, Work::Gather)
    }

    fn scatter(
        &self,
        direction: Direction,
        jobs: Vec<ScatterJob>,
    ) -> Result<Transfer<BlockMut>, TransferError> {
        self.enqueue(direction, jobs, Work::Scatter)
    }

    fn quantises(&self) -> bool {
        self.side.kernels.is_some()
    }

    fn quantise(&self, direction: Direction, jobs: Vec<QuantiseJob>) -> Result<Transfer, TransferError> {
        self.needs_kernels(jobs, |job| job.target).and_then(|jobs| {
            let steps = jobs.into_iter().map(|job| Quantise { job, via: None }).collect();
            self.enqueue(direction, steps, Work::Quantise)
        })
    }

    fn dequantise(&self, direction: Direction, jobs: Vec<DequantiseJob>) -> Result<Transfer, TransferError> {
        self.needs_kernels(jobs, |job| job.target).and_then(|jobs| {
            let steps = jobs.into_iter().map(|job| Dequantise { job, via: None }).collect();
            self.enqueue(direction, steps, Work::Dequantise)
        })
    }

    fn open_region(&self, peer: &Peer, brought: Brought) -> Result<ForeignRegion, RegionError> {
        if let DeviceState::Fenced(reason) = self.state() {
            return Err(RegionError::Fenced(reason));
        }
        let bytes = match &brought {
            Brought::SharedMemory { bytes, .. } | Brought::CudaIpc { bytes, .. } => *bytes,
        };
        ForeignRegion::open(peer, self.side.health.device, bytes, || {
            foreign::open(&self.side.context, &self.found, brought)
        })
    }

    fn gather_from(
        &self,
        direction: Direction,
        jobs: Vec<RegionGatherJob>,
    ) -> Result<Transfer, RegionRefusal> {
        regions::gather_from(jobs, self.side.health.device, |steps| {
            self.enqueue(direction, steps, Work::FromRegion)
        })
    }

    fn scatter_into(
        &self,
        direction: Direction,
        jobs: Vec<RegionScatterJob>,
    ) -> Result<Transfer<()>, RegionRefusal> {
        regions::scatter_into(jobs, self.side.health.device, |steps| {
            self.enqueue(direction, steps, Work::IntoRegion)
        })
    }

    fn record(&self, direction: Direction) -> Event {
        self.side.health.progress[direction.place()].record()
    }

    fn link_to(&self, target: &dyn Device) -> Result<Link, LinkError> {
        match target.as_cuda() {
            Some(target) => link::open(self, target),
            None => Err(no_link(self, target)),
        }
    }

    fn as_cuda(&self) -> Option<&CudaDevice> {
        Some(self)
    }
}

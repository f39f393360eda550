//! Gathering from and scattering into memory that other processes brought: what is asked for, the checks before anything
//! is issued, and what a host device does.

use std::fmt;

use keepwarm_types::Owner;

use super::batch::Transfer;
use super::steps::{COPY_STEP, Ended, Errand, Step, flip_first, room, sizes};
use super::{DeviceError, PlaneShape, TransferError};
use crate::checksum::{BlockHasher, Corrupt, block_checksum};
use crate::fault::FaultPlan;
use crate::foreign::{ForeignRegion, Lease, RegionState, Seen};
use crate::guard::{Block, BlockMut, next_instance};

/// Planes of regions that one scatter may write, where it names more than one row of them: they are held against each other,
/// 24 MiB of numbers at most. A session of 1,024 blocks of 512 layers with K and V.
pub const SCATTER_PLANES_MAX: usize = 1 << 20;
/// What profilers call the tier.
const REGION: &str = "region";

/// Planes that lie in a region, a pitch apart. Each has room for `tokens_per_block` tokens of its job's shape.
#[derive(Debug, Clone)]
pub struct RegionPlanes {
    /// Where they lie; opened by the device that is to do the job.
    pub region: ForeignRegion,
    /// Bytes from the region's start to the first plane.
    pub offset: u64,
    /// Bytes from one plane's start to the next one's, at least a plane's room; of no account for a single plane.
    pub pitch: u64,
    /// How many.
    pub planes: usize,
}

/// Planes of regions to pack into one block.
#[derive(Debug)]
pub struct RegionGatherJob {
    /// The shape of the working block.
    pub shape: PlaneShape,
    /// Its planes, in order: together `shape.planes`.
    pub sources: Vec<RegionPlanes>,
    /// How many tokens of each plane are valid, at most `shape.tokens_per_block`.
    pub tokens: usize,
    /// Where to; room for `shape.packed_bytes(tokens)`.
    pub target: BlockMut,
}

/// A packed block to spread over planes of regions.
#[derive(Debug)]
pub struct RegionScatterJob {
    /// The shape of the working block.
    pub shape: PlaneShape,
    /// The packed block, `shape.packed_bytes(tokens)` long.
    pub source: Block,
    /// Whose bytes the other process may see; must be the source's owner.
    pub owner: Owner,
    /// How many tokens of each plane it has, at most `shape.tokens_per_block`.
    pub tokens: usize,
    /// Where to, in order: together `shape.planes`. What lies behind a plane's tokens stays as it is. No two planes of one
    /// submission may have a written byte in common; the same memory opened twice is not seen to be the same, and what is
    /// written twice there arrives as corrupt.
    pub targets: Vec<RegionPlanes>,
}

/// Why a job with regions was refused before anything was issued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegionFault {
    /// As for any other job: the device is fenced or busy, the shape does not fit, the owner is another.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The region takes nothing new.
    #[error("the region is {0}: it takes no more operations; its process must bring it anew")]
    NotOpen(RegionState),
    /// Planes lie outside of the region.
    #[error(
        "{planes} planes of {room} bytes, {pitch} apart from {offset} on, do not lie in the region's {bytes} bytes"
    )]
    Bounds {
        /// Bytes from the region's start to the first plane.
        offset: u64,
        /// Bytes from one plane's start to the next one's.
        pitch: u64,
        /// How many.
        planes: usize,
        /// Bytes that a plane has room for.
        room: usize,
        /// The region's length.
        bytes: u64,
    },
    /// Planes overlap each other.
    #[error("planes of {room} bytes overlap at a pitch of {pitch}")]
    Pitch {
        /// Bytes from one plane's start to the next one's.
        pitch: u64,
        /// Bytes that a plane has room for.
        room: usize,
    },
    /// Planes of a scatter overlap each other.
    #[error(
        "the bytes from {offset} of a region on would be written twice by one submission: give each byte one source"
    )]
    Twice {
        /// Bytes from the region's start to the plane that begins in another one.
        offset: u64,
    },
    /// A scatter writes more planes than may be.
    #[error(
        "{0} planes are more than the {SCATTER_PLANES_MAX} that one scatter may write: submit fewer blocks at a time"
    )]
    Planes(usize),
    /// Another device opened the region.
    #[error("the region was opened by another device: open it with the one that is to work on it")]
    Elsewhere,
}

/// A submission with regions that was refused; the targets come back, nothing was written.
#[derive(Debug)]
pub struct RegionRefusal {
    /// Why.
    pub cause: RegionFault,
    /// The targets of a gather, in no particular order.
    pub targets: Vec<BlockMut>,
}

impl fmt::Display for RegionRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for RegionRefusal {}

impl From<TransferError> for RegionRefusal {
    fn from(error: TransferError) -> Self {
        Self { cause: error.cause.into(), targets: error.targets }
    }
}

/// Planes whose memory stays mapped: inside their region, and apart from each other.
#[derive(Debug)]
pub(super) struct Strip {
    pub(super) lease: Lease,
    pub(super) offset: usize,
    pub(super) pitch: usize,
    pub(super) planes: usize,
}

impl Strip {
    /// Checks planes with that much room each, and keeps their region.
    fn hold(planes: &RegionPlanes, room: usize, device: u64, seen: &mut Seen) -> Result<Self, RegionFault> {
        let RegionPlanes { region, offset, pitch, planes } = planes;
        let (offset, planes, bytes) = (*offset, *planes, region.bytes().0);
        let pitch = if planes == 1 { room as u64 } else { *pitch };
        if !region.is_of(device) {
            return Err(RegionFault::Elsewhere);
        }
        if pitch < room as u64 {
            return Err(RegionFault::Pitch { pitch, room });
        }
        let last = (planes as u64).checked_sub(1).and_then(|steps| steps.checked_mul(pitch));
        let end = last.and_then(|last| last.checked_add(offset)?.checked_add(room as u64));
        if end.is_none_or(|end| end > bytes) {
            return Err(RegionFault::Bounds { offset, pitch, planes, room, bytes });
        }
        let lease = region.lease(seen).map_err(RegionFault::NotOpen)?;
        Ok(Self { lease, offset: offset as usize, pitch: pitch as usize, planes })
    }

    /// Where each plane begins.
    fn starts(&self) -> impl Iterator<Item = usize> {
        (0..self.planes).map(|plane| self.offset + plane * self.pitch)
    }
}

/// Checks all planes of a job and keeps their regions.
fn hold(
    shape: &PlaneShape,
    tokens: usize,
    planes: &[RegionPlanes],
    device: u64,
    seen: &mut Seen,
) -> Result<Vec<Strip>, RegionFault> {
    let [stride, ..] = sizes(shape, tokens)?;
    let count = planes.iter().try_fold(0_usize, |sum, planes| sum.checked_add(planes.planes));
    if count != Some(shape.planes) {
        let count = count.map_or_else(|| "too many".to_owned(), |count| count.to_string());
        let what = format!("the regions have {count} planes, the shape has {}", shape.planes);
        return Err(DeviceError::Shape(what).into());
    }
    planes.iter().map(|planes| Strip::hold(planes, stride, device, seen)).collect()
}

/// A gather whose regions stay mapped.
pub(super) struct FromRegion {
    pub(super) shape: PlaneShape,
    pub(super) sources: Vec<Strip>,
    pub(super) tokens: usize,
    pub(super) target: BlockMut,
}

/// A scatter whose regions stay mapped.
pub(super) struct IntoRegion {
    pub(super) shape: PlaneShape,
    pub(super) source: Block,
    pub(super) tokens: usize,
    pub(super) targets: Vec<Strip>,
}

/// Checks gathers of a device and hands them on, or gives their targets back.
pub(super) fn gather_from(
    jobs: Vec<RegionGatherJob>,
    device: u64,
    enqueue: impl FnOnce(Vec<FromRegion>) -> Result<Transfer, TransferError>,
) -> Result<Transfer, RegionRefusal> {
    let mut seen = Seen::default();
    let check = |job: &RegionGatherJob| {
        let sources = hold(&job.shape, job.tokens, &job.sources, device, &mut seen)?;
        room(&job.target, job.shape.packed_bytes(job.tokens))?;
        Ok(sources)
    };
    let held: Result<Vec<_>, RegionFault> = jobs.iter().map(check).collect();
    match held {
        Ok(held) => {
            let step = |(job, sources): (RegionGatherJob, _)| {
                let RegionGatherJob { shape, tokens, target, .. } = job;
                FromRegion { shape, sources, tokens, target }
            };
            Ok(enqueue(jobs.into_iter().zip(held).map(step).collect())?)
        }
        Err(cause) => Err(RegionRefusal { cause, targets: jobs.into_iter().map(|job| job.target).collect() }),
    }
}

/// Checks scatters of a device and hands them on.
pub(super) fn scatter_into(
    jobs: Vec<RegionScatterJob>,
    device: u64,
    enqueue: impl FnOnce(Vec<IntoRegion>) -> Result<Transfer<()>, TransferError>,
) -> Result<Transfer<()>, RegionRefusal> {
    let mut seen = Seen::default();
    let step = |job: RegionScatterJob| {
        let RegionScatterJob { shape, source, owner, tokens, targets } = job;
        let targets = hold(&shape, tokens, &targets, device, &mut seen)?;
        //= GUARANTEES.md#G4
        if source.owner() != owner {
            return Err(DeviceError::WrongOwner.into());
        }
        if source.length() != shape.packed_bytes(tokens) {
            let (length, packed) = (source.length(), shape.packed_bytes(tokens));
            let what = format!("a packed source of {length} bytes, {tokens} tokens have {packed}");
            return Err(DeviceError::Shape(what).into());
        }
        Ok(IntoRegion { shape, source, tokens, targets })
    };
    let steps: Result<Vec<_>, RegionFault> = jobs.into_iter().map(step).collect();
    let steps = steps.and_then(|steps| apart(&steps).map(|()| steps));
    Ok(enqueue(steps.map_err(|cause| RegionRefusal { cause, targets: Vec::new() })?)?)
}

/// Whether no byte of a region would be written twice.
fn apart(steps: &[IntoRegion]) -> Result<(), RegionFault> {
    let strips = || steps.iter().flat_map(|step| step.targets.iter().map(move |strip| (strip, step.used())));
    // Planes of one strip are apart by its pitch.
    if strips().nth(1).is_none() {
        return Ok(());
    }
    let planes = strips().fold(0_usize, |sum, (strip, _)| sum.saturating_add(strip.planes));
    if planes > SCATTER_PLANES_MAX {
        return Err(RegionFault::Planes(planes));
    }
    let row = |(strip, used): (&Strip, usize)| {
        let begins = strip.lease.begins();
        strip
            .starts()
            .map(move |start| (begins + start as u64, used as u64, start as u64))
            .collect::<Vec<_>>()
    };
    let mut rows: Vec<_> = strips().filter(|(_, used)| *used > 0).flat_map(row).collect();
    rows.sort_unstable();
    let over = rows.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0);
    over.map_or(Ok(()), |pair| Err(RegionFault::Twice { offset: pair[1].2 }))
}

/// Whether every process whose memory it is runs: what a process left behind may be anything, and is nobody's any more.
fn attended(strips: &[Strip], seen: &mut Seen) -> Result<(), DeviceError> {
    match strips.iter().all(|strip| strip.lease.is_alive(seen)) {
        true => Ok(()),
        false => Err(DeviceError::Gone("the process that brought the region has ended".to_owned())),
    }
}

impl FromRegion {
    pub(super) fn used(&self) -> usize {
        self.tokens * self.shape.token_bytes
    }

    /// Seals what was gathered, where it is what the regions had. What they had has no instance yet: an error names the one
    /// that it would have become.
    pub(super) fn seal(
        target: BlockMut,
        length: usize,
        expected: keepwarm_types::BlockChecksum,
        found: keepwarm_types::BlockChecksum,
    ) -> Ended<Self> {
        let instance = next_instance();
        if expected != found {
            return Err((Corrupt { instance, expected, found }.into(), Some(target)));
        }
        Ok(target.into_block(length, instance, found))
    }
}

impl Step for FromRegion {
    type Done = Block;

    fn is_due(&self, seen: &mut Seen) -> Result<(), DeviceError> {
        attended(&self.sources, seen)
    }

    fn bytes(&self) -> usize {
        self.shape.packed_bytes(self.tokens)
    }

    fn errand(&self) -> Errand<'_> {
        Errand { work: "gather", from: REGION, to: self.target.arena(), owner: self.target.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let (used, length) = (self.used(), self.bytes());
        let Self { sources, mut target, .. } = self;
        let packed = &mut target.bytes_mut()[..length];
        let (mut bounce, mut hasher, mut to) = (vec![0; COPY_STEP.min(used)], BlockHasher::default(), 0);
        for (strip, start) in sources.iter().flat_map(|strip| strip.starts().map(move |start| (strip, start)))
        {
            for at in (0..used).step_by(COPY_STEP) {
                // Read once: what is hashed is what is kept, whatever its process does meanwhile.
                let piece = &mut bounce[..COPY_STEP.min(used - at)];
                strip.lease.read(start + at, piece);
                hasher.update(piece);
                packed[to..to + piece.len()].copy_from_slice(piece);
                to += piece.len();
            }
        }
        flip_first(packed, faults);
        let (expected, found) = (hasher.finish(), block_checksum(packed));
        Self::seal(target, length, expected, found)
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.target)
    }
}

impl IntoRegion {
    pub(super) fn used(&self) -> usize {
        self.tokens * self.shape.token_bytes
    }
}

impl Step for IntoRegion {
    type Done = ();

    fn is_due(&self, seen: &mut Seen) -> Result<(), DeviceError> {
        attended(&self.targets, seen)
    }

    fn bytes(&self) -> usize {
        self.source.length()
    }

    fn errand(&self) -> Errand<'_> {
        Errand { work: "scatter", from: self.source.arena(), to: REGION, owner: self.source.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let used = self.used();
        let starts = || self.targets.iter().flat_map(|strip| strip.starts().map(move |start| (strip, start)));
        for ((strip, start), row) in starts().zip(self.source.raw().chunks_exact(used.max(1))) {
            strip.lease.write(start, row);
        }
        if faults.flip_now()
            && let Some((strip, start)) = starts().next().filter(|_| used > 0)
        {
            let mut first = [0];
            strip.lease.read(start, &mut first);
            strip.lease.write(start, &[first[0] ^ 1]);
        }
        let mut hasher = BlockHasher::default();
        starts().for_each(|(strip, start)| strip.lease.hash(start, used, &mut hasher));
        let (expected, found) = (self.source.checksum(), hasher.finish());
        if expected != found {
            return Err((Corrupt { instance: self.source.instance(), expected, found }.into(), None));
        }
        Ok(())
    }

    fn into_target(self) -> Option<BlockMut> {
        None
    }
}

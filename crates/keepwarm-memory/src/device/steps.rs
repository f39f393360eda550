//! What a host device does with one block: copy, fill, gather, scatter; each verified where the bytes end.

use keepwarm_types::{BlockChecksum, Owner};

use super::{DeviceError, GatherJob, Job, PlaneShape, ScatterJob, gather, scatter};
use crate::checksum::{BlockHasher, CHUNK_BYTES, Corrupt, block_checksum};
use crate::fault::FaultPlan;
use crate::foreign::Seen;
use crate::guard::{Block, BlockMut, next_instance};

/// Bytes that are copied and then hashed while they are still in the first-level cache; whole chunks.
pub(super) const COPY_STEP: usize = 4 * CHUNK_BYTES;

/// A step's end: what it made, or why there is nothing, with the target back, if it was a block.
pub(super) type Ended<S> = Result<<S as Step>::Done, (DeviceError, Option<BlockMut>)>;

/// What a device that is not the host needs to know of a step.
#[cfg(feature = "cuda")]
pub(super) use super::cuda::Moves;
/// Nothing where there is none.
#[cfg(not(feature = "cuda"))]
pub(super) trait Moves {}
#[cfg(not(feature = "cuda"))]
impl<S> Moves for S {}

/// What a step does, between which tiers, for whom.
pub(super) struct Errand<'a> {
    pub(super) work: &'static str,
    pub(super) from: &'a str,
    pub(super) to: &'a str,
    pub(super) owner: Owner,
}

/// One block's part of a submission.
pub(super) trait Step: Moves + Send + Sized + 'static {
    /// What it makes of its target.
    type Done: Send + 'static;

    /// Whether its blocks fit each other, before anything is queued.
    fn check(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Whether no owner's bytes would come to another by it: tenant and birth, which tells lives of one name apart.
    fn keeps_owners(&self) -> bool {
        true
    }

    /// Whether it may still be issued, now that its turn has come.
    fn is_due(&self, _seen: &mut Seen) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Bytes to move.
    fn bytes(&self) -> usize;

    /// What it does for whom, as a profiler shows it.
    fn errand(&self) -> Errand<'_>;

    /// Does it. Sources are let go before it returns.
    fn run(self, faults: &FaultPlan) -> Ended<Self>;

    /// The target of a step that was not done, if it is a block.
    fn into_target(self) -> Option<BlockMut>;

    /// A bug that a test plants: its target's slot goes back to the arena while this still has it.
    #[cfg(all(test, feature = "cuda"))]
    fn let_go(&mut self) {}

    /// The target of a step that was done, where it can still be written.
    fn regain(_done: Self::Done) -> Option<BlockMut> {
        None
    }
}

impl Step for Job {
    type Done = Block;

    fn check(&self) -> Result<(), DeviceError> {
        room(&self.target, self.source.length())
    }

    // The copy gets the birth of what it is a copy of; its tenant is the target's.
    //= GUARANTEES.md#G4
    fn keeps_owners(&self) -> bool {
        self.source.tenant() == self.target.tenant()
    }

    fn bytes(&self) -> usize {
        self.source.length()
    }

    fn errand(&self) -> Errand<'_> {
        Errand {
            work: "copy",
            from: self.source.arena(),
            to: self.target.arena(),
            owner: self.target.owner(),
        }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let Self { source, mut target } = self;
        let flip = faults.flip_now();
        let mut hasher = BlockHasher::default();
        for (step, bytes) in source.raw().chunks(COPY_STEP).enumerate() {
            let at = step * COPY_STEP;
            target.write(at, bytes).expect("the capacity was checked, and steps leave no gap");
            if flip && step == 0 {
                let broken = bytes[0] ^ 1;
                target.write(at, &[broken]).expect("the byte was written just before");
            }
            hasher.update(&target.bytes()[at..at + bytes.len()]);
        }
        let (expected, found) = (source.checksum(), hasher.finish());
        if expected != found {
            return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
        }
        Ok(target.seal_copy(&source))
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.target)
    }

    #[cfg(all(test, feature = "cuda"))]
    fn let_go(&mut self) {
        self.target.give_back_early();
    }
}

/// A target to fill.
pub(super) struct FillJob {
    pub(super) target: BlockMut,
    pub(super) byte: u8,
}

impl Step for FillJob {
    type Done = Block;

    fn bytes(&self) -> usize {
        self.target.capacity()
    }

    fn errand(&self) -> Errand<'_> {
        Errand { work: "fill", from: "a byte", to: self.target.arena(), owner: self.target.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let Self { mut target, byte } = self;
        let all = target.bytes_mut();
        all.fill(byte);
        flip_first(all, faults);
        let found = block_checksum(all);
        seal_filled(target, byte, found)
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.target)
    }
}

/// Seals a target that was filled: what was to be written is hashed, so that memory that did not take it shows.
pub(super) fn seal_filled(
    target: BlockMut,
    byte: u8,
    found: BlockChecksum,
) -> Result<Block, (DeviceError, Option<BlockMut>)> {
    let mut hasher = BlockHasher::default();
    let (pattern, length) = ([byte; CHUNK_BYTES], target.capacity());
    for at in (0..length).step_by(CHUNK_BYTES) {
        hasher.update(&pattern[..CHUNK_BYTES.min(length - at)]);
    }
    target
        .seal_received(next_instance(), hasher.finish(), found)
        .map_err(|(target, corrupt)| (corrupt.into(), Some(target)))
}

impl Step for GatherJob {
    type Done = Block;

    fn check(&self) -> Result<(), DeviceError> {
        let Self { shape, sources, tokens, target } = self;
        let [stride, _, packed] = sizes(shape, *tokens)?;
        let mut planes = 0;
        for (place, source) in sources.iter().enumerate() {
            if source.length() % stride != 0 {
                let length = source.length();
                let what = format!("source {place} of {length} bytes is not whole planes of {stride}");
                return Err(DeviceError::Shape(what));
            }
            planes += source.length() / stride;
        }
        if planes != shape.planes {
            let what = format!("the sources have {planes} planes, the shape has {}", shape.planes);
            return Err(DeviceError::Shape(what));
        }
        room(target, packed)
    }

    //= GUARANTEES.md#G4
    fn keeps_owners(&self) -> bool {
        let owner = self.target.owner();
        self.sources.iter().all(|source| source.owner() == owner)
    }

    fn bytes(&self) -> usize {
        self.shape.packed_bytes(self.tokens)
    }

    fn errand(&self) -> Errand<'_> {
        let from = self.sources.first().map_or("nothing", Block::arena);
        Errand { work: "gather", from, to: self.target.arena(), owner: self.target.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let Self { shape, sources, tokens, mut target } = self;
        let (stride, used) = (shape.tokens_per_block * shape.token_bytes, tokens * shape.token_bytes);
        // The packed block gets a checksum of its own: what is broken before must not come out as sound.
        if let Some(corrupt) = sources.iter().find_map(|source| source.verify().err()) {
            return Err((corrupt.into(), Some(target)));
        }
        let length = shape.packed_bytes(tokens);
        let packed = &mut target.bytes_mut()[..length];
        let mut rest = &mut *packed;
        let mut hasher = BlockHasher::default();
        for source in &sources {
            let part = PlaneShape { planes: source.length() / stride, ..shape };
            let (head, tail) = rest.split_at_mut(part.packed_bytes(tokens));
            gather(&part, source.raw(), tokens, head);
            source.raw().chunks_exact(stride).for_each(|plane| hasher.update(&plane[..used]));
            rest = tail;
        }
        flip_first(packed, faults);
        let (expected, found) = (hasher.finish(), block_checksum(packed));
        if expected != found {
            let instance = sources.first().expect("a shape without planes is refused").instance();
            return Err((Corrupt { instance, expected, found }.into(), Some(target)));
        }
        Ok(target.into_block(length, next_instance(), found))
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.target)
    }
}

impl Step for ScatterJob {
    type Done = BlockMut;

    fn check(&self) -> Result<(), DeviceError> {
        let Self { shape, source, tokens, target } = self;
        let [_, block, packed] = sizes(shape, *tokens)?;
        if source.length() != packed {
            let length = source.length();
            let what = format!("a packed source of {length} bytes, {tokens} tokens have {packed}");
            return Err(DeviceError::Shape(what));
        }
        room(target, block)
    }

    //= GUARANTEES.md#G4
    fn keeps_owners(&self) -> bool {
        self.source.owner() == self.target.owner()
    }

    fn bytes(&self) -> usize {
        self.source.length()
    }

    fn errand(&self) -> Errand<'_> {
        Errand {
            work: "scatter",
            from: self.source.arena(),
            to: self.target.arena(),
            owner: self.target.owner(),
        }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let Self { shape, source, tokens, mut target } = self;
        let (stride, used) = (shape.tokens_per_block * shape.token_bytes, tokens * shape.token_bytes);
        let working = &mut target.bytes_mut()[..shape.block_bytes()];
        scatter(&shape, source.raw(), tokens, working);
        flip_first(&mut working[..used], faults);
        let mut hasher = BlockHasher::default();
        working.chunks_exact(stride).for_each(|plane| hasher.update(&plane[..used]));
        let (expected, found) = (source.checksum(), hasher.finish());
        if expected != found {
            return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
        }
        Ok(target)
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.target)
    }

    fn regain(done: BlockMut) -> Option<BlockMut> {
        Some(done)
    }
}

/// Bytes of a plane, of a full block, and of a packed one of `tokens`; none overflows, the first two are not zero.
pub(super) fn sizes(shape: &PlaneShape, tokens: usize) -> Result<[usize; 3], DeviceError> {
    let PlaneShape { planes, tokens_per_block, token_bytes } = *shape;
    let stride = tokens_per_block.checked_mul(token_bytes);
    let block = stride.and_then(|stride| stride.checked_mul(planes));
    let (Some(stride), Some(block @ 1..)) = (stride, block) else {
        let what =
            format!("{planes} planes of {tokens_per_block} tokens of {token_bytes} bytes are no block");
        return Err(DeviceError::Shape(what));
    };
    if tokens > tokens_per_block {
        let what = format!("{tokens} tokens do not fit a block of {tokens_per_block}");
        return Err(DeviceError::Shape(what));
    }
    Ok([stride, block, shape.packed_bytes(tokens)])
}

pub(super) fn room(target: &BlockMut, source_bytes: usize) -> Result<(), DeviceError> {
    if target.capacity() < source_bytes {
        return Err(DeviceError::Size { target: target.capacity(), source_bytes });
    }
    Ok(())
}

/// Turns a bit of what arrived, where a test wants it.
pub(super) fn flip_first(bytes: &mut [u8], faults: &FaultPlan) {
    if faults.flip_now()
        && let Some(first) = bytes.first_mut()
    {
        *first ^= 1;
    }
}

//! Blocks on their way to cold tiers as FP8, and back: what is asked, and what a host device does.
//!
//! Both forms of a block are the same instance, with bytes, a length and a checksum each. So a checkpoint and a restore
//! change no manifest, and whoever compares a block's bytes does so with the block's own checksum.

use super::steps::{Ended, Errand, Step, room};
use super::{DeviceError, Place};
use crate::checksum::{Corrupt, block_checksum};
use crate::fault::FaultPlan;
use crate::fp8::{Shape, dequantise_block, quantise_block};
use crate::guard::{Block, BlockMut};

/// A raw block whose numbers go into a cold tier.
#[derive(Debug)]
pub struct QuantiseJob {
    /// What its numbers are.
    pub shape: Shape,
    /// The raw block: whole numbers, as many for each plane.
    pub source: Block,
    /// Where to; room for the stored form.
    pub target: BlockMut,
}

/// A stored block whose numbers are wanted back.
#[derive(Debug)]
pub struct DequantiseJob {
    /// What its numbers are to be.
    pub shape: Shape,
    /// The stored block: scales, then codes.
    pub source: Block,
    /// Where to; room for the raw form.
    pub target: BlockMut,
}

/// A [`QuantiseJob`] on a stream.
pub(super) struct Quantise {
    pub(super) job: QuantiseJob,
    /// Memory of a device other than the host, where the stored form lies before it leaves.
    pub(super) via: Option<Place>,
}

/// A [`DequantiseJob`] on a stream.
pub(super) struct Dequantise {
    pub(super) job: DequantiseJob,
    /// Memory of a device other than the host, where the stored form lies when it has come.
    pub(super) via: Option<Place>,
}

fn shapeless(what: &str, block: &Block, shape: &Shape) -> DeviceError {
    let (length, planes) = (block.length(), shape.planes);
    DeviceError::Shape(format!(
        "a {what} block of {length} bytes is not {planes} planes of {:?}",
        shape.number
    ))
}

/// Writes a block's other form and seals it; what memory did not take shows.
fn land(source: &Block, mut target: BlockMut, bytes: &[u8], faults: &FaultPlan) -> Ended<Quantise> {
    target.write(0, bytes).expect("the capacity was checked");
    if faults.flip_now() {
        target.write(0, &[bytes[0] ^ 1]).expect("the byte was written just before");
    }
    let (expected, found) = (block_checksum(bytes), block_checksum(&target.bytes()[..bytes.len()]));
    if expected != found {
        return Err((Corrupt { instance: source.instance(), expected, found }.into(), Some(target)));
    }
    Ok(target.seal_form(source, bytes.len(), found))
}

impl Step for Quantise {
    type Done = Block;

    fn check(&self) -> Result<(), DeviceError> {
        let QuantiseJob { shape, source, target } = &self.job;
        match shape.numbers(source.length()) {
            Some(numbers @ 1..) => room(target, shape.stored_bytes(numbers)),
            _ => Err(shapeless("raw", source, shape)),
        }
    }

    // As for a copy: the tenant is the target's, and the birth comes with the bytes.
    //= GUARANTEES.md#G4
    fn keeps_owners(&self) -> bool {
        self.job.source.tenant() == self.job.target.tenant()
    }

    fn bytes(&self) -> usize {
        self.job.source.length()
    }

    fn errand(&self) -> Errand<'_> {
        let QuantiseJob { source, target, .. } = &self.job;
        Errand { work: "quantise", from: source.arena(), to: target.arena(), owner: target.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let QuantiseJob { shape, source, target } = self.job;
        // The stored form gets a checksum of its own: what is broken before must not come out as sound.
        if let Err(corrupt) = source.verify() {
            return Err((corrupt.into(), Some(target)));
        }
        let stored = quantise_block(&shape, source.raw()).expect("the shape was checked");
        land(&source, target, &stored, faults)
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.job.target)
    }
}

impl Step for Dequantise {
    type Done = Block;

    fn check(&self) -> Result<(), DeviceError> {
        let DequantiseJob { shape, source, target } = &self.job;
        match shape.numbers_stored(source.length()) {
            Some(numbers @ 1..) => room(target, shape.raw_bytes(numbers)),
            _ => Err(shapeless("stored", source, shape)),
        }
    }

    //= GUARANTEES.md#G4
    fn keeps_owners(&self) -> bool {
        self.job.source.tenant() == self.job.target.tenant()
    }

    fn bytes(&self) -> usize {
        self.job.source.length()
    }

    fn errand(&self) -> Errand<'_> {
        let DequantiseJob { source, target, .. } = &self.job;
        Errand { work: "dequantise", from: source.arena(), to: target.arena(), owner: target.owner() }
    }

    fn run(self, faults: &FaultPlan) -> Ended<Self> {
        let DequantiseJob { shape, source, target } = self.job;
        if let Err(corrupt) = source.verify() {
            return Err((corrupt.into(), Some(target)));
        }
        let raw = dequantise_block(&shape, source.raw()).expect("the shape was checked");
        land(&source, target, &raw, faults)
    }

    fn into_target(self) -> Option<BlockMut> {
        Some(self.job.target)
    }
}

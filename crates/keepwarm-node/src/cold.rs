//! A block's two forms: the raw bytes that GPUs and clients have, and what cold tiers keep of them.
//!
//! Where a part has no cold form both are the same, and blocks are copied. Else they become FP8 on their way out of a GPU and
//! numbers again on their way in, both by its device; what clients send and read is converted here, by the CPU.

use std::collections::HashMap;

use keepwarm_core::session::{Manifest, Number, Part};
use keepwarm_memory::fp8::{self, Shape};
use keepwarm_memory::{Block, BlockMut, DequantiseJob, Device, Direction, Job, QuantiseJob};
use keepwarm_types::{Bytes, InstanceId};

use crate::copy;
use crate::error::Error;
use crate::write::size_class;

/// Raw bytes of one batch of conversions, beyond its first block: the device has scratch for their stored form meanwhile,
/// at most 8 MiB for halves.
const BATCH_BYTES: usize = 16 << 20;

/// What the numbers of a part's blocks are, where cold tiers keep others.
pub(crate) fn shape(part: &Part) -> Option<Shape> {
    let number = match part.cold?.from {
        Number::F32 => fp8::Number::F32,
        Number::F16 => fp8::Number::F16,
        Number::Bf16 => fp8::Number::Bf16,
    };
    Some(Shape { number, planes: part.form.planes()?.planes as usize })
}

fn odd(part: &Part, length: usize) -> Error {
    Error::Internal(format!("a block of {length} bytes is none of part '{}'", part.name))
}

/// The stored form of a raw block.
pub(crate) fn stored(part: &Part, shape: &Shape, raw: &[u8]) -> Result<Vec<u8>, Error> {
    fp8::quantise_block(shape, raw).ok_or_else(|| odd(part, raw.len()))
}

/// The raw form of a stored block.
pub(crate) fn raw(part: &Part, shape: &Shape, stored: &[u8]) -> Result<Vec<u8>, Error> {
    fp8::dequantise_block(shape, stored).ok_or_else(|| odd(part, stored.len()))
}

/// Room to ask for the stored form of a block of so many raw bytes.
pub(crate) fn stored_class(part: &Part, raw: u64) -> Bytes {
    size_class(part.stored_bytes(raw), part.stored_block_bytes())
}

/// Room to ask for the copy of a GPU's block that pinned memory keeps.
pub(crate) fn room_for(part: &Part, block: &Block) -> Bytes {
    match part.cold {
        None => block.capacity(),
        Some(_) => stored_class(part, block.length() as u64),
    }
}

/// Copies blocks of a GPU, or their stored form, into targets, in order.
pub(crate) async fn leave(
    device: &dyn Device,
    part: &Part,
    sources: &[Block],
    targets: Vec<BlockMut>,
    at: &'static str,
) -> Result<Vec<Block>, Error> {
    let pairs = sources.iter().cloned().zip(targets);
    let Some(shape) = shape(part) else {
        let jobs = pairs.map(|(source, target)| Job { source, target }).collect();
        return copy::run(device, Direction::Out, jobs, at).await;
    };
    let jobs = pairs.map(|(source, target)| QuantiseJob { shape, source, target });
    let mut made = Vec::with_capacity(sources.len());
    for batch in batches(jobs, |job| job.source.length()) {
        let transfer = device.quantise(Direction::Out, batch).map_err(|error| Error::from(error.cause))?;
        made.extend(copy::ended(device, transfer, at).await?);
    }
    Ok(made)
}

/// A block of pinned memory that is to come into a GPU's.
pub(crate) struct Incoming {
    pub(crate) source: Block,
    /// Room that it needs there.
    pub(crate) size: Bytes,
    shape: Option<Shape>,
}

/// What comes in for these blocks, which a manifest names.
pub(crate) fn incoming(manifest: &Manifest, sources: Vec<Block>) -> Vec<Incoming> {
    // Where nothing is converted, nobody asks.
    let states = manifest.parts.iter().enumerate().filter(|_| manifest.layout.is_lossy());
    let parts: HashMap<InstanceId, usize> =
        states.flat_map(|(at, part)| part.blocks.iter().map(move |block| (block.instance, at))).collect();
    let one = |source: Block| {
        let part = parts.get(&source.instance()).map(|at| &manifest.layout.parts()[*at]);
        let shape = part.and_then(shape);
        let raw = part.and_then(|part| part.raw_bytes(source.length() as u64));
        let size = match (part, raw) {
            (Some(part), Some(raw)) if shape.is_some() => size_class(raw, part.form.block_bytes()),
            _ => source.capacity(),
        };
        Incoming { source, size, shape }
    };
    sources.into_iter().map(one).collect()
}

/// Copies blocks into a GPU's memory, or makes their raw form there. In no particular order.
pub(crate) async fn enter(
    device: &dyn Device,
    pairs: impl Iterator<Item = (Incoming, BlockMut)>,
    at: &'static str,
) -> Result<Vec<Block>, Error> {
    let (mut exact, mut lossy) = (Vec::new(), Vec::new());
    for (Incoming { source, shape, .. }, target) in pairs {
        match shape {
            None => exact.push(Job { source, target }),
            Some(shape) => lossy.push(DequantiseJob { shape, source, target }),
        }
    }
    let mut made = match exact.is_empty() {
        true => Vec::new(),
        false => copy::run(device, Direction::In, exact, at).await?,
    };
    for batch in batches(lossy.into_iter(), |job| job.target.capacity()) {
        let transfer = device.dequantise(Direction::In, batch).map_err(|error| Error::from(error.cause))?;
        made.extend(copy::ended(device, transfer, at).await?);
    }
    Ok(made)
}

/// Jobs in batches of at most [`BATCH_BYTES`], or of one.
fn batches<T>(jobs: impl Iterator<Item = T>, bytes: fn(&T) -> usize) -> Vec<Vec<T>> {
    let (mut batches, mut sum) = (Vec::<Vec<T>>::new(), 0);
    for job in jobs {
        sum += bytes(&job);
        match batches.last_mut().filter(|_| sum <= BATCH_BYTES) {
            Some(batch) => batch.push(job),
            None => {
                sum = bytes(&job);
                batches.push(vec![job]);
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_bounded_by_their_bytes() {
        let sizes = |jobs: &[usize]| {
            batches(jobs.iter().copied(), |job| *job).iter().map(Vec::len).collect::<Vec<_>>()
        };
        let half = BATCH_BYTES / 2;
        assert!(sizes(&[]).is_empty());
        assert_eq!(sizes(&[half, half, 1, 1]), [2, 2]);
        assert_eq!(sizes(&[BATCH_BYTES + 1, 1, half]), [1, 2]);
    }
}

//! Blocks as FP8 and back: bit for bit what the CPU's functions do, the same instances, verified on both sides.

use futures::executor::block_on;
use keepwarm_types::{Birth, Bytes, Owner};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, proptest};

use super::{Bench, Kind, bench, on_each_device};
use crate::checksum::block_checksum;
use crate::device::{DequantiseJob, DeviceError, DeviceState, Direction, Job, QuantiseJob, TransferError};
use crate::fault::flip_bit;
use crate::fp8::{Number, Shape, dequantise_block, quantise_block};
use crate::guard::{Block, BlockMut};

const SHAPE: Shape = Shape { number: Number::F16, planes: 3 };
const NUMBERS: usize = 100;
/// Room for the largest block of a test: an arena's extents have one size each, and there are few.
const ROOM: usize = 16 << 10;

/// Bytes of a block's numbers, all bits of which occur.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    (0..bytes as u64).map(|at| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

impl Bench {
    fn host(&self, bytes: &[u8]) -> Block {
        let mut block = self.space(false, ROOM);
        block.write(0, bytes).unwrap();
        block.seal(bytes.len()).unwrap()
    }

    fn space(&self, on_device: bool, bytes: usize) -> BlockMut {
        let arena = if on_device { self.device.arena() } else { &self.pinned };
        arena.allocate(&self.owner, Bytes(bytes as u64), 1).unwrap().pop().unwrap()
    }

    /// A block in the device's memory.
    fn raw(&self, bytes: &[u8]) -> Block {
        let job = Job { source: self.host(bytes), target: self.space(true, ROOM) };
        block_on(self.device.submit(Direction::In, vec![job]).unwrap()).unwrap().pop().unwrap()
    }

    fn quantise_job(&self, shape: Shape, raw: &Block) -> QuantiseJob {
        QuantiseJob { shape, source: raw.clone(), target: self.space(false, ROOM) }
    }

    fn dequantise_job(&self, shape: Shape, stored: &Block) -> DequantiseJob {
        DequantiseJob { shape, source: stored.clone(), target: self.space(true, ROOM) }
    }
}

/// A shape, and how many numbers each plane of each block has.
fn case() -> impl Strategy<Value = (Shape, Vec<usize>, u64)> {
    let number = prop::sample::select(vec![Number::F32, Number::F16, Number::Bf16]);
    let shape = (number, 1usize..6).prop_map(|(number, planes)| Shape { number, planes });
    (shape, prop::collection::vec(1usize..700, 1..6), any::<u64>())
}

fn blocks_go_and_come_back_as_the_cpu_has_them(kind: Kind) {
    let bench = bench(kind);
    proptest!(ProptestConfig::with_cases(30), |((shape, blocks, seed) in case())| {
        let images: Vec<_> = blocks.iter().map(|n| noise(shape.raw_bytes(*n), seed >> 8)).collect();
        let raw: Vec<_> = images.iter().map(|image| bench.raw(image)).collect();
        let jobs = raw.iter().map(|raw| bench.quantise_job(shape, raw)).collect();
        let stored = block_on(bench.device.quantise(Direction::Out, jobs).unwrap()).unwrap();
        for ((image, raw), stored) in images.iter().zip(&raw).zip(&stored) {
            let expected = quantise_block(&shape, image).unwrap();
            assert_eq!(stored.bytes(&bench.owner).unwrap(), expected);
            assert_eq!((stored.instance(), stored.checksum()), (raw.instance(), block_checksum(&expected)));
        }
        let jobs = stored.iter().map(|stored| bench.dequantise_job(shape, stored)).collect();
        let back = block_on(bench.device.dequantise(Direction::In, jobs).unwrap()).unwrap();
        for (stored, back) in stored.iter().zip(&back) {
            let expected = dequantise_block(&shape, stored.bytes(&bench.owner).unwrap()).unwrap();
            assert_eq!((back.instance(), back.checksum()), (stored.instance(), block_checksum(&expected)));
            assert_eq!(bench.read(back), expected);
        }
    });
}

fn what_is_broken_before_or_on_the_way_is_refused(kind: Kind) {
    let bench = bench(kind);
    let image = noise(SHAPE.raw_bytes(NUMBERS), 1);
    let refused = |error: DeviceError, block: &Block| {
        let is = matches!(&error, DeviceError::Corrupt(corrupt) if corrupt.instance == block.instance());
        assert!(is, "{error}");
        assert_eq!(bench.device.state(), DeviceState::Up);
    };
    let raw = bench.raw(&image);
    let quantise = |raw: &Block| {
        block_on(bench.device.quantise(Direction::Out, vec![bench.quantise_job(SHAPE, raw)]).unwrap())
    };
    let stored = quantise(&raw).unwrap().pop().unwrap();
    let dequantise = |stored: &Block| {
        block_on(bench.device.dequantise(Direction::In, vec![bench.dequantise_job(SHAPE, stored)]).unwrap())
    };
    dequantise(&stored).unwrap();
    bench.faults.flip_after(0);
    let TransferError { cause, targets } = quantise(&raw).unwrap_err();
    assert_eq!(targets.len(), 1);
    drop(targets);
    refused(cause, &raw);
    bench.faults.flip_after(0);
    refused(dequantise(&stored).unwrap_err().cause, &stored);
    // Damage that was there before does not come out as a sound block with a checksum of its own.
    flip_bit(&stored, 8 * (SHAPE.codes_at() as u64) + 3);
    refused(dequantise(&stored).unwrap_err().cause, &stored);
    if raw.is_on_host() {
        flip_bit(&raw, 77);
        refused(quantise(&raw).unwrap_err().cause, &raw);
    }
    drop((raw, stored));
    assert_eq!((bench.device.arena().figures().used, bench.pinned.figures().used), (Bytes(0), Bytes(0)));
}

fn what_does_not_fit_is_refused_before_anything_is_issued(kind: Kind) {
    let bench = bench(kind);
    let raw = bench.raw(&noise(SHAPE.raw_bytes(NUMBERS), 2));
    let stored = bench.host(&vec![0; SHAPE.stored_bytes(NUMBERS)]);
    let out = |job| bench.device.quantise(Direction::Out, vec![job]).unwrap_err();
    let into = |job| bench.device.dequantise(Direction::In, vec![job]).unwrap_err();
    let odd = Shape { planes: 7, ..SHAPE };
    let job = QuantiseJob { shape: odd, ..bench.quantise_job(SHAPE, &raw) };
    let error = out(job);
    assert!(matches!(error.cause, DeviceError::Shape(_)) && error.targets.len() == 1, "{error}");
    let job = DequantiseJob { shape: odd, ..bench.dequantise_job(SHAPE, &stored) };
    assert!(matches!(into(job).cause, DeviceError::Shape(_)));
    let small = QuantiseJob {
        target: bench.space(false, SHAPE.stored_bytes(NUMBERS) - 1),
        ..bench.quantise_job(SHAPE, &raw)
    };
    assert!(matches!(out(small).cause, DeviceError::Size { .. }));
    let small = DequantiseJob {
        target: bench.space(true, SHAPE.raw_bytes(NUMBERS) - 1),
        ..bench.dequantise_job(SHAPE, &stored)
    };
    assert!(matches!(into(small).cause, DeviceError::Size { .. }));
    let other = Owner { tenant: "other".parse().unwrap(), birth: Birth::from_random(1) };
    let theirs = bench.pinned.allocate(&other, Bytes(1000), 1).unwrap().pop().unwrap();
    let job = QuantiseJob { target: theirs, ..bench.quantise_job(SHAPE, &raw) };
    assert_eq!(out(job).cause, DeviceError::WrongOwner);
    let theirs = bench.device.arena().allocate(&other, Bytes(1000), 1).unwrap().pop().unwrap();
    let job = DequantiseJob { target: theirs, ..bench.dequantise_job(SHAPE, &stored) };
    assert_eq!(into(job).cause, DeviceError::WrongOwner);
}

fn a_batch_of_more_blocks_than_a_sheet_has_lines_is_done(kind: Kind) {
    let bench = bench(kind);
    let shape = Shape { number: Number::Bf16, planes: 1 };
    let raw = bench.raw(&noise(shape.raw_bytes(20), 3));
    let job = |_| QuantiseJob { shape, source: raw.clone(), target: bench.space(false, 64) };
    let jobs = (0..1100).map(job).collect();
    let stored = block_on(bench.device.quantise(Direction::Out, jobs).unwrap()).unwrap();
    let expected = quantise_block(&shape, &bench.read(&raw)).unwrap();
    assert!(
        stored.len() == 1100 && stored.iter().all(|block| block.bytes(&bench.owner).unwrap() == expected)
    );
}

on_each_device! {
    blocks_go_and_come_back_as_the_cpu_has_them,
    what_is_broken_before_or_on_the_way_is_refused,
    what_does_not_fit_is_refused_before_anything_is_issued,
    a_batch_of_more_blocks_than_a_sheet_has_lines_is_done,
}

#[cfg(feature = "cuda")]
mod cuda_alone {
    use super::*;
    use crate::device::tests::driver::{PATIENCE, bench_with, counted, order};

    #[test]
    fn a_device_without_scratch_refuses_the_batch_and_serves_on() {
        let bench = bench_with(PATIENCE);
        let raw = bench.raw(&noise(SHAPE.raw_bytes(NUMBERS), 4));
        let quantise = || {
            block_on(bench.device.quantise(Direction::Out, vec![bench.quantise_job(SHAPE, &raw)]).unwrap())
        };
        // The pool is there, and what is asked of it is more than it ever had.
        quantise().unwrap();
        if !order("cuMemAllocFromPoolAsync fail 2 times=2") {
            return;
        }
        let error = quantise().unwrap_err();
        assert!(matches!(error.cause, DeviceError::NoScratch(_)) && error.targets.len() == 1, "{error}");
        assert_eq!(bench.device.state(), DeviceState::Up);
        quantise().unwrap();
    }

    #[test]
    fn a_batch_is_one_launch_whatever_its_length_and_its_scratch_goes_back() {
        let bench = bench_with(PATIENCE);
        let raw = bench.raw(&noise(SHAPE.raw_bytes(NUMBERS), 5));
        let run = |blocks: usize| {
            let jobs: Vec<_> = (0..blocks).map(|_| bench.quantise_job(SHAPE, &raw)).collect();
            counted(|| drop(block_on(bench.device.quantise(Direction::Out, jobs).unwrap()).unwrap()))
        };
        run(1);
        let count = |calls: &[(&str, u64)], symbol: &str| {
            calls.iter().find(|(name, _)| *name == symbol).map_or(0, |(_, count)| *count)
        };
        let (one, many) = (run(1), run(40));
        for symbol in ["cuLaunchKernel", "cuMemAllocFromPoolAsync", "cuMemHostAlloc"] {
            assert_eq!(count(&one, symbol), count(&many, symbol), "{symbol}: {one:?} and {many:?}");
        }
    }
}

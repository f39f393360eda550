//! Each kernel against its reference on the CPU, through softcuda or, with `KEEPWARM_TEST_DEVICE=gpu`, on a GPU. The source's
//! logic and bounds are tested everywhere; the committed PTX only there.

use std::hash::{DefaultHasher, Hash};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use proptest::prelude::{Strategy, any, prop, proptest};
use proptest::test_runner::Config;
use twox_hash::{XxHash3_64, XxHash3_128};

use super::*;
use crate::checksum::block_checksum;
use crate::device::cuda::context::DeviceMemory;
use crate::device::cuda::driver::{CudaDriver, CudaSelector};
use crate::device::planes::{PlaneShape, gather, scatter};
use crate::fp8;
use crate::guard::Place;
use crate::region::Foreign;

/// Room for what a test moves.
const IMAGE_BYTES: usize = 1 << 20;
/// Descriptors of a test, at most.
const TABLE_MOST: usize = 256;

/// The kernels for softcuda, compiled once for each state of their sources and of softcuda.
pub(in crate::device) fn compiled() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let is = |path: &Path, word: &str| path.extension().is_some_and(|extension| extension == word);
    files.retain(|path| is(path, "cu") || is(path, "cuh"));
    files.sort();
    let mut state = DefaultHasher::new();
    for path in files.iter().chain([&softcuda::layout::beside_this_program().unwrap()]) {
        std::fs::read(path).unwrap().hash(&mut state);
    }
    let name = format!("kernels-{:016x}.so", std::hash::Hasher::finish(&state));
    let object = std::env::current_exe().unwrap().with_file_name(name);
    if !object.exists() {
        // It appears when it is whole, whoever else compiles it meanwhile.
        let sources = softcuda::kernels::sources(&folder).unwrap();
        softcuda::kernels::compile(&sources, &object, &[]).unwrap();
    }
    object
}

/// The kernels of the first device; a race or an access outside of what is alive ends the process or the context.
fn loaded() -> &'static (Arc<Context>, Kernels) {
    static LOADED: OnceLock<(Arc<Context>, Kernels)> = OnceLock::new();
    LOADED.get_or_init(|| {
        if !std::env::var("KEEPWARM_TEST_DEVICE").is_ok_and(|device| device == "gpu") {
            let object = compiled();
            softcuda::preload::preload(&[
                ("SOFTCUDA_KERNELS", object.to_str().unwrap()),
                ("SOFTCUDA_RACES", "abort"),
                ("SOFTCUDA_DEVICES", "uuids=process"),
            ])
            .unwrap();
        }
        let driver = CudaDriver::load().unwrap();
        let (_, device) = driver.select(&CudaSelector::Number(0)).unwrap();
        let context = Context::retain(&driver, device).unwrap();
        let kernels = Kernels::load(&context).unwrap();
        (context, kernels)
    })
}

/// A stream, and memory of the device with its picture on the host.
struct Bench {
    context: &'static Arc<Context>,
    kernels: &'static Kernels,
    stream: Stream,
    host: HostMemory,
    device: DeviceMemory,
}

impl Bench {
    fn new() -> Self {
        let (context, kernels) = loaded();
        context.enter().unwrap();
        let stream = Stream::create(context).unwrap();
        let host = HostMemory::reserve(context, IMAGE_BYTES as u64).unwrap();
        let device = DeviceMemory::reserve(context, "cuda:0", IMAGE_BYTES as u64).unwrap();
        Self { context, kernels, stream, host, device }
    }

    /// The device's address of a byte.
    fn at(&self, offset: usize) -> u64 {
        self.device.address() + offset as u64
    }

    fn place(&self) -> Place {
        self.device.place()
    }

    fn upload(&self, bytes: &[u8]) {
        assert!(bytes.len() <= IMAGE_BYTES, "{} bytes do not fit", bytes.len());
        // SAFETY: the memory is this bench's, has the room, and every copy that used it has been waited for.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.place().address as *mut u8, bytes.len())
        };
        self.stream.copy(self.place(), self.host.place(), bytes.len()).unwrap();
        self.stream.settle().unwrap();
    }

    /// The first bytes, once all that was launched has run.
    fn download(&self, bytes: usize) -> Vec<u8> {
        self.stream.copy(self.host.place(), self.place(), bytes).unwrap();
        self.stream.settle().unwrap();
        // SAFETY: the copy has been waited for.
        unsafe { self.host.head(bytes) }.to_vec()
    }

    fn table<T: Descriptor>(&self, descriptors: &[T]) -> Table<T> {
        let mut table = Table::reserve(self.context, TABLE_MOST).unwrap();
        // SAFETY: nothing reads a new table.
        unsafe { table.set(descriptors) };
        table
    }
}

fn cases(count: u32) -> Config {
    Config { cases: count, ..Config::default() }
}

/// Bytes that differ from their neighbours.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Places for pieces of these lengths, one after another with gaps, and the whole length: a gap of a multiple of 16
/// keeps what follows aligned.
fn laid_out(lengths: impl IntoIterator<Item = usize>, gap: usize) -> (Vec<usize>, usize) {
    let mut end = gap;
    let mut place = |length: usize| {
        let at = end;
        end = (at + length).next_multiple_of(16) + gap;
        at
    };
    let places = lengths.into_iter().map(&mut place).collect();
    (places, end)
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn blocks_are_gathered_and_scattered_as_on_the_cpu(
        planes in 1usize..5,
        tokens_per_block in 1usize..9,
        token_bytes in prop_token_bytes(),
        shares in prop::collection::vec(0usize..100, 1..6),
        gap in prop::sample::select(vec![0usize, 16, 48, 1, 7, 40]),
    ) {
        let shape = PlaneShape { planes, tokens_per_block, token_bytes };
        let tokens: Vec<_> = shares.iter().map(|share| tokens_per_block * share / 99).collect();
        let lengths = tokens.iter().flat_map(|tokens| [shape.block_bytes(), shape.packed_bytes(*tokens)]);
        let (places, end) = laid_out(lengths, gap);
        let mut expected = noise(end);
        let bench = Bench::new();
        for gathers in [true, false] {
            bench.upload(&expected);
            let moves: Vec<_> = tokens.iter().zip(places.chunks_exact(2)).map(|(tokens, at)| {
                let (working, packed) = (at[0]..at[0] + shape.block_bytes(), at[1]..at[1] + shape.packed_bytes(*tokens));
                let (pitch, used) = ((tokens_per_block * token_bytes) as u64, (tokens * token_bytes) as u64);
                let (working_at, packed_at) = (bench.at(at[0]), bench.at(at[1]));
                if gathers {
                    let from = expected[working].to_vec();
                    gather(&shape, &from, *tokens, &mut expected[packed]);
                    Move { from: working_at, to: packed_at, from_pitch: pitch, to_pitch: used, bytes: used, rows: planes as u64 }
                } else {
                    let from = expected[packed].to_vec();
                    scatter(&shape, &from, *tokens, &mut expected[working]);
                    Move { from: packed_at, to: working_at, from_pitch: used, to_pitch: pitch, bytes: used, rows: planes as u64 }
                }
            }).collect();
            bench.kernels.move_planes(&bench.stream, &bench.table(&moves)).unwrap();
            assert!(bench.download(end) == expected, "another image, gathers: {gathers}, {shape:?}");
            // What is scattered is not what was gathered.
            for at in places.chunks_exact(2) {
                expected[at[1]..].iter_mut().take(shape.packed_bytes(1)).for_each(|byte| *byte = byte.wrapping_add(1));
            }
        }
    }

    #[test]
    fn ranges_are_zeroed_and_nothing_beside_them(
        lengths in prop::collection::vec(prop::sample::select(vec![0usize, 1, 5, 15, 16, 17, 31, 100, 4096, 20_001]), 1..20),
        gap in 1usize..40,
    ) {
        let (places, end) = laid_out(lengths.iter().copied(), gap);
        let mut expected: Vec<u8> = noise(end).into_iter().map(|byte| byte | 1).collect();
        let bench = Bench::new();
        bench.upload(&expected);
        let ranges: Vec<_> =
            places.iter().zip(&lengths).map(|(at, bytes)| Range { at: bench.at(*at), bytes: *bytes as u64 }).collect();
        bench.kernels.scrub(&bench.stream, &bench.table(&ranges)).unwrap();
        for (at, bytes) in places.iter().zip(lengths) {
            expected[*at..at + bytes].fill(0);
        }
        assert!(bench.download(end) == expected, "another image");
    }

    #[test]
    fn runs_of_strided_rows_have_the_cpus_checksums(
        runs in prop::collection::vec(prop::collection::vec(prop_rows(), 0..5), 1..5),
        gap in prop::sample::select(vec![16usize, 32, 3, 8]),
    ) {
        check_runs(&runs, gap);
    }

    #[test]
    fn planes_become_fp8_and_come_back_as_on_the_cpu(
        planes in prop::collection::vec((any::<u64>(), 0usize..700, 0u32..3), 1..8),
        kind in prop::sample::select(vec![Number::F32, Number::F16, Number::Bf16]),
    ) {
        let planes: Vec<_> = planes.into_iter().map(|(seed, count, style)| numbers(kind, seed, count, style)).collect();
        check_fp8(kind, &planes);
    }
}

/// Bytes of a token: what engines have, and what they have not.
fn prop_token_bytes() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1usize, 2, 12, 16, 33, 64, 128, 1152, 2048, 3001])
}

/// A row's length, how much more the pitch is, and the rows: what engines have, and what they have not.
fn prop_rows() -> impl Strategy<Value = (usize, usize, usize)> {
    let bytes = prop::sample::select(vec![0usize, 1, 3, 16, 48, 100, 256, 512, 1000, 4096, 4100, 9000]);
    (bytes, prop::sample::select(vec![0usize, 16, 1, 4096]), 0usize..6)
}

/// Lays rows out, hashes them, and compares each chunk's word and each run's checksum.
fn check_runs(runs: &[Vec<(usize, usize, usize)>], gap: usize) {
    let spans = runs.iter().flatten().map(|(bytes, more, rows)| (bytes + more) * rows);
    let (places, end) = laid_out(spans, gap);
    let image = noise(end);
    let bench = Bench::new();
    let (mut places, mut of_runs, mut descriptors, mut expected) =
        (places.iter(), Vec::new(), Vec::new(), Vec::new());
    for run in runs {
        let mut bytes = Vec::new();
        of_runs.push(descriptors.len());
        for ((length, more, rows), at) in run.iter().zip(&mut places) {
            let pitch = length + more;
            (0..*rows).for_each(|row| bytes.extend_from_slice(&image[at + row * pitch..][..*length]));
            let (at, pitch, bytes, rows) = (bench.at(*at), pitch as u64, *length as u64, *rows as u64);
            descriptors.push(Rows { at, pitch, bytes, rows });
        }
        expected.push(bytes);
    }
    let rows = bench.table(&descriptors);
    // Behind the image: each run's checksum, then its chunks' words.
    let room = |bytes: &Vec<u8>| 16 + 8 * bytes.len().div_ceil(CHUNK_BYTES);
    let base = end.next_multiple_of(16);
    let (results, more) = laid_out(expected.iter().map(room), 16);
    let (results, whole): (Vec<_>, _) = (results.into_iter().map(|at| base + at).collect(), base + more);
    bench.upload(&[image, vec![0xee; whole - end]].concat());
    let runs = of_runs.iter().zip(&results).zip(&expected).map(|((first, at), bytes)| Run {
        rows: rows.address(*first),
        bytes: bytes.len() as u64,
        chunks: bench.at(at + 16),
        checksum: bench.at(*at),
    });
    bench.kernels.checksums(&bench.stream, &bench.table(&runs.collect::<Vec<_>>())).unwrap();
    let found = bench.download(whole);
    for (bytes, at) in expected.iter().zip(results) {
        let words = bytes.chunks(CHUNK_BYTES).flat_map(|chunk| XxHash3_64::oneshot(chunk).to_le_bytes());
        assert_eq!(
            found[at + 16..][..room(bytes) - 16],
            words.collect::<Vec<_>>(),
            "chunks of {} bytes",
            bytes.len()
        );
        let sum: [u8; 16] = found[at..at + 16].try_into().unwrap();
        let sum = keepwarm_types::BlockChecksum::from_u128(u128::from_le_bytes(sum));
        assert_eq!(sum, block_checksum(bytes), "{} bytes", bytes.len());
    }
}

#[test]
fn chunks_of_every_length_class_have_the_cpus_checksums() {
    let around = [
        239, 240, 241, 255, 256, 257, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 3071, 4032, 4095, 4096, 4097,
    ];
    let lengths: Vec<usize> = (0..=240).chain(around).collect();
    for lengths in lengths.chunks(TABLE_MOST / 2) {
        let runs: Vec<_> = lengths.iter().map(|length| vec![(*length, 0, 1)]).collect();
        check_runs(&runs, 16);
    }
}

#[test]
fn lists_of_every_length_class_have_the_cpus_checksums() {
    let bench = Bench::new();
    let counts: Vec<usize> = (0..=34).chain([127, 128, 129, 255, 256, 257, 384, 1000]).collect();
    let (places, end) = laid_out(counts.iter().map(|count| 16 + 8 * count), 16);
    let image = noise(end);
    bench.upload(&image);
    let run = |(at, count): (&usize, &usize)| Run {
        rows: 0,
        bytes: (*count * CHUNK_BYTES) as u64,
        chunks: bench.at(at + 16),
        checksum: bench.at(*at),
    };
    let runs = bench.table(&places.iter().zip(&counts).map(run).collect::<Vec<_>>());
    launch(bench.kernels.hash_runs, &bench.stream, &runs).unwrap();
    let found = bench.download(end);
    for (at, count) in places.iter().zip(counts) {
        let expected = XxHash3_128::oneshot(&image[at + 16..][..8 * count]);
        assert_eq!(found[*at..at + 16], expected.to_le_bytes(), "{count} words");
    }
}

/// A plane's bytes: bits as they come, numbers of one size, or nothing but numbers that are special.
fn numbers(kind: Number, seed: u64, count: usize, style: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 32) as u32
    };
    let special =
        [0, 1, 0x0040_0000, 0x007f_ffff, 0x0080_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7fc0_0001, 0x7fff_ffff];
    let bits = (0..count).map(|_| match style {
        0 => next(),
        // Around one: the exponent of most numbers of a cache.
        1 => next() & 0x83ff_ffff | 0x3c00_0000,
        _ => special[next() as usize % special.len()] | next() & 0x8000_0000,
    });
    match kind {
        Number::F32 => bits.flat_map(u32::to_le_bytes).collect(),
        Number::Bf16 => bits.flat_map(|bits| ((bits >> 16) as u16).to_le_bytes()).collect(),
        // The upper bits are the same kinds of numbers there, with another exponent.
        Number::F16 => {
            bits.flat_map(|bits| ((bits >> 16) as u16 ^ (bits as u16 & 0x3ff)).to_le_bytes()).collect()
        }
    }
}

/// Quantises planes, compares scales and codes, and compares the numbers that come back.
fn check_fp8(kind: Number, planes: &[Vec<u8>]) {
    let lengths = planes.iter().flat_map(|plane| [plane.len(), plane.len() / kind.bytes(), 4]);
    let (places, end) = laid_out(lengths, 16);
    let mut expected = noise(end);
    let bench = Bench::new();
    for (plane, at) in planes.iter().zip(places.chunks_exact(3)) {
        expected[at[0]..][..plane.len()].copy_from_slice(plane);
    }
    bench.upload(&expected);
    let table = bench.table(
        &planes
            .iter()
            .zip(places.chunks_exact(3))
            .map(|(plane, at)| {
                let places = [at[0], at[1], at[2]].map(|at| bench.at(at));
                Planes::new(kind, places, (plane.len() / kind.bytes()) as u64, 1)
            })
            .collect::<Vec<_>>(),
    );
    bench.kernels.quantise(&bench.stream, &table).unwrap();
    for (plane, at) in planes.iter().zip(places.chunks_exact(3)) {
        let scale = fp8::quantise(kind, plane, &mut expected[at[1]..][..plane.len() / kind.bytes()]);
        expected[at[2]..][..4].copy_from_slice(&scale.to_le_bytes());
    }
    let found = bench.download(end);
    let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    assert_eq!(differs, None, "{kind:?}: codes or scales differ, planes at {places:?}");
    bench.kernels.dequantise(&bench.stream, &table).unwrap();
    for (plane, at) in planes.iter().zip(places.chunks_exact(3)) {
        let codes = expected[at[1]..][..plane.len() / kind.bytes()].to_vec();
        let scale = f32::from_le_bytes(expected[at[2]..][..4].try_into().unwrap());
        fp8::dequantise(kind, &codes, scale, &mut expected[at[0]..][..plane.len()]);
    }
    assert!(bench.download(end) == expected, "{kind:?}: other numbers came back");
}

#[test]
fn every_half_becomes_the_cpus_code() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for kind in [Number::F16, Number::Bf16] {
        // Each exponent a plane of its own, so that all codes occur; and all of them together.
        let mut planes: Vec<_> = all.chunks(2048).map(<[u8]>::to_vec).collect();
        planes.push(all.clone());
        check_fp8(kind, &planes);
    }
}

#[test]
fn any_grid_serves_all_descriptors_to_their_end() {
    let bench = Bench::new();
    let (places, end) = laid_out([9000; 7], 3);
    for grid in [(1, 1), (2, 3), (3, 9)] {
        let mut expected: Vec<u8> = noise(end).into_iter().map(|byte| byte | 1).collect();
        bench.upload(&expected);
        bench.kernels.scrub(&bench.stream, &bench.table(&[])).unwrap();
        let ranges: Vec<_> = places[..4].iter().map(|at| Range { at: bench.at(*at), bytes: 9000 }).collect();
        launch_on(bench.kernels.scrub, &bench.stream, &bench.table(&ranges), grid).unwrap();
        // Two planes of three rows each, over the two that follow.
        let rows = |from: usize, to: usize| Move {
            from: bench.at(from),
            to: bench.at(to),
            from_pitch: 2000,
            to_pitch: 3000,
            bytes: 1999,
            rows: 3,
        };
        let moves = [rows(places[6], places[4]), rows(places[6] + 5, places[5])];
        launch_on(bench.kernels.move_planes, &bench.stream, &bench.table(&moves), grid).unwrap();
        places[..4].iter().for_each(|at| expected[*at..at + 9000].fill(0));
        for (from, to) in [(places[6], places[4]), (places[6] + 5, places[5])] {
            (0..3).for_each(|row| {
                let from = from + row * 2000;
                expected.copy_within(from..from + 1999, to + row * 3000);
            });
        }
        assert!(bench.download(end) == expected, "another image by grid {grid:?}");
    }
}

#[test]
fn a_grid_has_no_more_blocks_than_help() {
    let bench = Bench::new();
    let range = |bytes| Range { at: 0, bytes };
    for (ranges, grid) in [
        (vec![range(0)], (1, 1)),
        (vec![range(1), range(4097)], (2, 2)),
        (vec![range(1 << 40)], (4096, 1)),
        (vec![range(1 << 40); 100], (40, 100)),
    ] {
        assert_eq!(bench.table(&ranges).grid(), grid);
    }
    let mut table = Table::reserve(bench.context, 70_000).unwrap();
    // SAFETY: nothing reads a new table.
    unsafe { table.set(&vec![range(100); 70_000]) };
    assert_eq!(table.grid(), (1, 65_535), "kernels stride over the rest");
}

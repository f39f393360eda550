//! A CUDA device: what a restore and a checkpoint of n blocks cost in driver calls, bytes and time. Without a GPU on
//! softcuda, which counts and traces and says nothing about speed; with `KEEPWARM_TEST_DEVICE=gpu` on the machine's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::executor::block_on;
use futures::future::join_all;
use keepwarm_memory::{
    Arena, ArenaSettings, Block, CUDA_PATIENCE, CudaDevice, CudaDriver, CudaSelector, Device, Direction,
    FaultPlan, Job,
};
use keepwarm_types::{Birth, Bytes, Owner};
use serde_json::Value;
use softcuda::preload::preload;

use crate::{ROUNDS, median};

/// A block of 16 tokens of an 8B model's state: 32 layers x 8 heads x 128 x K and V x 2 bytes x 16.
const BLOCK: usize = 2 << 20;
/// On softcuda, whose kernels run on a fiber for each thread: 256 MiB of the above take it longer than a device may take.
/// Calls and bytes for each byte needed do not depend on it.
const SOFT_BLOCK: usize = 64 << 10;
/// Sessions of 16, 256 and 2,048 tokens.
const LENGTHS: [usize; 3] = [1, 16, 128];
/// Restores that are under way together in the look at overlap.
const TOGETHER: usize = 8;

/// What ran on the device's streams, or was called.
struct Line {
    symbol: String,
    kernel: String,
    bytes: u64,
    begin: u64,
    end: u64,
}

struct Bench {
    device: CudaDevice,
    pinned: Arena,
    owner: Owner,
    /// Bytes of a block.
    block: usize,
    /// softcuda's trace, and how much of it was read.
    trace: Option<PathBuf>,
}

impl Bench {
    fn new(folder: &Path) -> Self {
        let real = std::env::var("KEEPWARM_TEST_DEVICE").is_ok_and(|device| device == "gpu");
        let trace = folder.join("trace");
        if !real {
            let kernels = folder.join("kernels.so");
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
            let sources = softcuda::kernels::sources(&folder).unwrap();
            softcuda::kernels::compile(&sources, &kernels, &[]).unwrap();
            let settings = [
                ("SOFTCUDA_KERNELS", kernels.to_str().unwrap()),
                ("SOFTCUDA_TRACE", trace.to_str().unwrap()),
                ("SOFTCUDA_RACES", "abort"),
            ];
            preload(&settings).expect("softcuda is built: cargo build --release --workspace");
        }
        let driver = CudaDriver::load().unwrap();
        let settings = |name: &str| ArenaSettings::new(name, Bytes(640 << 20));
        let faults = Arc::new(FaultPlan::default());
        let device =
            CudaDevice::open(&driver, &CudaSelector::Number(0), &settings("hbm:0"), faults, CUDA_PATIENCE)
                .unwrap();
        let pinned = device.page_locked(&settings("pinned")).unwrap();
        let owner = Owner { tenant: "bench".parse().unwrap(), birth: Birth::from_random(1) };
        let word = if real { "the machine's own" } else { "softcuda, in host memory: its times say nothing" };
        println!("device: {} ({word})", device.found().name);
        let block = if real { BLOCK } else { SOFT_BLOCK };
        Self { device, pinned, owner, block, trace: (!real).then_some(trace) }
    }

    fn sources(&self, blocks: usize) -> Vec<Block> {
        let room = self.pinned.allocate(&self.owner, Bytes(self.block as u64), blocks).unwrap();
        let fill = |(n, mut block): (usize, keepwarm_memory::BlockMut)| {
            block.bytes_mut().fill(n as u8);
            block.seal(self.block).unwrap()
        };
        room.into_iter().enumerate().map(fill).collect()
    }

    fn jobs(&self, direction: Direction, sources: &[Block]) -> Vec<Job> {
        let arena = if direction == Direction::In { self.device.arena() } else { &self.pinned };
        let targets = arena.allocate(&self.owner, Bytes(self.block as u64), sources.len()).unwrap();
        sources.iter().cloned().zip(targets).map(|(source, target)| Job { source, target }).collect()
    }

    fn copy(&self, direction: Direction, sources: &[Block]) -> Vec<Block> {
        let jobs = self.jobs(direction, sources);
        block_on(self.device.submit(direction, jobs).unwrap()).unwrap()
    }

    /// What the trace has so far.
    fn traced(&self) -> Vec<Value> {
        let text = self.trace.as_ref().map(|path| std::fs::read_to_string(path).unwrap_or_default());
        text.unwrap_or_default().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Runs `work`; the operations, and the calls but for asking whether an event has passed, that it took.
    fn watched<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<Line>, Vec<Line>) {
        let before = self.traced().len();
        let done = work();
        let line = |value: &Value| Line {
            symbol: value["symbol"].as_str().unwrap_or_default().to_owned(),
            kernel: value["kernel"].as_str().unwrap_or_default().to_owned(),
            bytes: value["bytes"].as_u64().unwrap_or(0),
            begin: value["begin_ns"].as_u64().unwrap_or(0),
            end: value["end_ns"].as_u64().unwrap_or(0),
        };
        let (mut operations, mut calls) = (Vec::new(), Vec::new());
        for value in &self.traced()[before..] {
            match value["kind"].as_str() {
                Some("operation") => operations.push(line(value)),
                Some("call") if value["symbol"] != "cuEventQuery" => calls.push(line(value)),
                _ => {}
            }
        }
        (done, operations, calls)
    }
}

fn counts(calls: &[Line]) -> String {
    let mut by_symbol = BTreeMap::new();
    for call in calls {
        *by_symbol.entry(call.symbol.as_str()).or_insert(0) += 1;
    }
    by_symbol.iter().map(|(symbol, count)| format!("{symbol} {count}")).collect::<Vec<_>>().join(", ")
}

/// Nanoseconds in which an interval of one and an interval of the other both run.
fn overlap(one: &[&Line], other: &[&Line]) -> u64 {
    let both = |a: &Line, b: &Line| a.end.min(b.end).saturating_sub(a.begin.max(b.begin));
    one.iter().map(|a| other.iter().map(|b| both(a, b)).sum::<u64>()).sum()
}

pub(crate) fn run() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::new(folder.path());
    for blocks in LENGTHS {
        let sources = bench.sources(blocks);
        drop(bench.copy(Direction::In, &sources));
        let (there, operations, calls) = bench.watched(|| bench.copy(Direction::In, &sources));
        report(&bench, "restore", blocks, &operations, &calls, "cuMemcpyHtoDAsync_v2");
        let (back, operations, calls) = bench.watched(|| bench.copy(Direction::Out, &there));
        report(&bench, "checkpoint", blocks, &operations, &calls, "cuMemcpyDtoHAsync_v2");
        assert_eq!(back[0].checksum(), sources[0].checksum());
    }
    if bench.trace.is_some() {
        overlapping(&bench);
    }
    speed(&bench);
}

fn report(bench: &Bench, what: &str, blocks: usize, operations: &[Line], calls: &[Line], copy: &str) {
    if bench.trace.is_none() {
        return;
    }
    let copied: u64 = operations.iter().filter(|line| line.symbol == copy).map(|line| line.bytes).sum();
    let needed = (blocks * bench.block) as u64;
    println!(
        "{what} of {blocks:>3} blocks: bytes copied / needed {:.2}; {} driver calls: {}",
        copied as f64 / needed as f64,
        calls.len(),
        counts(calls)
    );
}

/// Restores that follow one another: the next one's copies run while the last one's bytes are hashed.
fn overlapping(bench: &Bench) {
    let sources = bench.sources(LENGTHS[1]);
    let (restored, operations, _) = bench.watched(|| {
        let submit = |_| bench.device.submit(Direction::In, bench.jobs(Direction::In, &sources)).unwrap();
        let transfers: Vec<_> = (0..TOGETHER).map(submit).collect();
        block_on(join_all(transfers))
    });
    assert!(restored.iter().all(Result::is_ok));
    let copies: Vec<_> = operations.iter().filter(|line| line.symbol.starts_with("cuMemcpyHtoD")).collect();
    let kernels: Vec<_> = operations.iter().filter(|line| !line.kernel.is_empty()).collect();
    let total: u64 = copies.iter().map(|line| line.end - line.begin).sum();
    println!(
        "{TOGETHER} restores together: {:.0} % of the copies' time has a kernel running beside it",
        100.0 * overlap(&copies, &kernels) as f64 / total.max(1) as f64
    );
}

/// Restores next to one plain copy of as many bytes.
fn speed(bench: &Bench) {
    let blocks = LENGTHS[2];
    let bytes = Bytes((blocks * bench.block) as u64);
    let sources = bench.sources(blocks);
    let rate = |seconds: f64| bytes.0 as f64 / seconds / 1e9;
    for (direction, word) in [(Direction::In, "restore"), (Direction::Out, "checkpoint")] {
        let (mut moved, mut plain) = (Vec::new(), Vec::new());
        let there = bench.copy(Direction::In, &sources);
        for warm in 0..=ROUNDS {
            let from = if direction == Direction::In { &sources } else { &there };
            let begun = std::time::Instant::now();
            drop(bench.copy(direction, from));
            let took = begun.elapsed().as_secs_f64();
            let copy = bench.device.time_plain_copy(direction, bytes).unwrap().as_secs_f64();
            if warm > 0 {
                moved.push(rate(took));
                plain.push(rate(copy));
            }
        }
        let ratio = median(moved.iter().zip(&plain).map(|(a, b)| a / b).collect());
        println!(
            "{word} of {bytes}: {:.1} GB/s verified, a plain copy {:.1} GB/s, ratio {ratio:.2}",
            median(moved),
            median(plain)
        );
    }
}

//! Bringing a session from pinned memory to the host device, checksums verified, next to a plain memcpy of the
//! same bytes.

use std::sync::Arc;
use std::time::Instant;

use keepwarm_memory::{Arena, ArenaSettings, Block, Device, Direction, FaultPlan, HostDevice, Job};
use keepwarm_types::{Birth, Bytes, Owner};

use crate::{ROUNDS, median};

/// A block of SmolLM2-135M's state, and the blocks of 2,000 tokens.
const BLOCK: usize = 368_640;
const BLOCKS: usize = 125;

pub(crate) fn run() {
    let settings = |name: &str| ArenaSettings::new(name, Bytes(512 << 20));
    let pinned = Arena::reserve(&settings("pinned").locked()).unwrap();
    let device = HostDevice::new(&settings("hbm:0"), Arc::new(FaultPlan::default())).unwrap();
    let owner = Owner { tenant: "bench".parse().unwrap(), birth: Birth::from_random(1) };
    let sources: Vec<Block> = pinned
        .allocate(&owner, Bytes(BLOCK as u64), BLOCKS)
        .unwrap()
        .into_iter()
        .map(|mut block| {
            block.bytes_mut().fill(9);
            block.seal(BLOCK).unwrap()
        })
        .collect();
    let from = vec![9u8; BLOCK * BLOCKS];
    let mut to = vec![1u8; BLOCK * BLOCKS];
    let (mut restores, mut copies) = (Vec::new(), Vec::new());
    for warm in 0..=ROUNDS * 4 {
        let started = Instant::now();
        let targets = device.arena().allocate(&owner, Bytes(BLOCK as u64), BLOCKS).unwrap();
        let jobs =
            sources.iter().cloned().zip(targets).map(|(source, target)| Job { source, target }).collect();
        let restored = futures::executor::block_on(device.submit(Direction::In, jobs).unwrap()).unwrap();
        let restore = started.elapsed().as_secs_f64();
        drop(restored);
        let started = Instant::now();
        for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
            to.copy_from_slice(from);
        }
        std::hint::black_box(&to);
        let copy = started.elapsed().as_secs_f64();
        if warm > 0 {
            restores.push((BLOCK * BLOCKS) as f64 / restore / 1e9);
            copies.push((BLOCK * BLOCKS) as f64 / copy / 1e9);
        }
    }
    let ratio = median(restores.iter().zip(&copies).map(|(a, b)| a / b).collect());
    println!(
        "restore of {} MiB: {:.1} GB/s, memcpy {:.1} GB/s, ratio {ratio:.2}",
        (BLOCK * BLOCKS) >> 20,
        median(restores),
        median(copies)
    );
}

//! The arena's shared table under thousands of schedules of its threads (shuttle: randomised, with preemptions
//! bounded; Burckhardt et al., ASPLOS 2010).
#![cfg(feature = "shuttle")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_memory::{Arena, ArenaSettings};
use keepwarm_types::{Birth, Bytes, Owner};
use shuttle::thread;

const SCHEDULES: usize = 2_000;
/// Preemptions of a schedule: most races need few.
const PREEMPTIONS: usize = 3;

/// Each thread takes blocks, fills them with its own byte, shares, drops and reads them; nobody's bytes change
/// but by their owner, and at the end all is given back.
fn threads_take_and_give_back() {
    let arena = Arena::reserve(&ArenaSettings::new("shuttle", Bytes(64 << 10)).fitting(Bytes(4096))).unwrap();
    let workers: Vec<_> = (1..=3u8)
        .map(|canary| {
            let arena = arena.clone();
            thread::spawn(move || {
                let tenant = format!("tenant{canary}").parse().unwrap();
                let owner = Owner { tenant, birth: Birth::from_random(canary.into()) };
                for round in 0..3 {
                    let size = Bytes(3000 + round * 1500);
                    let Ok(mut blocks) = arena.allocate(&owner, size, 2) else { continue };
                    let mut block = blocks.pop().unwrap();
                    drop(blocks);
                    assert!(block.bytes_mut().iter().all(|byte| [0, canary].contains(byte)), "foreign bytes");
                    block.bytes_mut().fill(canary);
                    thread::yield_now();
                    let length = block.written();
                    let block = block.seal(length).unwrap();
                    let (twin, reading) = (block.clone(), owner.clone());
                    let reader = thread::spawn(move || {
                        assert!(twin.bytes(&reading).unwrap().iter().all(|byte| *byte == canary));
                    });
                    drop(block);
                    reader.join().unwrap();
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    arena.validate();
    assert_eq!((arena.figures().used, arena.figures().blocks), (Bytes(0), 0));
}

#[test]
fn no_schedule_mixes_or_loses_blocks() {
    shuttle::check_pct(threads_take_and_give_back, SCHEDULES, PREEMPTIONS);
    shuttle::check_random(threads_take_and_give_back, SCHEDULES);
}

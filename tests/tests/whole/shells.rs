//! Whole nodes in a simulated network: see `keepwarm_tests::shells`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_tests::shells::{Options, run};

/// Seeds of the test command.
const SEEDS: u64 = 24;

#[test]
fn whole_nodes_keep_their_promises_in_a_bad_network() {
    let mut acknowledged = 0;
    for seed in 0..SEEDS {
        match run(Options { seed, verbose: false }) {
            Ok(ran) => acknowledged += ran.counts.acknowledged,
            Err(broken) => panic!("seed {seed}: {broken}"),
        }
    }
    assert!(acknowledged >= SEEDS * 50, "{acknowledged} acknowledged writes are too few to say anything");
}

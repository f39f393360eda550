//! The simulated cluster, seed after seed, and the bugs that it must find.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_tests::cluster_sim::{Bug, Options, run};

/// Seeds of the test command; `cargo xtask sim --cluster --seeds N` runs more.
const SEEDS: u64 = 2_000;

//= GUARANTEES.md#G1
//= GUARANTEES.md#G2
//= GUARANTEES.md#G3
//= GUARANTEES.md#G4
//= GUARANTEES.md#G8
//= GUARANTEES.md#G10
//= GUARANTEES.md#G11
#[test]
fn no_seed_finds_a_broken_promise() {
    let (mut done, mut refused, mut unknown) = (0, 0, 0);
    for seed in 0..SEEDS {
        let ran = run(&Options { seed, ..Options::default() }).unwrap_or_else(|report| panic!("{report}"));
        done += ran.answered.get("done").copied().unwrap_or(0);
        refused += ran.answered.get("refused").copied().unwrap_or(0);
        unknown += ran.answered.get("unknown").copied().unwrap_or(0);
    }
    assert!(
        done > 100 * SEEDS && refused > SEEDS && unknown > SEEDS / 10,
        "{done} done, {refused} refused, {unknown} unknown"
    );
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        let within = bug.found_within();
        let found = (0..within)
            .find(|seed| run(&Options { seed: *seed, bug: Some(bug), ..Options::default() }).is_err());
        assert!(found.is_some(), "{bug:?} was not found within {within} seeds");
    }
}

#[test]
fn a_seed_is_a_history() {
    for seed in [3, 4, 5] {
        let of = |seed| run(&Options { seed, ..Options::default() }).unwrap();
        assert_eq!(of(seed), of(seed));
        assert_ne!(of(seed), of(seed + 10));
    }
}

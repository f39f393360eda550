//! The simulated node, seed after seed, and the bugs that it must find.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_tests::sim::{Bug, Options, run};

/// Seeds of the test command; `cargo xtask sim --seeds N` runs more.
const SEEDS: u64 = 2_000;
/// Within so many seeds every planted bug is found.
const BUG_SEEDS: u64 = 60;

//= GUARANTEES.md#G1
//= GUARANTEES.md#G2
//= GUARANTEES.md#G3
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
        done > 100 * SEEDS && refused > SEEDS && unknown > 0,
        "{done} done, {refused} refused, {unknown} unknown"
    );
}

/// The same history, with a crash after its first happening, after its second, ...
#[test]
fn a_crash_at_any_step_breaks_no_promise() {
    let whole = run(&Options { seed: 7, crash_at: Some(u64::MAX), ..Options::default() }).unwrap();
    for step in 1..whole.steps.min(2_500) {
        let options = Options { seed: 7, crash_at: Some(step), ..Options::default() };
        run(&options).unwrap_or_else(|report| panic!("{report}"));
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        let found = (0..BUG_SEEDS).find(|seed| {
            let options = Options { seed: *seed, bug: Some(bug), ..Options::default() };
            std::panic::catch_unwind(|| run(&options)).map_or(true, |ran| ran.is_err())
        });
        assert!(found.is_some(), "{bug:?} was not found within {BUG_SEEDS} seeds");
    }
}

#[test]
fn a_seed_is_a_history() {
    let of = |seed| {
        let ran = run(&Options { seed, ..Options::default() }).unwrap();
        (ran.steps, ran.virtual_ms, ran.answered)
    };
    assert_eq!(of(3), of(3));
    assert_ne!(of(3), of(4));
}

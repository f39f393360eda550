//! Three nodes as processes, hurt in each way once under writers and readers; what their history promises must hold.
//! `cargo xtask chaos` is the same for longer.
#![allow(clippy::print_stdout, reason = "a test that cannot go on says why")]

use keepwarm_tests::chaos::{self, Fault, Length, Options};

/// Always the same schedule: what differs between two runs is the machine's doing.
const SEED: u64 = 1;

//= GUARANTEES.md#G10
//= GUARANTEES.md#G11
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_outlives_kills_quick_restarts_and_pauses() {
    let options = Options {
        program: env!("CARGO_BIN_EXE_keepwarm").into(),
        seed: SEED,
        length: Length::Rounds(Fault::ALL.len() as u64),
        faults: Fault::ALL.to_vec(),
    };
    let report = chaos::run(&options).await.expect("the run begins");
    println!("{}", report.text());
    assert!(report.passed(), "{}", report.text());
    assert!(report.counts.acknowledged > 0 && report.counts.reads > 0, "{:?}", report.counts);
}

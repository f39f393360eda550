//! Three nodes as processes, hurt in each way once under writers and readers; what their history promises must hold.
//! `cargo xtask chaos` is the same for longer.
#![allow(clippy::print_stdout, reason = "a test that cannot go on says why")]

use keepwarm_tests::chaos::checker::Promise;
use keepwarm_tests::chaos::report::Report;
use keepwarm_tests::chaos::{self, Fault, Length, Options, Plant};

/// Always the same schedule: what differs between two runs is the machine's doing.
const SEED: u64 = 1;

async fn chaos(faults: &[Fault], plant: Option<Plant>) -> Report {
    let options = Options {
        program: env!("CARGO_BIN_EXE_keepwarm").into(),
        seed: SEED,
        length: Length::Rounds(faults.len() as u64),
        faults: faults.to_vec(),
        plant,
    };
    let report = chaos::run(&options).await.expect("the run begins and can be judged");
    println!("{}", report.text());
    report
}

//= GUARANTEES.md#G10
//= GUARANTEES.md#G11
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_outlives_kills_quick_restarts_and_pauses() {
    let report = chaos(&Fault::ALL, None).await;
    assert!(report.passed(), "{}", report.text());
    assert!(report.counts.acknowledged > 0 && report.counts.reads > 0, "{:?}", report.counts);
    assert_eq!(report.faults.len(), Fault::ALL.len());
}

/// The run on a cluster that breaks this promise says so, and keeps what shows it.
async fn is_found(plant: Plant, promise: Promise) {
    let report = chaos(&[], Some(plant)).await;
    let told = report.violations.iter().any(|violation| violation.promise == promise);
    assert!(told, "{promise:?} was not told of {plant:?}: {}", report.text());
    let folder = report.folder.expect("a failed run keeps its folder");
    assert!(folder.join("history.jsonl").exists() && folder.join("n1.log").exists());
    std::fs::remove_dir_all(folder).expect("the folder is ours");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_went_with_nodes_whose_kill_nobody_told_are_found() {
    is_found(Plant::UntoldKill, Promise::Cold).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_went_with_disks_put_back_are_found() {
    is_found(Plant::OldDisks, Promise::Lost).await;
}

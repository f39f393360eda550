//! `cargo xtask sim`: the simulation of a node, seed by seed.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use keepwarm_tests::sim::{Bug, Options, run};

/// Runs the simulated node and says what it promised and broke.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim")]
struct Args {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds from there on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Crash once after this happening, and let nothing else go wrong.
    #[arg(long)]
    crash_at: Option<u64>,
    /// Plant a bug, by its name.
    #[arg(long, value_parser = bug)]
    bug: Option<Bug>,
    /// Print all that happens.
    #[arg(long)]
    verbose: bool,
}

fn bug(name: &str) -> Result<Bug, String> {
    let all = Bug::ALL.map(|bug| format!("{bug:?}"));
    let known = Bug::ALL.into_iter().find(|bug| format!("{bug:?}").eq_ignore_ascii_case(name));
    known.ok_or_else(|| format!("there is no bug '{name}'; there are {}", all.join(", ")))
}

fn main() -> ExitCode {
    let Args { seed, seeds, crash_at, bug, verbose } = Args::parse();
    let begun = Instant::now();
    let (mut steps, mut virtual_ms) = (0, 0);
    for seed in seed..seed.saturating_add(seeds) {
        match run(&Options { seed, crash_at, bug, verbose }) {
            Ok(ran) => {
                steps += ran.steps;
                virtual_ms += ran.virtual_ms;
            }
            Err(report) => {
                println!("seed {seed}: {report}");
                return ExitCode::FAILURE;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{seeds} seeds, {steps} happenings, no promise broken: {:.0} seeds a minute, {:.0} virtual seconds a second",
        seeds as f64 / seconds * 60.0,
        virtual_ms as f64 / 1000.0 / seconds
    );
    ExitCode::SUCCESS
}

//! `cargo xtask sim`: the simulations of a node, of a cluster (`--cluster`) and of whole nodes in a simulated network
//! (`--shells`), seed by seed.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use keepwarm_tests::{cluster_sim, shells, sim};

/// Runs the simulated node, or cluster, and says what it promised and broke.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim")]
struct Args {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds from there on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Several nodes, instead of one.
    #[arg(long)]
    cluster: bool,
    /// Whole nodes, with their actors, disks and QUIC links, in a simulated network.
    #[arg(long, conflicts_with = "cluster")]
    shells: bool,
    /// Crash once after this happening, and let nothing else go wrong; of one node only.
    #[arg(long, conflicts_with_all = ["cluster", "shells"])]
    crash_at: Option<u64>,
    /// Plant a bug, by its name.
    #[arg(long, conflicts_with = "shells")]
    bug: Option<String>,
    /// Print all that happens.
    #[arg(long)]
    verbose: bool,
}

/// The planted bug of this name.
fn named<B: Copy + std::fmt::Debug>(name: Option<&str>, all: &[B]) -> Result<Option<B>, String> {
    let Some(name) = name else { return Ok(None) };
    let known = all.iter().find(|bug| format!("{bug:?}").eq_ignore_ascii_case(name)).copied();
    let names: Vec<_> = all.iter().map(|bug| format!("{bug:?}")).collect();
    known.map(Some).ok_or_else(|| format!("there is no bug '{name}'; there are {}", names.join(", ")))
}

/// Runs one seed; happenings and virtual milliseconds.
fn run(args: &Args, seed: u64) -> Result<(u64, u64), String> {
    let verbose = args.verbose;
    if args.cluster {
        let bug = named(args.bug.as_deref(), &cluster_sim::Bug::ALL)?;
        let ran = cluster_sim::run(&cluster_sim::Options { seed, bug, verbose, traced: false })?;
        return Ok((ran.steps, ran.virtual_ms));
    }
    if args.shells {
        let ran = shells::run(shells::Options { seed, verbose })?;
        return Ok((ran.counts.acknowledged, ran.virtual_ms));
    }
    let bug = named(args.bug.as_deref(), &sim::Bug::ALL)?;
    let ran = sim::run(&sim::Options { seed, crash_at: args.crash_at, bug, verbose })?;
    Ok((ran.steps, ran.virtual_ms))
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.shells && args.verbose {
        // What the nodes log, each line with the node's address.
        let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| "info,openraft=error".to_owned());
        tracing_subscriber::fmt().with_env_filter(wanted).with_ansi(false).init();
    }
    let begun = Instant::now();
    let (mut steps, mut virtual_ms) = (0, 0);
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        match run(&args, seed) {
            Ok(ran) => {
                steps += ran.0;
                virtual_ms += ran.1;
            }
            Err(report) => {
                println!("seed {seed}: {report}");
                return ExitCode::FAILURE;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{} seeds, {steps} {}, no promise broken: {:.0} seeds a minute, {:.0} virtual seconds a second",
        args.seeds,
        if args.shells { "acknowledged writes" } else { "happenings" },
        args.seeds as f64 / seconds * 60.0,
        virtual_ms as f64 / 1000.0 / seconds
    );
    ExitCode::SUCCESS
}

//! `cargo xtask chaos`: three node processes under kills, restarts and stops, with a history that is checked.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use keepwarm_tests::chaos::{self, Fault, Length, Options, Plant};

/// An hour: what a history has room for.
const SECONDS_MAX: u64 = 3600;

/// Kills, restarts and stops node processes under load, and checks what their clients saw.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask chaos")]
struct Args {
    /// No fault begins after so many seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    seconds: u64,
    /// So many faults, however long they take.
    #[arg(long, conflicts_with = "seconds", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// Which faults in which order, at which nodes; drawn and told where absent.
    #[arg(long)]
    seed: Option<u64>,
    /// Which faults: kill, restart, pause, all.
    #[arg(long, value_delimiter = ',', default_value = "kill,restart,pause,all")]
    faults: Vec<Fault>,
    /// Break the cluster behind the checker's back, which must see it: untold-kill or old-disks.
    #[arg(long)]
    plant: Option<Plant>,
    /// Also write the report as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The keepwarm binary.
    #[arg(long, value_name = "FILE", default_value = "target/release/keepwarm")]
    program: PathBuf,
}

async fn run(args: Args) -> Result<bool, String> {
    let drawn = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let options = Options {
        program: args.program,
        seed: args.seed.unwrap_or_else(drawn),
        length: args.rounds.map_or(Length::Seconds(args.seconds), Length::Rounds),
        faults: args.faults,
        plant: args.plant,
    };
    println!("{}", options.command());
    let report = tokio::select! {
        report = chaos::run(&options) => report?,
        // Dropping the run ends its processes.
        _ = tokio::signal::ctrl_c() => return Err("interrupted".to_owned()),
    };
    println!("\n{}", report.text());
    if let Some(file) = &args.report {
        let text = serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?;
        std::fs::write(file, text).map_err(|error| format!("--report {}: {error}", file.display()))?;
    }
    Ok(report.passed())
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

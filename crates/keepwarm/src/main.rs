//! The keepwarm binary: command line, wiring, signals, exit codes.
//!
//! It owns what people see in a terminal, and the order in which a node starts and stops. All else is in
//! the crates that it puts together; the client commands and the demo know a node by its HTTP API alone.

mod cli;
mod commands;
mod demo;
mod failure;
mod output;
mod place;
mod wiring;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, GpuVerb, LogFormat, ModelVerb};
use failure::Failure;
use output::{Output, note};

/// What the log has where RUST_LOG does not say: a server tells of its start and its troubles, a command of
/// its troubles. What the consensus library meets is told by who uses it, once.
fn default_filter(command: &Command) -> &'static str {
    if matches!(command, Command::Serve(_)) { "info,openraft=off" } else { "warn" }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter(&cli.command)));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            note(&format!("keepwarm: no threads to run on: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(Box::pin(run(cli)));
    // What still runs in the background, a read of standard input among it, need not end first.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            note(&format!("keepwarm: {failure}"));
            failure.exit_code()
        }
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let output = Output { json: cli.json };
    match cli.command {
        Command::Serve(args) => wiring::serve(*args).await,
        Command::Demo(args) => demo::run(args, output).await,
        Command::Init(args) => commands::init::run(&args, output),
        Command::Cert { verb } => commands::cert::run(&verb, output),
        Command::Check(args) => commands::check::run(&args, output),
        Command::Gpu { verb: GpuVerb::Probe(args) } => commands::gpu::probe(&args, output),
        Command::Status(remote) => commands::status::run(&remote, output).await,
        Command::Sessions { remote, verb } => commands::sessions::run(&remote, verb, output).await,
        Command::Chat(args) => commands::chat::run(args, output).await,
        Command::Bench(args) => commands::bench::run(&args, output).await,
        Command::Model { verb: ModelVerb::Fetch } => commands::model::fetch(output).await,
    }
}

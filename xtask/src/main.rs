//! Developer commands: `cargo xtask test`, `tidy`, `bench`, `sim`, `chaos`, `softcuda`, `kernels`.
#![expect(clippy::print_stdout, reason = "a command-line tool")]

mod kernels;
mod softcuda;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Developer commands of keepwarm")]
struct Options {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Every check and test that can run on this machine; names what it skipped and why.
    Test(test::TestOptions),
    /// Imports, file and function lengths, names, guarantee tags, module docs.
    Tidy,
    /// Figures, each with its peer or limit in the same run.
    Bench {
        /// Which; all where none is named.
        names: Vec<String>,
    },
    /// The simulation of a node, or with `--cluster` of several: `--seed N`, `--seeds M`, `--verbose`; see its own
    /// `--help`.
    #[command(disable_help_flag = true)]
    Sim {
        /// Options of the simulation.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Node processes killed, restarted and stopped under load, with a checked history: `--seconds N`, `--seed N`,
    /// `--faults kill,restart,pause,all`, `--report FILE`; see its own `--help`.
    #[command(disable_help_flag = true)]
    Chaos {
        /// Options of the chaos.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Runs a command on the software CUDA driver: `--gpus 2 --memory 1GiB -- COMMAND ...`; see its README.
    Softcuda(softcuda::SoftcudaOptions),
    /// Compiles `kernels/*.cu` to `kernels/ptx`, and says what each kernel takes; needs Python, no GPU and no CUDA.
    Kernels(kernels::KernelsOptions),
}

/// The repository's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, PathBuf::from)
}

/// Builds and runs a package's program.
fn cargo_run(package: &str, program: &str, arguments: &[String]) -> Result<bool> {
    let mut command = Command::new("cargo");
    command
        .args(["run", "--release", "--quiet", "--package", package, "--bin", program, "--"])
        .args(arguments)
        .current_dir(root());
    Ok(command.status().context("cargo could not be started")?.success())
}

/// Builds the binary and hurts it.
fn chaos(arguments: &[String]) -> Result<bool> {
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "--quiet", "--package", "keepwarm"]).current_dir(root());
    if !build.status().context("cargo could not be started")?.success() {
        return Ok(false);
    }
    cargo_run("keepwarm-tests", "chaos", arguments)
}

fn run(options: &Options) -> Result<bool> {
    match &options.command {
        Task::Test(options) => test::run(&root(), options),
        Task::Tidy => tidy::run(&root()),
        Task::Bench { names } => cargo_run("keepwarm-benches", "keepwarm-benches", names),
        Task::Sim { options } => cargo_run("keepwarm-tests", "sim", options),
        Task::Chaos { options } => chaos(options),
        Task::Softcuda(options) => softcuda::run(&root(), options),
        Task::Kernels(options) => kernels::run(&root(), options),
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

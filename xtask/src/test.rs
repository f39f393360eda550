//! The test command: one release build for tests, demo and binary; a summary that hides nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct TestOptions {
    /// Only formatting, lints and tidy.
    #[arg(long)]
    quick: bool,
    /// Only the suites that run on a GPU, on this machine's.
    #[arg(long, conflicts_with = "quick")]
    gpu: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

struct Steps {
    done: Vec<(&'static str, Outcome, Duration)>,
}

impl Steps {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Outcome) {
        println!("\n== {name}");
        let started = Instant::now();
        let outcome = work();
        self.done.push((name, outcome, started.elapsed()));
    }

    /// Says how each step ended; true if none failed.
    fn summary(&self) -> bool {
        println!("\n== summary");
        let mut green = true;
        for (name, outcome, took) in &self.done {
            let word = match outcome {
                Outcome::Passed => "passed".to_owned(),
                Outcome::Failed(reason) => {
                    green = false;
                    format!("FAILED: {reason}")
                }
                Outcome::Skipped(reason) => format!("skipped: {reason}"),
            };
            println!("{name:<14} {:>6.1} s  {word}", took.as_secs_f64());
        }
        green
    }
}

fn command(root: &Path, program: &str, arguments: &[&str]) -> Outcome {
    println!("   {program} {}", arguments.join(" "));
    match Command::new(program).args(arguments).current_dir(root).status() {
        Ok(status) if status.success() => Outcome::Passed,
        Ok(status) => Outcome::Failed(format!("{program} ended with {status}")),
        Err(error) => Outcome::Failed(format!("{program} could not be started: {error}")),
    }
}

fn has(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Runs everything; true if nothing failed.
pub(crate) fn run(root: &Path, options: &TestOptions) -> Result<bool> {
    let mut steps = Steps { done: Vec::new() };
    if options.gpu {
        steps.step("gpu", || on_device(root, "gpu", GPU_SUITES));
        return Ok(steps.summary());
    }
    steps.step("format", || command(root, "cargo", &["fmt", "--all", "--check"]));
    steps.step("lints", || {
        command(
            root,
            "cargo",
            &["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"],
        )
    });
    steps.step("tidy", || match crate::tidy::run(root) {
        Ok(true) => Outcome::Passed,
        Ok(false) => Outcome::Failed("see above".to_owned()),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    });
    if !options.quick {
        steps.step("dependencies", || dependencies(root));
        steps.step("build", || build(root));
        steps.step("weights", || weights(root));
        steps.step("tests", || tests(root, options.filter.as_deref()));
        steps.step("kernels", || kernels(root));
        steps.step("softcuda", || on_device(root, "softcuda", DEVICE_SUITES));
        steps.step("interleavings", || {
            let test = ["--package", "keepwarm-memory", "--features", "shuttle", "--test", "interleavings"];
            command(root, "cargo", &[&["test", "--release"][..], &test].concat())
        });
        steps.step("python client", || python_client(root));
        steps.step("doc tests", || {
            command(root, "cargo", &["test", "--release", "--workspace", "--doc", "--quiet"])
        });
    }
    Ok(steps.summary())
}

fn dependencies(root: &Path) -> Outcome {
    if !has("cargo", &["deny", "--version"]) {
        return Outcome::Skipped("cargo-deny is not installed: cargo install cargo-deny --locked".to_owned());
    }
    match command(root, "cargo", &["deny", "--log-level", "error", "check", "licenses", "bans", "sources"]) {
        Outcome::Passed => {}
        other => return other,
    }
    // The advisories' database is a git repository on another host than the registry's.
    let advisories = Command::new("cargo").args(["deny", "check", "advisories"]).current_dir(root).output();
    match advisories {
        Ok(output) if output.status.success() => Outcome::Passed,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let unreachable =
                ["fetch", "failed to", "clone", "resolve host"].iter().any(|word| said.contains(word));
            if unreachable && !said.contains("RUSTSEC-") {
                println!(
                    "   skipped: the advisory database could not be fetched; deny.toml pins what is known"
                );
                Outcome::Passed
            } else {
                println!("{said}");
                Outcome::Failed("an advisory applies".to_owned())
            }
        }
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// All tests, and with them the binary, of the whole workspace: any other choice of packages has other features of what
/// they depend on, and builds that once more.
fn build(root: &Path) -> Outcome {
    if has("cargo", &["nextest", "--version"]) {
        return command(root, "cargo", &["nextest", "run", "--release", "--workspace", "--no-run"]);
    }
    command(root, "cargo", &["test", "--release", "--workspace", "--lib", "--bins", "--tests", "--no-run"])
}

/// The binary that was built with the tests: it lies beside this program.
fn binary() -> Result<String> {
    let program = std::env::current_exe().context("this program's own path")?;
    Ok(program.with_file_name("keepwarm").display().to_string())
}

fn weights(root: &Path) -> Outcome {
    let binary = match binary() {
        Ok(binary) => binary,
        Err(error) => return Outcome::Failed(format!("{error:#}")),
    };
    match command(root, &binary, &["model", "fetch"]) {
        Outcome::Failed(reason) => Outcome::Skipped(format!(
            "no model weights ({reason}): tests that need them say SKIPPED and use a tiny model"
        )),
        other => other,
    }
}

/// The committed PTX against what its sources compile to.
fn kernels(root: &Path) -> Outcome {
    if let Err(error) = crate::kernels::fetch(root) {
        return Outcome::Skipped(format!("{error:#}"));
    }
    match crate::kernels::run(root, &crate::kernels::KernelsOptions { check: true }) {
        Ok(true) => Outcome::Passed,
        Ok(false) => Outcome::Failed("see above".to_owned()),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The OpenAI API through OpenAI's own client, which pip fetches into the target folder.
fn python_client(root: &Path) -> Outcome {
    const PACKAGE: &str = "openai==3.57.0";
    let folder = root.join("target/python");
    if !folder.join("openai").is_dir() {
        let folder = folder.display().to_string();
        let pip =
            ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", &folder, PACKAGE];
        if let Outcome::Failed(reason) = command(root, "python3", &pip) {
            return Outcome::Skipped(format!("{PACKAGE} could not be installed: {reason}"));
        }
    }
    let binary = match binary() {
        Ok(binary) => binary,
        Err(error) => return Outcome::Failed(format!("{error:#}")),
    };
    let mut python = Command::new("python3");
    python.args(["tests/python/openai_client.py", &binary]);
    match python.env("PYTHONPATH", &folder).current_dir(root).status() {
        Ok(status) if status.success() => Outcome::Passed,
        Ok(status) => Outcome::Failed(format!("the client's checks ended with {status}")),
        Err(error) => Outcome::Failed(format!("python3 could not be started: {error}")),
    }
}

/// Tests that run on any device; the memory crate's own suite goes over the host's and softcuda by itself.
const DEVICE_SUITES: &str = "package(keepwarm-node) + package(keepwarm-engine) + test(/^(api|archives)::/)";
/// And on a real one.
const GPU_SUITES: &str = "package(keepwarm-memory) + package(keepwarm-node) + package(keepwarm-engine) + test(/^(api|archives)::/)";

/// The kernels for the CPU, beside this program.
fn softcuda_kernels(root: &Path) -> Result<PathBuf> {
    let program = std::env::current_exe().context("this program's own path")?;
    crate::softcuda::kernels(root, program.parent().context("this program lies in no folder")?)
}

/// Tests of nodes and engines again, on other GPUs than the host's memory.
fn on_device(root: &Path, device: &str, suites: &str) -> Outcome {
    if !has("cargo", &["nextest", "--version"]) {
        return Outcome::Skipped(
            "cargo-nextest is not installed: cargo install cargo-nextest --locked".to_owned(),
        );
    }
    // All of the workspace, so that nothing is built twice.
    let mut arguments = vec!["nextest", "run", "--release", "--workspace", "--filterset", suites];
    if std::env::var_os("CI").is_some() {
        arguments.extend(["--profile", "ci"]);
    }
    println!("   KEEPWARM_TEST_DEVICE={device} cargo {}", arguments.join(" "));
    let mut command = Command::new("cargo");
    if device == "softcuda" {
        match softcuda_kernels(root) {
            Ok(object) => drop(command.env("SOFTCUDA_KERNELS", object)),
            Err(error) => return Outcome::Failed(format!("{error:#}")),
        }
    }
    match command.args(arguments).env("KEEPWARM_TEST_DEVICE", device).current_dir(root).status() {
        Ok(status) if status.success() => Outcome::Passed,
        Ok(status) => Outcome::Failed(format!("tests on {device} ended with {status}")),
        Err(error) => Outcome::Failed(format!("cargo could not be started: {error}")),
    }
}

fn tests(root: &Path, filter: Option<&str>) -> Outcome {
    let mut arguments = vec!["nextest", "run", "--release", "--workspace"];
    if std::env::var_os("CI").is_some() {
        arguments.extend(["--profile", "ci"]);
    }
    arguments.extend(filter);
    if has("cargo", &["nextest", "--version"]) {
        return command(root, "cargo", &arguments);
    }
    println!("   cargo-nextest is not installed: cargo's own test runner takes its place");
    let mut arguments = vec!["test", "--release", "--workspace", "--lib", "--bins", "--tests"];
    arguments.extend(filter);
    command(root, "cargo", &arguments)
}

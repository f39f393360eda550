//! Runs a command on the software CUDA driver: builds it, compiles the kernels for the CPU, and points the loader at
//! both.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

/// What machine to play, and what to run on it.
#[derive(Debug, Args)]
pub(crate) struct SoftcudaOptions {
    /// GPUs.
    #[arg(long, default_value_t = 1)]
    gpus: u32,
    /// Memory of each.
    #[arg(long, default_value = "1GiB")]
    memory: String,
    /// A whole description instead: more inline keys (`gpus=2,memory=1GiB,mig=2`) or a file of TOML or JSON.
    #[arg(long, conflicts_with_all = ["gpus", "memory"])]
    devices: Option<String>,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// True if the command succeeded.
pub(crate) fn run(root: &Path, options: &SoftcudaOptions) -> Result<bool> {
    let built = Command::new("cargo")
        .args(["build", "--release", "--quiet", "--package", "softcuda"])
        .current_dir(root)
        .status()
        .context("cargo could not be started")?;
    if !built.success() {
        bail!("softcuda could not be built");
    }
    let library = softcuda::layout::beside_this_program()?;
    let folder = library.with_file_name("softcuda");
    softcuda::layout::lay_out(&library, &folder)?;
    let mut search = vec![folder.clone()];
    search.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    let devices =
        options.devices.clone().unwrap_or_else(|| format!("gpus={},memory={}", options.gpus, options.memory));
    let (program, arguments) = options.command.split_first().context("a command is missing")?;
    let mut command = Command::new(program);
    command.args(arguments).env("SOFTCUDA_DEVICES", devices);
    command.env("LD_LIBRARY_PATH", std::env::join_paths(search).context("LD_LIBRARY_PATH")?);
    command.env("SOFTCUDA_KERNELS", kernels(root, &folder)?);
    let status = command.status().with_context(|| format!("{program} could not be started"))?;
    if !status.success() {
        println!("{program} ended with {status}");
    }
    Ok(status.success())
}

/// The kernels, compiled for the CPU into a folder.
pub(crate) fn kernels(root: &Path, folder: &Path) -> Result<PathBuf> {
    let sources = softcuda::kernels::sources(&root.join("kernels"))?;
    let object = folder.join("kernels.so");
    softcuda::kernels::compile(&sources, &object, &[])?;
    Ok(object)
}

//! `softcuda-kernels OUT.so SOURCE.cu ...`: compiles kernels for the CPU; `SOFTCUDA_KERNELS=OUT.so` then runs them.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(out), sources) = (paths.next(), paths.collect::<Vec<_>>()) else { return usage() };
    if sources.is_empty() {
        return usage();
    }
    match softcuda::kernels::compile(&sources, &out, &[]) {
        Ok(kernels) => {
            println!("{}: {}", out.display(), kernels.join(", "));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("softcuda-kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: softcuda-kernels OUT.so SOURCE.cu ...");
    ExitCode::FAILURE
}

//! Compiles `kernels/*.cu` to the PTX that is committed, on any machine: by the compiler and the assembler of two pinned
//! wheels, which pip fetches into the target folder. They are NVIDIA's, and never committed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use clap::Args;

/// What to do with what was compiled.
#[derive(Debug, Args)]
pub(crate) struct KernelsOptions {
    /// Compares with the committed PTX, and writes nothing.
    #[arg(long)]
    pub(crate) check: bool,
}

/// The wheels, with their hashes; the folder of what was fetched is named by their version.
const WHEELS: &str = "xtask/src/kernels/wheels.txt";
const VERSION: &str = "12.6.77";
const COMPILE: &str = "xtask/src/kernels/nvrtc.py";
/// PTX for compute capability 8.0 runs there and on all that came after. Floats are computed as the CPU's references do: no
/// contraction, subnormal numbers kept, divisions and roots rounded.
const OPTIONS: &[&str] = &[
    "--gpu-architecture=compute_80",
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
];
/// NVRTC 12.6 says 8.5, which drivers before its own refuse, whatever is in the text. 8.0 is that of CUDA 12.0, the oldest
/// driver that is used; the assembler refuses text that needs more than it says.
const SAID: &str = ".version 8.5\n";
const NEEDED: &str = ".version 8.0\n";
/// Whose registers are counted.
const TARGETS: &[&str] = &["sm_80", "sm_90"];

/// What a kernel takes of a multiprocessor.
#[derive(Debug, PartialEq, Eq)]
struct Figures {
    kernel: String,
    registers: u32,
    /// Bytes of a block.
    shared: u32,
    /// Bytes of a thread that did not fit into registers.
    spilled: u32,
}

/// True if all compiled, nothing spills and, for a check, the committed PTX is that of the sources.
pub(crate) fn run(root: &Path, options: &KernelsOptions) -> Result<bool> {
    let sources = softcuda::kernels::sources(&root.join("kernels"))?;
    let tools = fetch(root)?;
    let made = root.join("target/kernels/ptx");
    std::fs::create_dir_all(&made).with_context(|| made.display().to_string())?;
    compile(root, &tools, &sources, &made)?;
    let mut green = true;
    println!("{:<14} {:<6} {:>9} {:>13} {:>12}", "kernel", "target", "registers", "shared, bytes", "spills");
    for source in &sources {
        let ptx = made.join(named(source, "ptx"));
        for target in TARGETS {
            for figures in assemble(&tools, &ptx, target)? {
                let Figures { kernel, registers, shared, spilled } = &figures;
                println!("{kernel:<14} {target:<6} {registers:>9} {shared:>13} {spilled:>12}");
                green &= *spilled == 0;
            }
        }
    }
    if !green {
        println!("a kernel spills registers into memory: give it less to hold at a time");
    }
    let committed = root.join("kernels/ptx");
    Ok(if options.check {
        compare(&sources, &made, &committed)?
    } else {
        publish(&sources, &made, &committed)?
    } && green)
}

fn named(source: &Path, ending: &str) -> PathBuf {
    PathBuf::from(source.with_extension(ending).file_name().unwrap_or_default())
}

/// The folder with the wheels' content, fetched once.
pub(crate) fn fetch(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/kernels").join(VERSION);
    if folder.is_dir() {
        return Ok(folder);
    }
    // Under another name until it is whole.
    let partial = folder.with_extension(format!("partial-{}", std::process::id()));
    let status = Command::new("python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--root-user-action=ignore",
        ])
        .args(["--only-binary", ":all:", "--require-hashes", "--requirement", WHEELS, "--target"])
        .arg(&partial)
        .current_dir(root)
        .status()
        .context("python3 could not be started: it fetches the compiler and calls it")?;
    if !status.success() {
        drop(std::fs::remove_dir_all(&partial));
        bail!(
            "pip could not fetch NVRTC and ptxas {VERSION} (its message is above). They come from pip's package index: \
             check the network, or let PIP_INDEX_URL or PIP_FIND_LINKS name a mirror or a folder with the wheels of \
             {WHEELS}"
        );
    }
    match std::fs::rename(&partial, &folder) {
        // Another run was faster.
        Err(_) if folder.is_dir() => drop(std::fs::remove_dir_all(&partial)),
        renamed => renamed.with_context(|| folder.display().to_string())?,
    }
    Ok(folder)
}

fn compile(root: &Path, tools: &Path, sources: &[PathBuf], out: &Path) -> Result<()> {
    let mut command = Command::new("python3");
    command.arg(root.join(COMPILE)).arg(tools.join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")).arg(out);
    let output = command.args(OPTIONS).arg("--").args(sources).output().context("python3")?;
    if !output.status.success() {
        bail!("the kernels do not compile:\n{}", said(&output));
    }
    for source in sources {
        let path = out.join(named(source, "ptx"));
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if !text.contains(SAID) {
            bail!("{} does not say '{}': another NVRTC than {VERSION}?", path.display(), SAID.trim_end());
        }
        std::fs::write(&path, text.replacen(SAID, NEEDED, 1)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// Assembles PTX for a target and tells what its kernels take.
fn assemble(tools: &Path, ptx: &Path, target: &str) -> Result<Vec<Figures>> {
    let ptxas = tools.join("nvidia/cuda_nvcc/bin/ptxas");
    let output = Command::new(&ptxas)
        .args(["--verbose", "--gpu-name", target, "--output-file"])
        .arg(ptx.with_extension(format!("{target}.cubin")))
        .arg(ptx)
        .output()
        .with_context(|| ptxas.display().to_string())?;
    let text = said(&output);
    if !output.status.success() {
        bail!("{} does not assemble for {target}:\n{text}", ptx.display());
    }
    figures(&text).with_context(|| format!("ptxas says of its kernels what is not understood:\n{text}"))
}

/// Reads what `ptxas --verbose` prints of each kernel.
fn figures(text: &str) -> Option<Vec<Figures>> {
    // The number before a word.
    let before = |line: &str, word: &str| -> Option<u32> {
        line[..line.find(word)?].split_whitespace().next_back()?.parse().ok()
    };
    let (mut all, mut kernel, mut spilled) = (Vec::new(), None, 0);
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().map(str::to_owned);
        } else if line.contains("spill stores") {
            spilled = before(line, " bytes spill stores")? + before(line, " bytes spill loads")?;
        } else if line.contains(" registers") {
            let (registers, shared) = (before(line, " registers")?, before(line, " bytes smem").unwrap_or(0));
            all.push(Figures { kernel: kernel.take()?, registers, shared, spilled });
        }
    }
    all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    (!all.is_empty() && kernel.is_none()).then_some(all)
}

/// PTX whose source is gone.
fn left_over(sources: &[PathBuf], committed: &Path) -> Result<Vec<PathBuf>> {
    let names: BTreeSet<_> = sources.iter().map(|source| named(source, "ptx")).collect();
    let entries = std::fs::read_dir(committed).with_context(|| committed.display().to_string())?;
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    found.retain(|path| path.extension().is_some_and(|extension| extension == "ptx"));
    found.retain(|path| !names.contains(&named(path, "ptx")));
    found.sort();
    Ok(found)
}

fn publish(sources: &[PathBuf], made: &Path, committed: &Path) -> Result<bool> {
    std::fs::create_dir_all(committed).with_context(|| committed.display().to_string())?;
    for path in left_over(sources, committed)? {
        std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
    }
    for source in sources {
        let to = committed.join(named(source, "ptx"));
        std::fs::copy(made.join(named(source, "ptx")), &to).with_context(|| to.display().to_string())?;
    }
    Ok(true)
}

/// Says where the committed PTX is not that of the sources.
fn compare(sources: &[PathBuf], made: &Path, committed: &Path) -> Result<bool> {
    let mut differences = Vec::new();
    for path in left_over(sources, committed)? {
        differences.push(format!("{} has no source", path.display()));
    }
    for source in sources {
        let (ours, theirs) = (made.join(named(source, "ptx")), committed.join(named(source, "ptx")));
        let new = std::fs::read_to_string(&ours).with_context(|| ours.display().to_string())?;
        match std::fs::read_to_string(&theirs) {
            Ok(old) => differences.extend(
                difference(&old, &new)
                    .map(|what| format!("{what}; all: diff {} {}", theirs.display(), ours.display())),
            ),
            Err(error) => differences.push(format!("{}: {error}", theirs.display())),
        }
    }
    for difference in &differences {
        println!("{difference}");
    }
    if !differences.is_empty() {
        println!(
            "the committed PTX is not that of kernels/: run `cargo xtask kernels` and commit kernels/ptx"
        );
    }
    Ok(differences.is_empty())
}

/// The first line that differs.
fn difference(old: &str, new: &str) -> Option<String> {
    if old == new {
        return None;
    }
    let same = old.lines().zip(new.lines()).take_while(|(old, new)| old == new).count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("(the end)").trim().to_owned();
    Some(format!("line {}: committed '{}', compiled '{}'", same + 1, line(old), line(new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ptxas_says_is_read() {
        let text = "ptxas info    : 192 bytes gmem\n\
            ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
            ptxas info    : Function properties for b\n    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 68 registers, used 1 barriers, 32768 bytes smem, 364 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
            ptxas info    : Function properties for a\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 16 registers, 364 bytes cmem[0]\n";
        let kernel = |kernel: &str, registers, shared, spilled| Figures {
            kernel: kernel.to_owned(),
            registers,
            shared,
            spilled,
        };
        assert_eq!(figures(text), Some(vec![kernel("a", 16, 0, 0), kernel("b", 68, 32_768, 12)]));
        assert_eq!(figures("ptxas info    : 192 bytes gmem"), None, "no kernel");
        assert_eq!(figures("Compiling entry function 'a' for 'sm_80'"), None, "nothing of the kernel");
    }

    #[test]
    fn the_first_line_that_differs_is_told() {
        assert_eq!(difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(difference("a\nb", "a\n c").unwrap(), "line 2: committed 'b', compiled 'c'");
        assert_eq!(difference("a\n", "a\nb\n").unwrap(), "line 2: committed '(the end)', compiled 'b'");
    }
}

//! Compiles CUDA C++ kernels for the CPU: preprocesses each source with the shim, rewrites what C++ does not have,
//! and links them with their runtime into the shared object that `SOFTCUDA_KERNELS` names. Needs g++.

mod scan;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The C++ compiler: its thread sanitizer's calls are what the runtime answers.
const COMPILER: &str = "g++";
const SHIM: &[(&str, &str)] = &[
    ("softcuda.h", include_str!("../../shim/softcuda.h")),
    ("cuda_fp16.h", include_str!("../../shim/cuda_fp16.h")),
    ("runtime.cpp", include_str!("../../shim/runtime.cpp")),
];
/// As a GPU's compiler has it: no contraction beyond the source's, type punning and overflow as written.
const LANGUAGE: &[&str] = &["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden"];
const KERNEL: &[&str] = &[
    "-fno-strict-aliasing",
    "-fwrapv",
    "-ffp-contract=off",
    "-fsanitize=thread",
    "-fsanitize=bounds",
    "-fno-sanitize-recover=bounds",
    "--param",
    "tsan-instrument-func-entry-exit=0",
];

/// Why kernels could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no compiler.
    #[error(
        "{COMPILER} could not be started ({0}): kernels run on the CPU need it, as in Debian's package g++"
    )]
    NoCompiler(io::Error),
    /// The compiler refused a source.
    #[error("{COMPILER} refused {path}:\n{said}")]
    Refused {
        /// Which source.
        path: PathBuf,
        /// What the compiler printed.
        said: String,
    },
    /// A source has what this crate cannot run.
    #[error("{place}: {why}")]
    NotModelled {
        /// File and line.
        place: String,
        /// What, and what to do instead.
        why: String,
    },
    /// Two sources have a kernel of one name.
    #[error(
        "kernel '{name}' is in {first} and in {second}: names must differ, since modules find kernels by them"
    )]
    Twice {
        /// The kernel.
        name: String,
        /// Where it is first.
        first: PathBuf,
        /// Where it is again.
        second: PathBuf,
    },
    /// There is nothing to run.
    #[error("no kernel in the sources: none has an extern \"C\" __global__ function")]
    Nothing,
}

type Result<T> = std::result::Result<T, CompileError>;

fn on(path: &Path) -> impl FnOnce(io::Error) -> CompileError {
    let path = path.to_owned();
    move |source| CompileError::File { path, source }
}

/// The sources of a folder, `*.cu`, sorted.
///
/// # Errors
/// The folder cannot be read.
pub fn sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut sources =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    Ok(sources)
}

/// Compiles sources into one shared object and tells the names of their kernels; `defines` are as for `-D`.
/// The object appears under its name when it is whole.
pub fn compile(sources: &[PathBuf], out: &Path, defines: &[&str]) -> Result<Vec<String>> {
    let work = Workplace::beside(out)?;
    let mut kernels: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut objects = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let text = preprocess(source, &work.0, defines)?;
        let scanned = scan::scan(&text).map_err(|refused| CompileError::NotModelled {
            place: format!("{}:{}", refused.file, refused.line),
            why: refused.why,
        })?;
        for name in &scanned.kernels {
            if let Some(first) = kernels.insert(name.clone(), source.clone()) {
                return Err(CompileError::Twice { name: name.clone(), first, second: source.clone() });
            }
        }
        let (rewritten, object) = (work.0.join(format!("{number}.ii")), work.0.join(format!("{number}.o")));
        std::fs::write(&rewritten, scanned.text).map_err(on(&rewritten))?;
        let mut compiler = Command::new(COMPILER);
        compiler.args(LANGUAGE).args(KERNEL).args(["-x", "c++-cpp-output", "-c"]);
        run(compiler.arg(&rewritten).arg("-o").arg(&object), source)?;
        objects.push(object);
    }
    if kernels.is_empty() {
        return Err(CompileError::Nothing);
    }
    let whole = work.0.join("kernels.so");
    let mut linker = Command::new(COMPILER);
    linker.args(LANGUAGE).args(defines.iter().map(|define| format!("-D{define}")));
    linker.args(["-shared", "-Wl,--no-undefined", "-o"]).arg(&whole).arg(work.0.join("runtime.cpp"));
    run(linker.args(["-x", "none"]).args(&objects).args(["-ldl", "-lm"]), out)?;
    std::fs::rename(&whole, out).map_err(on(out))?;
    Ok(kernels.into_keys().collect())
}

fn preprocess(source: &Path, work: &Path, defines: &[&str]) -> Result<String> {
    if let Err(error) = std::fs::metadata(source) {
        return Err(on(source)(error));
    }
    let mut compiler = Command::new(COMPILER);
    compiler.args(["-E", "-x", "c++", "-std=c++17", "-I"]).arg(work);
    compiler.arg("-include").arg(work.join("softcuda.h"));
    compiler.args(defines.iter().map(|define| format!("-D{define}")));
    run(compiler.arg(source), source)
}

fn run(command: &mut Command, path: &Path) -> Result<String> {
    let output = command.output().map_err(CompileError::NoCompiler)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(CompileError::Refused { path: path.to_owned(), said });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A folder of this process beside the result, with the shim in it; goes when it is dropped.
#[derive(Debug)]
struct Workplace(PathBuf);

impl Workplace {
    fn beside(out: &Path) -> Result<Self> {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", std::process::id()));
        let place = Self(out.with_file_name(name));
        std::fs::create_dir_all(&place.0).map_err(on(&place.0))?;
        for (name, text) in SHIM {
            let path = place.0.join(name);
            std::fs::write(&path, text).map_err(on(&path))?;
        }
        Ok(place)
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // What stays behind is a folder that names its process: no reason to fail.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

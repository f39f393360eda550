//! Lays the built library out under the names that programs load.

use std::io;
use std::path::Path;

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

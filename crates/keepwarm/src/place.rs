//! Files put in place whole: written beside their place, synced, and renamed, so that whoever reads sees the old
//! file or the new one.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::failure::Failure;

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readers {
    /// Everyone: mode 0644.
    All,
    /// Its owner: mode 0600.
    Owner,
}

impl Readers {
    const fn mode(self) -> u32 {
        match self {
            Self::All => 0o644,
            Self::Owner => 0o600,
        }
    }
}

/// Writes a file where there is none.
pub(crate) fn create(path: &Path, text: &str, readers: Readers) -> Result<(), Failure> {
    write(path, text, readers, false)
}

/// Writes a file, over the one that is there.
pub(crate) fn replace(path: &Path, text: &str, readers: Readers) -> Result<(), Failure> {
    write(path, text, readers, true)
}

fn write(path: &Path, text: &str, readers: Readers, over: bool) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot write {}: {error}", path.display()));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(failed)?;
    // The file beside is its owner's alone from the start.
    let mut beside = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    beside.write_all(text.as_bytes()).map_err(failed)?;
    beside.as_file().set_permissions(Permissions::from_mode(readers.mode())).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    let placed = if over { beside.persist(path) } else { beside.persist_noclobber(path) };
    placed.map_err(|error| match error.error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Failure::config(format!("{} exists, and is not overwritten", path.display()))
        }
        _ => failed(error.error),
    })?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_created_once_and_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/key");
        create(&path, "one", Readers::Owner).unwrap();
        let refused = create(&path, "two", Readers::Owner).unwrap_err().to_string();
        assert!(refused.contains("exists"), "{refused}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        replace(&path, "three", Readers::Owner).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        replace(&path, "four", Readers::All).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn where_nothing_can_be_written_the_file_is_named() {
        let failure = create(Path::new("/proc/no/file"), "", Readers::All).unwrap_err().to_string();
        assert!(failure.contains("cannot write /proc/no/file"), "{failure}");
    }
}

//! Opening a catalog: the folder, its lock, its format, and whose it is.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use keepwarm_types::{Incarnation, ShardCount};
use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use uuid::Uuid;

use crate::writer::Writer;

/// Pages that the database keeps in memory: some 100,000 sessions' records; beyond, it reads the disk again.
const CACHE_BYTES: usize = 64 << 20;
/// Version of what this crate writes; any other on disk is refused. 2: changes have stamps, holders incarnations.
const FORMAT: u64 = 2;
/// The database's file in its folder.
const FILE: &str = "catalog.redb";
/// The file that says that the folder had a catalog, and which: its disk id.
const MARKER: &str = "catalog.id";
/// The file that says which process has the folder.
const LOCK: &str = "LOCK";

pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
pub(crate) const SESSIONS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("sessions");
pub(crate) const TOMBSTONES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("tombstones");
pub(crate) const TOKENS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("tokens");
pub(crate) const MESSAGES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("messages");

/// When a commit counts as safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Once it is synced to disk.
    Always,
    /// Once the system has it; synced this often. A power cut may take what came since.
    Interval(Duration),
}

/// What a catalog belongs to.
#[derive(Debug, Clone)]
pub struct CatalogSettings {
    /// Name of the cluster.
    pub cluster: String,
    /// Number of its shards.
    pub shards: ShardCount,
    /// When commits are safe.
    pub sync: Sync,
}

/// What opening found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Which start of this folder this is, from 1.
    pub incarnation: Incarnation,
    /// Made with the folder: the disk's identity.
    pub disk_id: Uuid,
}

/// Why a catalog could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path is there and is not a folder.
    #[error("{0} is not a folder: choose another data_dir")]
    NotAFolder(PathBuf),
    /// The system refused.
    #[error("cannot use {path}: {cause}{hint}")]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
        /// What to do, where it is known.
        hint: &'static str,
    },
    /// Another process has it.
    #[error("{path} is in use by process {pid}: stop it, or choose another data_dir")]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Who has it, where it could be read.
        pid: String,
    },
    /// Written by a newer keepwarm.
    #[error(
        "{path} has format {found}; this keepwarm reads {FORMAT}: run the newer keepwarm, or choose another data_dir"
    )]
    Newer {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// Written before the first release.
    #[error(
        "{path} has format {found}, which only versions before the first release wrote; move it away to start empty, or run the version that wrote it"
    )]
    Older {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// It belongs to another cluster, or the number of shards was changed.
    #[error(
        "{path} belongs to cluster '{found}', not '{expected}': choose another data_dir, or correct cluster.name / cluster.shards"
    )]
    OtherCluster {
        /// The folder.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What the spec says.
        expected: String,
    },
    /// The file is damaged beyond what the database repairs.
    #[error(
        "{path} is damaged: {detail}; restore it from a copy, or move the folder away to start empty (its sessions are lost then)"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
}

/// The catalog of one node.
#[derive(Debug, Clone)]
pub struct Catalog {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) writer: Writer,
    pub(crate) database: Arc<Database>,
    pub(crate) shards: ShardCount,
    pub(crate) disk_id: Uuid,
    /// None where it is in memory.
    pub(crate) folder: Option<PathBuf>,
    /// Held for its lock; the database closes first.
    _lock: Option<File>,
}

impl Catalog {
    /// Opens or makes the catalog in `folder`.
    ///
    /// # Errors
    /// [`OpenError`]: each says what to do. Nothing was changed but for an unfinished transaction that the
    /// database rolled back.
    pub fn open(folder: &Path, settings: &CatalogSettings) -> Result<(Self, Recovered), OpenError> {
        if folder.exists() && !folder.is_dir() {
            return Err(OpenError::NotAFolder(folder.to_owned()));
        }
        std::fs::create_dir_all(folder).map_err(|cause| io(folder, cause))?;
        let lock = lock(folder)?;
        let path = folder.join(FILE);
        let expected = marked(folder)?;
        // A database that is gone would be made anew, and every session that was acknowledged be unknown.
        if expected.is_some() && std::fs::metadata(&path).map_or(true, |file| file.len() == 0) {
            let detail = format!("it is gone or empty, but {MARKER} says that there was a catalog");
            return Err(OpenError::Damaged { path, detail });
        }
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|error| database_error(&path, error))?;
        let (catalog, recovered) = Self::start(database, &path, settings, expected, Some((folder, lock)))?;
        if expected.is_none() {
            mark(folder, recovered.disk_id)?;
        }
        Ok((catalog, recovered))
    }

    /// A catalog in memory, for a node that keeps nothing.
    ///
    /// # Errors
    /// [`OpenError`] where a thread or memory cannot be had.
    pub fn ephemeral(settings: &CatalogSettings) -> Result<(Self, Recovered), OpenError> {
        let path = PathBuf::from("(memory)");
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(InMemoryBackend::new())
            .map_err(|error| database_error(&path, error))?;
        Self::start(database, &path, settings, None, None)
    }

    fn start(
        database: Database,
        path: &Path,
        settings: &CatalogSettings,
        expected: Option<Uuid>,
        lock: Option<(&Path, File)>,
    ) -> Result<(Self, Recovered), OpenError> {
        let recovered = identify(&database, path, settings, expected)?;
        let database = Arc::new(database);
        let writer = Writer::start(Arc::clone(&database), settings.sync, settings.shards)
            .map_err(|cause| io(path, cause))?;
        let (folder, lock) = lock.map(|(folder, lock)| (folder.to_owned(), lock)).unzip();
        let disk_id = recovered.disk_id;
        let inner = Inner { writer, database, shards: settings.shards, disk_id, folder, _lock: lock };
        Ok((Self { inner: Arc::new(inner) }, recovered))
    }
}

fn lock(folder: &Path) -> Result<File, OpenError> {
    let path = folder.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|cause| io(&path, cause))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Only for the message: an unreadable pid leaves it out.
            let _ = file.read_to_string(&mut pid);
            let pid = if pid.is_empty() { "(unknown)".to_owned() } else { pid };
            return Err(OpenError::InUse { path: folder.to_owned(), pid });
        }
        Err(TryLockError::Error(cause)) => return Err(io(&path, cause)),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| write!(file, "{}", std::process::id()))
        .map_err(|cause| io(&path, cause))?;
    Ok(file)
}

pub(crate) fn io(path: &Path, cause: std::io::Error) -> OpenError {
    let hint = match cause.kind() {
        ErrorKind::PermissionDenied => "; give the user that runs keepwarm the right to write there",
        ErrorKind::StorageFull => "; the disk is full: free some space",
        ErrorKind::ReadOnlyFilesystem => "; the file system is read-only",
        _ => "",
    };
    OpenError::Io { path: path.to_owned(), cause, hint }
}

pub(crate) fn database_error(path: &Path, error: DatabaseError) -> OpenError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => {
            OpenError::InUse { path: path.to_owned(), pid: "(unknown)".to_owned() }
        }
        // A file cut short is damage, not a failing disk.
        DatabaseError::Storage(StorageError::Io(cause))
            if !matches!(cause.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            io(path, cause)
        }
        other => OpenError::Damaged { path: path.to_owned(), detail: other.to_string() },
    }
}

/// The disk id that the folder's marker has; none where there never was a catalog.
fn marked(folder: &Path) -> Result<Option<Uuid>, OpenError> {
    let path = folder.join(MARKER);
    match std::fs::read_to_string(&path) {
        Ok(text) => match text.trim().parse() {
            Ok(disk_id) => Ok(Some(disk_id)),
            Err(_) => Err(OpenError::Damaged { path, detail: "it is not a UUID".to_owned() }),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(cause) if cause.kind() == ErrorKind::InvalidData => {
            Err(OpenError::Damaged { path, detail: "it is not a UUID".to_owned() })
        }
        Err(cause) => Err(io(&path, cause)),
    }
}

/// Leaves the marker behind, synced: written beside its name first, so that there is a whole one or none.
fn mark(folder: &Path, disk_id: Uuid) -> Result<(), OpenError> {
    let (path, beside) = (folder.join(MARKER), folder.join(format!("{MARKER}.new")));
    let write = || {
        let mut file = File::create(&beside)?;
        writeln!(file, "{disk_id}")?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)?;
        // The names in the folder must last as well.
        File::open(folder)?.sync_all()
    };
    write().map_err(|cause| io(&path, cause))
}

/// Checks whose catalog it is and counts its starts.
fn identify(
    database: &Database,
    path: &Path,
    settings: &CatalogSettings,
    marked: Option<Uuid>,
) -> Result<Recovered, OpenError> {
    let damaged = |detail: String| OpenError::Damaged { path: path.to_owned(), detail };
    let fail = |error: redb::Error| match error {
        redb::Error::Io(cause) => io(path, cause),
        other => damaged(other.to_string()),
    };
    let expected = format!("{} ({} shards)", settings.cluster, settings.shards.get());
    let begin = database.begin_write().map_err(|error| fail(error.into()))?;
    let recovered = {
        let mut meta = begin.open_table(META).map_err(|error| fail(error.into()))?;
        let get = |name: &str| -> Result<Option<Vec<u8>>, OpenError> {
            let found = meta.get(name).map_err(|error| fail(error.into()))?;
            Ok(found.map(|value| value.value().to_vec()))
        };
        let number = |name: &str| -> Result<Option<u64>, OpenError> {
            let Some(value) = get(name)? else { return Ok(None) };
            let bytes = value.try_into().map_err(|_| damaged(format!("'{name}' is not a number")))?;
            Ok(Some(u64::from_le_bytes(bytes)))
        };
        match number("format")? {
            Some(found) if found > FORMAT => {
                return Err(OpenError::Newer { path: path.to_owned(), found });
            }
            Some(found) if found < FORMAT => {
                return Err(OpenError::Older { path: path.to_owned(), found });
            }
            _ => {}
        }
        if let Some(found) = get("cluster")? {
            let found = String::from_utf8_lossy(&found).into_owned();
            if found != expected {
                return Err(OpenError::OtherCluster { path: path.to_owned(), found, expected });
            }
        }
        let disk_id = match get("disk_id")? {
            Some(bytes) => {
                Uuid::from_slice(&bytes).map_err(|_| damaged("'disk_id' is not a UUID".to_owned()))?
            }
            None => match marked {
                Some(marked) => {
                    return Err(damaged(format!(
                        "it is empty, but {MARKER} says that it was catalog {marked}"
                    )));
                }
                None => Uuid::new_v4(),
            },
        };
        if let Some(marked) = marked.filter(|marked| *marked != disk_id) {
            return Err(damaged(format!("it is catalog {disk_id}, but {MARKER} names catalog {marked}")));
        }
        let incarnation = number("incarnation")?.unwrap_or(0) + 1;
        let pairs: [(&str, &[u8]); 4] = [
            ("format", &FORMAT.to_le_bytes()),
            ("cluster", expected.as_bytes()),
            ("disk_id", disk_id.as_bytes()),
            ("incarnation", &incarnation.to_le_bytes()),
        ];
        for (name, value) in pairs {
            meta.insert(name, value).map_err(|error| fail(error.into()))?;
        }
        for table in [SESSIONS, TOMBSTONES, TOKENS, MESSAGES] {
            begin.open_table(table).map_err(|error| fail(error.into()))?;
        }
        Recovered { incarnation: Incarnation(incarnation), disk_id }
    };
    begin.commit().map_err(|error| fail(error.into()))?;
    let check = database.begin_read().map_err(|error| fail(error.into()))?;
    check.open_table(SESSIONS).map_err(|error| fail(error.into()))?;
    Ok(recovered)
}

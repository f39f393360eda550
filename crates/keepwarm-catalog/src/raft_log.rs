//! The registry's log on disk: a file of its own beside the catalog's, under the same lock.
//!
//! Entries and values are opaque bytes, each with its checksum. One writer thread takes what is queued, in order,
//! into one transaction, syncs it and tells everybody at once; so votes and entries are never reordered. After
//! the first failure nothing more is taken until the file is opened again: a log with a hole is worse than none.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use redb::backends::InMemoryBackend;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, WriteTransaction,
};

use crate::disk;
use crate::open::{Catalog, META, OpenError, database_error, io as io_error};
use crate::quota::Quota;
use crate::read::ReadError;

/// The log's file in the catalog's folder.
const FILE: &str = "registry.redb";
/// Pages kept in memory: the log is read at start alone.
const CACHE_BYTES: usize = 4 << 20;
/// Submissions that wait for the disk: far more than a consensus group ever has in flight.
const QUEUE_MAX: usize = 4096;
/// Submissions in one transaction.
const GROUP_MAX: usize = 256;
/// In the catalog: that this folder has a log. A folder whose log is gone has forgotten its votes.
const HAS_LOG: &str = "has_registry_log";

/// Said of a folder whose log was lost.
const GONE: &str = "the registry's log is gone, and with it this node's votes";

const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
const VALUES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("values");
const DISK_ID: &str = "disk_id";

/// A value beside the entries, of which there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The last vote.
    Vote,
    /// Up to where entries are agreed upon; a hint.
    Committed,
    /// The last entry that was purged.
    Purged,
    /// The last snapshot, with what it says of itself.
    Snapshot,
    /// Which cluster was founded or joined here.
    Cluster,
}

impl Slot {
    const fn name(self) -> &'static str {
        match self {
            Self::Vote => "vote",
            Self::Committed => "committed",
            Self::Purged => "purged",
            Self::Snapshot => "snapshot",
            Self::Cluster => "cluster",
        }
    }

    /// Whether it must be on disk before it is acknowledged.
    const fn durable(self) -> bool {
        !matches!(self, Self::Committed)
    }
}

/// One step of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogStep {
    /// Entries by index, replacing what is there.
    Append(Vec<(u64, Vec<u8>)>),
    /// Drops the entry of this index and all later ones.
    TruncateFrom(u64),
    /// Drops the entry of this index and all earlier ones.
    PurgeTo(u64),
    /// Replaces a value.
    Put(Slot, Vec<u8>),
}

/// Nothing more is written: the log takes no steps until it is opened again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// This step failed; whether it is on disk is known at the next start.
    #[error(
        "the registry's log cannot be written: {0}; free space or repair the disk, then restart the node"
    )]
    Write(String),
    /// An earlier step failed.
    #[error(
        "the registry's log failed before and takes nothing more: repair the disk, then restart the node"
    )]
    Failed,
    /// More waits for the disk than ever should.
    #[error("{QUEUE_MAX} steps wait for the disk of the registry's log: it does not keep up")]
    Full,
}

/// Told the outcome, on the writer thread; must not block.
pub type LogDone = Box<dyn FnOnce(Result<(), LogError>) + Send>;

struct Submission {
    steps: Vec<LogStep>,
    done: LogDone,
}

/// The log of one node's registry. Clones share it; [`RaftLog::close`], or the last one dropped, closes it.
#[derive(Debug, Clone)]
pub struct RaftLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    open: Mutex<Option<Open>>,
    path: PathBuf,
}

#[derive(Debug)]
struct Open {
    queue: Option<Sender<Submission>>,
    thread: Option<JoinHandle<()>>,
    database: Arc<Database>,
    /// Holds the folder's lock.
    _catalog: Option<Catalog>,
}

impl Catalog {
    /// Opens or makes the registry's log in the catalog's folder, or in memory where the catalog is. It keeps the
    /// folder's lock for as long as it lives.
    ///
    /// # Errors
    /// [`OpenError`]; also where the folder had a log that is gone, or has that of another folder: a node that
    /// forgot its votes must join as a new one.
    pub fn raft_log(&self) -> Result<RaftLog, OpenError> {
        let Some(folder) = &self.inner.folder else {
            return RaftLog::start(InMemoryBackend::new(), PathBuf::from("(memory)"), Some(self.clone()));
        };
        let path = folder.join(FILE);
        let existed = path.exists();
        if !existed && self.has_log().map_err(|error| damaged(&path, error))? {
            return Err(damaged(&path, GONE));
        }
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|error| database_error(&path, error))?;
        let log = RaftLog::run(database, path.clone(), Some(self.clone()))?;
        if !existed {
            // Its name in the folder must last as well.
            fs::File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(|cause| io_error(folder, cause))?;
        }
        self.mark_log().map_err(|error| damaged(&path, error))?;
        Ok(log)
    }

    fn has_log(&self) -> Result<bool, ReadError> {
        Ok(self.inner.database.begin_read()?.open_table(META)?.get(HAS_LOG)?.is_some())
    }

    fn mark_log(&self) -> Result<(), ReadError> {
        if self.has_log()? {
            return Ok(());
        }
        let begin = self.inner.database.begin_write()?;
        begin.open_table(META)?.insert(HAS_LOG, [1].as_slice())?;
        begin.commit().map_err(|error| ReadError::Database(error.to_string()))
    }
}

fn damaged(path: &Path, error: impl ToString) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), detail: error.to_string() }
}

impl RaftLog {
    /// A log in memory, for a node that keeps nothing.
    ///
    /// # Errors
    /// [`OpenError`] where a thread or memory cannot be had.
    pub fn ephemeral() -> Result<Self, OpenError> {
        Self::start(InMemoryBackend::new(), PathBuf::from("(memory)"), None)
    }

    /// A log in memory whose disk is full after so many bytes: what a test needs to see a full one.
    ///
    /// # Errors
    /// [`OpenError`] where not even an empty log fits.
    pub fn limited(bytes: u64) -> Result<Self, OpenError> {
        Self::start(Quota::new(bytes), PathBuf::from("(memory)"), None)
    }

    fn start(
        backend: impl StorageBackend,
        path: PathBuf,
        catalog: Option<Catalog>,
    ) -> Result<Self, OpenError> {
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)
            .map_err(|error| database_error(&path, error))?;
        Self::run(database, path, catalog)
    }

    fn run(database: Database, path: PathBuf, catalog: Option<Catalog>) -> Result<Self, OpenError> {
        identify(&database, &path, catalog.as_ref())?;
        let database = Arc::new(database);
        let (queue, receive) = bounded(QUEUE_MAX);
        let written = Arc::clone(&database);
        let thread = std::thread::Builder::new()
            .name("registry-log".to_owned())
            .spawn(move || run(&written, &receive))
            .map_err(|cause| io_error(&path, cause))?;
        let open = Open { queue: Some(queue), thread: Some(thread), database, _catalog: catalog };
        Ok(Self { inner: Arc::new(Inner { open: Mutex::new(Some(open)), path }) })
    }

    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn database(&self) -> Result<Arc<Database>, ReadError> {
        let closed = || ReadError::Database(format!("{} is closed", self.path()));
        self.open().as_ref().map(|open| Arc::clone(&open.database)).ok_or_else(closed)
    }

    /// Writes what was queued, then gives the file and its share of the folder's lock back; clones take and give
    /// nothing more. Blocks on disk.
    pub fn close(&self) {
        let open = self.open().take();
        drop(open);
    }

    /// Queues steps for one transaction, after all that were queued before; `done` is told once they are safe.
    pub fn submit(&self, steps: Vec<LogStep>, done: LogDone) {
        let queue = self.open().as_ref().and_then(|open| open.queue.clone());
        let Some(queue) = queue else { return done(Err(LogError::Failed)) };
        match queue.try_send(Submission { steps, done }) {
            Ok(()) => {}
            Err(TrySendError::Full(submission)) => (submission.done)(Err(LogError::Full)),
            Err(TrySendError::Disconnected(submission)) => (submission.done)(Err(LogError::Failed)),
        }
    }

    /// Entries of these indices as last synced or written. Blocks on disk; for the start.
    ///
    /// # Errors
    /// [`ReadError`] naming the damaged entry.
    pub fn entries(&self, range: Range<u64>) -> Result<Vec<(u64, Vec<u8>)>, ReadError> {
        let begin = self.database()?.begin_read()?;
        let table = begin.open_table(ENTRIES)?;
        let mut entries = Vec::new();
        for entry in table.range(range)? {
            let (index, value) = entry?;
            let index = index.value();
            let named = |error| ReadError::Damaged(format!("entry {index} of {}: {error}", self.path()));
            entries.push((index, disk::unsealed(value.value()).map_err(named)?.to_vec()));
        }
        Ok(entries)
    }

    /// A value. Blocks on disk; for the start.
    ///
    /// # Errors
    /// [`ReadError`] naming the damaged value.
    pub fn value(&self, slot: Slot) -> Result<Option<Vec<u8>>, ReadError> {
        let begin = self.database()?.begin_read()?;
        let table = begin.open_table(VALUES)?;
        let Some(value) = table.get(slot.name())? else { return Ok(None) };
        let named = |error| ReadError::Damaged(format!("the {} of {}: {error}", slot.name(), self.path()));
        Ok(Some(disk::unsealed(value.value()).map_err(named)?.to_vec()))
    }

    /// Where it lies, for messages.
    #[must_use]
    pub fn path(&self) -> std::path::Display<'_> {
        self.inner.path.display()
    }
}

impl Drop for Open {
    /// Writes what was queued, then ends.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the writer of the registry's log panicked");
        }
    }
}

/// The file belongs to this folder: its votes were this disk's.
fn identify(database: &Database, path: &Path, catalog: Option<&Catalog>) -> Result<(), OpenError> {
    let write = || -> Result<Option<String>, ReadError> {
        let mut begin = database.begin_write()?;
        begin
            .set_durability(Durability::Immediate)
            .map_err(|error| ReadError::Database(error.to_string()))?;
        {
            begin.open_table(ENTRIES)?;
            let mut values = begin.open_table(VALUES)?;
            if let Some(catalog) = catalog {
                let disk_id = catalog.inner.disk_id;
                let found = values.get(DISK_ID)?.map(|value| value.value().to_vec());
                match found {
                    Some(found) if found != disk_id.as_bytes() => {
                        return Ok(Some("it is the log of another data_dir".to_owned()));
                    }
                    Some(_) => {}
                    // The file is new, or was emptied.
                    None if catalog.has_log()? => return Ok(Some(GONE.to_owned())),
                    None => drop(values.insert(DISK_ID, disk_id.as_bytes().as_slice())?),
                }
            }
        }
        begin.commit().map_err(|error| ReadError::Database(error.to_string()))?;
        Ok(None)
    };
    match write() {
        Ok(None) => Ok(()),
        Ok(Some(detail)) => Err(damaged(path, detail)),
        Err(error) => Err(damaged(path, error)),
    }
}

fn run(database: &Database, queue: &Receiver<Submission>) {
    let mut failed = false;
    while let Ok(first) = queue.recv() {
        let group: Vec<_> = std::iter::once(first).chain(queue.try_iter().take(GROUP_MAX - 1)).collect();
        let outcome = if failed {
            Err(LogError::Failed)
        } else {
            write(database, &group).map_err(|error| LogError::Write(error.to_string()))
        };
        if let Err(error) = &outcome
            && !failed
        {
            failed = true;
            tracing::error!(%error, "the registry's log failed");
        }
        for submission in group {
            (submission.done)(outcome.clone());
        }
    }
}

fn write(database: &Database, group: &[Submission]) -> Result<(), io::Error> {
    let durable = group.iter().flat_map(|submission| &submission.steps).any(|step| match step {
        LogStep::Put(slot, _) => slot.durable(),
        _ => true,
    });
    let mut begin = database.begin_write().map_err(io::Error::other)?;
    begin
        .set_durability(if durable { Durability::Immediate } else { Durability::None })
        .map_err(io::Error::other)?;
    for step in group.iter().flat_map(|submission| &submission.steps) {
        apply(&begin, step).map_err(io::Error::other)?;
    }
    begin.commit().map_err(io::Error::other)
}

fn apply(begin: &WriteTransaction, step: &LogStep) -> Result<(), ReadError> {
    match step {
        LogStep::Append(entries) => {
            let mut table = begin.open_table(ENTRIES)?;
            for (index, bytes) in entries {
                table.insert(index, disk::sealed_bytes(bytes).as_slice())?;
            }
        }
        LogStep::TruncateFrom(index) => begin.open_table(ENTRIES)?.retain_in(*index.., |_, _| false)?,
        LogStep::PurgeTo(index) => begin.open_table(ENTRIES)?.retain_in(..=*index, |_, _| false)?,
        LogStep::Put(slot, bytes) => {
            begin.open_table(VALUES)?.insert(slot.name(), disk::sealed_bytes(bytes).as_slice())?;
        }
    }
    Ok(())
}

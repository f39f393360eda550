//! The writer thread: everything that is queued becomes one transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use keepwarm_core::shard::{PersistError, Record, Tombstone, TranscriptChange};
use keepwarm_types::ShardCount;
use redb::{Database, Durability};

use crate::disk::{self, DiskManifest};
use crate::open::{Catalog, MESSAGES, SESSIONS, Sync, TOKENS, TOMBSTONES};
use crate::read::ReadError;
use crate::transcript::Pages;

/// Submissions that wait for the disk. With a sync of some milliseconds and [`GROUP_MAX`] to a group this is
/// a few groups; more means that the disk does not keep up, and the writer is told so.
pub const QUEUE_MAX: usize = 8192;
/// Submissions in one transaction.
pub const GROUP_MAX: usize = 1024;

/// Told the outcome, on the writer thread; must not block. On failure the records come back.
pub type Done = Box<dyn FnOnce(Result<(), (PersistError, Vec<Record>)>) + Send>;

/// Nothing was taken, and nothing ever will be: the records come back.
#[derive(Debug)]
pub struct SubmitError(pub Vec<Record>);

struct Submission {
    records: Vec<Record>,
    done: Done,
}

#[derive(Debug)]
pub(crate) struct Writer {
    queue: Option<Sender<Submission>>,
    thread: Option<JoinHandle<()>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    transactions: AtomicU64,
    submissions: AtomicU64,
}

impl Writer {
    pub(crate) fn start(database: Arc<Database>, sync: Sync, shards: ShardCount) -> std::io::Result<Self> {
        let (send, receive) = bounded(QUEUE_MAX);
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        let thread = std::thread::Builder::new()
            .name("catalog".to_owned())
            .spawn(move || run(&database, &receive, sync, shards, &counted))?;
        Ok(Self { queue: Some(send), thread: Some(thread), counts })
    }
}

impl Drop for Writer {
    /// Writes what was queued, then ends.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the catalog's writer panicked");
        }
    }
}

impl Catalog {
    /// Queues records for one transaction; `done` is told once they are safe, or that they are not.
    ///
    /// # Errors
    /// [`SubmitError`] at once where the queue is full or closed.
    pub fn submit(&self, records: Vec<Record>, done: Done) -> Result<(), SubmitError> {
        let Some(queue) = &self.inner.writer.queue else { return Err(SubmitError(records)) };
        queue.try_send(Submission { records, done }).map_err(|error| match error {
            TrySendError::Full(submission) | TrySendError::Disconnected(submission) => {
                SubmitError(submission.records)
            }
        })
    }

    /// Transactions and submissions so far: their ratio is how well commits are grouped.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let counts = &self.inner.writer.counts;
        (counts.transactions.load(Ordering::Relaxed), counts.submissions.load(Ordering::Relaxed))
    }
}

fn run(database: &Database, queue: &Receiver<Submission>, sync: Sync, shards: ShardCount, counts: &Counts) {
    let mut poisoned = false;
    let mut unsynced: Option<Instant> = None;
    loop {
        let first = match (sync, unsynced) {
            (Sync::Interval(interval), Some(since)) => {
                let left = interval.saturating_sub(since.elapsed());
                match queue.recv_timeout(left.max(Duration::from_millis(1))) {
                    Ok(first) => Some(first),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            _ => match queue.recv() {
                Ok(first) => Some(first),
                Err(_) => break,
            },
        };
        let group: Vec<_> = first.into_iter().chain(queue.try_iter().take(GROUP_MAX - 1)).collect();
        let due = match (sync, unsynced) {
            (Sync::Always, _) => true,
            (Sync::Interval(interval), Some(since)) => since.elapsed() >= interval,
            (Sync::Interval(_), None) => false,
        };
        let outcome =
            if poisoned { Err(PersistError::NotApplied) } else { write(database, &group, due, shards) };
        poisoned |= outcome == Err(PersistError::Unknown);
        unsynced = if due { None } else { unsynced.or_else(|| Some(Instant::now())) };
        counts.transactions.fetch_add(1, Ordering::Relaxed);
        counts.submissions.fetch_add(group.len() as u64, Ordering::Relaxed);
        for submission in group {
            (submission.done)(outcome.map_err(|error| (error, submission.records)));
        }
    }
    if unsynced.is_some() && !poisoned {
        // The last sync of an interval; what it covers was acknowledged as at risk.
        let _ = write(database, &[], true, shards);
    }
}

/// One transaction. An error before the commit is certain; an error of the commit itself is not, and after
/// it the database takes no more writes until it is opened again.
fn write(
    database: &Database,
    group: &[Submission],
    sync: bool,
    shards: ShardCount,
) -> Result<(), PersistError> {
    let refused = |error: ReadError| {
        tracing::error!(%error, "the catalog did not take a group of records");
        PersistError::NotApplied
    };
    let mut begin = database.begin_write().map_err(|error| refused(error.into()))?;
    let durability = if sync { Durability::Immediate } else { Durability::None };
    begin.set_durability(durability).map_err(|error| refused(ReadError::Database(error.to_string())))?;
    for submission in group {
        for record in &submission.records {
            apply(&begin, record, shards).map_err(refused)?;
        }
    }
    begin.commit().map_err(|error| {
        tracing::error!(%error, "a commit of the catalog failed: its outcome is unknown until the next start");
        PersistError::Unknown
    })
}

fn apply(begin: &redb::WriteTransaction, record: &Record, shards: ShardCount) -> Result<(), ReadError> {
    let mut sessions = begin.open_table(SESSIONS)?;
    let mut tombstones = begin.open_table(TOMBSTONES)?;
    let mut tokens = begin.open_table(TOKENS)?;
    let mut messages = begin.open_table(MESSAGES)?;
    let mut pages = Pages { tokens: &mut tokens, messages: &mut messages, shards };
    match record {
        Record::Manifest(manifest, transcript) => {
            let (key, birth) = (&manifest.key, manifest.birth);
            match transcript {
                TranscriptChange::Keep => {}
                TranscriptChange::Delta(delta) => pages.apply(key, birth, delta)?,
                TranscriptChange::CutTokens(length) => pages.cut(key, birth, *length)?,
                TranscriptChange::CopyFrom { parent, birth: from, tokens, messages, .. } => {
                    pages.copy((parent, *from), (key, birth), *tokens, *messages)?;
                }
            }
            let value = disk::encode_manifest(&DiskManifest::from(&**manifest));
            sessions.insert(disk::key_bytes(key, shards).as_slice(), value.as_slice())?;
        }
        Record::Tombstone { key, birth, revision, at, expired, stamp } => {
            pages.remove(key, *birth)?;
            let bytes = disk::key_bytes(key, shards);
            sessions.remove(bytes.as_slice())?;
            let tombstone =
                Tombstone { birth: *birth, revision: *revision, at: *at, expired: *expired, stamp: *stamp };
            let value = disk::encode_tombstone(&disk::disk_tombstone(&tombstone));
            tombstones.insert(bytes.as_slice(), value.as_slice())?;
        }
        Record::Forget(key) => {
            tombstones.remove(disk::key_bytes(key, shards).as_slice())?;
        }
        Record::Drop(key, birth) => {
            pages.remove(key, *birth)?;
            sessions.remove(disk::key_bytes(key, shards).as_slice())?;
        }
    }
    Ok(())
}

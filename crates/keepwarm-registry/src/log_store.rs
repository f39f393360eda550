//! The group's log: all entries that are not purged in memory, every change of them on disk before it counts.
//!
//! Snapshots bound the entries in memory; the disk is read at start alone.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keepwarm_catalog::{LogError, LogStep, RaftLog, ReadError, Slot};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogId, LogState, OptionalSend, RaftLogId, RaftLogReader, StorageIOError, Vote};
use tokio::sync::oneshot;

use crate::codec::raft::{
    RawLogEntry, decode_log_entry, decode_log_id, decode_vote, encode_log_entry, encode_log_id, encode_vote,
};
use crate::raft_types::{LogEntry, StorageError, TypeConfig};

/// Bytes of entries in one message to a voter: one entry is under this, and a few are far under a frame's limit.
const APPEND_BYTES_MAX: usize = 1 << 20;

/// The log of one node; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    disk: RaftLog,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Each with its bytes on disk.
    entries: BTreeMap<u64, (usize, LogEntry)>,
    purged: Option<LogId<u64>>,
    committed: Option<LogId<u64>>,
    vote: Option<Vote<u64>>,
}

/// Writes and waits until it is safe.
pub(crate) async fn write(disk: &RaftLog, steps: Vec<LogStep>) -> Result<(), LogError> {
    let (done, outcome) = oneshot::channel();
    // Nobody waits any more only where the node stops.
    disk.submit(steps, Box::new(move |result| drop(done.send(result))));
    outcome.await.unwrap_or(Err(LogError::Failed))
}

impl LogStore {
    /// Reads what is on disk. Blocks.
    ///
    /// # Errors
    /// [`ReadError`] naming what is damaged.
    pub(crate) fn open(disk: RaftLog) -> Result<Self, ReadError> {
        let named = |what: &str, error: &dyn ToString| {
            ReadError::Damaged(format!("{what} of {}: {}", disk.path(), error.to_string()))
        };
        let log_id = |slot: Slot, what: &str| -> Result<Option<LogId<u64>>, ReadError> {
            let Some(bytes) = disk.value(slot)? else { return Ok(None) };
            Ok(Some(decode_log_id(&bytes).map_err(|error| named(what, &error))?.into()))
        };
        let purged = log_id(Slot::Purged, "the purged id")?;
        let committed = log_id(Slot::Committed, "the committed id")?;
        let vote = match disk.value(Slot::Vote)? {
            Some(bytes) => Some(decode_vote(&bytes).map_err(|error| named("the vote", &error))?.into()),
            None => None,
        };
        let mut entries = BTreeMap::new();
        let mut expected = purged.map(|id: LogId<u64>| id.index + 1);
        for (index, bytes) in disk.entries(0..u64::MAX)? {
            let entry = decode_log_entry(&bytes)
                .and_then(LogEntry::try_from)
                .map_err(|error| named(&format!("entry {index}"), &error))?;
            if entry.log_id.index != index || expected.is_some_and(|expected| expected != index) {
                return Err(named(&format!("entry {index}"), &"entries before it are missing"));
            }
            expected = Some(index + 1);
            entries.insert(index, (bytes.len(), entry));
        }
        let memory = Memory { entries, purged, committed, vote };
        Ok(Self { disk, memory: Arc::new(Mutex::new(memory)) })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lost(error: LogError, kind: fn(AnyError) -> StorageIOError<u64>) -> StorageError {
    kind(AnyError::new(&error)).into()
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<LogEntry>, StorageError> {
        Ok(self.memory().entries.range(range).map(|(_, (_, entry))| entry.clone()).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<LogEntry>, StorageError> {
        let mut bytes = 0;
        let memory = self.memory();
        let fits = |(_, (size, _)): &(&u64, &(usize, LogEntry))| {
            let first = bytes == 0;
            bytes += size;
            first || bytes <= APPEND_BYTES_MAX
        };
        Ok(memory.entries.range(start..end).take_while(fits).map(|(_, (_, entry))| entry.clone()).collect())
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let memory = self.memory();
        let last = memory.entries.values().next_back().map(|(_, entry)| entry.log_id);
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: last.or(memory.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError> {
        let steps = vec![LogStep::Put(Slot::Vote, encode_vote(&vote.into()))];
        write(&self.disk, steps).await.map_err(|error| lost(error, StorageIOError::write_vote))?;
        self.memory().vote = Some(*vote);
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError> {
        Ok(self.memory().vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), StorageError> {
        self.memory().committed = committed;
        if let Some(id) = &committed {
            // A hint: nobody waits for it, and the next failure is told to whoever writes an entry.
            let steps = vec![LogStep::Put(Slot::Committed, encode_log_id(&id.into()))];
            self.disk.submit(steps, Box::new(drop));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError> {
        Ok(self.memory().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut bytes = Vec::new();
        {
            let mut memory = self.memory();
            for entry in entries {
                let encoded = encode_log_entry(&RawLogEntry::from(&entry));
                let index = entry.get_log_id().index;
                memory.entries.insert(index, (encoded.len(), entry));
                bytes.push((index, encoded));
            }
        }
        let done = |result: Result<(), LogError>| callback.log_io_completed(result.map_err(io::Error::other));
        self.disk.submit(vec![LogStep::Append(bytes)], Box::new(done));
        Ok(())
    }

    async fn truncate(&mut self, id: LogId<u64>) -> Result<(), StorageError> {
        drop(self.memory().entries.split_off(&id.index));
        write(&self.disk, vec![LogStep::TruncateFrom(id.index)])
            .await
            .map_err(|error| lost(error, StorageIOError::write_logs))
    }

    async fn purge(&mut self, id: LogId<u64>) -> Result<(), StorageError> {
        {
            let mut memory = self.memory();
            memory.entries = memory.entries.split_off(&(id.index + 1));
            memory.purged = Some(id);
        }
        let steps =
            vec![LogStep::PurgeTo(id.index), LogStep::Put(Slot::Purged, encode_log_id(&(&id).into()))];
        write(&self.disk, steps).await.map_err(|error| lost(error, StorageIOError::write_logs))
    }
}

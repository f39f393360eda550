//! Reading the catalog: a shard at start, a transcript at any time.

use keepwarm_core::session::{Manifest, Message, Stamp};
use keepwarm_core::shard::Tombstone;
use keepwarm_types::{Birth, SessionKey, ShardId};
use redb::ReadableDatabase;

use crate::disk::{self, BadValue};
use crate::open::{Catalog, MESSAGES, SESSIONS, TOKENS, TOMBSTONES};
use crate::transcript::{read_messages, read_tokens};

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The database failed.
    #[error("the catalog cannot be read: {0}")]
    Database(String),
    /// A value is not what was written.
    #[error("the catalog is damaged: {0}")]
    Damaged(String),
}

macro_rules! from_database {
    ($($error:ident),+) => {
        $(impl From<redb::$error> for ReadError {
            fn from(error: redb::$error) -> Self {
                Self::Database(error.to_string())
            }
        })+
    };
}
from_database!(StorageError, TableError, TransactionError);

impl From<BadValue> for ReadError {
    fn from(value: BadValue) -> Self {
        Self::Damaged(value.0)
    }
}

/// The token ids and messages of a session's life.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Messages.
    pub messages: Vec<Message>,
}

impl Catalog {
    /// Every manifest of a shard, without block instances.
    ///
    /// # Errors
    /// [`ReadError`] naming the session whose record is damaged.
    pub fn manifests(&self, shard: ShardId) -> Result<Vec<Manifest>, ReadError> {
        let begin = self.inner.database.begin_read()?;
        let table = begin.open_table(SESSIONS)?;
        let (first, end) = disk::shard_range(shard);
        let mut manifests = Vec::new();
        for entry in table.range(first.as_slice()..end.as_slice())? {
            let (key, value) = entry?;
            let key = disk::key_from(key.value())?;
            let named = |error: BadValue| ReadError::Damaged(format!("session {key}: {error}"));
            let disk = disk::decode_manifest(value.value()).map_err(named)?;
            manifests.push(disk::manifest_from(key.clone(), disk).map_err(named)?);
        }
        Ok(manifests)
    }

    /// Every tombstone of a shard.
    ///
    /// # Errors
    /// [`ReadError`] naming the session whose record is damaged.
    pub fn tombstones(&self, shard: ShardId) -> Result<Vec<(SessionKey, Tombstone)>, ReadError> {
        let begin = self.inner.database.begin_read()?;
        let table = begin.open_table(TOMBSTONES)?;
        let (first, end) = disk::shard_range(shard);
        let mut tombstones = Vec::new();
        for entry in table.range(first.as_slice()..end.as_slice())? {
            let (key, value) = entry?;
            let key = disk::key_from(key.value())?;
            let disk = disk::decode_tombstone(value.value())
                .map_err(|error| ReadError::Damaged(format!("tombstone of {key}: {error}")))?;
            tombstones.push((key, disk::tombstone_from(&disk)));
        }
        Ok(tombstones)
    }

    /// A session's stamp and whole transcript, of one moment; none where it is not there. Blocks on disk; call it off
    /// the async threads.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn whole(&self, key: &SessionKey) -> Result<Option<(Stamp, Transcript)>, ReadError> {
        let begin = self.inner.database.begin_read()?;
        let shards = self.inner.shards;
        let sessions = begin.open_table(SESSIONS)?;
        let Some(value) = sessions.get(disk::key_bytes(key, shards).as_slice())? else { return Ok(None) };
        let manifest = disk::manifest_from(key.clone(), disk::decode_manifest(value.value())?)?;
        let transcript = Transcript {
            tokens: read_tokens(&begin.open_table(TOKENS)?, key, shards, manifest.birth)?,
            messages: read_messages(&begin.open_table(MESSAGES)?, key, shards, manifest.birth)?,
        };
        Ok(Some((manifest.stamp, transcript)))
    }

    /// The transcript of a session's life, as last committed. Blocks on disk; call it off the async threads.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn transcript(&self, key: &SessionKey, birth: Birth) -> Result<Transcript, ReadError> {
        let begin = self.inner.database.begin_read()?;
        let shards = self.inner.shards;
        Ok(Transcript {
            tokens: read_tokens(&begin.open_table(TOKENS)?, key, shards, birth)?,
            messages: read_messages(&begin.open_table(MESSAGES)?, key, shards, birth)?,
        })
    }
}

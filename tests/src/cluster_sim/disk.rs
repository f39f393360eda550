//! The catalog of a simulated node: records become durable in groups, in their order, or not at all.
//!
//! It keeps manifests as the real one does, without their blocks: instances mean nothing to the next process.

use std::collections::{BTreeMap, VecDeque};

use keepwarm_core::session::Manifest;
use keepwarm_core::shard::{PersistError, Record, Ticket, Tombstone, TranscriptChange};
use keepwarm_types::{Birth, SessionKey, ShardId};

/// What survives a crash.
#[derive(Debug, Clone, Default)]
pub struct Store {
    pub manifests: BTreeMap<SessionKey, Manifest>,
    pub transcripts: BTreeMap<(SessionKey, Birth), Vec<u32>>,
    pub tombstones: BTreeMap<SessionKey, Tombstone>,
}

impl Store {
    fn apply(&mut self, record: &Record) {
        match record {
            Record::Manifest(manifest, transcript) => {
                let name = (manifest.key.clone(), manifest.birth);
                match transcript {
                    TranscriptChange::Keep => {}
                    TranscriptChange::Delta(delta) => {
                        let tokens = self.transcripts.entry(name).or_default();
                        tokens.truncate(delta.keep_tokens.as_usize());
                        tokens.extend(&delta.tokens);
                    }
                    TranscriptChange::CutTokens(length) => {
                        self.transcripts.entry(name).or_default().truncate(length.as_usize());
                    }
                    TranscriptChange::CopyFrom { parent, birth, tokens, .. } => {
                        let of = self.transcripts.get(&(parent.clone(), *birth)).cloned().unwrap_or_default();
                        let taken = of.into_iter().take(tokens.as_usize()).collect();
                        self.transcripts.insert(name, taken);
                    }
                }
                let mut kept = Manifest::clone(manifest);
                for part in &mut kept.parts {
                    part.blocks = Vec::new();
                }
                self.manifests.insert(manifest.key.clone(), kept);
            }
            Record::Tombstone { key, birth, .. } => {
                self.transcripts.remove(&(key.clone(), *birth));
                self.manifests.remove(key);
                if let Some(grave) = record.grave() {
                    self.tombstones.insert(key.clone(), grave);
                }
            }
            Record::Forget(key) => drop(self.tombstones.remove(key)),
            Record::Drop(key, birth) => {
                self.transcripts.remove(&(key.clone(), *birth));
                self.manifests.remove(key);
            }
        }
    }
}

/// What a group of records came to.
pub type Outcome = (ShardId, Ticket, Result<(), (PersistError, Vec<Record>)>);

/// A disk that can be full, and can fail in the middle of a sync.
#[derive(Debug, Default)]
pub struct Disk {
    pub store: Store,
    queue: VecDeque<(ShardId, Ticket, Vec<Record>)>,
    pub syncing: bool,
    pub full: bool,
    /// The next sync fails; whether its records are there afterwards is anybody's guess.
    pub breaks: bool,
}

impl Disk {
    pub fn submit(&mut self, shard: ShardId, ticket: Ticket, records: Vec<Record>) {
        self.queue.push_back((shard, ticket, records));
    }

    /// Writes all that waits as one group.
    pub fn sync(&mut self, luck: bool) -> Vec<Outcome> {
        self.syncing = false;
        let group: Vec<_> = self.queue.drain(..).collect();
        let breaks = std::mem::take(&mut self.breaks);
        if !self.full && (!breaks || luck) {
            group.iter().flat_map(|(.., records)| records).for_each(|record| self.store.apply(record));
        }
        let error = if self.full { PersistError::NotApplied } else { PersistError::Unknown };
        let outcome = |(shard, ticket, records)| {
            (shard, ticket, if self.full || breaks { Err((error, records)) } else { Ok(()) })
        };
        group.into_iter().map(outcome).collect()
    }

    /// The power goes: of what waited, some first part may have reached the disk.
    pub fn crash(&mut self, reached: usize) {
        let group: Vec<_> = self.queue.drain(..).collect();
        if !self.full {
            let kept = &group[..reached.min(group.len())];
            kept.iter().flat_map(|(.., records)| records).for_each(|record| self.store.apply(record));
        }
        (self.syncing, self.full, self.breaks) = (false, false, false);
    }

    /// Groups of records that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
}

//! The catalog of a simulated node: records become durable in groups, in their order, or not at all.

use std::collections::{BTreeMap, VecDeque};

use keepwarm_core::session::Manifest;
use keepwarm_core::shard::{PersistError, Record, Ticket, Tombstone, TranscriptChange};
use keepwarm_types::{Birth, SessionKey};

use super::bug::Bug;

/// What survives a crash.
#[derive(Debug, Clone, Default)]
pub struct Store {
    pub manifests: BTreeMap<SessionKey, Manifest>,
    pub transcripts: BTreeMap<(SessionKey, Birth), Vec<u32>>,
    pub tombstones: BTreeMap<SessionKey, Tombstone>,
}

impl Store {
    fn apply(&mut self, record: &Record, bug: Option<Bug>) {
        match record {
            Record::Manifest(manifest, transcript) => {
                let name = (manifest.key.clone(), manifest.birth);
                match transcript {
                    TranscriptChange::Keep => {}
                    TranscriptChange::Delta(delta) if bug != Some(Bug::TranscriptLagsBehind) => {
                        let tokens = self.transcripts.entry(name).or_default();
                        tokens.truncate(delta.keep_tokens.as_usize());
                        tokens.extend(&delta.tokens);
                    }
                    TranscriptChange::Delta(_) => {}
                    TranscriptChange::CutTokens(length) => {
                        self.transcripts.entry(name).or_default().truncate(length.as_usize());
                    }
                    TranscriptChange::CopyFrom { parent, birth, tokens, .. } => {
                        let of = self.transcripts.get(&(parent.clone(), *birth)).cloned().unwrap_or_default();
                        let taken = of.into_iter().take(tokens.as_usize()).collect();
                        self.transcripts.insert(name, taken);
                    }
                }
                self.manifests.insert(manifest.key.clone(), Manifest::clone(manifest));
            }
            Record::Tombstone { key, birth, revision, at, expired, stamp } => {
                self.transcripts.remove(&(key.clone(), *birth));
                if bug != Some(Bug::DeletionIsNotWritten) {
                    self.manifests.remove(key);
                    let grave = Tombstone {
                        birth: *birth,
                        revision: *revision,
                        at: *at,
                        expired: *expired,
                        stamp: *stamp,
                    };
                    self.tombstones.insert(key.clone(), grave);
                }
            }
            Record::Forget(key) => {
                self.tombstones.remove(key);
            }
            Record::Drop(key, birth) => {
                self.transcripts.remove(&(key.clone(), *birth));
                self.manifests.remove(key);
            }
        }
    }
}

/// What a group of records came to.
pub type Outcome = (Ticket, Result<(), (PersistError, Vec<Record>)>);

/// A disk that can be full, and can fail in the middle of a sync.
#[derive(Debug, Default)]
pub struct Disk {
    pub store: Store,
    queue: VecDeque<(Ticket, Vec<Record>)>,
    pub full: bool,
    /// The next sync fails; whether its records are there afterwards is anybody's guess.
    pub breaks: bool,
    /// Acknowledged, but not written: the bug of that name.
    late: Vec<(Ticket, Vec<Record>)>,
    /// After a failed sync it takes nothing more until it is opened again.
    poisoned: bool,
}

impl Disk {
    pub fn submit(&mut self, ticket: Ticket, records: Vec<Record>) {
        self.queue.push_back((ticket, records));
    }

    /// Writes all that waits as one group.
    pub fn sync(&mut self, luck: bool, bug: Option<Bug>) -> Vec<Outcome> {
        let group: Vec<_> = self.queue.drain(..).collect();
        let fail = |error| {
            move |(ticket, records): (Ticket, Vec<Record>)| -> Outcome { (ticket, Err((error, records))) }
        };
        if self.poisoned || self.full {
            return group.into_iter().map(fail(PersistError::NotApplied)).collect();
        }
        let late = std::mem::take(&mut self.late);
        self.keep(&late, bug);
        let breaks = std::mem::take(&mut self.breaks);
        if bug == Some(Bug::AcknowledgedBeforeSync) {
            self.late.clone_from(&group);
        } else if !breaks || luck {
            self.keep(&group, bug);
        }
        if breaks {
            self.poisoned = true;
            let error = match bug {
                Some(Bug::UnknownCalledNo) => PersistError::NotApplied,
                _ => PersistError::Unknown,
            };
            return group.into_iter().map(fail(error)).collect();
        }
        group.into_iter().map(|(ticket, _)| (ticket, Ok(()))).collect()
    }

    fn keep(&mut self, group: &[(Ticket, Vec<Record>)], bug: Option<Bug>) {
        for record in group.iter().flat_map(|(_, records)| records) {
            self.store.apply(record, bug);
        }
    }

    /// The power goes: of what waited, some first part may have reached the disk.
    pub fn crash(&mut self, reached: usize, bug: Option<Bug>) {
        let group: Vec<_> = self.queue.drain(..).collect();
        self.late.clear();
        if !self.poisoned && !self.full && bug != Some(Bug::AcknowledgedBeforeSync) {
            self.keep(&group[..reached.min(group.len())], bug);
        }
        (self.full, self.breaks, self.poisoned) = (false, false, false);
    }

    /// Whether records wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
}

//! Records on their way to this node's catalog, and what becomes of those that it refuses.

use std::collections::{BTreeMap, HashMap};

use keepwarm_types::{Millis, SessionKey, Timestamp};

use super::event::ReplicaCommand;
use super::message::Message;
use super::state::{Part, Replica};
use crate::registry::Member;
use crate::session::Stamp;
use crate::shard::{PersistError, Record, Ticket, TranscriptChange};

/// How long after the catalog refused records they are given to it again.
const RETRY: Millis = Millis(500);

/// Records on their way.
#[derive(Debug)]
pub(super) struct Saving {
    keys: Vec<SessionKey>,
    then: Then,
    /// Which save this is, by when it was first given.
    serial: u64,
    /// Forks among the records: the parent, and the child. On a primary the parent does not change until the child is on
    /// disk, so that what has to be given to the catalog again still says the same.
    forks: Vec<(SessionKey, SessionKey)>,
}

/// What follows.
#[derive(Debug)]
pub(super) enum Then {
    /// It was a change of the own shard.
    Change(Ticket),
    /// Say this to the primary.
    Say(Member, Message),
    Nothing,
}

/// A session with records on their way that are no change of the own shard.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    count: u32,
    /// The latest of them.
    latest: u64,
}

impl Replica {
    /// Gives records to the catalog.
    pub(super) fn save(
        &mut self,
        keys: Vec<SessionKey>,
        records: Vec<Record>,
        then: Then,
        out: &mut Vec<ReplicaCommand>,
    ) {
        self.saves += 1;
        let fork = |record: &Record| parent(record).map(|(parent, _)| (parent.clone(), record.key().clone()));
        let forks = records.iter().filter_map(fork).collect();
        let saving = Saving { keys, then, serial: self.saves, forks };
        if !matches!(saving.then, Then::Change(_)) {
            count(&mut self.saving, &saving);
        }
        self.give(saving, records, out);
    }

    fn give(&mut self, saving: Saving, records: Vec<Record>, out: &mut Vec<ReplicaCommand>) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.local.insert(ticket, saving);
        out.push(ReplicaCommand::Persist(ticket, records));
    }

    pub(super) fn persisted(&mut self, now: Timestamp, ticket: Ticket, out: &mut Vec<ReplicaCommand>) {
        let Some(saving) = self.local.remove(&ticket) else { return };
        match saving.then {
            // Its own shard knows what it lent for that.
            Then::Change(ticket) => self.saved_here(now, ticket, out),
            Then::Say(ref to, ref message) => {
                if matches!(self.part, Part::Follower(_)) && self.set.replicas.first() == Some(to) {
                    self.say(to, message.clone(), out);
                }
                self.saved(now, &saving, out);
            }
            Then::Nothing => self.saved(now, &saving, out),
        }
        self.touched(now, out);
    }

    fn saved(&mut self, now: Timestamp, saving: &Saving, out: &mut Vec<ReplicaCommand>) {
        for key in &saving.keys {
            if let Some(unsaved) = self.saving.get_mut(key) {
                unsaved.count -= 1;
                if unsaved.count == 0 {
                    self.saving.remove(key);
                }
            }
        }
        for (parent, child) in &saving.forks {
            let Part::Primary(office) = &mut self.part else { return };
            let mut commands = Vec::new();
            office.shard.give_back(now, parent, child, false, &mut commands);
            self.carry_out(now, commands, None, out);
        }
    }

    pub(super) fn persist_failed(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        error: PersistError,
        records: Vec<Record>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Some(saving) = self.local.remove(&ticket) else { return };
        if let Then::Change(change) = saving.then
            && self.not_saved_here(now, change, error, out)
        {
            self.touched(now, out);
            return;
        }
        // What others have, or may have, is tried until it is here too.
        self.retries.push((now + RETRY, saving, records));
    }

    pub(super) fn retry(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        for (_, saving, records) in self.retries.extract_if(.., |(at, ..)| *at <= now).collect::<Vec<_>>() {
            self.save_again(now, saving, records, out);
        }
    }

    /// Gives refused records to the catalog again: those that are still what is to be on disk. A fork whose parent is not
    /// what it was any more would begin with other tokens.
    //= GUARANTEES.md#G2
    fn save_again(
        &mut self,
        now: Timestamp,
        mut saving: Saving,
        mut records: Vec<Record>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let given = records.len();
        let last: HashMap<_, _> =
            records.iter().map(|record| (record.key().clone(), record.stamp())).collect();
        records.retain(|record| {
            // A fork that was put in its place whole since then needs no parent.
            let later = self.saving.get(record.key()).is_some_and(|unsaved| unsaved.latest > saving.serial);
            !(later && parent(record).is_some())
                && self.head(record.key()) == last.get(record.key()).copied().flatten()
        });
        if records.len() < given && matches!(saving.then, Then::Say(..)) {
            // Whoever put something later in its place says when that is on disk.
            saving.then = Then::Nothing;
        }
        // The own shard keeps the parent of a fork as it is.
        let own = matches!(saving.then, Then::Change(_));
        let moved_on = |record: &Record| parent(record).is_some_and(|(key, met)| self.head(key) != Some(met));
        let (gone, records): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|record| !own && moved_on(record));
        if gone.is_empty() {
            return self.give(saving, records, out);
        }
        // As its disk has it, it was never here. A primary sends it whole; one that came to be it knows that nobody was
        // told of it, since all must have it for that.
        for record in &gone {
            match self.part {
                Part::Primary(_) => self.never_was(now, record.key(), out),
                Part::Follower(_) => self.forget_unsaved(record.key(), out),
            }
        }
        // Where the outcome was unknown it may be on the disk all the same.
        let drops: Vec<_> = gone
            .iter()
            .filter_map(|record| match record {
                Record::Manifest(manifest, _) => Some(Record::Drop(record.key().clone(), manifest.birth)),
                _ => None,
            })
            .collect();
        self.save(gone.iter().map(|record| record.key().clone()).collect(), drops, Then::Nothing, out);
        self.saved(now, &saving, out);
        self.touched(now, out);
    }

    /// What is on its way to this node's disk when it becomes primary keeps parents as they are, too.
    pub(super) fn lend_to_inherited(&mut self) {
        let Part::Primary(office) = &mut self.part else { return };
        let under_way = self.local.values().chain(self.retries.iter().map(|(_, saving, _)| saving));
        for (parent, child) in under_way.flat_map(|saving| &saving.forks) {
            office.shard.lend(parent, child.clone());
        }
    }

    /// A change of the own shard that is on its way to the catalog when the office ends is saved as a copy's is.
    pub(super) fn orphan(&mut self, ticket: Ticket) {
        let mine = |saving: &Saving| matches!(saving.then, Then::Change(change) if change == ticket);
        let local = self.local.values_mut();
        let retries = self.retries.iter_mut().map(|(_, saving, _)| saving);
        for saving in local.chain(retries).filter(|saving| mine(saving)) {
            saving.then = Then::Nothing;
            count(&mut self.saving, saving);
        }
    }
}

fn count(unsaved: &mut BTreeMap<SessionKey, Unsaved>, saving: &Saving) {
    for key in &saving.keys {
        let unsaved = unsaved.entry(key.clone()).or_default();
        (unsaved.count, unsaved.latest) = (unsaved.count + 1, unsaved.latest.max(saving.serial));
    }
}

/// The session that a record begins as a prefix of, and the state of it that is meant.
pub(super) fn parent(record: &Record) -> Option<(&SessionKey, Stamp)> {
    match record {
        Record::Manifest(_, TranscriptChange::CopyFrom { parent, stamp, .. }) => Some((parent, *stamp)),
        _ => None,
    }
}

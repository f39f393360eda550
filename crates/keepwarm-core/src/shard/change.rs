//! A change's way: prepared, persisted, committed; or undone, or in doubt.

use std::sync::Arc;

use keepwarm_types::{Birth, Bytes, InstanceId, Millis, SessionKey, Timestamp};

use super::command::{Command, Record, Residence, Ticket, TranscriptChange};
use super::entry::{After, End, Entry, Pending};
use super::event::{PersistError, RequestId};
use super::refusal::Refusal;
use super::state::{Shard, Timer, session};
use super::view::{Answer, Deleted, Written};
use crate::session::{Form, Manifest, Stamp, State};

/// How long after an unclear outcome the records are tried again.
const RETRY: Millis = Millis(500);

pub(super) const IN_DOUBT: &str = "an earlier write's outcome is not known yet";

/// A change that the rules allow, before it is given to the catalog.
pub(super) struct Change {
    pub(super) request: Option<RequestId>,
    pub(super) next: Arc<Manifest>,
    pub(super) transcript: TranscriptChange,
    pub(super) released: Vec<InstanceId>,
    pub(super) undo: Vec<InstanceId>,
    pub(super) after: After,
}

impl Pending {
    /// The parent of a fork, and whether it shall list it.
    fn fork(&self) -> Option<(SessionKey, bool)> {
        let After::Forked { branch, .. } = self.after else { return None };
        let next = self.next.as_ref()?;
        Some((SessionKey::new(next.key.tenant.clone(), next.parent.as_ref()?.id), branch))
    }
}

impl Shard {
    /// The name of the next change.
    pub(super) fn next_stamp(&mut self) -> Stamp {
        self.sequence += 1;
        Stamp { generation: self.settings.generation, sequence: self.sequence }
    }

    /// Gives a change to the catalog.
    pub(super) fn prepare(&mut self, key: &SessionKey, change: Change, out: &mut Vec<Command>) {
        let mut next = change.next;
        Arc::make_mut(&mut next).stamp = self.next_stamp();
        validate_manifest(&next);
        let record = Record::Manifest(Arc::clone(&next), change.transcript);
        let pending = Pending {
            ticket: Ticket(0),
            request: change.request,
            next: Some(next),
            released: change.released,
            undo: change.undo,
            after: change.after,
            in_doubt: None,
        };
        self.persist(key, pending, vec![record], out);
    }

    pub(super) fn persist(
        &mut self,
        key: &SessionKey,
        mut pending: Pending,
        records: Vec<Record>,
        out: &mut Vec<Command>,
    ) {
        self.next_ticket += 1;
        pending.ticket = Ticket(self.next_ticket);
        self.tickets.insert(pending.ticket, key.clone());
        out.push(Command::Persist(pending.ticket, records));
        let entry = self.sessions.entry(key.clone()).or_default();
        entry.work().pending = Some(pending);
    }

    //= GUARANTEES.md#G1
    pub(super) fn persisted(&mut self, now: Timestamp, ticket: Ticket, out: &mut Vec<Command>) {
        let Some(key) = self.tickets.remove(&ticket) else { return };
        let Some(entry) = self.sessions.get_mut(&key) else { return };
        let Some(pending) = entry.work().pending.take() else { return };
        let forked = pending.fork();
        match pending.next {
            Some(next) => {
                let fresh = entry.manifest.is_none();
                entry.manifest = Some(Arc::clone(&next));
                // A session that goes cold was not used by that.
                if !matches!(pending.after, After::Cold | After::Quiet) || fresh {
                    entry.last_used = now;
                }
                let view = entry.view(now);
                if fresh {
                    self.set_timer(next.expires_at(now), Timer::Session(key.clone()));
                }
                if !pending.released.is_empty() {
                    out.push(Command::Release(pending.released));
                }
                if matches!(pending.after, After::Cold) {
                    out.push(Command::Invalidate(key.clone(), next.birth));
                }
                self.reside(now, &key, out);
                if let (Some(request), Ok(view)) = (pending.request, view) {
                    out.push(Command::Reply(request, Ok(Box::new(answer(pending.after, view, &next)))));
                }
            }
            None => self.ended(now, &key, pending, out),
        }
        if let Some((parent, branch)) = forked {
            self.give_back(now, &parent, &key, branch, out);
        }
        self.resume(now, &key, out);
    }

    /// A session's end is committed: its memory and its name go, its tombstone stays.
    fn ended(&mut self, now: Timestamp, key: &SessionKey, pending: Pending, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.remove(key) else { return };
        let Some(manifest) = entry.manifest else { return };
        let After::Ended(end, stamp, at) = pending.after else { return };
        let bytes = manifest.stored_bytes();
        let birth = manifest.birth;
        gone(now, key, birth, pending.released, out);
        self.bury(
            key.clone(),
            super::state::Tombstone {
                birth,
                revision: manifest.revision,
                // As it was written down, so that whoever has this stamp has the same.
                at,
                expired: end == End::Expired,
                stamp,
            },
        );
        if end == End::Abandoned {
            self.forget(key, out);
        }
        if let Some(request) = pending.request {
            let deleted = Deleted { id: key.id, birth, revision: manifest.revision, bytes };
            out.push(Command::Reply(request, Ok(Box::new(Answer::Deleted(deleted)))));
        }
        let queue = entry.work.map(|work| work.queue).unwrap_or_default();
        for request in queue {
            self.request(now, request, out);
        }
        self.forget_oldest(key, out);
    }

    /// A session that the own catalog never took goes without a tombstone. False where there is none, or it is at work.
    pub(crate) fn never_was(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) -> bool {
        let idle = self.sessions.get(key).filter(|entry| !entry.busy());
        let Some(manifest) = idle.and_then(|entry| entry.manifest.clone()) else { return false };
        self.sessions.remove(key);
        gone(now, key, manifest.birth, self.named_here(&manifest), out);
        true
    }

    pub(super) fn persist_failed(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        error: PersistError,
        records: Vec<Record>,
        out: &mut Vec<Command>,
    ) {
        let Some(key) = self.tickets.remove(&ticket) else { return };
        let Some(entry) = self.sessions.get_mut(&key) else { return };
        let Some(mut pending) = entry.work().pending.take() else { return };
        let retried = pending.request.is_none() && pending.in_doubt.is_some();
        if error != PersistError::Unknown && !retried {
            if !pending.undo.is_empty() {
                out.push(Command::Release(std::mem::take(&mut pending.undo)));
            }
            if let Some(request) = pending.request {
                let refusal = match error {
                    PersistError::TooFewHolders => {
                        Refusal::Moving("fewer nodes than `replication` can hold the session's bytes")
                    }
                    _ => Refusal::Unavailable("the catalog did not take the change"),
                };
                out.push(Command::Reply(request, Err(refusal)));
            }
            if matches!(pending.after, After::Ended(End::Expired, ..)) {
                self.set_timer(now + RETRY, Timer::Session(key.clone()));
            }
            self.resume(now, &key, out);
            if self.sessions.get(&key).is_some_and(|entry| entry.manifest.is_none() && !entry.busy()) {
                self.sessions.remove(&key);
            }
            if let Some((parent, _)) = pending.fork() {
                self.give_back(now, &parent, &key, false, out);
            }
            return;
        }
        //= GUARANTEES.md#G3
        // From here on the outcome is committed or unknown, never "no": the same records are tried again.
        if let Some(request) = pending.request.take() {
            out.push(Command::Reply(request, Err(Refusal::OutcomeUnknown)));
        }
        pending.in_doubt = Some(records);
        entry.work().pending = Some(pending);
        self.refuse_behind(&key, out);
        self.set_timer(now + RETRY, Timer::Retry(key));
    }

    /// Refuses whoever waits behind a change whose outcome is unknown: that of the session, or of a fork of it.
    pub(super) fn refuse_behind(&mut self, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.get_mut(key) else { return };
        let Some(work) = entry.work.as_mut() else { return };
        let parent = work.pending.as_ref().and_then(Pending::fork).map(|(parent, _)| parent);
        for request in std::mem::take(&mut work.queue) {
            out.push(Command::Reply(request.id, Err(Refusal::Unavailable(IN_DOUBT))));
        }
        if let Some(parent) = parent {
            self.refuse_behind(&parent, out);
        }
    }

    /// Whether the outcome of what the session is busy with is unknown.
    pub(super) fn in_doubt(&self, key: &SessionKey) -> bool {
        let Some(work) = self.sessions.get(key).and_then(|entry| entry.work.as_ref()) else { return false };
        // A fork of an earlier office is no change of this one: nobody knows when its catalog takes it.
        let inherited = |child| !self.sessions.get(child).is_some_and(Entry::is_pending);
        work.pending.as_ref().is_some_and(|pending| pending.in_doubt.is_some())
            || work.lent.iter().any(|child| inherited(child) || self.in_doubt(child))
    }

    /// A fork begins as this session is now: until it is in the catalog nothing changes here.
    pub(crate) fn lend(&mut self, parent: &SessionKey, child: SessionKey) {
        if let Some(entry) = self.sessions.get_mut(parent) {
            entry.work().lent.push(child);
        }
    }

    /// The fork is in the catalog, or will never be.
    pub(crate) fn give_back(
        &mut self,
        now: Timestamp,
        parent: &SessionKey,
        child: &SessionKey,
        branch: bool,
        out: &mut Vec<Command>,
    ) {
        let Some(work) = self.sessions.get_mut(parent).and_then(|entry| entry.work.as_mut()) else { return };
        work.lent.retain(|lent| lent != child);
        if branch {
            self.add_branch(now, parent, child.id, out);
        }
        self.resume(now, parent, out);
    }

    /// Tries a change in doubt again.
    pub(super) fn retry(&mut self, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(work) = self.sessions.get_mut(key).and_then(|entry| entry.work.as_mut()) else { return };
        let Some(mut pending) = work.pending.take_if(|pending| pending.in_doubt.is_some()) else { return };
        let records = pending.in_doubt.replace(Vec::new()).unwrap_or_default();
        self.persist(key, pending, records, out);
    }

    /// Takes up what waited behind a change.
    pub(super) fn resume(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        while let Some(entry) = self.sessions.get_mut(key) {
            if entry.busy() {
                return;
            }
            let Some(request) = entry.work.as_mut().and_then(|work| work.queue.pop_front()) else {
                entry.settle();
                return;
            };
            self.request(now, request, out);
        }
    }
}

/// What everybody else must let go of with a session.
fn gone(now: Timestamp, key: &SessionKey, birth: Birth, released: Vec<InstanceId>, out: &mut Vec<Command>) {
    out.push(Command::Release(released));
    out.push(Command::Invalidate(key.clone(), birth));
    out.push(Command::Ended(key.clone()));
    out.push(Command::Reside(Residence {
        key: key.clone(),
        birth,
        bytes: Bytes::ZERO,
        stored: Bytes::ZERO,
        protected_until: now,
        expires_at: now,
        leased: false,
        last_used_at: now,
    }));
}

fn answer(after: After, view: super::view::SessionView, next: &Arc<Manifest>) -> Answer {
    match after {
        After::Session { new, clipped } => session(view, new, clipped),
        After::Forked { clipped, .. } => session(view, true, clipped),
        After::Written { length } => Answer::Written(Written {
            birth: next.birth,
            generation: next.stamp.generation,
            revision: next.revision,
            length_tokens: next.length_tokens,
            length,
            manifest: Arc::clone(next),
        }),
        After::Cold | After::Quiet | After::Ended(..) => Answer::Done,
    }
}

/// Asserts what must hold of every manifest.
pub(super) fn validate_manifest(manifest: &Manifest) {
    let key = &manifest.key;
    assert_eq!(manifest.parts.len(), manifest.layout.parts().len(), "{key}: parts differ from the layout");
    for (index, (state, part)) in manifest.parts.iter().zip(manifest.layout.parts()).enumerate() {
        if let State::Cold(_) = manifest.state {
            assert!(state.blocks.is_empty(), "{key}: part {index} is cold and names blocks");
            continue;
        }
        let before = Bytes(u64::from(state.first_block) * part.form.block_bytes());
        let named = part.raw_sum(state.blocks.iter().map(|block| block.length));
        assert_eq!(
            named.map(|named| before + named),
            Some(state.length),
            "{key}: part {index} does not add up"
        );
        assert!(
            part.cold.is_none() || state.digest.is_none(),
            "{key}: part {index} has a digest of other bytes"
        );
        let full = part.stored_block_bytes();
        if let Some((last, rest)) = state.blocks.split_last() {
            assert!(
                rest.iter().all(|block| u64::from(block.length) == full),
                "{key}: part {index} has a short block inside"
            );
            assert!(
                last.length > 0 && u64::from(last.length) <= full,
                "{key}: part {index} has a bad last block"
            );
        }
        if matches!(part.form, Form::Paged(_) | Form::Window { .. }) {
            assert_eq!(
                manifest.part_tokens(index),
                Some(manifest.length_tokens),
                "{key}: part {index} is not at the length"
            );
        }
    }
    if manifest.transcript_tokens.0 > 0 {
        assert!(manifest.length_tokens <= manifest.transcript_tokens, "{key}: state beyond its transcript");
    }
}

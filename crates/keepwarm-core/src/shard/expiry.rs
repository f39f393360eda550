//! What time ends: sessions, leases, staged bytes, tombstones.

use keepwarm_types::{SessionKey, Timestamp};

use super::command::{Command, Record, Ticket};
use super::entry::End;
use super::state::{RETRY_AFTER, Shard, TOMBSTONE_TTL, TOMBSTONES_MAX, Timer, Tombstone};

impl Shard {
    pub(super) fn tick(&mut self, now: Timestamp, out: &mut Vec<Command>) {
        while let Some((at, _)) = self.timers.first()
            && *at <= now
        {
            let Some((_, timer)) = self.timers.pop_first() else { break };
            match timer {
                Timer::Session(key) => self.session_due(now, &key, out),
                Timer::Lease(key) => self.lease_due(now, &key, out),
                Timer::Stage(key) => self.stages_due(now, &key, out),
                Timer::Tombstone(key) => self.tombstone_due(now, &key, out),
                Timer::Retry(key) => self.retry(&key, out),
            }
        }
    }

    /// Ends the session if its TTL has really passed; a use since then has moved the deadline.
    fn session_due(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.get(key) else { return };
        let Some(manifest) = &entry.manifest else { return };
        let due = manifest.expires_at(entry.last_used);
        if due > now {
            self.set_timer(due, Timer::Session(key.clone()));
        } else if entry.lease(now).is_some() || entry.busy() {
            self.set_timer(now + RETRY_AFTER, Timer::Session(key.clone()));
        } else {
            // It is alive and idle, so ending it cannot be refused.
            let _ = self.delete(now, None, key, End::Expired, out);
        }
    }

    fn lease_due(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.get_mut(key) else { return };
        let Some(work) = entry.work.as_mut() else { return };
        if work.lease.is_some_and(|lease| lease.expires_at <= now) {
            work.lease = None;
            self.reside(now, key, out);
        }
    }

    fn stages_due(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.get_mut(key) else { return };
        let Some(work) = entry.work.as_mut() else { return };
        let due: Vec<_> = work.stages.extract_if(.., |stage| stage.expires_at <= now).collect();
        entry.settle();
        for stage in due {
            out.push(Command::Release(stage.brought.into_iter().map(|(_, instance)| instance).collect()));
            self.reside(now, key, out);
        }
    }

    /// Remembers an end.
    pub(super) fn bury(&mut self, key: SessionKey, tombstone: Tombstone) {
        self.set_timer(tombstone.at + TOMBSTONE_TTL, Timer::Tombstone(key.clone()));
        self.graves.entry(key.tenant.clone()).or_default().insert((tombstone.at, key.clone()));
        self.tombstones.insert(key, tombstone);
    }

    fn tombstone_due(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        if self.tombstones.get(key).is_some_and(|grave| grave.at + TOMBSTONE_TTL <= now) {
            self.forget(key, out);
        }
    }

    /// Keeps a tenant's tombstones within their bound.
    pub(super) fn forget_oldest(&mut self, newest: &SessionKey, out: &mut Vec<Command>) {
        while let Some(graves) = self.graves.get(&newest.tenant)
            && graves.len() > TOMBSTONES_MAX
            && let Some((_, key)) = graves.first().cloned()
        {
            self.forget(&key, out);
        }
    }

    /// Nobody waits for a forgetting: if it is not persisted, the next start finds the tombstone due again.
    pub(super) fn forget(&mut self, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(grave) = self.tombstones.remove(key) else { return };
        self.timers.remove(&(grave.at + TOMBSTONE_TTL, Timer::Tombstone(key.clone())));
        if let Some(graves) = self.graves.get_mut(&key.tenant) {
            graves.remove(&(grave.at, key.clone()));
            if graves.is_empty() {
                self.graves.remove(&key.tenant);
            }
        }
        self.next_ticket += 1;
        out.push(Command::Persist(Ticket(self.next_ticket), vec![Record::Forget(key.clone())]));
    }
}

//! What a replica needs of the shard that it runs: heads, holders, doubts, and the way into and out of office.

use std::collections::BTreeMap;
use std::sync::Arc;

use keepwarm_types::{Birth, Bytes, Generation, InstanceId, SessionKey, Timestamp};

use super::change::Change;
use super::command::{Command, Ticket, TranscriptChange};
use super::entry::{After, Entry};
use super::event::{Request, RequestId};
use super::refusal::Refusal;
use super::state::{Handled, Shard, ShardSettings, Timer, Tombstone};
use super::write::mismatch;
use crate::registry::Member;
use crate::session::{Manifest, Stamp, State};

/// A session as a shard that leaves office knew it.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) manifest: Option<Arc<Manifest>>,
    /// The change on its way: its ticket, who asked, what it would make of the session, and what it brought.
    pub(crate) pending: Option<LeftPending>,
    /// Requests that wait behind it.
    pub(crate) queue: Vec<RequestId>,
    /// Instances of staged parts.
    pub(crate) staged: Vec<InstanceId>,
}

#[derive(Debug)]
pub(crate) struct LeftPending {
    pub(crate) ticket: Ticket,
    pub(crate) request: Option<RequestId>,
    pub(crate) next: Option<Arc<Manifest>>,
    pub(crate) undo: Vec<InstanceId>,
}

impl Shard {
    /// A shard that takes office with the sessions that this node has.
    pub(crate) fn take_over(
        settings: ShardSettings,
        now: Timestamp,
        manifests: impl IntoIterator<Item = Arc<Manifest>>,
        tombstones: impl IntoIterator<Item = (SessionKey, Tombstone)>,
    ) -> Self {
        let mut shard = Self::new(settings);
        for manifest in manifests {
            let key = manifest.key.clone();
            shard.set_timer(manifest.expires_at(now), Timer::Session(key.clone()));
            shard.sessions.insert(key, Entry { manifest: Some(manifest), last_used: now, work: None });
        }
        for (key, tombstone) in tombstones {
            shard.bury(key, tombstone);
        }
        shard
    }

    /// Leaves office: what it had, session by session.
    pub(crate) fn leave(self) -> (BTreeMap<SessionKey, Left>, BTreeMap<SessionKey, Tombstone>) {
        let left = |(key, entry): (SessionKey, Entry)| {
            let (mut pending, mut queue, mut staged) = (None, Vec::new(), Vec::new());
            if let Some(work) = entry.work {
                queue = work.queue.iter().map(|request| request.id).collect();
                staged = work.stages.into_iter().flat_map(|stage| stage.brought).map(|(_, i)| i).collect();
                pending = work.pending.map(|pending| LeftPending {
                    ticket: pending.ticket,
                    request: pending.request,
                    next: pending.next,
                    undo: pending.undo,
                });
            }
            (key, Left { manifest: entry.manifest, pending, queue, staged })
        };
        (self.sessions.into_iter().map(left).collect(), self.tombstones)
    }

    /// A later generation of the same primary, and where the bytes of new sessions go.
    pub(crate) fn set_office(&mut self, generation: Generation, holders: Arc<[Member]>) {
        self.settings.generation = generation;
        self.holders = holders;
    }

    /// The committed manifest.
    pub(crate) fn committed(&self, key: &SessionKey) -> Option<&Arc<Manifest>> {
        self.sessions.get(key)?.manifest.as_ref()
    }

    /// The tombstone.
    pub(crate) fn grave(&self, key: &SessionKey) -> Option<&Tombstone> {
        self.tombstones.get(key)
    }

    /// Whether a change of the session is on its way.
    pub(crate) fn changing(&self, key: &SessionKey) -> bool {
        self.sessions.get(key).is_some_and(Entry::busy)
    }

    /// Whether a lease of the session runs.
    pub(crate) fn leased(&self, now: Timestamp, key: &SessionKey) -> bool {
        self.leased_until(now, key).is_some()
    }

    /// When the session's lease ends, if one runs.
    pub(crate) fn leased_until(&self, now: Timestamp, key: &SessionKey) -> Option<Timestamp> {
        self.sessions.get(key)?.lease(now).map(|lease| lease.expires_at)
    }

    /// Sessions that are leased, and those that change or have a transaction.
    pub(crate) fn at_work(&self, now: Timestamp) -> (usize, usize) {
        self.sessions.values().fold((0, 0), |(leased, changing), entry| {
            let works = entry.busy() || entry.work.as_ref().is_some_and(|work| work.is_changing());
            (leased + usize::from(entry.lease(now).is_some()), changing + usize::from(works))
        })
    }

    /// Whether the session may go cold to make room: neither protected nor at work.
    pub(crate) fn may_cool(&self, now: Timestamp, key: &SessionKey, birth: Birth) -> bool {
        let Some(entry) = self.sessions.get(key).filter(|entry| !entry.busy()) else { return false };
        let Some(manifest) = entry.manifest.as_ref().filter(|manifest| manifest.birth == birth) else {
            return false;
        };
        entry.lease(now).is_none() && manifest.protect.until(entry.last_used) <= now
    }

    /// Whether a request needs bytes that only other nodes hold.
    pub(crate) fn lacks_bytes(&self, request: &Request) -> bool {
        let lacks = |manifest: &Arc<Manifest>| {
            let bytes = manifest.state == State::Warm && manifest.stored_bytes() > Bytes::ZERO;
            bytes && !manifest.holders.contains(&self.settings.member)
        };
        request.verb.needs_bytes() && self.committed(&request.key).is_some_and(lacks)
    }

    /// The instances of a committed manifest that have a name in this node's memory for it.
    pub(super) fn named_here(&self, manifest: &Manifest) -> Vec<InstanceId> {
        if !manifest.holders.contains(&self.settings.member) {
            return Vec::new();
        }
        manifest.instances().map(|block| block.instance).collect()
    }

    /// Bytes of a committed manifest in this node's memory.
    pub(super) fn held_bytes(&self, manifest: &Manifest) -> Bytes {
        let here = manifest.holders.contains(&self.settings.member);
        if here { manifest.stored_bytes() } else { Bytes::ZERO }
    }

    /// Who waits for this ticket's outcome.
    pub(crate) fn asker(&self, ticket: Ticket) -> Option<RequestId> {
        let key = self.tickets.get(&ticket)?;
        self.sessions.get(key)?.work.as_ref()?.pending.as_ref()?.request
    }

    /// Committed sessions, by key, after one of them.
    pub(crate) fn sessions_after(
        &self,
        after: Option<&SessionKey>,
    ) -> impl Iterator<Item = (&SessionKey, &Arc<Manifest>)> {
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.sessions
            .range((from, std::ops::Bound::Unbounded))
            .filter_map(|(key, entry)| Some((key, entry.manifest.as_ref()?)))
    }

    /// Tombstones, by key, after one of them.
    pub(crate) fn graves_after(
        &self,
        after: Option<&SessionKey>,
    ) -> impl Iterator<Item = (&SessionKey, &Tombstone)> {
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.tombstones.range((from, std::ops::Bound::Unbounded))
    }

    /// Replaces what is known of who holds a committed session's bytes, where some of them have gone; nothing is
    /// written, since every replica comes to the same from the set.
    pub(crate) fn holders_left(&mut self, key: &SessionKey, holders: &[Member]) {
        let Some(manifest) = self.sessions.get_mut(key).and_then(|entry| entry.manifest.as_mut()) else {
            return;
        };
        let manifest = Arc::make_mut(manifest);
        manifest.holders = holders.into();
    }

    /// Changes who will hold the bytes of a change that is on its way and was sent to nobody yet.
    pub(crate) fn pending_holders(&mut self, ticket: Ticket, holders: &[Member]) -> Option<Arc<Manifest>> {
        let key = self.tickets.get(&ticket)?;
        let pending = self.sessions.get_mut(key)?.work.as_mut()?.pending.as_mut()?;
        let next = pending.next.as_mut()?;
        Arc::make_mut(next).holders = holders.into();
        Some(Arc::clone(next))
    }

    /// The outcome was not known in time: whoever asked is told so, and who waits behind it is refused. The change
    /// stays on its way.
    //= GUARANTEES.md#G3
    pub(crate) fn doubt(&mut self, ticket: Ticket, out: &mut Vec<Command>) {
        let Some(key) = self.tickets.get(&ticket).cloned() else { return };
        let Some(work) = self.sessions.get_mut(&key).and_then(|entry| entry.work.as_mut()) else { return };
        let Some(pending) = work.pending.as_mut() else { return };
        if let Some(request) = pending.request.take() {
            out.push(Command::Reply(request, Err(Refusal::OutcomeUnknown)));
        }
        pending.in_doubt.get_or_insert_default();
        self.refuse_behind(&key, out);
    }

    /// Commits who holds the bytes, without a new revision.
    pub(super) fn place(
        &mut self,
        id: RequestId,
        key: &SessionKey,
        met: (Birth, Stamp),
        holders: &Arc<[Member]>,
        brought: Vec<InstanceId>,
        out: &mut Vec<Command>,
    ) -> Handled {
        let manifest = self.live(key).and_then(Entry::manifest).map(Arc::clone);
        let fits = |manifest: &Arc<Manifest>| {
            let bytes = manifest.state == State::Warm && manifest.stored_bytes() > Bytes::ZERO;
            bytes && (manifest.birth, manifest.stamp) == met
        };
        if !manifest.as_ref().is_ok_and(fits) && !brought.is_empty() {
            out.push(Command::Release(brought.clone()));
        }
        let manifest = manifest?;
        if !fits(&manifest) {
            return Err(mismatch(&manifest));
        }
        let mut next = Manifest::clone(&manifest);
        next.holders = Arc::clone(holders);
        let leaves = !holders.contains(&self.settings.member);
        next.placement_seq = next.placement_seq.next();
        let change = Change {
            request: Some(id),
            next: Arc::new(next),
            transcript: TranscriptChange::Keep,
            released: if leaves { self.named_here(&manifest) } else { Vec::new() },
            undo: brought,
            after: After::Quiet,
        };
        self.prepare(key, change, out);
        Ok(None)
    }
}

//! A replica's state, its role, and how a new set changes it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use keepwarm_types::{ColdReason, Generation, InstanceId, Millis, SessionKey, ShardId, Timestamp};

use super::event::{CopyId, ReplicaCommand, ReplicaEvent, ReplicaSettings};
use super::follower::{Copy, Follower, Head};
use super::message::{Envelope, Message};
use super::office::Office;
use super::saving::{Saving, Unsaved};
use crate::registry::{Member, ReplicaSet};
use crate::session::{Manifest, Protect, Stamp};
use crate::shard::{Record, Refusal, Ticket, Tombstone};

/// How long an unanswered message waits before it is sent again: several round trips of any link, and less than a
/// person notices.
pub const RESEND: Millis = Millis(300);
/// How long bytes that came for a change wait for it: longer than its sender keeps trying to reach the others.
pub(super) const INBOX_TTL: Millis = Millis(60_000);
/// How often deadlines are looked at while something is unanswered.
const LOOK: Millis = Millis(50);

/// What a replica is to its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It answers.
    Primary,
    /// It has every manifest.
    Secondary,
    /// It is being filled.
    Learner,
    /// It is in no set; what its catalog has is kept for a return.
    Idle,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one per shard, and moved once per take-over")]
pub(super) enum Part {
    Primary(Office),
    Follower(Follower),
}

/// One replica of one shard.
#[derive(Debug)]
pub struct Replica {
    pub(super) settings: ReplicaSettings,
    pub(super) set: Arc<ReplicaSet>,
    pub(super) part: Part,
    pub(super) tickets: u64,
    pub(super) copies: u64,
    pub(super) local: HashMap<Ticket, Saving>,
    /// Sessions whose head may not be on disk yet.
    pub(super) saving: BTreeMap<SessionKey, Unsaved>,
    /// Records that the catalog refused, and when they are given to it again.
    pub(super) retries: Vec<(Timestamp, Saving, Vec<Record>)>,
    /// How often records were given to be saved.
    pub(super) saves: u64,
    /// When a primary looks at what is late next, while anything is unanswered; events in between do not put it off.
    look_at: Option<Timestamp>,
    /// Bytes that came and that no manifest names yet, until when they are kept.
    pub(super) inbox: BTreeMap<(SessionKey, InstanceId), Timestamp>,
    /// Bytes that were being fetched when the office ended: they go when they are there.
    pub(super) unwanted: BTreeMap<CopyId, Vec<InstanceId>>,
    /// Messages sent so far.
    sent: u64,
    /// Questions and rounds of earlier offices: an answer to one of them is never taken for one to a later.
    pub(super) before: (u64, u64),
}

impl Replica {
    /// A replica of what the catalog has, in no set yet. The bytes of an earlier process are gone: nothing is held.
    #[must_use]
    pub fn new(
        settings: ReplicaSettings,
        manifests: impl IntoIterator<Item = Manifest>,
        tombstones: impl IntoIterator<Item = (SessionKey, Tombstone)>,
    ) -> Self {
        let live = manifests.into_iter().map(|manifest| {
            let key = manifest.key.clone();
            (key, Copy::on_disk(Head::Live(Arc::new(manifest))))
        });
        let ended = tombstones.into_iter().map(|(key, grave)| (key, Copy::on_disk(Head::Ended(grave))));
        let set =
            ReplicaSet { generation: Generation(0), replicas: Vec::new(), learner: None, lost_at: None };
        Self {
            settings,
            set: Arc::new(set),
            part: Part::Follower(Follower { copies: live.chain(ended).collect(), dropped: 0 }),
            tickets: 0,
            copies: 0,
            local: HashMap::new(),
            saving: BTreeMap::new(),
            retries: Vec::new(),
            saves: 0,
            look_at: None,
            inbox: BTreeMap::new(),
            unwanted: BTreeMap::new(),
            sent: 0,
            before: (0, 0),
        }
    }

    /// Which shard this is.
    #[must_use]
    pub const fn id(&self) -> ShardId {
        self.settings.shard
    }

    /// The set that it acts in.
    #[must_use]
    pub const fn set(&self) -> &Arc<ReplicaSet> {
        &self.set
    }

    /// What it is to its shard.
    #[must_use]
    pub fn role(&self) -> Role {
        let me = &self.settings.member;
        match &self.part {
            Part::Primary(_) => Role::Primary,
            Part::Follower(_) if self.set.replicas.contains(me) => Role::Secondary,
            Part::Follower(_) if self.set.learner.as_ref() == Some(me) => Role::Learner,
            Part::Follower(_) => Role::Idle,
        }
    }

    /// Sessions that it has.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.part {
            Part::Primary(office) => office.shard.len(),
            Part::Follower(follower) => {
                follower.copies.values().filter(|copy| matches!(copy.head, Head::Live(_))).count()
            }
        }
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Live sessions as they are here, with how long their bytes are safe.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionKey, Protect)> {
        self.manifests().map(|manifest| (&manifest.key, manifest.protect))
    }

    pub(super) fn manifests(&self) -> Box<dyn Iterator<Item = &Arc<Manifest>> + '_> {
        match &self.part {
            Part::Primary(office) => {
                Box::new(office.shard.sessions_after(None).map(|(_, manifest)| manifest))
            }
            Part::Follower(follower) => {
                Box::new(follower.copies.values().filter_map(|copy| match &copy.head {
                    Head::Live(manifest) => Some(manifest),
                    Head::Ended(_) => None,
                }))
            }
        }
    }

    /// Sessions with fewer copies than they should have, as their primary knows; none for any other.
    #[must_use]
    pub fn under_replicated(&self) -> usize {
        match &self.part {
            Part::Primary(_) => self.manifests().filter(|manifest| self.fewer(manifest, None)).count(),
            Part::Follower(_) => 0,
        }
    }

    /// Sessions whose bytes are here and, for all that is known here, on no other node of the set.
    #[must_use]
    pub fn needed_here(&self) -> usize {
        let me = &self.settings.member;
        let only_here = |manifest: &&Arc<Manifest>| {
            let others =
                manifest.holders.iter().any(|holder| holder != me && self.set.replicas.contains(holder));
            manifest.stored_bytes().0 > 0 && manifest.holders.contains(me) && !others
        };
        self.manifests().filter(only_here).count()
    }

    /// A session's head here: its last change that may be on disk.
    #[must_use]
    pub fn head(&self, key: &SessionKey) -> Option<Stamp> {
        match &self.part {
            Part::Primary(office) => office.head(key),
            Part::Follower(follower) => follower.head(key),
        }
    }

    /// A session as it is here: the committed one of a primary, the head of any other.
    #[must_use]
    pub fn manifest(&self, key: &SessionKey) -> Option<&Arc<Manifest>> {
        match &self.part {
            Part::Primary(office) => office.shard.committed(key),
            Part::Follower(follower) => match &follower.copies.get(key)?.head {
                Head::Live(manifest) => Some(manifest),
                Head::Ended(_) => None,
            },
        }
    }

    /// When a [`ReplicaEvent::Tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Timestamp {
        let office = match &self.part {
            Part::Primary(office) => office.shard.next_deadline(),
            Part::Follower(_) => Timestamp::NEVER,
        };
        let look = self.look_at.unwrap_or(Timestamp::NEVER);
        let inbox = self.inbox.values().min().copied().unwrap_or(Timestamp::NEVER);
        let retry = self.retries.iter().map(|(at, ..)| *at).min().unwrap_or(Timestamp::NEVER);
        office.min(look).min(inbox).min(retry)
    }

    /// Takes one event and says what to do, in order.
    pub fn on(&mut self, now: Timestamp, event: ReplicaEvent) -> Vec<ReplicaCommand> {
        let mut out = Vec::new();
        match event {
            ReplicaEvent::Request(request) => match &mut self.part {
                Part::Primary(_) => self.request(now, request, &mut out),
                Part::Follower(_) => {
                    let refusal = Refusal::Moving("another node owns it");
                    out.push(ReplicaCommand::Reply(request.id, Err(refusal)));
                }
            },
            ReplicaEvent::Peer(envelope) => self.peer(now, envelope, &mut out),
            ReplicaEvent::Set(set) => self.adopt(now, &set, &mut out),
            ReplicaEvent::Linked(member) => self.resend(now, Some(&member), &mut out),
            ReplicaEvent::Persisted(ticket) => self.persisted(now, ticket, &mut out),
            ReplicaEvent::PersistFailed(ticket, error, records) => {
                self.persist_failed(now, ticket, error, records, &mut out);
            }
            ReplicaEvent::Arrived(key, instances) => {
                let until = now + INBOX_TTL;
                // What was there already for the session has one name too many now; a fork of it needs its own.
                let again =
                    |instance: &InstanceId| self.inbox.insert((key.clone(), *instance), until).is_some();
                let twice: Vec<_> = instances.into_iter().filter(again).collect();
                if !twice.is_empty() {
                    out.push(release(twice));
                }
            }
            ReplicaEvent::Evict(key, birth) => self.evict(now, key, birth, &mut out),
            ReplicaEvent::Copied(id, result) => self.copied(now, id, result, &mut out),
            ReplicaEvent::RegistryConfirmed { round } => self.registry_confirmed(now, round, &mut out),
            ReplicaEvent::ProposalFailed(generation) => {
                if let Part::Primary(office) = &mut self.part
                    && generation == self.set.generation
                {
                    office.proposed = None;
                }
            }
            ReplicaEvent::Leaves(generation, member) => self.leaves(now, generation, member, &mut out),
            ReplicaEvent::Tick => self.tick(now, &mut out),
        }
        let open = matches!(&self.part, Part::Primary(office) if office.unanswered());
        self.look_at = open.then(|| self.look_at.unwrap_or(now + LOOK));
        out
    }

    fn tick(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        self.look_at = None;
        let late: Vec<_> = self
            .inbox
            .iter()
            .filter(|(_, until)| **until <= now)
            .map(|((_, instance), _)| *instance)
            .collect();
        if !late.is_empty() {
            self.inbox.retain(|_, until| *until > now);
            out.push(release(late));
        }
        self.retry(now, out);
        if matches!(self.part, Part::Primary(_)) {
            self.office_tick(now, out);
        }
    }

    /// Takes up a set that is later than the known one.
    fn adopt(&mut self, now: Timestamp, set: &Arc<ReplicaSet>, out: &mut Vec<ReplicaCommand>) {
        if set.generation <= self.set.generation {
            return;
        }
        let first = set.replicas.first() == Some(&self.settings.member);
        let same = set.replicas.first() == self.set.replicas.first();
        self.set = Arc::clone(set);
        if let Part::Follower(follower) = &mut self.part
            && !same
        {
            follower.listen_anew();
        }
        match (&self.part, first) {
            (Part::Primary(_), true) => self.keep_office(now, out),
            (Part::Primary(_), false) => self.leave_office(out),
            (Part::Follower(_), true) => self.take_office(now, out),
            (Part::Follower(_), false) => {}
        }
        if self.role() == Role::Idle {
            self.let_go(out);
        }
    }

    /// Takes what another replica says, if it is meant for this process and comes from one that counts.
    //= GUARANTEES.md#G11
    fn peer(&mut self, now: Timestamp, envelope: Envelope, out: &mut Vec<ReplicaCommand>) {
        let Envelope { from, to, set, sent, message, .. } = envelope;
        if to != self.settings.member {
            return;
        }
        if set.generation < self.set.generation {
            // Whoever asks in an earlier generation learns of the present one; an answer of then says nothing now.
            if !matches!(message, Message::Stale) && set.replicas.first() == Some(&from) {
                self.say(&from, Message::Stale, out);
            }
            return;
        }
        self.adopt(now, &set, out);
        let known = self.set.replicas.contains(&from) || self.set.learner.as_ref() == Some(&from);
        if !known {
            return;
        }
        match &self.part {
            Part::Primary(_) => self.answered(now, &from, message, out),
            Part::Follower(_) if self.set.replicas.first() == Some(&from) && self.role() != Role::Idle => {
                self.told(from, sent, message, out);
            }
            Part::Follower(_) => {}
        }
    }

    pub(super) fn say(&mut self, to: &Member, message: Message, out: &mut Vec<ReplicaCommand>) {
        let envelope = self.envelope(to, message);
        out.push(ReplicaCommand::Send(envelope));
    }

    pub(super) fn envelope(&mut self, to: &Member, message: Message) -> Envelope {
        self.sent += 1;
        Envelope {
            shard: self.settings.shard,
            from: self.settings.member.clone(),
            to: to.clone(),
            set: Arc::clone(&self.set),
            sent: self.sent,
            message,
        }
    }

    pub(super) fn next_copy(&mut self) -> CopyId {
        self.copies += 1;
        CopyId(self.copies)
    }

    /// A manifest as seen from the present set: its holders are those of the set that are the same process still;
    /// where none is left, it is cold.
    pub(super) fn seen_from_set(&self, manifest: &Arc<Manifest>, holding: bool) -> Arc<Manifest> {
        let me = &self.settings.member;
        let holds = |member: &&Member| {
            if *member == me { holding } else { self.set.replicas.contains(member) }
        };
        let holders: Vec<_> = manifest.holders.iter().filter(holds).cloned().collect();
        if holders.len() == manifest.holders.len() {
            return Arc::clone(manifest);
        }
        let mut seen = Manifest::clone(manifest);
        if holders.is_empty() && seen.parts.iter().any(|part| part.length.0 > 0) {
            let restarted = manifest.holders.iter().all(|holder| holder.node == me.node);
            let reason = if restarted { ColdReason::Restarted } else { ColdReason::HoldersLost };
            seen.go_cold(reason);
        }
        seen.holders = holders.into();
        Arc::new(seen)
    }

    /// Checks the state against itself.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn validate(&self) {
        match &self.part {
            Part::Primary(office) => {
                assert_eq!(
                    self.set.replicas.first(),
                    Some(&self.settings.member),
                    "in office without a right"
                );
                office.validate(&self.set);
            }
            Part::Follower(follower) => follower.validate(),
        }
    }
}

pub(super) fn release(instances: Vec<InstanceId>) -> ReplicaCommand {
    ReplicaCommand::Shard(crate::shard::Command::Release(instances))
}

pub(super) fn retain(instances: Vec<InstanceId>) -> ReplicaCommand {
    ReplicaCommand::Shard(crate::shard::Command::Retain(instances))
}

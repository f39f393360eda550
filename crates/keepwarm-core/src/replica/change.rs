//! A change's way: bytes to the holders, then the change to every replica, then committed.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use keepwarm_types::{InstanceId, SessionKey, Timestamp};

use super::event::{CopyFailed, ReplicaCommand};
use super::heal::{CaughtUp, CopyFor};
use super::message::{Message, Prepare};
use super::office::OWN;
use super::saving::Then;
use super::state::{Part, RESEND, Replica, release, retain};
use crate::registry::Member;
use crate::session::{BlockRef, Manifest, Stamp};
use crate::shard::{Command, Event, PersistError, Record, RequestId, Ticket};

/// Notices of commits that wait for the next look; beyond, they are sent at once.
const NOTICES_MAX: usize = 64;

/// A change that not all have yet.
#[derive(Debug)]
pub(super) struct Changing {
    pub(super) key: SessionKey,
    pub(super) record: Record,
    /// The head that it follows.
    previous: Option<Stamp>,
    /// Whether it was given to anybody: from then on it is committed or unknown.
    pub(super) sent: bool,
    /// Whether another replica may have it, or the own catalog in spite of what it says: from then on there is no "no".
    pub(super) given: bool,
    /// Whether the own catalog has it.
    local: bool,
    pub(super) acked: Vec<Member>,
    /// Bytes that must be at their holders first, and those holders that could not be had.
    copying: BTreeSet<super::event::CopyId>,
    lost: Vec<Member>,
    since: Timestamp,
    /// When it was first sent.
    pub(super) sent_at: Option<Timestamp>,
    /// When it was last sent to all.
    pub(super) at: Timestamp,
    doubted: bool,
}

impl Changing {
    /// What it makes of the session, unless that ends.
    pub(super) const fn manifest(&self) -> Option<&Arc<Manifest>> {
        match &self.record {
            Record::Manifest(manifest, _) => Some(manifest),
            Record::Tombstone { .. } | Record::Forget(_) | Record::Drop(..) => None,
        }
    }
}

impl Replica {
    /// Gives the shard an event and carries out what it says. The answer to `direct` was agreed upon by all; every
    /// other answer is kept until the generation is confirmed.
    pub(super) fn drive(
        &mut self,
        now: Timestamp,
        event: Event,
        direct: Option<RequestId>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let commands = office.shard.on(now, event);
        self.carry_out(now, commands, direct, out);
    }

    pub(super) fn carry_out(
        &mut self,
        now: Timestamp,
        commands: Vec<Command>,
        direct: Option<RequestId>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        for command in commands {
            match command {
                Command::Persist(ticket, records) => {
                    for record in records {
                        self.begin_change(now, ticket, record, out);
                    }
                }
                // Nobody waits for what the replica asked of its own shard.
                Command::Reply(id, _) if id.0 & OWN != 0 => {}
                Command::Reply(id, result) if direct == Some(id) => {
                    out.push(ReplicaCommand::Reply(id, result))
                }
                Command::Reply(id, result) => self.hold(now, id, result, out),
                Command::Again(request) => self.request(now, request, out),
                other => out.push(ReplicaCommand::Shard(other)),
            }
        }
    }

    fn begin_change(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        record: Record,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        if let Record::Forget(key) = record {
            // Nobody waits for it; who misses it forgets at the next comparison.
            let peers: Vec<_> = office.peers.iter().map(|peer| peer.member.clone()).collect();
            for peer in peers {
                let record = Record::Forget(key.clone());
                let prepare = Prepare { key: key.clone(), previous: None, stamp: Stamp::default(), record };
                self.say(&peer, Message::Prepare(Box::new(prepare)), out);
            }
            self.save(Vec::new(), vec![Record::Forget(key)], Then::Nothing, out);
            return;
        }
        let key = record.key().clone();
        let change = Changing {
            key: key.clone(),
            previous: office.committed_head(&key),
            record,
            sent: false,
            given: false,
            local: false,
            acked: Vec::new(),
            copying: BTreeSet::new(),
            lost: Vec::new(),
            since: now,
            sent_at: None,
            at: now,
            doubted: false,
        };
        let blocks = new_blocks(office.shard.committed(&key), &change, |key| office.shard.committed(key));
        let holders = change.manifest().map(|manifest| Arc::clone(&manifest.holders)).unwrap_or_default();
        office.changing.insert(key.clone(), ticket);
        let birth = change.manifest().map(|manifest| manifest.birth);
        office.changes.insert(ticket, change);
        self.take_caught_up(ticket, &key, out);
        if let Some(birth) = birth.filter(|_| !blocks.is_empty()) {
            if !self.settings.degraded && holders.len() < self.settings.replication {
                self.not_applied(now, ticket, PersistError::TooFewHolders, out);
                return;
            }
            let me = self.settings.member.clone();
            for to in holders.iter().filter(|holder| **holder != me) {
                let id = self.next_copy();
                let Part::Primary(office) = &mut self.part else { return };
                office.copying.insert(id, CopyFor::Change { ticket, to: to.clone() });
                if let Some(change) = office.changes.get_mut(&ticket) {
                    change.copying.insert(id);
                }
                let (to, key, blocks) = (to.clone(), key.clone(), blocks.clone());
                out.push(ReplicaCommand::Copy { id, to, key, birth, blocks, spare: false });
            }
        }
        self.send_if_copied(now, ticket, out);
    }

    /// A session with too few holders that is written all the time gains one by a change: whoever has most of its
    /// bytes gets what it lacks of this one.
    fn take_caught_up(&mut self, ticket: Ticket, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let me = self.settings.member.clone();
        let leaving = self.leaving().cloned();
        let Part::Primary(office) = &mut self.part else { return };
        let Some(CaughtUp { member, has, .. }) = office.caught_up.remove(key) else { return };
        let Some(manifest) = office.changes.get(&ticket).and_then(Changing::manifest).cloned() else {
            return;
        };
        let holders = &manifest.holders;
        let fits = holders.contains(&me) && !holders.contains(&member) && Some(&member) != leaving.as_ref();
        if !fits || !self.too_few(&manifest) || !self.set.replicas.contains(&member) {
            return;
        }
        let Part::Primary(office) = &mut self.part else { return };
        // It comes in the place of who is to leave, or there is nobody of that kind.
        let staying = holders.iter().filter(|holder| Some(*holder) != leaving.as_ref());
        let holders: Vec<_> = staying.chain([&member]).cloned().collect();
        let Some(next) = office.shard.pending_holders(ticket, &holders) else { return };
        let lacks: Vec<_> =
            next.instances().filter(|block| !has.contains(&block.instance)).copied().collect();
        let id = self.next_copy();
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get_mut(&ticket) else { return };
        if let Record::Manifest(manifest, _) = &mut change.record {
            *manifest = Arc::clone(&next);
        }
        if !lacks.is_empty() {
            change.copying.insert(id);
            office.copying.insert(id, CopyFor::Change { ticket, to: member.clone() });
            let (key, birth) = (key.clone(), next.birth);
            out.push(ReplicaCommand::Copy { id, to: member, key, birth, blocks: lacks, spare: false });
        }
    }

    /// Bytes of a change are at a holder, or not.
    pub(super) fn copied_for_change(
        &mut self,
        now: Timestamp,
        id: super::event::CopyId,
        ticket: Ticket,
        to: Member,
        result: Result<(), CopyFailed>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get_mut(&ticket) else { return };
        if !change.copying.remove(&id) {
            return;
        }
        if result.is_err() {
            change.lost.push(to);
        }
        self.send_if_copied(now, ticket, out);
    }

    /// Once the bytes are where they are to be, the change goes to everybody.
    //= GUARANTEES.md#G10
    fn send_if_copied(&mut self, now: Timestamp, ticket: Ticket, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get_mut(&ticket) else { return };
        if !change.copying.is_empty() || change.sent {
            return;
        }
        if !change.lost.is_empty() {
            let left: Vec<_> = change
                .manifest()
                .map(|manifest| {
                    manifest.holders.iter().filter(|h| !change.lost.contains(h)).cloned().collect()
                })
                .unwrap_or_default();
            if !self.settings.degraded && left.len() < self.settings.replication {
                self.not_applied(now, ticket, PersistError::TooFewHolders, out);
                return;
            }
            if let Some(next) = office.shard.pending_holders(ticket, &left)
                && let Record::Manifest(manifest, _) = &mut change.record
            {
                *manifest = next;
            }
        }
        (change.sent, change.sent_at) = (true, Some(now));
        let (key, record) = (change.key.clone(), change.record.clone());
        self.save(vec![key], vec![record], Then::Change(ticket), out);
        self.send_change(now, ticket, None, out);
        self.commit_if_all_have(now, ticket, out);
    }

    /// Sends a change to all that did not acknowledge it, or to one of them.
    pub(super) fn send_change(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        only: Option<&Member>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get_mut(&ticket) else { return };
        let Some(stamp) = change.record.stamp() else { return };
        if only.is_none() {
            change.at = now;
        }
        let prepare = Prepare {
            key: change.key.clone(),
            previous: change.previous,
            stamp,
            record: change.record.clone(),
        };
        let open =
            |member: &&Member| !change.acked.contains(member) && only.is_none_or(|only| only == *member);
        let to: Vec<_> = office
            .peers
            .iter()
            .filter(|peer| !peer.installs.contains_key(&change.key))
            .map(|peer| &peer.member)
            .filter(open)
            .cloned()
            .collect();
        change.given |= !to.is_empty();
        for member in to {
            self.say(&member, Message::Prepare(Box::new(prepare.clone())), out);
        }
    }

    /// A replica has the change on disk.
    pub(super) fn prepared_at(
        &mut self,
        now: Timestamp,
        from: &Member,
        ticket: Ticket,
        holding: bool,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get_mut(&ticket) else { return };
        let manifest = change.manifest().cloned();
        if let Some(manifest) = manifest.filter(|manifest| !holding && manifest.holders.contains(from)) {
            // It is named as a holder: it counts once it has the bytes.
            if self.again_under_way(ticket, from) {
                return;
            }
            let id = self.next_copy();
            let Part::Primary(office) = &mut self.part else { return };
            office.copying.insert(id, CopyFor::Again { ticket, to: from.clone() });
            let blocks = manifest.instances().copied().collect();
            let (key, birth) = (manifest.key.clone(), manifest.birth);
            out.push(ReplicaCommand::Copy { id, to: from.clone(), key, birth, blocks, spare: false });
            return;
        }
        if !change.acked.contains(from) {
            change.acked.push(from.clone());
            // A learner has other things to do.
            if let Some(sent_at) = change.sent_at
                && office.secondaries().any(|peer| peer.member == *from)
            {
                out.push(ReplicaCommand::Took(from.clone(), now.since(sent_at)));
            }
        }
        self.commit_if_all_have(now, ticket, out);
    }

    pub(super) fn prepared(
        &mut self,
        now: Timestamp,
        from: &Member,
        key: &SessionKey,
        stamp: Stamp,
        holding: bool,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(ticket) = office.changing.get(key).copied() else { return };
        // A session on its way whole has the change, or it is sent again after it.
        if office.peer(from).is_none_or(|peer| peer.installs.contains_key(key)) {
            return;
        }
        let fits = office.changes.get(&ticket).is_some_and(|c| c.sent && c.record.stamp() == Some(stamp));
        if fits {
            self.prepared_at(now, from, ticket, holding, out);
        }
    }

    /// The own catalog has the change.
    pub(super) fn saved_here(&mut self, now: Timestamp, ticket: Ticket, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(change) = office.changes.get_mut(&ticket) {
            change.local = true;
            let key = change.key.clone();
            self.install_saved(now, &key, out);
        }
        self.commit_if_all_have(now, ticket, out);
    }

    /// The own catalog does not have the change; true where that settles it. Once others may have it, it is tried
    /// until it is here too.
    //= GUARANTEES.md#G3
    pub(super) fn not_saved_here(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        error: PersistError,
        out: &mut Vec<ReplicaCommand>,
    ) -> bool {
        let Part::Primary(office) = &mut self.part else { return false };
        let Some(change) = office.changes.get_mut(&ticket) else { return true };
        if error == PersistError::NotApplied && !change.given {
            self.not_applied(now, ticket, error, out);
            return true;
        }
        change.given = true;
        let mut commands = Vec::new();
        office.shard.doubt(ticket, &mut commands);
        self.doubted(commands, out);
        false
    }

    fn forget_change(&mut self, ticket: Ticket) {
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(change) = office.changes.remove(&ticket) {
            office.changing.remove(&change.key);
        }
    }

    /// Certainly not applied, since nobody was given it.
    fn not_applied(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        error: PersistError,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let direct = office.shard.asker(ticket);
        self.forget_change(ticket);
        self.drive(now, Event::PersistFailed(ticket, error, Vec::new()), direct, out);
    }

    /// Committed once the own catalog and every other member of the set has it: the secondaries, and the learner
    /// from when it came, so that it lacks nothing when it is promoted.
    //= GUARANTEES.md#G10
    fn commit_if_all_have(&mut self, now: Timestamp, ticket: Ticket, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(change) = office.changes.get(&ticket) else { return };
        let all =
            change.sent && change.local && office.peers.iter().all(|p| change.acked.contains(&p.member));
        if !all {
            return;
        }
        let direct = office.shard.asker(ticket);
        let (key, stamp) = (change.key.clone(), change.record.stamp());
        let lost = !change.lost.is_empty();
        let kept = self.bytes_for_a_holder_that_left(&key, ticket);
        self.forget_change(ticket);
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(stamp) = stamp {
            for peer in &mut office.peers {
                peer.notices.insert(key.clone(), (stamp, None));
            }
        }
        if let Some(stale) = office.stale.remove(&key) {
            out.push(release(stale));
        }
        let full = office.peers.iter().any(|peer| peer.notices.len() == NOTICES_MAX);
        let kept = kept.filter(|_| stamp.is_some());
        if let Some(kept) = &kept {
            out.push(retain(kept.clone()));
        }
        self.drive(now, Event::Persisted(ticket), direct, out);
        if full {
            self.tell_commits(now, out);
        }
        self.look_at(&key, lost);
        if let (Some(kept), Some(stamp)) = (kept, stamp) {
            let me = self.settings.member.clone();
            self.place_with(now, &key, stamp, me, kept, out);
        }
        self.heal_between_changes(now, &key, out);
        self.fetched(now, out);
    }

    /// What this node keeps of a session that a change takes from it, since one of its next holders has left the set
    /// while the change was on its way: those bytes may be the last, or fewer copies than were promised.
    fn bytes_for_a_holder_that_left(&self, key: &SessionKey, ticket: Ticket) -> Option<Vec<InstanceId>> {
        let Part::Primary(office) = &self.part else { return None };
        let me = &self.settings.member;
        let (now, next) = (office.shard.committed(key)?, office.changes.get(&ticket)?.manifest()?);
        let leaves = now.holders.contains(me) && !next.holders.is_empty() && !next.holders.contains(me);
        let gone = next.holders.iter().any(|holder| !self.set.replicas.contains(holder));
        (leaves && gone).then(|| next.instances().map(|block| block.instance).collect())
    }

    /// After the set has changed, some may be enough.
    pub(super) fn commit_what_all_have(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let tickets: Vec<_> = office.changes.keys().copied().collect();
        for ticket in tickets {
            self.commit_if_all_have(now, ticket, out);
        }
    }

    /// Tells the others what is committed, so that they let go of what was before; again where they did not hear.
    pub(super) fn tell_commits(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let mut notices = Vec::new();
        for peer in &mut office.peers {
            let due = |told: &Option<Timestamp>| told.is_none_or(|at| now.since(at) >= RESEND);
            let open = peer.notices.iter_mut().filter(|(_, (_, told))| due(told)).take(NOTICES_MAX);
            let tell = |(key, (stamp, told)): (&SessionKey, &mut (Stamp, Option<Timestamp>))| {
                *told = Some(now);
                (key.clone(), *stamp)
            };
            let heads: Vec<_> = open.map(tell).collect();
            if !heads.is_empty() {
                notices.push((peer.member.clone(), heads));
            }
        }
        for (member, heads) in notices {
            self.say(&member, Message::Committed(heads), out);
        }
    }

    /// A peer heard what is committed.
    pub(super) fn noted(
        &mut self,
        from: &Member,
        heads: &[(SessionKey, Stamp)],
        before: Option<keepwarm_types::Generation>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let began = office.began;
        let Some(peer) = office.peer(from) else { return };
        for (key, stamp) in heads {
            if peer.notices.get(key).is_some_and(|(told, _)| told == stamp) {
                peer.notices.remove(key);
            }
        }
        peer.settled_noted |= before == Some(began);
    }

    /// Whoever waited too long for a change learns that its outcome is unknown; the change stays on its way.
    //= GUARANTEES.md#G3
    pub(super) fn doubt_late_changes(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let deadline = self.settings.write_deadline;
        let Part::Primary(office) = &mut self.part else { return };
        let mut commands = Vec::new();
        for (ticket, change) in &mut office.changes {
            if change.sent && !change.doubted && now.since(change.since) >= deadline {
                (change.doubted, change.given) = (true, true);
                office.shard.doubt(*ticket, &mut commands);
            }
        }
        self.doubted(commands, out);
    }

    /// "Unknown" is true whatever the generation; the refusals of who waited behind it changed nothing.
    fn doubted(&self, commands: Vec<Command>, out: &mut Vec<ReplicaCommand>) {
        for command in commands {
            match command {
                Command::Reply(id, _) if id.0 & OWN != 0 => {}
                Command::Reply(id, result) => out.push(ReplicaCommand::Reply(id, result)),
                other => out.push(ReplicaCommand::Shard(other)),
            }
        }
    }
}

/// Blocks that the change names and that the session's holders do not have yet: neither its present state nor what
/// it was forked from names them.
fn new_blocks<'a>(
    before: Option<&Arc<Manifest>>,
    change: &Changing,
    committed: impl Fn(&SessionKey) -> Option<&'a Arc<Manifest>>,
) -> Vec<BlockRef> {
    let Some(next) = change.manifest() else { return Vec::new() };
    let parent = next.parent.as_ref().filter(|_| before.is_none());
    let parent = parent.and_then(|parent| committed(&SessionKey::new(next.key.tenant.clone(), parent.id)));
    let known = before.into_iter().chain(parent);
    let known: HashSet<_> =
        known.flat_map(|manifest| manifest.instances()).map(|block| block.instance).collect();
    next.instances().filter(|block| !known.contains(&block.instance)).copied().collect()
}

//! Who holds a session's bytes, and who should: fetching what is not here, copying where copies are too few.

use std::collections::HashSet;
use std::sync::Arc;

use keepwarm_types::{Bytes, ColdReason, InstanceId, Millis, SessionKey, Timestamp};

use super::event::{CopyFailed, CopyId, ReplicaCommand};
use super::room::Moving;
use super::state::{Part, Replica, release};
use crate::registry::Member;
use crate::session::{Manifest, Stamp, State};
use crate::shard::{Refusal, Ticket, Verb};

/// Sessions that are copied or fetched at once, beside the changes' own bytes: the foreground goes first.
const HEALING_MAX: usize = 8;

/// How long after a holder could not take a session's bytes it, or another, is asked again.
const AGAIN: Millis = Millis(1000);

/// A session that needs healing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sick {
    /// Not before.
    at: Timestamp,
    /// How often it did not work: each time the next of those who could is asked.
    failed: usize,
}

/// A member that has the bytes of an earlier state of a session that is written too often to be healed at rest: the
/// session's next change takes it as a holder, with what it lacks.
#[derive(Debug)]
pub(super) struct CaughtUp {
    pub(super) member: Member,
    pub(super) has: HashSet<InstanceId>,
    at: Timestamp,
}

/// What bytes on their way are for.
#[derive(Debug)]
pub(super) enum CopyFor {
    /// A change's new blocks, before it is sent.
    Change { ticket: Ticket, to: Member },
    /// All blocks of a change, for a holder that lacks them.
    Again { ticket: Ticket, to: Member },
    /// All blocks of a session that has too few holders.
    Heal { key: SessionKey, met: Stamp, to: Member, blocks: Vec<InstanceId> },
    /// All blocks of a session whose primary has none.
    Fetch { key: SessionKey, met: Stamp, from: Member, blocks: Vec<InstanceId> },
    /// All blocks of a session that leaves a holder.
    Move(Moving),
}

impl CopyFor {
    fn heals(&self) -> Option<&SessionKey> {
        match self {
            Self::Heal { key, .. } | Self::Fetch { key, .. } => Some(key),
            Self::Change { .. } | Self::Again { .. } | Self::Move(_) => None,
        }
    }

    pub(super) const fn moves(&self) -> Option<&SessionKey> {
        match self {
            Self::Move(moving) => Some(&moving.key),
            _ => None,
        }
    }
}

impl Replica {
    /// Whether a session has fewer holders that stay than it should. Its primary need not be one of them: it fetches the
    /// bytes when somebody wants them.
    pub(super) fn too_few(&self, manifest: &Manifest) -> bool {
        self.fewer(manifest, self.leaving())
    }

    /// The same without one of its holders.
    pub(super) fn fewer(&self, manifest: &Manifest, without: Option<&Member>) -> bool {
        if manifest.state != State::Warm || manifest.stored_bytes() == Bytes::ZERO {
            return false;
        }
        let staying = |members: &[Member]| members.iter().filter(|member| Some(*member) != without).count();
        staying(&manifest.holders) < self.settings.replication.min(staying(&self.set.replicas))
    }

    /// Notes whether a session needs healing.
    pub(super) fn look_at(&mut self, key: &SessionKey, changed: bool) {
        self.drop_gone_holders(key);
        let Part::Primary(office) = &self.part else { return };
        let waited_for = office.unfetched.contains_key(key);
        let sick = waited_for || office.shard.committed(key).is_some_and(|manifest| self.too_few(manifest));
        let Part::Primary(office) = &mut self.part else { return };
        if sick {
            office.sick.entry(key.clone()).or_default();
        } else if !changed {
            office.sick.remove(key);
        }
    }

    /// The set has changed: holders that are not in it any more count no more.
    pub(super) fn look_at_holders(&mut self) {
        let Part::Primary(office) = &self.part else { return };
        let gone = |manifest: &Arc<Manifest>| {
            manifest.holders.iter().any(|holder| !self.set.replicas.contains(holder))
        };
        let keys: Vec<_> = office
            .shard
            .sessions_after(None)
            .filter(|(_, manifest)| gone(manifest) || self.too_few(manifest))
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            self.look_at(&key, false);
        }
    }

    fn drop_gone_holders(&mut self, key: &SessionKey) {
        let set = Arc::clone(&self.set);
        self.keep_holders(key, |holder| set.replicas.contains(holder));
    }

    fn keep_holders(&mut self, key: &SessionKey, keep: impl Fn(&Member) -> bool) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(manifest) = office.shard.committed(key) else { return };
        if manifest.holders.iter().all(&keep) {
            return;
        }
        let left: Vec<_> = manifest.holders.iter().filter(|holder| keep(holder)).cloned().collect();
        office.shard.holders_left(key, &left);
    }

    /// A member that is named as a holder does not have the bytes.
    pub(super) fn lacks(
        &mut self,
        now: Timestamp,
        member: &Member,
        key: &SessionKey,
        out: &mut Vec<ReplicaCommand>,
    ) {
        self.keep_holders(key, |holder| holder != member);
        self.take_back(now, key, out);
        self.look_at(key, false);
    }

    /// The head of a take-over may name others as holders who were to take the bytes over from this node and do not have
    /// them: where they are here still, because that was never settled, they count again.
    //= GUARANTEES.md#G10
    fn take_back(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let me = self.settings.member.clone();
        let Part::Primary(office) = &self.part else { return };
        // A change that is on its way knows what this node holds.
        if office.shard.changing(key) {
            return;
        }
        let Some(manifest) = office.shard.committed(key).filter(|manifest| self.too_few(manifest)) else {
            return;
        };
        let blocks: Vec<_> = manifest.instances().map(|block| block.instance).collect();
        let here = |stale: &Vec<InstanceId>| blocks.iter().all(|block| stale.contains(block));
        if manifest.holders.contains(&me) || !office.stale.get(key).is_some_and(here) {
            return;
        }
        let holders: Vec<_> = [&me].into_iter().chain(manifest.holders.iter()).cloned().collect();
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(stale) = office.stale.get_mut(key) {
            for block in &blocks {
                if let Some(at) = stale.iter().position(|instance| instance == block) {
                    stale.swap_remove(at);
                }
            }
        }
        office.shard.holders_left(key, &holders);
        let mut reside = Vec::new();
        office.shard.reside(now, key, &mut reside);
        out.extend(reside.into_iter().map(ReplicaCommand::Shard));
    }

    /// Takes up sessions that need healing, as many as may be under way.
    pub(super) fn heal(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &self.part else { return };
        let under_way = office.copying.values().filter(|copy| copy.heals().is_some()).count();
        let due = office.sick.iter().filter(|(_, sick)| sick.at <= now).map(|(key, _)| key.clone());
        let keys: Vec<_> = due.take(HEALING_MAX.saturating_sub(under_way)).collect();
        for key in keys {
            self.heal_one(now, &key, out);
        }
    }

    /// A session that is written all the time is looked at between two changes, where it may be healed.
    pub(super) fn heal_between_changes(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &self.part else { return };
        let under_way = office.copying.values().filter(|copy| copy.heals().is_some()).count();
        if under_way < HEALING_MAX && office.sick.get(key).is_some_and(|sick| sick.at <= now) {
            self.heal_one(now, key, out);
        }
    }

    /// The next step for one session.
    pub(super) fn heal_one(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let me = self.settings.member.clone();
        let leaving = self.leaving().cloned();
        let Part::Primary(office) = &mut self.part else { return };
        let under_way = office.copying.values().any(|copy| copy.heals() == Some(key));
        // A transcript that is not on disk yet would be missed by a change that keeps it.
        let caught_up = office.caught_up.get(key).is_some_and(|caught_up| now.since(caught_up.at) < AGAIN);
        if under_way || caught_up || office.shard.changing(key) || self.saving.contains_key(key) {
            return;
        }
        let manifest = match office.shard.committed(key) {
            Some(manifest) if manifest.state == State::Warm && manifest.stored_bytes() > Bytes::ZERO => {
                Arc::clone(manifest)
            }
            _ => {
                office.sick.remove(key);
                return;
            }
        };
        let (birth, met) = (manifest.birth, manifest.stamp);
        if manifest.holders.is_empty() {
            let cold = Verb::GoCold { birth, reason: ColdReason::HoldersLost, force: true };
            self.ask_shard(now, key.clone(), cold, out);
            return;
        }
        let blocks: Vec<_> = manifest.instances().copied().collect();
        let id = self.next_copy();
        let too_few = self.too_few(&manifest);
        let Part::Primary(office) = &mut self.part else { return };
        if !manifest.holders.contains(&me) {
            let waited_for = office.unfetched.contains_key(key);
            if !waited_for && !too_few {
                office.sick.remove(key);
                return;
            }
            let failed = office.sick.get(key).map_or(0, |sick| sick.failed);
            let from = manifest.holders[failed % manifest.holders.len()].clone();
            let instances = blocks.iter().map(|block| block.instance).collect();
            let copy = CopyFor::Fetch { key: key.clone(), met, from: from.clone(), blocks: instances };
            office.copying.insert(id, copy);
            out.push(ReplicaCommand::Fetch { id, from, key: key.clone(), birth, blocks, spare: false });
            return;
        }
        let failed = office.sick.get(key).map_or(0, |sick| sick.failed);
        let free = self.set.replicas.iter().filter(|replica| !manifest.holders.contains(replica));
        let free: Vec<_> = free.filter(|replica| Some(*replica) != leaving.as_ref()).collect();
        match free.get(failed % free.len().max(1)) {
            Some(to) if too_few => {
                let instances = blocks.iter().map(|block| block.instance).collect();
                let heal = CopyFor::Heal { key: key.clone(), met, to: Member::clone(to), blocks: instances };
                office.copying.insert(id, heal);
                let to = Member::clone(to);
                out.push(ReplicaCommand::Copy { id, to, key: key.clone(), birth, blocks, spare: false });
            }
            _ => {
                office.sick.remove(key);
            }
        }
    }

    /// Bytes arrived, or not.
    pub(super) fn copied(
        &mut self,
        now: Timestamp,
        id: CopyId,
        result: Result<(), CopyFailed>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        if let Some(blocks) = self.unwanted.remove(&id) {
            if result.is_ok() {
                out.push(release(blocks));
            }
            return;
        }
        let Part::Primary(office) = &mut self.part else { return };
        match office.copying.remove(&id) {
            Some(CopyFor::Change { ticket, to }) => self.copied_for_change(now, id, ticket, to, result, out),
            Some(CopyFor::Again { ticket, to }) if result.is_ok() => {
                self.send_change(now, ticket, Some(&to), out);
            }
            // The change is sent to it again in time, and its answer says again what it lacks.
            Some(CopyFor::Again { .. }) => {}
            Some(CopyFor::Heal { key, met, to, blocks }) => match result {
                Ok(()) if office.committed_head(&key) == Some(met) && !office.shard.changing(&key) => {
                    self.place_with(now, &key, met, to, Vec::new(), out);
                }
                Ok(()) => {
                    let has = blocks.into_iter().collect();
                    office.caught_up.insert(key, CaughtUp { member: to, has, at: now });
                }
                Err(CopyFailed::Damaged) => self.found_damaged(now, &key, met, out),
                // Somebody else may have room, or it may have some later.
                Err(_) => self.turn_to_the_next(now, &key),
            },
            Some(CopyFor::Fetch { key, met, from, blocks }) => match result {
                Ok(()) => {
                    let me = self.settings.member.clone();
                    self.place_with(now, &key, met, me, blocks, out);
                }
                Err(CopyFailed::Gone) => {
                    self.lacks(now, &from, &key, out);
                    self.heal_one(now, &key, out);
                }
                Err(CopyFailed::NoRoom) => {
                    self.turn_to_the_next(now, &key);
                    self.refuse_unfetched(&key, out);
                }
                // Another holder may be reached.
                Err(CopyFailed::Unreachable | CopyFailed::Damaged) => self.turn_to_the_next(now, &key),
            },
            Some(CopyFor::Move(moving)) => self.moved(now, moving, result, out),
            None => {}
        }
    }

    /// Whether all bytes of a change are on their way to a holder again: it is at work, not silent.
    pub(super) fn again_under_way(&self, ticket: Ticket, to: &Member) -> bool {
        let Part::Primary(office) = &self.part else { return false };
        let again = |copy: &CopyFor| matches!(copy, CopyFor::Again { ticket: other, to: other_to } if *other == ticket && other_to == to);
        office.copying.values().any(again)
    }

    /// A session that cannot be healed now lets the others go first.
    fn turn_to_the_next(&mut self, now: Timestamp, key: &SessionKey) {
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(sick) = office.sick.get_mut(key) {
            (sick.at, sick.failed) = (now + AGAIN, sick.failed + 1);
        }
    }

    fn refuse_unfetched(&mut self, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some((_, waiting)) = office.unfetched.remove(key) else { return };
        for request in waiting {
            let refusal = Refusal::Moving("its owner has no room for the session's bytes now");
            out.push(ReplicaCommand::Reply(request.id, Err(refusal)));
        }
    }

    /// Commits that one more member holds the bytes of exactly this state, and nobody whom it would be one too many.
    /// `brought` came for that, with a name each.
    pub(super) fn place_with(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        met: Stamp,
        member: Member,
        brought: Vec<InstanceId>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let wanted = self.settings.replication.min(self.set.replicas.len());
        let me = &self.settings.member;
        let leaving = self.leaving().cloned();
        let Part::Primary(office) = &mut self.part else { return };
        let manifest = office.shard.committed(key).filter(|manifest| manifest.stamp == met);
        // Who is to leave may be proposed to already.
        let manifest = manifest.filter(|_| leaving.as_ref() != Some(&member));
        let Some(manifest) =
            manifest.filter(|_| !office.shard.changing(key) && !self.saving.contains_key(key))
        else {
            if !brought.is_empty() {
                out.push(release(brought));
            }
            return;
        };
        let (mine, others): (Vec<_>, Vec<_>) =
            manifest.holders.iter().filter(|holder| **holder != member).partition(|holder| *holder == me);
        // Who is to leave counts where nobody else does.
        let (last, others): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|holder| Some(*holder) == leaving.as_ref());
        let holders = mine.into_iter().chain([&member]).chain(others).chain(last);
        let holders = holders.take(wanted).cloned().collect();
        let place = Verb::Place { birth: manifest.birth, met, holders, brought };
        self.ask_shard(now, key.clone(), place, out);
    }

    /// Requests whose session's bytes have come go on.
    pub(super) fn fetched(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let me = self.settings.member.clone();
        let Part::Primary(office) = &mut self.part else { return };
        let here = |key: &SessionKey| {
            office
                .shard
                .committed(key)
                .is_none_or(|manifest| manifest.state != State::Warm || manifest.holders.contains(&me))
        };
        let ready: Vec<_> = office.unfetched.keys().filter(|key| here(key)).cloned().collect();
        for key in ready {
            let Part::Primary(office) = &mut self.part else { return };
            let Some((_, waiting)) = office.unfetched.remove(&key) else { continue };
            for request in waiting {
                self.request(now, request, out);
            }
        }
    }
}

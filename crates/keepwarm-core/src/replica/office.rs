//! What a primary keeps, and how an office begins, goes on in a new set, and ends.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use keepwarm_types::{Generation, InstanceId, SessionKey, Timestamp};

use super::change::Changing;
use super::confirm::Rounds;
use super::event::{CopyId, ReplicaCommand};
use super::follower::{Copy, Follower, Head};
use super::heal::{CaughtUp, CopyFor, Sick};
use super::state::{Part, Replica, release};
use super::sweep::{Asked, Peer};
use crate::registry::{Member, ReplicaSet};
use crate::session::Stamp;
use crate::shard::{Command, LeftPending, Refusal, Request, Shard, ShardSettings, Ticket};

/// Requests that wait for one session to be settled or fetched.
pub(super) const WAITING_MAX: usize = 64;

/// Requests that the replica makes of its own shard have this bit.
pub(super) const OWN: u64 = 1 << 63;

/// Everything that only a primary has.
#[derive(Debug)]
pub(super) struct Office {
    pub(super) shard: Shard,
    /// The generation in which the office began.
    pub(super) began: Generation,
    /// The other replicas, and the learner.
    pub(super) peers: Vec<Peer>,
    /// Changes that not all have yet.
    pub(super) changes: BTreeMap<Ticket, Changing>,
    pub(super) changing: HashMap<SessionKey, Ticket>,
    /// Comparisons that are not answered yet.
    pub(super) asked: BTreeMap<u64, Asked>,
    pub(super) questions: u64,
    /// Whether every head of earlier generations is settled.
    pub(super) swept: bool,
    /// Sessions that were settled before the sweep came to them.
    pub(super) settled: BTreeSet<SessionKey>,
    /// Requests that wait for a session to be settled, and since when.
    pub(super) unsettled: BTreeMap<SessionKey, (Timestamp, VecDeque<Request>)>,
    /// Requests that wait for a session's bytes, and since when.
    pub(super) unfetched: BTreeMap<SessionKey, (Timestamp, VecDeque<Request>)>,
    /// Instances of predecessors of heads that are not settled yet.
    pub(super) stale: BTreeMap<SessionKey, Vec<InstanceId>>,
    pub(super) rounds: Rounds,
    /// Bytes on their way.
    pub(super) copying: BTreeMap<CopyId, CopyFor>,
    /// Members that have most of a busy session's bytes.
    pub(super) caught_up: BTreeMap<SessionKey, CaughtUp>,
    /// Sessions with too few holders, or whose bytes somebody waits for here.
    pub(super) sick: BTreeMap<SessionKey, Sick>,
    /// Replicas that had no room to spare, and until when they are not asked again.
    pub(super) full: HashMap<Member, Timestamp>,
    /// Requests of the own shard so far.
    pub(super) owned: u64,
    /// When a change of the set was proposed.
    pub(super) proposed: Option<Timestamp>,
    /// Whether that one gives the shard to another primary.
    pub(super) ceding: bool,
    /// When somebody was last proposed to leave.
    pub(super) accused: Option<Timestamp>,
    /// Who is to leave once no session counts on its copy.
    pub(super) leaving: Option<Member>,
    /// When that was last looked at.
    pub(super) counted: Option<Timestamp>,
    /// It was proposed in this generation: whenever that comes to be, nobody may count on its copy.
    pub(super) parting: bool,
}

impl Office {
    /// Takes note of a proposed change of the set.
    pub(super) const fn propose(&mut self, now: Timestamp, cedes: bool) {
        (self.proposed, self.ceding) = (Some(now), cedes);
    }

    /// Whether the shard is about to go to another primary.
    pub(super) const fn is_ceding(&self) -> bool {
        self.proposed.is_some() && self.ceding
    }

    pub(super) fn head(&self, key: &SessionKey) -> Option<Stamp> {
        let sent = self.changing.get(key).and_then(|ticket| self.changes.get(ticket));
        if let Some(change) = sent.filter(|change| change.sent) {
            return change.record.stamp();
        }
        self.committed_head(key)
    }

    pub(super) fn committed_head(&self, key: &SessionKey) -> Option<Stamp> {
        let live = self.shard.committed(key).map(|manifest| manifest.stamp);
        live.or_else(|| self.shard.grave(key).map(|grave| grave.stamp))
    }

    pub(super) fn peer(&mut self, member: &Member) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.member == *member)
    }

    /// The other replicas, without the learner.
    pub(super) fn secondaries(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().filter(|peer| !peer.learner)
    }

    /// Whether anything waits for somebody.
    pub(super) fn unanswered(&self) -> bool {
        !self.changes.is_empty()
            || !self.asked.is_empty()
            || !self.rounds.waiting.is_empty()
            || !self.unsettled.is_empty()
            || !self.unfetched.is_empty()
            || !self.sick.is_empty()
            || self.leaving.is_some()
            || self.is_ceding()
            || self
                .peers
                .iter()
                .any(|peer| peer.learner || !peer.filled() || !peer.settled_noted || !peer.notices.is_empty())
    }

    pub(super) fn validate(&self, set: &ReplicaSet) {
        self.shard.validate();
        assert_eq!(self.shard.generation(), set.generation, "the shard acts in another generation");
        let peers = set.replicas.len() - 1 + usize::from(set.learner.is_some());
        assert_eq!(self.peers.len(), peers, "the peers are not those of the set");
        for (key, ticket) in &self.changing {
            assert!(self.changes.contains_key(ticket), "{key} waits for a change that nobody has");
        }
        for (_, waiting) in self.unsettled.values().chain(self.unfetched.values()) {
            assert!(waiting.len() <= WAITING_MAX, "too many requests wait for one session");
        }
    }
}

impl Replica {
    /// Where the bytes of a new session go: here, and to the next replicas of the set.
    pub(super) fn default_holders(&self) -> Arc<[Member]> {
        let staying = self.set.replicas.iter().filter(|replica| Some(*replica) != self.leaving());
        staying.take(self.settings.replication.max(1)).cloned().collect()
    }

    /// Becomes primary: its own copies are the truth from now on.
    pub(super) fn take_office(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Follower(follower) = &mut self.part else { return };
        let copies = std::mem::take(&mut follower.copies);
        let (mut manifests, mut graves, mut stale) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (key, mut copy) in copies {
            let taken = copy.taken_back(&self.settings.member, &self.set.replicas);
            let Copy { head, holding, extra, .. } = copy;
            match head {
                Head::Live(manifest) => {
                    manifests.push(taken.unwrap_or_else(|| self.seen_from_set(&manifest, holding)));
                }
                Head::Ended(grave) => graves.push((key.clone(), grave)),
            }
            if !extra.is_empty() {
                stale.insert(key, extra);
            }
        }
        let settings = ShardSettings {
            shard: self.settings.shard,
            count: self.settings.count,
            member: self.settings.member.clone(),
            generation: self.set.generation,
            begun: self.settings.begun,
        };
        let mut shard = Shard::take_over(settings, now, manifests, graves);
        shard.set_office(self.set.generation, self.default_holders());
        let sick = shard
            .sessions_after(None)
            .filter(|(_, manifest)| self.too_few(manifest))
            .map(|(key, _)| (key.clone(), Sick::default()))
            .collect();
        let keys: Vec<_> = shard.sessions_after(None).map(|(key, _)| key.clone()).collect();
        self.part = Part::Primary(Office {
            shard,
            began: self.set.generation,
            peers: self.peers_of_set(now, &[]),
            changes: BTreeMap::new(),
            changing: HashMap::new(),
            asked: BTreeMap::new(),
            questions: self.before.0,
            swept: false,
            settled: BTreeSet::new(),
            unsettled: BTreeMap::new(),
            unfetched: BTreeMap::new(),
            stale,
            rounds: Rounds::after(self.before.1),
            copying: BTreeMap::new(),
            caught_up: BTreeMap::new(),
            sick,
            full: HashMap::new(),
            owned: 0,
            proposed: None,
            ceding: false,
            accused: None,
            leaving: None,
            counted: None,
            parting: false,
        });
        self.lend_to_inherited();
        let Part::Primary(office) = &self.part else { return };
        let mut reside = Vec::new();
        keys.iter().for_each(|key| office.shard.reside(now, key, &mut reside));
        out.extend(reside.into_iter().map(ReplicaCommand::Shard));
        self.sweep(now, out);
        self.touched(now, out);
    }

    /// Goes on as primary in a new set.
    pub(super) fn keep_office(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        if let Part::Primary(office) = &mut self.part {
            (office.leaving, office.parting) = (None, false);
        }
        let holders = self.default_holders();
        let Part::Primary(office) = &mut self.part else { return };
        let before = std::mem::take(&mut office.peers);
        office.shard.set_office(self.set.generation, holders);
        let peers = self.peers_of_set(now, &before);
        let members: Vec<_> = peers.iter().map(|peer| peer.member.clone()).collect();
        let Part::Primary(office) = &mut self.part else { return };
        office.peers = peers;
        office.proposed = None;
        office.asked.retain(|_, asked| office.peers.iter().any(|peer| peer.member == asked.peer));
        let filled = office.secondaries().all(Peer::filled);
        office.swept &= filled;
        self.look_at_holders();
        // What was sent in the generation before may be refused in this one.
        for member in &members {
            self.resend(now, Some(member), out);
        }
        self.sweep(now, out);
        self.confirm_anew(now, out);
        self.commit_what_all_have(now, out);
        self.touched(now, out);
    }

    /// Is primary no longer. What was sent to others may yet be committed by them; nothing else was applied.
    //= GUARANTEES.md#G3
    pub(super) fn leave_office(&mut self, out: &mut Vec<ReplicaCommand>) {
        let empty = Part::Follower(Follower::default());
        let Part::Primary(office) = std::mem::replace(&mut self.part, empty) else { return };
        let moving_on = || Refusal::Moving("the session's owner has changed");
        self.before = (office.questions, office.rounds.begun);
        let mut freed = Vec::new();
        self.abandon_copies(office.copying, out);
        let waiting = office.unsettled.into_values().chain(office.unfetched.into_values());
        for request in waiting.flat_map(|(_, requests)| requests) {
            out.push(ReplicaCommand::Reply(request.id, Err(moving_on())));
        }
        for (_, id, _) in office.rounds.waiting {
            out.push(ReplicaCommand::Refuse(id, moving_on()));
        }
        let mut changes = office.changes;
        let (sessions, graves) = office.shard.leave();
        let me = &self.settings.member;
        let mut copies: BTreeMap<_, _> = graves
            .into_iter()
            .map(|(key, grave)| {
                (
                    key,
                    Copy {
                        head: Head::Ended(grave),
                        holding: false,
                        bare: false,
                        extra: Vec::new(),
                        heard: 0,
                    },
                )
            })
            .collect();
        let mut orphans = Vec::new();
        for (key, left) in sessions {
            freed.extend(left.staged);
            for id in left.queue.into_iter().filter(|id| id.0 & OWN == 0) {
                out.push(ReplicaCommand::Reply(id, Err(moving_on())));
            }
            let birth = left.manifest.as_ref().map(|manifest| manifest.birth);
            if let Some(birth) = birth {
                out.push(ReplicaCommand::Shard(Command::Invalidate(key.clone(), birth)));
            }
            let mut extra = Vec::new();
            let mut head = left.manifest.clone().map(Head::Live);
            let held = |manifest: &crate::session::Manifest| manifest.holders.contains(me);
            if let Some(LeftPending { ticket, request, next, undo }) = left.pending {
                let change = changes.remove(&ticket);
                let sent = change.as_ref().is_some_and(|change| change.sent);
                let refusal = if sent { Refusal::OutcomeUnknown } else { moving_on() };
                if let Some(id) = request.filter(|id| id.0 & OWN == 0) {
                    out.push(ReplicaCommand::Reply(id, Err(refusal)));
                }
                match change.filter(|change| change.sent) {
                    None => freed.extend(undo),
                    Some(change) => {
                        orphans.push(ticket);
                        let kept: BTreeSet<_> = next
                            .iter()
                            .filter(|next| held(next))
                            .flat_map(|next| next.instances())
                            .map(|block| block.instance)
                            .collect();
                        let old = left.manifest.iter().filter(|manifest| held(manifest));
                        let old = old.flat_map(|manifest| manifest.instances().map(|block| block.instance));
                        extra.extend(old.chain(undo).filter(|instance| !kept.contains(instance)));
                        extra.sort_unstable();
                        extra.dedup();
                        head = match next {
                            Some(next) => Some(Head::Live(next)),
                            None => change.record.grave().map(Head::Ended),
                        };
                    }
                }
            }
            if let Some(head) = head {
                let holding = matches!(&head, Head::Live(manifest) if held(manifest));
                copies.insert(key, Copy { head, holding, bare: false, extra, heard: 0 });
            }
        }
        for (key, instances) in office.stale {
            match copies.get_mut(&key) {
                Some(copy) => copy.extra.extend(instances),
                None => freed.extend(instances),
            }
        }
        if !freed.is_empty() {
            out.push(release(freed));
        }
        self.part = Part::Follower(Follower { copies, dropped: 0 });
        orphans.into_iter().for_each(|ticket| self.orphan(ticket));
    }

    /// Bytes on their way for an office that ends: what comes is let go, and whoever asked is refused.
    fn abandon_copies(&mut self, copying: BTreeMap<CopyId, CopyFor>, out: &mut Vec<ReplicaCommand>) {
        for (id, copy) in copying {
            match copy {
                CopyFor::Fetch { blocks, .. } => drop(self.unwanted.insert(id, blocks)),
                CopyFor::Move(moving) => {
                    if let Some(blocks) = moving.fetched(&self.settings.member) {
                        self.unwanted.insert(id, blocks.clone());
                    }
                    if let Some(asker) = moving.asker() {
                        out.push(ReplicaCommand::Reply(
                            asker,
                            Err(Refusal::Moving("the session's owner has changed")),
                        ));
                    }
                }
                CopyFor::Change { .. } | CopyFor::Again { .. } | CopyFor::Heal { .. } => {}
            }
        }
    }

    /// The others of the set, those that were there before as they were.
    fn peers_of_set(&self, now: Timestamp, before: &[Peer]) -> Vec<Peer> {
        let replicas = self.set.replicas.iter().skip(1).map(|member| (member, false));
        let learner = self.set.learner.iter().map(|member| (member, true));
        let peer = |(member, learner): (&Member, bool)| {
            let old = before.iter().find(|peer| peer.member == *member).cloned();
            Peer { learner, ..old.unwrap_or_else(|| Peer::new(member.clone(), now)) }
        };
        replicas.chain(learner).map(peer).collect()
    }
}

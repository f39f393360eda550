//! Rounds in which every secondary confirms the generation, so that an owner that was replaced never answers.

use std::collections::VecDeque;

use keepwarm_types::{Millis, SessionKey, Timestamp};

use super::event::ReplicaCommand;
use super::message::Message;
use super::office::{OWN, WAITING_MAX};
use super::state::{Part, RESEND, Replica};
use crate::registry::Member;
use crate::shard::{Answer, Event, RETRY_AFTER, Refusal, Request, RequestId, Verb};

/// What waits for which round.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// The last round that was begun.
    pub(super) begun: u64,
    /// When it was begun.
    pub(super) began_at: Timestamp,
    at: Timestamp,
    /// The last round that the registry confirmed.
    registry: u64,
    /// Round, request, and when it came.
    pub(super) waiting: VecDeque<(u64, RequestId, Timestamp)>,
}

impl Rounds {
    /// Rounds of an earlier office are never taken for those of this one.
    pub(super) fn after(begun: u64) -> Self {
        Self { begun, ..Self::default() }
    }
}

/// How long nothing begins in a shard that is to be ceded, where nobody answers: as long as the registry is asked for it.
pub(super) const CEDES_FOR: Millis = Millis(5_000);

impl Replica {
    /// Takes a request of a client.
    pub(super) fn request(&mut self, now: Timestamp, request: Request, out: &mut Vec<ReplicaCommand>) {
        if matches!(request.verb, Verb::List(_)) {
            self.drive(now, Event::Request(request), None, out);
            return;
        }
        let key = request.key.clone();
        let Some(request) = self.unsettled(now, &key, request, out) else { return };
        let request = match &request.verb {
            // The child's name must be free everywhere.
            Verb::Fork(fork) => {
                let child = SessionKey::new(key.tenant.clone(), fork.child);
                let Some(request) = self.unsettled(now, &child, request, out) else { return };
                request
            }
            _ => request,
        };
        if self.cedes_before(&request.verb) {
            let refusal = Refusal::Moving("its shard goes to another node");
            out.push(ReplicaCommand::Reply(request.id, Err(refusal)));
            return;
        }
        if let Verb::Cede(to) = &request.verb {
            return self.cede(now, &request, to, out);
        }
        match request.verb {
            Verb::Demote => return self.demote(now, &request, out),
            Verb::Condemn { birth, damaged } => return self.condemn(now, request, (birth, damaged), out),
            _ => {}
        }
        let Some(request) = self.unfetched(now, request, out) else { return };
        if self.may_be_lost(&request) {
            let refusal = Refusal::Lost { at: self.set.lost_at.unwrap_or(Timestamp::NEVER) };
            self.hold(now, request.id, Err(refusal), out);
            return;
        }
        self.drive(now, Event::Request(request), None, out);
    }

    /// Whether a session that is not here may have been here before every catalog of the shard was lost.
    fn may_be_lost(&self, request: &Request) -> bool {
        let (Some(lost_at), Part::Primary(office)) = (self.set.lost_at, &self.part) else { return false };
        if matches!(request.verb, Verb::Create(_)) || office.committed_head(&request.key).is_some() {
            return false;
        }
        // A UUIDv7 says when it was made; any other may be of any age.
        let made =
            request.key.id.uuid().get_timestamp().filter(|_| request.key.id.uuid().get_version_num() == 7);
        made.is_none_or(|made| {
            let (secs, nanos) = made.to_unix();
            secs.saturating_mul(1000).saturating_add(u64::from(nanos) / 1_000_000) <= lost_at.0
        })
    }

    /// Whether a request must wait until the session's bytes are here; if so it is kept.
    fn unfetched(
        &mut self,
        now: Timestamp,
        request: Request,
        out: &mut Vec<ReplicaCommand>,
    ) -> Option<Request> {
        let Part::Primary(office) = &mut self.part else { return Some(request) };
        if !office.shard.lacks_bytes(&request) {
            return Some(request);
        }
        let key = request.key.clone();
        let (_, waiting) = office.unfetched.entry(key.clone()).or_insert_with(|| (now, VecDeque::new()));
        if waiting.len() >= WAITING_MAX {
            let refusal = Refusal::Overloaded { what: "requests for this session", retry_after: RETRY_AFTER };
            out.push(ReplicaCommand::Reply(request.id, Err(refusal)));
            return None;
        }
        waiting.push_back(request);
        office.sick.entry(key.clone()).or_default();
        self.heal_one(now, &key, out);
        None
    }

    /// Keeps an answer until a round that begins from now on is confirmed.
    //= GUARANTEES.md#G11
    pub(super) fn hold(
        &mut self,
        now: Timestamp,
        id: RequestId,
        result: Result<Box<Answer>, Refusal>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let cluster = self.settings.cluster;
        let Part::Primary(office) = &mut self.part else { return };
        if office.secondaries().next().is_none() && !cluster {
            out.push(ReplicaCommand::Reply(id, result));
            return;
        }
        let idle = office.rounds.waiting.is_empty();
        let round = office.rounds.begun + 1;
        office.rounds.waiting.push_back((round, id, now));
        out.push(ReplicaCommand::Hold(id, result));
        if idle {
            self.begin_round(now, out);
        }
    }

    fn begin_round(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        office.rounds.begun += 1;
        office.rounds.began_at = now;
        self.ask_round(now, out);
    }

    /// Asks for the present round: the secondaries, or the registry where there are none.
    fn ask_round(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let round = office.rounds.begun;
        office.rounds.at = now;
        let open: Vec<_> = office
            .secondaries()
            .filter(|peer| peer.confirmed < round)
            .map(|peer| peer.member.clone())
            .collect();
        if office.secondaries().next().is_none() {
            out.push(ReplicaCommand::ConfirmRegistry { round });
        }
        for member in open {
            self.say(&member, Message::Confirm { round }, out);
        }
    }

    /// The set has changed: whatever waits is confirmed in it.
    pub(super) fn confirm_anew(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        if office.rounds.waiting.is_empty() {
            return;
        }
        let next = office.rounds.begun + 1;
        office.rounds.waiting.iter_mut().for_each(|(round, ..)| *round = next);
        self.begin_round(now, out);
    }

    pub(super) fn confirmed(
        &mut self,
        now: Timestamp,
        from: &Member,
        round: u64,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        if let Some(peer) = office.peer(from) {
            peer.confirmed = peer.confirmed.max(round);
        }
        self.deliver(now, out);
    }

    pub(super) fn registry_confirmed(&mut self, now: Timestamp, round: u64, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        office.rounds.registry = office.rounds.registry.max(round);
        self.deliver(now, out);
    }

    /// Gives the answers whose round all have confirmed.
    fn deliver(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let secondaries = office.secondaries().map(|peer| peer.confirmed).min();
        let confirmed = secondaries.unwrap_or(office.rounds.registry);
        let rounds = &mut office.rounds;
        while let Some((round, id, _)) = rounds.waiting.front().copied()
            && round <= confirmed
        {
            rounds.waiting.pop_front();
            out.push(ReplicaCommand::Deliver(id));
        }
        // What came while a round was under way needs one that begins now.
        if confirmed >= rounds.begun && !rounds.waiting.is_empty() {
            self.begin_round(now, out);
        }
    }

    /// Looks at what is late.
    pub(super) fn office_tick(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let deadline = self.settings.write_deadline;
        self.leave_the_silent(now, out);
        let Part::Primary(office) = &mut self.part else { return };
        if office.shard.next_deadline() <= now {
            self.drive(now, Event::Tick, None, out);
        }
        let Part::Primary(office) = &mut self.part else { return };
        while let Some((_, id, since)) = office.rounds.waiting.front().copied()
            && now.since(since) >= deadline
        {
            office.rounds.waiting.pop_front();
            out.push(ReplicaCommand::Refuse(
                id,
                Refusal::Moving("its copies did not confirm that it still owns the session"),
            ));
        }
        if !office.rounds.waiting.is_empty() && now.since(office.rounds.at) >= RESEND {
            self.ask_round(now, out);
        }
        if let Part::Primary(office) = &mut self.part
            && office
                .proposed
                .is_some_and(|at| now.since(at) >= if office.ceding { CEDES_FOR } else { deadline })
        {
            // Whether that one comes to be or not, another on the same generation cannot do harm. Who leased a session of a
            // shard that is ceded after all loses that lease, and is told so.
            office.proposed = None;
        }
        self.resend(now, None, out);
        self.give_up_waiting(now, out);
        self.doubt_late_changes(now, out);
        self.tell_commits(now, out);
        self.heal(now, out);
        self.let_leave(now, out);
        self.fetched(now, out);
        self.touched(now, out);
    }

    /// Takes what another member answers.
    pub(super) fn answered(
        &mut self,
        now: Timestamp,
        from: &Member,
        message: Message,
        out: &mut Vec<ReplicaCommand>,
    ) {
        match message {
            Message::Prepared { key, stamp, holding } => self.prepared(now, from, &key, stamp, holding, out),
            Message::NeedWhole { key } => {
                let Part::Primary(office) = &mut self.part else { return };
                let on_its_way = office.peer(from).is_some_and(|peer| peer.installs.contains_key(&key));
                if !on_its_way {
                    self.install_at(now, from, &key, out);
                }
            }
            Message::Compared { id, differing, lacking } => {
                self.compared(now, from, id, differing, lacking, out);
            }
            Message::Installed { key, head, holding } => self.installed(now, from, &key, head, holding, out),
            Message::Noted { heads, before } => self.noted(from, &heads, before),
            Message::Confirmed { round } => self.confirmed(now, from, round, out),
            Message::Evict { key, birth } => self.make_room(now, &key, birth, from, out),
            Message::Prepare(_)
            | Message::Committed(_)
            | Message::Settled { .. }
            | Message::Compare(_)
            | Message::Install(_)
            | Message::Confirm { .. }
            | Message::Stale => {}
        }
    }

    /// A request of the replica's own.
    pub(super) fn ask_shard(
        &mut self,
        now: Timestamp,
        key: SessionKey,
        verb: Verb,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        office.owned += 1;
        let id = RequestId(OWN | office.owned);
        self.drive(now, Event::Request(Request { id, key, verb }), None, out);
    }
}

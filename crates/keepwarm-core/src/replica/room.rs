//! A holder without room: a session's bytes move to a replica that has room to spare, or the session goes cold.
//!
//! A move is a copy, then a commit of who holds the bytes, then the old copy is given back: at no time are there fewer
//! copies than before. Nobody lets anything go for a copy that moves, so two full nodes never push sessions to and
//! fro; where no replica has room to spare, an unprotected session goes cold and a protected one stays.

use std::sync::Arc;

use keepwarm_types::{Birth, Bytes, ColdReason, InstanceId, Millis, SessionKey, Timestamp};

use super::event::{CopyFailed, ReplicaCommand};
use super::heal::CopyFor;
use super::message::Message;
use super::state::{INBOX_TTL, Part, Replica, release};
use crate::registry::Member;
use crate::session::{Manifest, Stamp, State};
use crate::shard::{Answer, Event, Refusal, Request, RequestId, Verb};

/// Sessions of a shard that move at once: the foreground goes first.
const MOVES_MAX: usize = 8;
/// How long a replica that had no room to spare, or could not be reached, is not asked again.
const FULL_FOR: Millis = Millis(1000);
/// A copy that took longer has lost its first bytes by now, which nothing names there: half of what they are kept for.
const COPY_MAX: Millis = Millis(INBOX_TTL.0 / 2);

/// Why a session's bytes do not move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stuck {
    /// Nobody has room for them.
    NoRoom,
    /// Not now.
    NotNow(&'static str),
}

impl Stuck {
    const fn text(self) -> &'static str {
        match self {
            Self::NoRoom => "no other node of its set has room to spare",
            Self::NotNow(why) => why,
        }
    }
}

/// A session's bytes on their way from a holder that has no room to a replica that may have some.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) key: SessionKey,
    birth: Birth,
    met: Stamp,
    away: Member,
    to: Member,
    blocks: Vec<InstanceId>,
    began: Timestamp,
    /// Whoever asked for the move by name; a holder that only wants room has nobody.
    asker: Option<RequestId>,
}

impl Moving {
    /// What was fetched for it into this node's memory.
    pub(super) fn fetched(&self, me: &Member) -> Option<&Vec<InstanceId>> {
        (self.to == *me).then_some(&self.blocks)
    }

    pub(super) const fn asker(&self) -> Option<RequestId> {
        self.asker
    }
}

impl Replica {
    /// This node's memory has no room for the session any more. The primary decides; a copy's holder asks it, and is
    /// not answered but by the change that takes the session from it.
    pub(super) fn evict(
        &mut self,
        now: Timestamp,
        key: SessionKey,
        birth: Birth,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let me = self.settings.member.clone();
        match (&self.part, self.set.replicas.first().cloned()) {
            (Part::Primary(_), _) => self.make_room(now, &key, birth, &me, out),
            (Part::Follower(_), Some(primary)) => self.say(&primary, Message::Evict { key, birth }, out),
            (Part::Follower(_), None) => out.push(ReplicaCommand::Stays(key)),
        }
    }

    /// A holder has no room for the session: it moves, or goes cold unless it is protected, or stays.
    pub(super) fn make_room(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        birth: Birth,
        away: &Member,
        out: &mut Vec<ReplicaCommand>,
    ) {
        match self.begin_move(now, key, Some(birth), away, None, out) {
            Ok(()) => {}
            Err(Stuck::NoRoom) => self.let_cool(now, key, birth, away, out),
            Err(Stuck::NotNow(_)) => self.stays(key, away, out),
        }
    }

    /// A client wants this node's pinned memory free of the session: its bytes move, or stay and the refusal says why.
    pub(super) fn demote(&mut self, now: Timestamp, request: &Request, out: &mut Vec<ReplicaCommand>) {
        let (me, id) = (self.settings.member.clone(), request.id);
        let Part::Primary(office) = &self.part else { return };
        let refusal = match office.shard.committed(&request.key) {
            None => Refusal::UnknownSession,
            Some(manifest) if !manifest.holders.contains(&me) => {
                return self.hold(now, id, Ok(Box::new(Answer::Done)), out);
            }
            Some(_) => match self.begin_move(now, &request.key, None, &me, Some(id), out) {
                Ok(()) => return,
                Err(stuck) => Refusal::Conflict(stuck.text().to_owned()),
            },
        };
        self.hold(now, id, Err(refusal), out);
    }

    /// Starts the copy; the error says why there is no move.
    fn begin_move(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        birth: Option<Birth>,
        away: &Member,
        asker: Option<RequestId>,
        out: &mut Vec<ReplicaCommand>,
    ) -> Result<(), Stuck> {
        let me = self.settings.member.clone();
        let Part::Primary(office) = &mut self.part else { return Err(Stuck::NotNow("another node owns it")) };
        let manifest = office.shard.committed(key).filter(|manifest| {
            let bytes = manifest.state == State::Warm && manifest.stored_bytes() > Bytes::ZERO;
            bytes && birth.is_none_or(|birth| manifest.birth == birth) && manifest.holders.contains(away)
        });
        let Some(manifest) = manifest.map(Arc::clone) else {
            return Err(Stuck::NotNow("it has no bytes there"));
        };
        if office.shard.changing(key) || self.saving.contains_key(key) || !office.is_settled(key) {
            return Err(Stuck::NotNow("a change of it is under way"));
        }
        if *away == me && office.shard.leased(now, key) {
            return Err(Stuck::NotNow("it is leased"));
        }
        if office.copying.values().any(|copy| copy.moves() == Some(key)) {
            return Err(Stuck::NotNow("its bytes are moving already"));
        }
        if office.copying.values().filter(|copy| copy.moves().is_some()).count() >= MOVES_MAX {
            return Err(Stuck::NotNow("too many sessions are moving already"));
        }
        office.full.retain(|_, until| *until > now);
        let holds_here = manifest.holders.contains(&me);
        // Its bytes are sent from here, or fetched to here.
        let may = |replica: &&Member| {
            let new = !manifest.holders.contains(replica) && !office.full.contains_key(*replica);
            let stays = office.leaving.as_ref() != Some(*replica);
            new && stays && (holds_here || **replica == me)
        };
        let Some(to) = self.set.replicas.iter().find(may).cloned() else {
            return Err(Stuck::NoRoom);
        };
        let blocks: Vec<_> = manifest.instances().copied().collect();
        let id = self.next_copy();
        let moving = Moving {
            key: key.clone(),
            birth: manifest.birth,
            met: manifest.stamp,
            away: away.clone(),
            to: to.clone(),
            blocks: blocks.iter().map(|block| block.instance).collect(),
            began: now,
            asker,
        };
        let Part::Primary(office) = &mut self.part else { return Err(Stuck::NotNow("another node owns it")) };
        office.copying.insert(id, CopyFor::Move(moving));
        let (key, birth) = (key.clone(), manifest.birth);
        out.push(if to == me {
            ReplicaCommand::Fetch { id, from: away.clone(), key, birth, blocks, spare: true }
        } else {
            ReplicaCommand::Copy { id, to, key, birth, blocks, spare: true }
        });
        Ok(())
    }

    /// The copy is there, or not: who holds the bytes is committed, or the session stays, or cools.
    pub(super) fn moved(
        &mut self,
        now: Timestamp,
        moving: Moving,
        result: Result<(), CopyFailed>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let me = self.settings.member.clone();
        let Moving { key, birth, met, away, to, blocks, began, asker } = moving;
        let brought = if to == me { blocks } else { Vec::new() };
        let Part::Primary(office) = &mut self.part else { return };
        if result.is_err() && result != Err(CopyFailed::Damaged) {
            office.full.insert(to.clone(), now + FULL_FOR);
        }
        let committed = office.shard.committed(&key).filter(|manifest| manifest.stamp == met);
        let fits = |manifest: &&Arc<Manifest>| {
            let leased = away == me && office.shard.leased(now, &key);
            let quiet = !office.shard.changing(&key) && !self.saving.contains_key(&key);
            let in_time = to == me || now.since(began) <= COPY_MAX;
            let stays = self.set.replicas.contains(&to) && office.leaving.as_ref() != Some(&to);
            quiet && !leased && in_time && stays && manifest.holders.contains(&away)
        };
        if let (Ok(()), Some(manifest)) = (result, committed.filter(fits)) {
            let stay = manifest.holders.iter().filter(|holder| **holder != away);
            let holders = if to == me {
                [&to].into_iter().chain(stay).cloned().collect()
            } else {
                stay.chain([&to]).cloned().collect()
            };
            let place = Verb::Place { birth, met, holders, brought };
            match asker {
                Some(id) => {
                    self.drive(now, Event::Request(Request { id, key, verb: place }), None, out);
                }
                None => self.ask_shard(now, key, place, out),
            }
            return;
        }
        if result.is_ok() && !brought.is_empty() {
            out.push(release(brought));
        }
        if to == me && result == Err(CopyFailed::Gone) {
            self.lacks(now, &away, &key, out);
        }
        if result == Err(CopyFailed::Damaged) {
            // Whoever it should leave keeps it: the copy that is none any more is this node's.
            self.found_damaged(now, &key, met, out);
        }
        match asker {
            Some(id) => {
                let why = match result {
                    Ok(()) => "it changed while its bytes moved",
                    Err(CopyFailed::NoRoom) => Stuck::NoRoom.text(),
                    Err(_) => "its bytes could not be moved",
                };
                self.hold(now, id, Err(Refusal::Conflict(why.to_owned())), out);
            }
            // Another replica may have room.
            None if result.is_err() && result != Err(CopyFailed::Damaged) => {
                self.make_room(now, &key, birth, &away, out);
            }
            None => self.stays(&key, &away, out),
        }
    }

    /// No move: it goes cold, unless it is protected or runs.
    fn let_cool(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        birth: Birth,
        away: &Member,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &self.part else { return };
        // Who asked may have been relieved of it since.
        let there = office.shard.committed(key).is_some_and(|manifest| manifest.holders.contains(away));
        if !there || self.saving.contains_key(key) || !office.shard.may_cool(now, key, birth) {
            return self.stays(key, away, out);
        }
        let cold = Verb::GoCold { birth, reason: ColdReason::Evicted, force: false };
        self.ask_shard(now, key.clone(), cold, out);
    }

    /// Tells this node's pinned tier that a session does not leave now.
    fn stays(&self, key: &SessionKey, away: &Member, out: &mut Vec<ReplicaCommand>) {
        if *away == self.settings.member {
            out.push(ReplicaCommand::Stays(key.clone()));
        }
    }
}

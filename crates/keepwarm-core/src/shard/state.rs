//! The shard's state and its single entry point.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use keepwarm_types::{
    Birth, Bytes, ColdReason, Generation, Millis, Revision, SessionKey, ShardCount, ShardId, TenantName,
    Timestamp,
};

use super::change::IN_DOUBT;
use super::command::{Command, Residence, Ticket};
use super::entry::{End, Entry};
use super::event::{Event, Request, RequestId, Verb};
use super::refusal::Refusal;
use super::view::Answer;
use crate::registry::Member;
use crate::session::{Manifest, Stamp, State};

/// Requests that wait behind one session's write. A writer waits for its answers, so more than a few mean
/// that somebody does not.
pub const WRITES_QUEUED_MAX: usize = 16;
/// Transactions that one session can have open.
pub const TXNS_MAX: usize = 8;
/// How long staged bytes wait for their commit.
pub const STAGE_TTL: Millis = Millis::from_secs(600);
/// How long an ended session answers as such.
pub const TOMBSTONE_TTL: Millis = Millis::from_secs(86_400);
/// Tombstones per tenant and shard; beyond, the oldest is forgotten early.
pub const TOMBSTONES_MAX: usize = 4096;
/// Branches that a conversation keeps; beyond, the oldest ends.
pub const BRANCHES_MAX: usize = 8;
/// Bits of a sequence below the count of begins: 2^40 changes a begin.
const SEQUENCE_BITS: u32 = 40;
/// When a client that met a full queue may come again.
pub const RETRY_AFTER: Millis = Millis(200);

/// What a shard is told at its start.
#[derive(Debug, Clone)]
pub struct ShardSettings {
    /// Which shard.
    pub shard: ShardId,
    /// How many there are.
    pub count: ShardCount,
    /// The process that it runs in. Lease epochs begin above those of every earlier incarnation.
    pub member: Member,
    /// The generation of its replica set.
    pub generation: Generation,
    /// How often this shard was begun in this process: stamps of one begin are never those of another.
    pub begun: u32,
}

/// What is remembered of a session that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tombstone {
    /// The life that ended.
    pub birth: Birth,
    /// Its last revision.
    pub revision: Revision,
    /// When it ended.
    pub at: Timestamp,
    /// Whether it expired, rather than being deleted.
    pub expired: bool,
    /// Names this end.
    pub stamp: Stamp,
}

/// A deadline that a tick may find passed; checked against the session when it fires.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Session(SessionKey),
    Lease(SessionKey),
    Stage(SessionKey),
    Tombstone(SessionKey),
    Retry(SessionKey),
}

/// The brain of one shard.
#[derive(Debug)]
pub struct Shard {
    pub(super) settings: ShardSettings,
    /// Where the bytes of a session without any go.
    pub(super) holders: Arc<[Member]>,
    pub(super) sequence: u64,
    pub(super) sessions: BTreeMap<SessionKey, Entry>,
    pub(super) tombstones: BTreeMap<SessionKey, Tombstone>,
    /// Per tenant, tombstones by age.
    pub(super) graves: HashMap<TenantName, BTreeSet<(Timestamp, SessionKey)>>,
    pub(super) tickets: HashMap<Ticket, SessionKey>,
    pub(super) next_ticket: u64,
    pub(super) timers: BTreeSet<(Timestamp, Timer)>,
    pub(super) grants: u64,
}

/// What handling a request gave: an answer now, or one after a commit.
pub(super) type Handled = Result<Option<Answer>, Refusal>;

impl Shard {
    /// An empty shard.
    #[must_use]
    pub fn new(settings: ShardSettings) -> Self {
        let holders = Arc::from([settings.member.clone()]);
        let sequence = u64::from(settings.begun) << SEQUENCE_BITS;
        Self {
            settings,
            holders,
            sequence,
            sessions: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            graves: HashMap::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            timers: BTreeSet::new(),
            grants: 0,
        }
    }

    /// A shard with what the catalog has. The process that held the bytes is gone, so every session that was
    /// warm is cold: lengths stay, blocks do not. Being recovered counts as a use, since uses after the last
    /// commit were not written down.
    #[must_use]
    pub fn recover(
        settings: ShardSettings,
        now: Timestamp,
        manifests: impl IntoIterator<Item = Manifest>,
        tombstones: impl IntoIterator<Item = (SessionKey, Tombstone)>,
    ) -> Self {
        let mut shard = Self::new(settings);
        for mut manifest in manifests {
            if manifest.state == State::Warm && manifest.parts.iter().any(|part| part.length > Bytes::ZERO) {
                manifest.go_cold(ColdReason::Restarted);
            }
            let key = manifest.key.clone();
            shard.set_timer(manifest.expires_at(now), Timer::Session(key.clone()));
            shard
                .sessions
                .insert(key, Entry { manifest: Some(Arc::new(manifest)), last_used: now, work: None });
        }
        for (key, tombstone) in tombstones {
            shard.bury(key, tombstone);
        }
        shard
    }

    /// Which shard this is.
    #[must_use]
    pub const fn id(&self) -> ShardId {
        self.settings.shard
    }

    /// The generation that it acts in.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.settings.generation
    }

    /// Sessions that it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// When a [`Event::Tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Timestamp {
        self.timers.first().map_or(Timestamp::NEVER, |(at, _)| *at)
    }

    /// Takes one event and says what to do, in order.
    pub fn on(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Request(request) => self.request(now, request, &mut out),
            Event::Persisted(ticket) => self.persisted(now, ticket, &mut out),
            Event::PersistFailed(ticket, error, records) => {
                self.persist_failed(now, ticket, error, records, &mut out)
            }
            Event::Tick => self.tick(now, &mut out),
        }
        out
    }

    pub(super) fn request(&mut self, now: Timestamp, request: Request, out: &mut Vec<Command>) {
        if waits(&request.verb) && self.changing(&request.key) {
            let in_doubt = self.in_doubt(&request.key);
            let Some(entry) = self.sessions.get_mut(&request.key) else { return };
            let work = entry.work();
            if work.queue.len() >= WRITES_QUEUED_MAX {
                let refusal =
                    Refusal::Overloaded { what: "writes of this session", retry_after: RETRY_AFTER };
                out.push(Command::Reply(request.id, Err(refusal)));
            } else if in_doubt {
                out.push(Command::Reply(request.id, Err(Refusal::Unavailable(IN_DOUBT))));
            } else {
                work.queue.push_back(request);
            }
            return;
        }
        if self.lacks_bytes(&request) {
            out.push(Command::Again(request));
            return;
        }
        let Request { id, key, verb } = request;
        let handled = self.handle(now, id, &key, verb, out);
        match handled {
            Ok(Some(answer)) => out.push(Command::Reply(id, Ok(Box::new(answer)))),
            Ok(None) => {}
            Err(refusal) => out.push(Command::Reply(id, Err(refusal))),
        }
    }

    fn handle(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        verb: Verb,
        out: &mut Vec<Command>,
    ) -> Handled {
        match verb {
            Verb::Create(create) => self.create(now, id, key, create, out),
            Verb::Get => self.live(key)?.view(now).map(|view| Some(session(view, false, false))),
            Verb::List(query) => Ok(Some(self.list(now, &key.tenant, &query))),
            Verb::PlanWrite(plan) => self.plan_write(now, key, &plan),
            Verb::Write(write) => self.write(now, id, key, write, out),
            Verb::Commit(commit) => self.commit(now, id, key, commit, out),
            Verb::Abort(txn) => self.abort(now, key, txn, out),
            Verb::Turn(turn) => self.turn(now, id, key, turn, out),
            Verb::Read { part } => self.read(now, key, Some(&part), out),
            Verb::ReadAll => self.read(now, key, None, out),
            Verb::Activate { lease, ttl, home } => self.activate(now, key, lease, ttl, home, out),
            Verb::Renew { lease, ttl } => self.renew(now, key, lease, ttl, out),
            Verb::Release { lease } => self.release(now, key, lease, out),
            Verb::SetHome(home) => {
                self.live(key)?.manifest()?;
                self.entry(key)?.work().home = Some(home);
                Ok(Some(Answer::Done))
            }
            Verb::Touch => {
                self.live(key)?.manifest()?;
                self.touch(now, key, out);
                Ok(Some(Answer::Done))
            }
            Verb::Truncate { cut, precondition } => self.truncate(now, id, key, cut, precondition, out),
            Verb::Fork(fork) => self.fork(now, id, key, fork, out),
            Verb::GoCold { birth, reason, force } => self.go_cold(now, id, key, birth, reason, force, out),
            Verb::Condemn { birth, damaged } => self.condemn(now, id, key, birth, damaged, out),
            Verb::Cede(_) => Err(Refusal::Conflict("no other node has a replica of its shard".to_owned())),
            Verb::Demote => Err(Refusal::Conflict("no other node can hold its bytes".to_owned())),
            Verb::Place { birth, met, holders, brought } => {
                self.place(id, key, (birth, met), &holders, brought, out)
            }
            Verb::Delete => self.delete(now, Some(id), key, End::Deleted, out).map(|()| None),
            Verb::Abandon => self.delete(now, Some(id), key, End::Abandoned, out).map(|()| None),
        }
    }

    /// The session, or which kind of absence it is.
    pub(super) fn live(&self, key: &SessionKey) -> Result<&Entry, Refusal> {
        match self.sessions.get(key) {
            Some(entry) if entry.manifest.is_some() => Ok(entry),
            _ => Err(self.absence(key)),
        }
    }

    pub(super) fn entry(&mut self, key: &SessionKey) -> Result<&mut Entry, Refusal> {
        if self.sessions.contains_key(key) {
            return self.sessions.get_mut(key).ok_or(Refusal::UnknownSession);
        }
        Err(self.absence(key))
    }

    fn absence(&self, key: &SessionKey) -> Refusal {
        match self.tombstones.get(key) {
            Some(grave) if grave.expired => Refusal::Expired { birth: grave.birth },
            Some(grave) => Refusal::Deleted { birth: grave.birth },
            None => Refusal::UnknownSession,
        }
    }

    pub(super) fn set_timer(&mut self, at: Timestamp, timer: Timer) {
        if at < Timestamp::NEVER {
            self.timers.insert((at, timer));
        }
    }

    /// Notes a use: protection and TTL count from now.
    pub(super) fn touch(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        if let Some(entry) = self.sessions.get_mut(key) {
            entry.last_used = now;
        }
        self.reside(now, key, out);
    }

    /// Tells the pinned tier what the session is to it now.
    pub(crate) fn reside(&self, now: Timestamp, key: &SessionKey, out: &mut Vec<Command>) {
        let Some(entry) = self.sessions.get(key) else { return };
        let Some(manifest) = &entry.manifest else { return };
        out.push(Command::Reside(Residence {
            key: key.clone(),
            birth: manifest.birth,
            bytes: self.held_bytes(manifest) + entry.staged_bytes(),
            stored: manifest.stored_bytes() + entry.staged_bytes(),
            protected_until: manifest.protect.until(entry.last_used),
            expires_at: manifest.expires_at(entry.last_used),
            leased: entry.lease(now).is_some(),
            last_used_at: entry.last_used,
        }));
    }

    /// Checks the state against itself.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn validate(&self) {
        for (_, timer) in &self.timers {
            if let Timer::Tombstone(key) = timer {
                assert!(self.tombstones.contains_key(key), "{key}: a timer outlives its tombstone");
            }
        }
        for (key, entry) in &self.sessions {
            assert_eq!(
                self.settings.count.shard_of(key.id),
                self.settings.shard,
                "{key} is in the wrong shard"
            );
            if let Some(manifest) = &entry.manifest {
                super::change::validate_manifest(manifest);
                assert!(!self.tombstones.contains_key(key), "{key} is both alive and ended");
            } else {
                assert!(entry.is_pending(), "{key} has neither manifest nor a commit under way");
            }
            if let Some(work) = &entry.work {
                assert!(work.queue.len() <= WRITES_QUEUED_MAX, "{key} queues too much");
                assert!(work.stages.len() <= TXNS_MAX, "{key} stages too much");
                assert!(work.queue.is_empty() || entry.busy(), "{key} queues behind nothing");
                if let Some(pending) = &work.pending {
                    let in_flight = self.tickets.get(&pending.ticket) == Some(key);
                    assert!(
                        in_flight || pending.in_doubt.is_some(),
                        "{key} waits for a ticket that nobody has"
                    );
                }
            }
        }
    }
}

/// Whether a verb must wait for a change of its session that is on its way.
const fn waits(verb: &Verb) -> bool {
    match verb {
        Verb::Create(_)
        | Verb::Write(_)
        | Verb::Commit(_)
        | Verb::Turn(_)
        | Verb::Activate { .. }
        | Verb::Truncate { .. }
        | Verb::Fork(_)
        | Verb::GoCold { .. }
        | Verb::Condemn { .. }
        | Verb::Place { .. }
        | Verb::Abort(_)
        | Verb::Delete
        | Verb::Abandon => true,
        Verb::Get
        | Verb::List(_)
        | Verb::PlanWrite(_)
        | Verb::Read { .. }
        | Verb::ReadAll
        | Verb::Renew { .. }
        | Verb::Release { .. }
        | Verb::SetHome(_)
        | Verb::Demote
        | Verb::Cede(_)
        | Verb::Touch => false,
    }
}

pub(super) fn session(view: super::view::SessionView, new: bool, clipped: bool) -> Answer {
    Answer::Session { view: Box::new(view), new, clipped }
}

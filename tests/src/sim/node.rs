//! The shell of a simulated node: it carries the core's commands out on a simulated memory and disk.
//!
//! It does what the shard and pinned actors of keepwarm-node do, with the same core underneath.

use std::collections::{BTreeMap, HashMap};

use keepwarm_core::registry::Member;
use keepwarm_core::residency::{
    NeedId, Residency, ResidencyCommand, ResidencyEvent, ResidencySettings, Resident,
};
use keepwarm_core::session::{Manifest, State};
use keepwarm_core::shard::{
    Answer, Command, Event, Record, Refusal, Request, RequestId, Residence, Shard, ShardSettings, Verb,
};
use keepwarm_types::{
    Birth, Bytes, ColdReason, Generation, Incarnation, InstanceId, SessionKey, ShardCount, ShardId,
    TenantName, Timestamp,
};

use super::bug::Bug;
use super::disk::Disk;
use super::memory::Memory;

/// Bytes that a block counts as, to the residency.
pub const BLOCK: u64 = 8;
/// Blocks of the pinned arena: fewer than the sessions want.
pub const ARENA_BLOCKS: usize = 40;
/// Longest wait for room.
const ROOM_DEADLINE_MS: u64 = 500;

/// Who asked for something.
#[derive(Debug)]
enum Asker {
    Client(u64),
    Evictor(SessionKey),
}

/// What the world must do for a node.
#[derive(Debug)]
pub enum Effect {
    /// Records wait to be written.
    Sync,
    /// A client's call is answered; what a read pinned comes along.
    Answer(u64, Result<Box<Answer>, Refusal>, Vec<InstanceId>),
    /// Room was granted, or refused.
    Room(u64, bool),
    /// The residency wants a session to go.
    Evict(SessionKey, Birth),
}

/// One node.
#[derive(Debug)]
pub struct Node {
    pub shard: Shard,
    residency: Residency,
    pub memory: Memory,
    asked: BTreeMap<RequestId, Asker>,
    /// Instances that came with a write and that its sender still holds.
    brought: BTreeMap<RequestId, Vec<InstanceId>>,
    next: u64,
    bug: Option<Bug>,
    /// Evictions that the catalog was asked to take: which session, and when.
    pub evicted: Vec<(Manifest, Timestamp)>,
}

fn settings(incarnation: u64) -> ShardSettings {
    ShardSettings {
        shard: ShardId(0),
        count: ShardCount::new(1).unwrap(),
        member: Member { node: "n1".parse().unwrap(), incarnation: Incarnation(incarnation) },
        generation: Generation(incarnation),
        begun: 0,
    }
}

/// What the answer lets its receiver read.
fn readable(answer: &Answer) -> Vec<InstanceId> {
    match answer {
        Answer::Read(grant) => grant.manifest.instances().map(|block| block.instance).collect(),
        Answer::Lease(grant) => grant.manifest.instances().map(|block| block.instance).collect(),
        Answer::Plan(plan) => plan.tail.iter().map(|block| block.instance).collect(),
        _ => Vec::new(),
    }
}

impl Node {
    /// A node on what its disk has.
    pub fn start(incarnation: u64, now: Timestamp, disk: &Disk, bug: Option<Bug>) -> Self {
        let manifests = disk.store.manifests.values().cloned();
        let tombstones = disk.store.tombstones.iter().map(|(key, grave)| (key.clone(), *grave));
        let residency = ResidencySettings {
            capacity: Bytes(ARENA_BLOCKS as u64 * BLOCK),
            low: 0.7,
            high: 0.9,
            inclusive: false,
            movable: false,
            shares: HashMap::new(),
        };
        Self {
            shard: Shard::recover(settings(incarnation), now, manifests, tombstones),
            residency: Residency::new(residency),
            memory: Memory::new(ARENA_BLOCKS, incarnation << 32),
            asked: BTreeMap::new(),
            brought: BTreeMap::new(),
            next: 0,
            bug,
            evicted: Vec::new(),
        }
    }

    /// A client's request; a write brings blocks, which stay its sender's until it is answered.
    pub fn ask(
        &mut self,
        now: Timestamp,
        disk: &mut Disk,
        call: u64,
        key: SessionKey,
        verb: Verb,
        brought: Vec<InstanceId>,
    ) -> Vec<Effect> {
        let id = self.request(Asker::Client(call));
        if !brought.is_empty() {
            self.brought.insert(id, brought);
        }
        self.on(now, disk, Event::Request(Request { id, key, verb }))
    }

    fn request(&mut self, asker: Asker) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        self.asked.insert(id, asker);
        id
    }

    /// Carries out a proposed eviction.
    pub fn evict(&mut self, now: Timestamp, disk: &mut Disk, key: SessionKey, birth: Birth) -> Vec<Effect> {
        let id = self.request(Asker::Evictor(key.clone()));
        let force = self.bug == Some(Bug::ProtectionIgnored);
        let verb = Verb::GoCold { birth, reason: ColdReason::Evicted, force };
        self.on(now, disk, Event::Request(Request { id, key, verb }))
    }

    /// Asks the residency for room.
    pub fn need(&mut self, now: Timestamp, tenant: &TenantName, call: u64, blocks: usize) -> Vec<Effect> {
        let mut out = Vec::new();
        let bytes = Bytes(blocks as u64 * BLOCK);
        let deadline = now + keepwarm_types::Millis(ROOM_DEADLINE_MS);
        let need = ResidencyEvent::Need { need: NeedId(call), tenant: tenant.clone(), bytes, deadline };
        self.reside(now, need, &mut out);
        out
    }

    /// The time of leases, protections and waits for room passes.
    pub fn tick(&mut self, now: Timestamp, disk: &mut Disk) -> Vec<Effect> {
        let mut out = self.on(now, disk, Event::Tick);
        let used = Bytes(self.memory.used() as u64 * BLOCK);
        self.reside(now, ResidencyEvent::Used(used), &mut out);
        self.reside(now, ResidencyEvent::Tick, &mut out);
        out
    }

    /// Feeds the core one event and carries its commands out, in their order.
    pub fn on(&mut self, now: Timestamp, disk: &mut Disk, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        for command in self.shard.on(now, event) {
            match command {
                Command::Persist(ticket, records) => {
                    self.note(now, &records);
                    if self.bug == Some(Bug::FreedBeforeCommit) {
                        self.free_early(&records);
                    }
                    disk.submit(ticket, records);
                    out.push(Effect::Sync);
                }
                Command::Adopt(_, instances) => {
                    instances.into_iter().for_each(|instance| self.memory.name(instance))
                }
                Command::Retain(instances) => {
                    if self.bug != Some(Bug::ForkSharesWithoutCounting) {
                        instances.into_iter().for_each(|instance| self.memory.name(instance));
                    }
                }
                Command::Release(instances) => {
                    if self.bug != Some(Bug::NothingIsGivenBack) {
                        instances.into_iter().for_each(|instance| self.memory.unname(instance));
                    }
                }
                Command::Reside(residence) => {
                    let event = resident(residence, self.bug);
                    self.reside(now, event, &mut out);
                }
                Command::Invalidate(..) | Command::Ended(_) => {}
                Command::Again(request) => panic!("the only node lacks bytes for {request:?}"),
                Command::Reply(id, reply) => self.reply(now, id, reply, &mut out),
            }
        }
        self.shard.validate();
        self.residency.validate();
        let used = Bytes(self.memory.used() as u64 * BLOCK);
        self.reside(now, ResidencyEvent::Used(used), &mut out);
        out
    }

    fn note(&mut self, now: Timestamp, records: &[Record]) {
        for record in records {
            if let Record::Manifest(manifest, _) = record
                && manifest.state == State::Cold(ColdReason::Evicted)
                && self.manifest(&manifest.key).is_some_and(|old| old.state == State::Warm)
            {
                self.evicted.push((Manifest::clone(manifest), now));
            }
        }
    }

    fn free_early(&mut self, records: &[Record]) {
        let Some(Record::Manifest(next, _)) = records.first() else { return };
        let Some(old) = self.manifest(&next.key) else { return };
        let kept: Vec<_> = next.instances().map(|block| block.instance).collect();
        for block in old.instances().filter(|block| !kept.contains(&block.instance)) {
            self.memory.unname(block.instance);
        }
    }

    /// The committed manifest, as a request would see it.
    fn manifest(&mut self, key: &SessionKey) -> Option<Manifest> {
        let id = RequestId(0);
        let verb = Verb::Get;
        let commands =
            self.shard.on(Timestamp::default(), Event::Request(Request { id, key: key.clone(), verb }));
        commands.into_iter().find_map(|command| match command {
            Command::Reply(_, Ok(answer)) => match *answer {
                Answer::Session { view, .. } => Some(Manifest::clone(&view.manifest)),
                _ => None,
            },
            _ => None,
        })
    }

    fn reply(
        &mut self,
        now: Timestamp,
        id: RequestId,
        reply: Result<Box<Answer>, Refusal>,
        out: &mut Vec<Effect>,
    ) {
        match self.asked.remove(&id) {
            Some(Asker::Client(call)) => {
                for instance in self.brought.remove(&id).unwrap_or_default() {
                    self.memory.unpin(instance);
                }
                let pins = reply.as_ref().map(|answer| readable(answer)).unwrap_or_default();
                if self.bug != Some(Bug::ReaderDoesNotPin) {
                    pins.iter().for_each(|instance| self.memory.pin(*instance));
                }
                out.push(Effect::Answer(call, reply, pins));
            }
            Some(Asker::Evictor(key)) => {
                let event =
                    if reply.is_ok() { ResidencyEvent::Gone(key) } else { ResidencyEvent::Refused(key) };
                self.reside(now, event, out);
            }
            None => {}
        }
    }

    /// A reader is done.
    pub fn unpin(&mut self, pins: &[InstanceId]) {
        if self.bug != Some(Bug::ReaderDoesNotPin) {
            pins.iter().for_each(|instance| self.memory.unpin(*instance));
        }
    }

    fn reside(&mut self, now: Timestamp, event: ResidencyEvent, out: &mut Vec<Effect>) {
        for command in self.residency.on(now, event) {
            match command {
                ResidencyCommand::Evict { key, birth, .. } => out.push(Effect::Evict(key, birth)),
                ResidencyCommand::Grant(need) => out.push(Effect::Room(need.0, true)),
                ResidencyCommand::Deny { need, .. } => out.push(Effect::Room(need.0, false)),
            }
        }
    }
}

fn resident(residence: Residence, bug: Option<Bug>) -> ResidencyEvent {
    let ignored = bug == Some(Bug::ProtectionIgnored);
    if residence.bytes == Bytes::ZERO {
        return ResidencyEvent::Gone(residence.key);
    }
    let resident = Resident {
        birth: residence.birth,
        bytes: residence.bytes,
        dirty: false,
        leased: residence.leased,
        protected_until: if ignored { Timestamp::default() } else { residence.protected_until },
        expires_at: residence.expires_at,
    };
    ResidencyEvent::Put { key: residence.key, resident, used: true }
}

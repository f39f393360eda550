//! Messages and bytes between nodes: lost, late, doubled, out of order, cut off.

use keepwarm_core::registry::Member;
use keepwarm_core::replica::{CopyFailed, Envelope, ReplicaEvent};
use keepwarm_types::{InstanceId, SessionId, TenantName};
use keepwarm_wire::envelope::{decode, encode};
use keepwarm_wire::{LayoutCache, VERSION_OLDEST, Version};

use super::bug::Bug;
use super::world::{Happening, Local, Pins, Transfer, World};
use crate::sim::memory::{Stamp, checksum};

/// One message in so many is encoded and read again.
const CODED: u64 = 16;
/// How long a sender waits before it takes its peer for unreachable.
const UNREACHABLE_MS: u64 = 150;

type Bytes = Vec<(InstanceId, Vec<Stamp>, (TenantName, SessionId))>;

impl World {
    /// The node that a member is a process of.
    #[must_use]
    pub fn place(&self, member: &Member) -> usize {
        self.nodes.iter().position(|node| node.name == member.node).expect("nodes are never taken away")
    }

    /// The node whose process is this member now, and not paused.
    fn awake(&self, member: &Member) -> Option<usize> {
        let at = self.place(member);
        let process = self.nodes[at].process.as_ref()?;
        (process.member.as_ref() == Some(member) && !process.paused).then_some(at)
    }

    /// The version that two nodes' processes speak; none where one of them does not run.
    fn version(&self, one: usize, other: usize) -> Option<Version> {
        let versions = |at: usize| self.nodes[at].process.as_ref().map(|process| process.versions);
        versions(one)?.common(versions(other)?).ok()
    }

    /// Now and then a message goes as the bytes that a link carries.
    fn as_bytes(&mut self, at: usize, to: usize, envelope: &Envelope) {
        let Some(version) = self.version(at, to).filter(|_| envelope.sent.is_multiple_of(CODED)) else {
            return;
        };
        let read = encode(envelope, version)
            .map_err(|error| error.to_string())
            .and_then(|frame| decode(&frame, &LayoutCache::new()).map_err(|error| error.to_string()));
        let why = match read {
            Ok(read) if read == *envelope => return,
            Ok(read) => format!("{envelope:?} was read as {read:?}"),
            Err(error) => format!("{envelope:?}: {error}"),
        };
        self.check(Err(why));
    }

    pub fn send(&mut self, at: usize, envelope: Envelope) {
        let Some(envelope) = self.misled(at, envelope) else { return };
        let to = self.place(&envelope.to);
        self.as_bytes(at, to, &envelope);
        if self.is_cut(at, to) || self.chance(self.shape.loss) {
            return;
        }
        let times = 1 + u64::from(self.chance(self.shape.doubled));
        for _ in 0..times {
            let wait = if self.chance(30) { self.below(400) } else { 1 + self.below(8) };
            let Some(life) = self.nodes[to].process.as_ref().map(|process| process.life) else { return };
            let what = Local::Message(envelope.clone());
            self.after(wait, Happening::At { node: to, life, what });
        }
    }

    /// A message reaches a process.
    pub fn receive(&mut self, at: usize, envelope: Envelope) {
        let from = self.place(&envelope.from);
        if self.is_cut(from, at) {
            return;
        }
        let Some(envelope) = self.mistaken(at, envelope) else { return };
        let shard = envelope.shard;
        let forged = self.freed_early(&envelope);
        self.on(at, shard, ReplicaEvent::Peer(envelope));
        if let Some(forged) = forged {
            self.on(at, shard, ReplicaEvent::Peer(forged));
        }
    }

    /// Bytes begin their way; those that are sent are pinned until they are there.
    pub fn transfer(&mut self, at: usize, mut transfer: Transfer) {
        if !transfer.fetched {
            let Some(process) = &mut self.nodes[at].process else { return };
            let memory = &mut process.memory;
            let absent = transfer.blocks.iter().filter(|block| !memory.pin(block.instance)).count();
            transfer.pinned = true;
            if absent > 0 {
                let key = &transfer.key;
                let why = format!("n{}: {absent} blocks of {key} are to be sent and are not there", at + 1);
                self.check(Err(why));
            }
        }
        let wait = if self.chance(50) { self.below(600) } else { 2 + self.below(20) };
        self.after(wait, Happening::Transfer(Box::new(transfer)));
    }

    /// Bytes are there, or are not.
    pub fn transferred(&mut self, transfer: Transfer) {
        let (source, target) = (self.awake(&transfer.source), self.awake(&transfer.target));
        let asker = if transfer.fetched { &transfer.target } else { &transfer.source };
        let asker = self.place(asker);
        let result = match (source, target) {
            (Some(source), Some(target)) if !self.is_cut(source, target) && !self.is_cut(target, source) => {
                if !transfer.fetched && self.chance(10) {
                    self.find_damage(source, &transfer)
                } else {
                    self.arrive(source, target, &transfer)
                }
            }
            _ => Err(CopyFailed::Unreachable),
        };
        let (from, to) = (&transfer.source, &transfer.target);
        let line = format!("  bytes of {} {} -> {}: {result:?}", transfer.key, from.node, to.node);
        self.say(|| line);
        if transfer.pinned {
            let at = self.place(&transfer.source);
            let member = self.nodes[at].member() == Some(&transfer.source);
            let life = self.nodes[at].process.as_ref().map_or(0, |process| process.life);
            if member {
                let instances = transfer.blocks.iter().map(|block| block.instance).collect();
                self.unpin(&Pins { at, life, instances });
            }
        }
        // The news that a copy arrived may get lost on its way back.
        let lost = !transfer.fetched && result.is_ok() && self.chance(self.shape.loss);
        let result = if lost { Err(CopyFailed::Unreachable) } else { result };
        let there = self.nodes[asker].process.as_ref().filter(|process| {
            let asker = if transfer.fetched { &transfer.target } else { &transfer.source };
            process.member.as_ref() == Some(asker)
        });
        let Some(life) = there.map(|process| process.life) else { return };
        let what = Local::Copied(transfer.shard, transfer.id, result);
        let wait = match result {
            Err(CopyFailed::Unreachable) => UNREACHABLE_MS,
            // What was fetched belongs to the replica as soon as it is there.
            _ if transfer.fetched => return self.at_once(asker, what),
            _ => self.below(6),
        };
        self.after(wait, Happening::At { node: asker, life, what });
    }

    /// The bytes turn out to be damaged where they are sent from.
    fn find_damage(&mut self, source: usize, transfer: &Transfer) -> Result<(), CopyFailed> {
        let key = &transfer.key;
        let manifest = self.replica(source, transfer.shard).and_then(|replica| replica.manifest(key));
        if let Some(birth) = manifest.map(|manifest| manifest.birth) {
            self.promises.damaged.insert((key.clone(), birth, transfer.source.clone()));
        }
        Err(CopyFailed::Damaged)
    }

    fn at_once(&mut self, at: usize, what: Local) {
        self.local(at, what);
    }

    fn arrive(&mut self, source: usize, target: usize, transfer: &Transfer) -> Result<(), CopyFailed> {
        // The version before has no word for it.
        let known = self.version(source, target).is_some_and(|version| version.number() > VERSION_OLDEST);
        if transfer.spare && !transfer.fetched && !known {
            return Err(CopyFailed::NoRoom);
        }
        let bytes = self.read_out(source, target, transfer)?;
        let full = transfer.spare && self.chance(200);
        let Some(process) = &mut self.nodes[target].process else { return Err(CopyFailed::Unreachable) };
        if full || !process.memory.has_room(bytes.len()) {
            return Err(CopyFailed::NoRoom);
        }
        let instances: Vec<_> = bytes.iter().map(|(instance, ..)| *instance).collect();
        for (instance, content, of) in bytes {
            process.memory.arrive(instance, content, of);
        }
        if !transfer.fetched {
            self.on(target, transfer.shard, ReplicaEvent::Arrived(transfer.key.clone(), instances));
        }
        Ok(())
    }

    /// The blocks as the source has them, verified.
    fn read_out(&mut self, source: usize, target: usize, transfer: &Transfer) -> Result<Bytes, CopyFailed> {
        let reused = self.bug(Bug::ReusedUnderTransfer) && self.chance(100);
        let dropped = self.bug(Bug::TenantDropped);
        let Some(process) = &self.nodes[source].process else { return Err(CopyFailed::Unreachable) };
        let mut bytes = Vec::new();
        for block in &transfer.blocks {
            let slot = process.memory.get(block.instance);
            let Some(slot) = slot else { return Err(CopyFailed::Gone) };
            let mut content = slot.content.clone();
            if reused && let Some(receiver) = &self.nodes[target].process {
                // Whoever got the same memory writes into it at the same time.
                let other =
                    receiver.memory.slots().map(|(_, slot)| &slot.content).find(|other| **other != content);
                content = other.cloned().unwrap_or(content);
            }
            let of = (transfer.key.tenant.clone(), transfer.key.id);
            if dropped && let Some(receiver) = &self.nodes[target].process {
                let same = receiver.memory.slots().map(|(_, slot)| slot).find(|slot| {
                    slot.of.1 == of.1 && slot.of.0 != of.0 && slot.content.len() == content.len()
                });
                content = same.map_or(content, |slot| slot.content.clone());
            }
            if !reused && !dropped && checksum(&content) != block.checksum {
                return Err(CopyFailed::Gone);
            }
            bytes.push((block.instance, content, of));
        }
        Ok(bytes)
    }
}

//! A node: its disk, its clock, and the process that runs on it for now.

use std::collections::BTreeMap;

use keepwarm_core::registry::Member;
use keepwarm_core::replica::{Replica, ReplicaSettings};
use keepwarm_core::shard::{Answer, Refusal, RequestId};
use keepwarm_types::{Incarnation, InstanceId, Millis, NodeName, SessionKey, ShardCount, ShardId, Timestamp};
use keepwarm_wire::Versions;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::disk::Disk;
use super::memory::Memory;
use super::world::{BEGIN, Local, Shape};

/// A clock that goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub ahead: u64,
    /// Of a thousand.
    pub rate: u64,
}

impl Clock {
    /// What it shows.
    #[must_use]
    pub const fn shows(self, now: Timestamp) -> Timestamp {
        Timestamp(BEGIN.0 + (now.0 - BEGIN.0) * self.rate / 1000 + self.ahead)
    }

    /// How long until it shows that.
    #[must_use]
    pub const fn until(self, now: Timestamp, shown: Timestamp) -> u64 {
        (shown.since(self.shows(now)).0).saturating_mul(1000) / self.rate + 1
    }
}

/// Who asked for something, and what came along.
#[derive(Debug)]
pub struct Asked {
    pub call: u64,
    pub key: SessionKey,
    pub brought: Vec<InstanceId>,
}

/// An answer that is ready, and what it pins.
pub type Held = (Result<Box<Answer>, Refusal>, Vec<InstanceId>);

/// What ends with a crash.
#[derive(Debug)]
pub struct Process {
    /// What it speaks with its peers.
    pub versions: Versions,
    pub life: u64,
    /// Once it is registered.
    pub member: Option<Member>,
    pub memory: Memory,
    pub replicas: BTreeMap<ShardId, Replica>,
    pub asked: BTreeMap<RequestId, Asked>,
    pub held: BTreeMap<RequestId, Held>,
    pub next: u64,
    /// When each replica's next tick comes.
    pub ticks: BTreeMap<ShardId, Timestamp>,
    pub paused: bool,
    pub backlog: Vec<Local>,
}

/// A place where processes run one after another.
#[derive(Debug)]
pub struct Node {
    pub name: NodeName,
    pub disk: Disk,
    /// An emptied disk is another.
    pub disk_id: u128,
    pub clock: Clock,
    pub process: Option<Process>,
    /// Goes on as this process, if a bug makes it.
    pub predecessor: Option<Member>,
}

impl Node {
    #[must_use]
    pub fn new(index: usize, rng: &mut ChaCha8Rng) -> Self {
        Self {
            name: format!("n{}", index + 1).parse().unwrap(),
            disk: Disk::default(),
            disk_id: index as u128 + 1,
            clock: Clock { ahead: rng.random_range(0..5_000), rate: rng.random_range(900..1100) },
            process: None,
            predecessor: None,
        }
    }

    /// The process, if it takes part.
    #[must_use]
    pub fn member(&self) -> Option<&Member> {
        self.process.as_ref()?.member.as_ref()
    }
}

impl Process {
    #[must_use]
    pub const fn new(life: u64, room: usize, versions: Versions) -> Self {
        Self {
            life,
            versions,
            member: None,
            memory: Memory::new(room, life),
            replicas: BTreeMap::new(),
            asked: BTreeMap::new(),
            held: BTreeMap::new(),
            next: 0,
            ticks: BTreeMap::new(),
            paused: false,
            backlog: Vec::new(),
        }
    }

    /// It is registered: its replicas begin on what its disk has.
    pub fn begin(&mut self, name: &NodeName, incarnation: Incarnation, disk: &Disk, shape: &Shape) {
        let member = Member { node: name.clone(), incarnation };
        let count = ShardCount::new(shape.shards.into()).unwrap();
        for shard in (0..shape.shards).map(ShardId) {
            let settings = ReplicaSettings {
                shard,
                count,
                member: member.clone(),
                begun: 0,
                replication: shape.replication,
                degraded: shape.degraded,
                cluster: true,
                write_deadline: Millis(5000),
            };
            let here = |key: &SessionKey| count.shard_of(key.id) == shard;
            let manifests = disk.store.manifests.values().filter(|manifest| here(&manifest.key)).cloned();
            let ended = disk.store.tombstones.iter().filter(|(key, _)| here(key));
            let tombstones = ended.map(|(key, grave)| (key.clone(), *grave));
            self.replicas.insert(shard, Replica::new(settings, manifests, tombstones));
        }
        self.member = Some(member);
    }
}

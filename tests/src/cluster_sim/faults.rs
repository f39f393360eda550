//! What goes wrong, when, and how it ends.

use keepwarm_core::registry::Entry;
use keepwarm_core::replica::ReplicaEvent;
use keepwarm_types::ShardId;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::bug::Bug;
use super::disk::Disk;
use super::world::{Happening, Local, World};

/// Virtual milliseconds in which things go wrong.
pub const FAULTS_MS: u64 = 5_000;
/// Before that the cluster forms.
const FORMING_MS: u64 = 300;
/// Sessions that a node whose memory is full proposes to let go.
const LEAVE_AT_ONCE: usize = 4;

/// One thing that goes wrong; most of them end.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Memory is lost; the node starts again after so long, perhaps on an empty disk.
    Crash {
        node: usize,
        down: u64,
        emptied: bool,
    },
    /// Nothing happens in the process; then all that waited does.
    Pause {
        node: usize,
        lasts: u64,
    },
    /// One way.
    Cut {
        pairs: Vec<(usize, usize)>,
        lasts: u64,
    },
    /// The registry answers nobody.
    Stall {
        lasts: u64,
    },
    /// A node hears nothing of the registry, nor it of the node.
    Astray {
        node: usize,
        lasts: u64,
    },
    DiskFull {
        node: usize,
        lasts: u64,
    },
    DiskBreaks {
        node: usize,
    },
    /// A node's memory takes nothing more; it asks that sessions leave.
    Full {
        node: usize,
        lasts: u64,
    },
    /// Two take a healthy node for failed.
    Accuse {
        node: usize,
    },
    Drain {
        node: usize,
        lasts: u64,
    },
    ClockJumps {
        node: usize,
        by: u64,
    },
    /// A primary and its first secondary hear nothing of the others and of the registry.
    OldPair {
        lasts: u64,
    },
    /// The primary crashes, whoever it is by then: its changes that are on their way are orphans.
    Orphan {
        down: u64,
    },
    /// All at once.
    CrashAll,
}

impl World {
    pub fn plan_faults(&mut self, rng: &mut ChaCha8Rng) {
        let nodes = self.shape.nodes;
        let drained = rng.random_range(0..4) == 0;
        if drained {
            let lasts = rng.random_range(1_000..3_000);
            let at = rng.random_range(FORMING_MS..FAULTS_MS - lasts);
            self.after(at, Happening::Fault(Fault::Drain { node: rng.random_range(0..nodes), lasts }));
        }
        if self.shape.rolling {
            for node in 0..nodes {
                let at = FORMING_MS + (FAULTS_MS - FORMING_MS) / (nodes as u64 + 1) * (node as u64 + 1);
                let down = rng.random_range(20..200);
                self.after(at, Happening::Fault(Fault::Crash { node, down, emptied: false }));
            }
        }
        if self.bug(Bug::ConfirmedByOne) {
            for at in [400, 2_700] {
                self.after(at, Happening::Fault(Fault::OldPair { lasts: 2_000 }));
            }
        }
        if self.bug(Bug::NotReconciled) {
            // What is on its way then is with some and not with others; near the end little is written over it.
            for at in [1_000, 2_000, FAULTS_MS - 100, FAULTS_MS - 50] {
                self.after(at, Happening::Fault(Fault::Orphan { down: 100 }));
            }
        }
        if rng.random_range(0..6) == 0 || self.bug(Bug::LeftWithCopies) {
            // Members leave, and another holder fails meanwhile or just after.
            for at in [800, 2_000, 3_200] {
                self.after(
                    at,
                    Happening::Fault(Fault::Drain { node: rng.random_range(0..nodes), lasts: 900 }),
                );
                let then = at + rng.random_range(150..500);
                self.after(then, Happening::Fault(Fault::Orphan { down: 50 }));
            }
        }
        for _ in 0..rng.random_range(2..8) {
            let at = rng.random_range(FORMING_MS..FAULTS_MS - 200);
            let node = rng.random_range(0..nodes);
            let lasts = if rng.random_range(0..2) == 0 {
                rng.random_range(20..300)
            } else {
                rng.random_range(300..2_500)
            };
            let fault = match rng.random_range(0..25) {
                0..6 => {
                    let down = if rng.random_range(0..2) == 0 { rng.random_range(5..200) } else { lasts };
                    Fault::Crash { node, down, emptied: rng.random_range(0..12) == 0 }
                }
                6..9 => Fault::Pause { node, lasts },
                9..12 => {
                    let here: Vec<_> = (0..nodes).map(|_| rng.random_range(0..2) == 0).collect();
                    if rng.random_range(0..2) == 0 {
                        // The registry is with the others.
                        for node in (0..nodes).filter(|node| here[*node]) {
                            self.after(at, Happening::Fault(Fault::Astray { node, lasts: lasts + 100 }));
                        }
                    }
                    let all = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
                    Fault::Cut { pairs: all.filter(|(a, b)| here[*a] != here[*b]).collect(), lasts }
                }
                12..14 => Fault::Cut { pairs: vec![(node, (node + 1) % nodes)], lasts },
                14 => Fault::Stall { lasts },
                15 | 16 => Fault::Astray { node, lasts },
                17 => Fault::DiskFull { node, lasts },
                18 => Fault::DiskBreaks { node },
                19 => Fault::Full { node, lasts },
                20..22 => Fault::Accuse { node },
                22 => Fault::ClockJumps { node, by: lasts * 4 },
                23 => Fault::CrashAll,
                _ => {
                    // Cut off with the registry behind it: an old primary goes on.
                    self.after(at, Happening::Fault(Fault::Astray { node, lasts: lasts + 300 }));
                    Fault::Accuse { node }
                }
            };
            self.after(at, Happening::Fault(fault));
        }
        self.after(FAULTS_MS, Happening::Heal);
    }

    /// A primary and its first secondary stay together, without the others and the registry.
    fn split_old_pair(&mut self, lasts: u64) {
        let Some(set) = self.registry.set(ShardId(0)) else { return };
        let pair: Vec<_> = set.replicas.iter().take(2).map(|member| self.place(member)).collect();
        let nodes = self.nodes.len();
        let all = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        let pairs = all.filter(|(a, b)| pair.contains(a) != pair.contains(b)).collect();
        self.fault(Fault::Cut { pairs, lasts });
        for node in pair {
            self.fault(Fault::Astray { node, lasts });
        }
    }

    pub fn fault(&mut self, fault: Fault) {
        if self.healed {
            return;
        }
        self.say(|| format!("{fault:?}"));
        let lasts = match &fault {
            Fault::Crash { node, down, emptied } => {
                if self.nodes[*node].process.is_none() {
                    return;
                }
                self.crash(*node);
                if *emptied {
                    self.lives += 1;
                    (self.nodes[*node].disk, self.nodes[*node].disk_id) =
                        (Disk::default(), 1000 + u128::from(self.lives));
                }
                return self.after(*down, Happening::Restart(*node));
            }
            Fault::OldPair { lasts } => return self.split_old_pair(*lasts),
            Fault::Orphan { down } => {
                let Some(primary) = self.registry.primary(ShardId(0)) else { return };
                let node = self.place(&primary);
                return self.fault(Fault::Crash { node, down: *down, emptied: false });
            }
            Fault::CrashAll => {
                for node in 0..self.nodes.len() {
                    self.crash(node);
                    let down = 5 + self.below(300);
                    self.after(down, Happening::Restart(node));
                }
                return;
            }
            Fault::Pause { node, lasts } => {
                match &mut self.nodes[*node].process {
                    Some(process) => process.paused = true,
                    None => return,
                }
                *lasts
            }
            Fault::Cut { pairs, lasts } => {
                pairs.iter().for_each(|pair| *self.cut.entry(*pair).or_default() += 1);
                *lasts
            }
            Fault::Stall { lasts } => {
                self.stalled = true;
                *lasts
            }
            Fault::Astray { node, lasts } => {
                self.astray.insert(*node);
                *lasts
            }
            Fault::DiskFull { node, lasts } => {
                self.nodes[*node].disk.full = true;
                *lasts
            }
            Fault::DiskBreaks { node } => return self.nodes[*node].disk.breaks = true,
            Fault::Full { node, lasts } => {
                self.fill(*node);
                *lasts
            }
            Fault::Accuse { node } => {
                let others = self.nodes.iter().map(|other| other.name.clone());
                let observers = others.filter(|name| *name != self.nodes[*node].name).collect();
                return self.accuse(*node, observers);
            }
            Fault::Drain { node, lasts } => {
                let entry = Entry::Drain { node: self.nodes[*node].name.clone(), draining: true };
                self.propose(entry, None);
                *lasts
            }
            Fault::ClockJumps { node, by } => return self.nodes[*node].clock.ahead += *by,
        };
        self.after(lasts, Happening::Mend(fault));
    }

    pub fn mend(&mut self, fault: Fault) {
        if self.healed {
            return;
        }
        self.say(|| format!("ends: {fault:?}"));
        match fault {
            Fault::Pause { node, .. } => self.resume(node),
            Fault::Cut { pairs, .. } => {
                for (from, to) in pairs {
                    let times = self.cut.entry((from, to)).or_default();
                    *times = times.saturating_sub(1);
                    if *times == 0 {
                        self.linked(from, to);
                        self.linked(to, from);
                    }
                }
            }
            Fault::Stall { .. } => self.stalled = false,
            Fault::Astray { node, .. } => drop(self.astray.remove(&node)),
            Fault::DiskFull { node, .. } => self.nodes[node].disk.full = false,
            Fault::Full { node, .. } => self.make_room(node),
            Fault::Drain { node, .. } => {
                let entry = Entry::Drain { node: self.nodes[node].name.clone(), draining: false };
                self.after(1, Happening::Apply(entry, None));
            }
            Fault::Crash { .. }
            | Fault::DiskBreaks { .. }
            | Fault::Accuse { .. }
            | Fault::ClockJumps { .. }
            | Fault::OldPair { .. }
            | Fault::Orphan { .. }
            | Fault::CrashAll => {}
        }
    }

    /// From now on nothing goes wrong, and what went wrong is over.
    pub fn heal(&mut self) {
        self.say(|| "nothing goes wrong any more".to_owned());
        self.healed = true;
        self.stalled = false;
        self.astray.clear();
        self.cut.clear();
        (self.shape.loss, self.shape.doubled) = (0, 0);
        for node in 0..self.nodes.len() {
            self.nodes[node].disk.full = false;
            self.nodes[node].disk.breaks = false;
            self.make_room(node);
            self.resume(node);
            self.after(30, Happening::Restart(node));
            let entry = Entry::Drain { node: self.nodes[node].name.clone(), draining: false };
            self.after(1, Happening::Apply(entry, None));
            for other in 0..self.nodes.len() {
                self.linked(node, other);
            }
        }
    }

    fn linked(&mut self, node: usize, other: usize) {
        let Some(member) = self.nodes[other].member().cloned() else { return };
        let Some(life) = self.nodes[node].process.as_ref().map(|process| process.life) else { return };
        for shard in (0..self.shape.shards).map(ShardId) {
            let wait = 5 + self.below(50);
            let what = Local::Event(shard, ReplicaEvent::Linked(member.clone()));
            self.after(wait, Happening::At { node, life, what });
        }
    }

    fn resume(&mut self, node: usize) {
        let Some(process) = &mut self.nodes[node].process else { return };
        process.paused = false;
        let life = process.life;
        for what in std::mem::take(&mut process.backlog) {
            self.after(0, Happening::At { node, life, what });
        }
    }

    pub fn crash(&mut self, node: usize) {
        let Some(process) = self.nodes[node].process.take() else { return };
        self.say(|| format!("n{} crashes", node + 1));
        let waiting = self.nodes[node].disk.waiting() as u64;
        let reached = self.below(waiting + 1) as usize;
        self.nodes[node].disk.crash(reached);
        for asked in process.asked.into_values() {
            self.lose(asked.call);
        }
        for what in process.backlog {
            if let Local::Request { call, .. } = what {
                self.lose(call);
            }
        }
        if let Some(member) = process.member {
            self.promises.gone(member.clone());
            if self.bug(Bug::OldIncarnationCounts) {
                self.nodes[node].predecessor = Some(member);
            }
        }
    }

    /// Memory is full: nothing more is taken, and some sessions are to move or to go.
    fn fill(&mut self, node: usize) {
        let Some(process) = &mut self.nodes[node].process else { return };
        process.memory.capacity = 0;
        let Some(member) = process.member.clone() else { return };
        let mut held = Vec::new();
        for replica in process.replicas.values() {
            for key in self.keys.all() {
                let manifest = replica.manifest(&key);
                let here = manifest.filter(|manifest| manifest.holders.contains(&member));
                held.extend(here.map(|manifest| (replica.id(), key.clone(), manifest.birth)));
            }
        }
        for _ in 0..LEAVE_AT_ONCE.min(held.len()) {
            let (shard, key, birth) = held.swap_remove(self.below(held.len() as u64) as usize);
            let now = self.now;
            self.promises.evicting(&key, birth, now);
            self.on(node, shard, ReplicaEvent::Evict(key, birth));
        }
    }

    fn make_room(&mut self, node: usize) {
        let room = self.shape.room;
        if let Some(process) = &mut self.nodes[node].process {
            process.memory.capacity = room;
        }
    }
}

//! The registry as a register that is slow, unavailable or seen late; and who watches the nodes for it.

use std::sync::Arc;

use keepwarm_core::registry::{Change, Entry, Member, NodeStatus, Registration, Response, leavers, plan};
use keepwarm_core::replica::{ReplicaEvent, Role};
use keepwarm_types::{Generation, Incarnation, Millis, ShardId, Timestamp};
use keepwarm_wire::{VERSION_OLDEST, Versions};
use uuid::Uuid;

use super::bug::Bug;
use super::node::Process;
use super::world::{Happening, Local, Proposer, World};

/// A node that was not heard for so long is accused.
const FAILED_AFTER: Millis = Millis(400);
const FOLLOW_MS: u64 = 60;
const DETECT_MS: u64 = 50;
const PLAN_MS: u64 = 90;
/// How long a process waits for its registration before it asks again.
const REGISTER_AGAIN_MS: u64 = 300;

/// The generation that a change of a shard's set is of.
const fn generation_of(entry: &Entry) -> Generation {
    match entry {
        Entry::Change { generation, .. } => *generation,
        _ => Generation(0),
    }
}

impl World {
    /// Gives an entry to the registry; it may get lost, and so may its answer.
    pub fn propose(&mut self, entry: Entry, proposer: Option<Proposer>) {
        let generation = generation_of(&entry);
        let cut = proposer.is_some_and(|proposer| self.astray.contains(&proposer.node));
        if self.stalled || cut || self.chance(self.shape.loss) {
            if let Some(proposer) = proposer {
                self.refused(proposer, generation, 300);
            }
            return;
        }
        let wait = if self.chance(30) { self.below(800) } else { 2 + self.below(15) };
        self.after(wait, Happening::Apply(entry, proposer));
    }

    /// Its proposer is told that it did not work, or that nobody knows.
    fn refused(&mut self, proposer: Proposer, generation: Generation, wait: u64) {
        let Proposer { node, life, shard: Some(shard) } = proposer else { return };
        let what = Local::Event(shard, ReplicaEvent::ProposalFailed(generation));
        self.after(wait, Happening::At { node, life, what });
    }

    /// The group has agreed upon an entry.
    pub fn apply(&mut self, entry: &Entry, proposer: Option<Proposer>) {
        let before: Vec<_> = self.registry.shards().map(|shard| self.registry.set(shard)).collect();
        let applied = self.registry.apply(entry);
        self.registry.validate();
        let line = format!("registry: {entry:?}: {:?}", applied.response);
        self.say(|| line.chars().take(200).collect());
        // Whoever leaves by a plan leaves no copy behind that is missed.
        let planned = matches!(
            entry,
            Entry::Change { change: Change::Remove { observers, .. }, .. } if observers.is_empty()
        );
        for shard in &applied.shards {
            let set = self.registry.set(*shard).expect("it has changed");
            for old in before[shard.0 as usize].iter().flat_map(|set| &set.replicas) {
                if !set.replicas.contains(old) && !planned {
                    self.promises.gone(old.clone());
                }
            }
            if set.lost_at.is_some() {
                let keys = self.keys;
                self.promises.shard_lost(|key| keys.shard(key) == *shard);
            }
            let names = set.replicas.iter().map(|member| format!("{}.{}", member.node, member.incarnation));
            let line = format!("{shard} is g{} of {:?}", set.generation, names.collect::<Vec<_>>());
            self.say(|| line);
        }
        if let Some(proposer) = proposer {
            let lost = self.chance(self.shape.loss);
            match applied.response {
                Response::Registered(incarnation) if !lost => {
                    let (node, life) = (proposer.node, proposer.life);
                    let wait = 1 + self.below(5);
                    let what = Local::Registered(incarnation);
                    self.after(wait, Happening::At { node, life, what });
                }
                Response::Refused(_) => self.refused(proposer, generation_of(entry), 5),
                _ if lost => self.refused(proposer, generation_of(entry), 300),
                Response::Done | Response::Registered(_) => {}
            }
        }
        for node in 0..self.nodes.len() {
            for shard in &applied.shards {
                self.watch(node, *shard);
            }
        }
    }

    /// A node hears of a shard's present set, some time.
    fn watch(&mut self, node: usize, shard: ShardId) {
        if self.astray.contains(&node) || self.chance(self.shape.loss) {
            return;
        }
        let Some(set) = self.registry.set(shard) else { return };
        let Some(life) = self.nodes[node].process.as_ref().map(|process| process.life) else { return };
        let wait = 1 + self.below(20);
        self.after(wait, Happening::At { node, life, what: Local::Watch(shard, Arc::new(set)) });
    }

    /// What a node missed comes sooner or later; a process that was given up by the others ends itself.
    pub fn follow(&mut self) {
        for node in 0..self.nodes.len() {
            if self.astray.contains(&node) {
                continue;
            }
            let Some(process) = &self.nodes[node].process else { continue };
            let Some(member) = process.member.clone() else { continue };
            let behind: Vec<_> = process
                .replicas
                .values()
                .filter(|replica| {
                    let set = self.registry.set(replica.id());
                    set.is_some_and(|set| set.generation > replica.set().generation)
                })
                .map(keepwarm_core::replica::Replica::id)
                .collect();
            let led = process.replicas.values().filter(|replica| {
                let set = self.registry.set(replica.id());
                set.is_some_and(|set| set.generation == replica.set().generation)
            });
            let leaving: Vec<_> = led
                .filter(|replica| replica.role() == Role::Primary)
                .map(|replica| {
                    let leaves = leavers(&self.registry, [replica.id()], &[]).pop().map(|(_, member)| member);
                    (replica.id(), ReplicaEvent::Leaves(replica.set().generation, leaves))
                })
                .collect();
            let paused = process.paused;
            let state = self.registry.node(&member.node).expect("it has registered");
            // Who was taken for failed but is the last copy of something stays, and may return.
            let down = state.status == NodeStatus::Down && !self.registry.holds(&member.node);
            let given_up = state.incarnation != member.incarnation || down;
            if given_up && !paused {
                self.say(|| format!("n{} finds itself given up", node + 1));
                self.crash(node);
                self.after(20, Happening::Restart(node));
                continue;
            }
            behind.into_iter().for_each(|shard| self.watch(node, shard));
            let life = self.nodes[node].process.as_ref().map_or(0, |process| process.life);
            for (shard, leaves) in leaving {
                let wait = 1 + self.below(20);
                self.after(wait, Happening::At { node, life, what: Local::Event(shard, leaves) });
            }
        }
        self.after(FOLLOW_MS, Happening::Follow);
    }

    /// Asks the registry whether a member is still primary in a generation.
    pub fn look(&mut self, node: usize, life: u64, shard: ShardId, generation: Generation, round: u64) {
        if self.stalled || self.astray.contains(&node) {
            return;
        }
        let Some(set) = self.registry.set(shard) else { return };
        if set.generation == generation && set.replicas.first() == self.nodes[node].member() {
            let what = Local::Event(shard, ReplicaEvent::RegistryConfirmed { round });
            let wait = 1 + self.below(10);
            self.after(wait, Happening::At { node, life, what });
        }
    }

    /// What the leader would do next.
    pub fn plan(&mut self) {
        if !self.stalled {
            for entry in plan(&self.registry, self.shape.nodes, 4) {
                self.propose(entry, None);
            }
            if self.bug(Bug::LeftWithCopies) {
                self.leave_at_once();
            }
        }
        self.after(PLAN_MS, Happening::Plan);
    }

    /// Without asking the primary.
    fn leave_at_once(&mut self) {
        for (shard, member) in leavers(&self.registry, self.registry.shards(), &[]) {
            let Some(set) = self.registry.set(shard) else { continue };
            let change = Change::Remove { node: member.node, observers: Vec::new() };
            self.propose(Entry::Change { shard, generation: set.generation, change }, None);
        }
    }

    /// Nodes that others do not hear are accused.
    pub fn detect(&mut self) {
        let (now, count) = (self.now, self.nodes.len());
        let awake = |world: &Self, node: usize| {
            let process = world.nodes[node].process.as_ref();
            process.is_some_and(|process| process.member.is_some() && !process.paused)
        };
        for accused in 0..count {
            let mut observers = Vec::new();
            for observer in (0..count).filter(|observer| *observer != accused) {
                if !awake(self, observer) {
                    continue;
                }
                let heard = awake(self, accused)
                    && !self.is_cut(accused, observer)
                    && !self.is_cut(observer, accused);
                if heard {
                    self.unheard.remove(&(observer, accused));
                    continue;
                }
                // Each process has its own time to be heard.
                let name = &self.nodes[accused].name;
                let process = self.registry.node(name).map_or(Incarnation(0), |state| state.incarnation);
                let unheard = self.unheard.entry((observer, accused)).or_insert((process, now));
                if unheard.0 != process {
                    *unheard = (process, now);
                }
                if now.since(unheard.1) >= FAILED_AFTER && !self.astray.contains(&observer) {
                    observers.push(self.nodes[observer].name.clone());
                }
            }
            let heard = observers.is_empty() && awake(self, accused);
            self.accuse(accused, observers);
            if heard {
                self.welcome(accused);
            }
        }
        self.after(DETECT_MS, Happening::Detect);
    }

    /// Proposes that a node has failed, as these saw.
    pub fn accuse(&mut self, accused: usize, observers: Vec<keepwarm_types::NodeName>) {
        let name = self.nodes[accused].name.clone();
        let Some(state) = self.registry.node(&name) else { return };
        if state.status == NodeStatus::Down || observers.is_empty() {
            return;
        }
        let entry = Entry::Down { node: name, incarnation: state.incarnation, observers };
        self.propose(entry, None);
    }

    /// Proposes that a process that was taken for failed returns, where it has what nobody else has.
    fn welcome(&mut self, node: usize) {
        let member = self.nodes[node].member().cloned();
        let Some(state) = self.registry.node(&self.nodes[node].name) else { return };
        let same = member.is_some_and(|member| member.incarnation == state.incarnation);
        if same && state.status == NodeStatus::Down && self.registry.holds(&self.nodes[node].name) {
            let entry = Entry::Return { node: self.nodes[node].name.clone(), incarnation: state.incarnation };
            self.propose(entry, None);
        }
    }

    /// A process asks to take part.
    pub fn register(&mut self, node: usize) {
        let at = self.now;
        let there = &self.nodes[node];
        let Some(process) = there.process.as_ref().filter(|process| process.member.is_none()) else { return };
        let life = process.life;
        let registration = Registration {
            node: there.name.clone(),
            disk: Uuid::from_u128(there.disk_id),
            process: Uuid::from_u128((u128::from(life) << 16) + node as u128 + 1),
            peer: String::new(),
            http: String::new(),
            zone: format!("z{node}"),
            stores: true,
            certificate: [0; 32],
        };
        self.propose(Entry::Register { registration, at }, Some(Proposer { node, life, shard: None }));
        let again = Happening::At { node, life, what: Local::RegisterAgain };
        self.after(REGISTER_AGAIN_MS, again);
    }

    /// The registration is applied: from now on the process takes part.
    pub fn registered(&mut self, node: usize, incarnation: Incarnation) {
        let shape = self.shape;
        let present = self.registry.node(&self.nodes[node].name).map(|state| state.incarnation);
        if present != Some(incarnation) || self.nodes[node].member().is_some() {
            return;
        }
        let there = &mut self.nodes[node];
        let Some(process) = &mut there.process else { return };
        process.begin(&there.name, incarnation, &there.disk, &shape);
        self.say(|| format!("n{} is n{}.{incarnation}", node + 1, node + 1));
        for shard in (0..shape.shards).map(ShardId) {
            if let Some(set) = self.registry.set(shard) {
                self.on(node, shard, ReplicaEvent::Set(Arc::new(set)));
            }
        }
    }

    /// A process begins on what its node's disk has.
    pub fn restart(&mut self, node: usize) {
        if self.nodes[node].process.is_some() {
            return;
        }
        self.lives += 1;
        let (life, room, shape) = (self.lives, self.shape.room, self.shape);
        self.say(|| format!("n{} starts, life {life}", node + 1));
        let before = shape.rolling && life <= shape.nodes as u64;
        let versions =
            if before { Versions { newest: VERSION_OLDEST, ..Versions::ALL } } else { Versions::ALL };
        let mut process = Process::new(life, room, versions);
        let there = &mut self.nodes[node];
        let known = self.registry.node(&there.name);
        let up = |member: &Member| {
            known.is_some_and(|known| {
                known.incarnation == member.incarnation && known.status == NodeStatus::Up
            })
        };
        if let Some(member) = there.predecessor.take().filter(up) {
            process.begin(&there.name, member.incarnation, &there.disk, &shape);
            there.process = Some(process);
            return;
        }
        there.process = Some(process);
        self.register(node);
    }

    /// Whether every shard has all the replicas that there can be, and everybody knows.
    #[must_use]
    pub fn whole(&self) -> bool {
        let size = (self.shape.replication + 1).min(self.nodes.len());
        self.registry.shards().all(|shard| {
            self.registry.set(shard).is_some_and(|set| {
                let known = |member| {
                    let at = self.place(member);
                    self.nodes[at].member() == Some(member)
                        && self.replica(at, shard).is_some_and(|replica| **replica.set() == set)
                };
                set.replicas.len() == size && set.learner.is_none() && set.replicas.iter().all(known)
            })
        })
    }

    /// For how long something has been so.
    #[must_use]
    pub fn since(&self, then: Timestamp) -> u64 {
        self.now.since(then).0
    }
}

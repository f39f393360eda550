//! Nodes and sets, and how an entry changes them.

use std::collections::HashMap;

use keepwarm_types::{Generation, Incarnation, NodeName, ShardCount, ShardId, Timestamp};

use super::entry::{Applied, Change, Entry, Refused, Registration, Response};

/// Most replicas of a shard: `replication` of at most four, and one.
pub const REPLICAS_MAX: usize = 5;
/// Nodes are counted in sixteen bits.
const NODES_MAX: usize = u16::MAX as usize - 1;

/// What holds for the cluster's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegistrySettings {
    /// How many shards.
    pub shards: ShardCount,
    /// Copies of each session's bytes.
    pub replication: usize,
}

/// Whether a node takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeStatus {
    /// It does.
    Up,
    /// It does, and is being emptied.
    Draining,
    /// Its process has failed.
    Down,
}

/// A node as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// How it registered last.
    pub registration: Registration,
    /// Which process of it.
    pub incarnation: Incarnation,
    /// Whether it takes part.
    pub status: NodeStatus,
    /// The registry's version at its last change.
    pub changed: u64,
}

/// One process of one node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Which node.
    pub node: NodeName,
    /// Which process of it.
    pub incarnation: Incarnation,
}

/// Who owns a shard, as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSet {
    /// +1 with each change.
    pub generation: Generation,
    /// The first is the primary.
    pub replicas: Vec<Member>,
    /// Who copies, to become a replica.
    pub learner: Option<Member>,
    /// When all catalogs of the shard were lost, if they were.
    pub lost_at: Option<Timestamp>,
}

/// A node's place in the table; nodes are never taken out of it.
type Place = u16;
const NOBODY: Place = Place::MAX;

/// 40 bytes a shard: 65,536 shards are 2.6 MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Set {
    generation: Generation,
    lost_at: Timestamp,
    changed: u64,
    replicas: [Place; REPLICAS_MAX],
    learner: Place,
}

const _: () = assert!(size_of::<Set>() <= 40);

impl Set {
    const EMPTY: Self = Self {
        generation: Generation(0),
        lost_at: Timestamp::NEVER,
        changed: 0,
        replicas: [NOBODY; REPLICAS_MAX],
        learner: NOBODY,
    };

    fn members(&self) -> impl Iterator<Item = Place> {
        self.replicas.into_iter().take_while(|place| *place != NOBODY)
    }

    fn len(&self) -> usize {
        self.members().count()
    }

    fn has(&self, node: Place) -> bool {
        self.members().any(|place| place == node)
    }

    fn put(&mut self, members: &[Place]) {
        self.replicas = [NOBODY; REPLICAS_MAX];
        self.replicas[..members.len()].copy_from_slice(members);
    }

    fn without(&self, node: Place) -> Vec<Place> {
        self.members().filter(|place| *place != node).collect()
    }
}

/// Nodes, shards and the spec's version, after the entries so far.
#[derive(Debug, Clone)]
pub struct Registry {
    settings: RegistrySettings,
    version: u64,
    spec: (u64, [u8; 32]),
    incarnations: u64,
    nodes: Vec<NodeState>,
    places: HashMap<NodeName, Place>,
    sets: Vec<Set>,
}

impl Registry {
    /// Before any entry.
    #[must_use]
    pub fn new(settings: RegistrySettings) -> Self {
        assert!(settings.replication < REPLICAS_MAX, "replication is checked with the spec");
        Self {
            settings,
            version: 0,
            spec: (0, [0; 32]),
            incarnations: 0,
            nodes: Vec::new(),
            places: HashMap::new(),
            sets: vec![Set::EMPTY; settings.shards.get() as usize],
        }
    }

    /// What holds for the cluster's life.
    #[must_use]
    pub const fn settings(&self) -> RegistrySettings {
        self.settings
    }

    /// Entries applied so far.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// The spec's version and hash.
    #[must_use]
    pub const fn spec(&self) -> (u64, [u8; 32]) {
        self.spec
    }

    /// Nodes that ever registered, in the order of their first registration.
    #[must_use]
    pub fn nodes(&self) -> &[NodeState] {
        &self.nodes
    }

    /// A node by name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&NodeState> {
        self.places.get(name).map(|place| &self.nodes[usize::from(*place)])
    }

    /// Shards, in order.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.settings.shards.get()).map(ShardId)
    }

    /// Who owns a shard; none before its first set.
    #[must_use]
    pub fn set(&self, shard: ShardId) -> Option<ReplicaSet> {
        let set = self.sets.get(shard.0 as usize)?;
        let member = |place: Place| {
            let node = &self.nodes[usize::from(place)];
            Member { node: node.registration.node.clone(), incarnation: node.incarnation }
        };
        (set.generation > Generation(0)).then(|| ReplicaSet {
            generation: set.generation,
            replicas: set.members().map(member).collect(),
            learner: (set.learner != NOBODY).then(|| member(set.learner)),
            lost_at: (set.lost_at != Timestamp::NEVER).then_some(set.lost_at),
        })
    }

    /// Shards whose set has changed after `version`, for followers.
    pub fn shards_since(&self, version: u64) -> impl Iterator<Item = ShardId> + '_ {
        self.shards().filter(move |shard| self.sets[shard.0 as usize].changed > version)
    }

    /// Bytes of memory, for the figures.
    #[must_use]
    pub fn footprint(&self) -> usize {
        size_of::<Set>() * self.sets.len() + size_of::<NodeState>() * self.nodes.len()
    }

    pub(super) fn place(&self, name: &NodeName) -> Option<u16> {
        self.places.get(name).copied()
    }

    /// Replicas (first the primary) and learner of a shard, by place; and its generation.
    pub(super) fn places_of(&self, shard: ShardId) -> (Generation, Vec<u16>, Option<u16>) {
        let set = &self.sets[shard.0 as usize];
        (set.generation, set.members().collect(), (set.learner != NOBODY).then_some(set.learner))
    }

    /// Takes the next agreed entry.
    pub fn apply(&mut self, entry: &Entry) -> Applied {
        self.version += 1;
        let mut shards = Vec::new();
        let response = self.change(entry, &mut shards).unwrap_or_else(Response::Refused);
        for shard in &shards {
            self.sets[shard.0 as usize].changed = self.version;
        }
        Applied { version: self.version, response, shards }
    }

    fn change(&mut self, entry: &Entry, shards: &mut Vec<ShardId>) -> Result<Response, Refused> {
        match entry {
            Entry::Spec { version, hash } => {
                let same = (*version, *hash) == self.spec;
                if !same && *version <= self.spec.0 {
                    return Err(Refused::Spec(self.spec.0));
                }
                self.spec = (*version, *hash);
            }
            Entry::Register { registration, at } => return self.register(registration, *at, shards),
            Entry::Down { node, incarnation, observers } => {
                let place = self.present(node, *incarnation)?;
                self.evidence(node, observers)?;
                self.mark(place, NodeStatus::Down);
                for (shard, set) in (0..).map(ShardId).zip(&mut self.sets) {
                    if take_out(set, place) {
                        shards.push(shard);
                    }
                }
            }
            Entry::GiveUp { node, incarnation, at } => {
                let place = self.present(node, *incarnation)?;
                if self.nodes[usize::from(place)].status != NodeStatus::Down {
                    return Err(Refused::Unfit("only a node that is down can be given up"));
                }
                for (shard, set) in (0..).map(ShardId).zip(&mut self.sets) {
                    if set.has(place) {
                        // The next assignment starts it anew.
                        set.put(&[]);
                        (set.learner, set.lost_at) = (NOBODY, *at);
                        set.generation = set.generation.next();
                        shards.push(shard);
                    }
                }
            }
            Entry::Drain { node, draining } => {
                let place = self.place(node).ok_or_else(|| Refused::UnknownNode(node.clone()))?;
                let status = self.nodes[usize::from(place)].status;
                match (status, draining) {
                    (NodeStatus::Up, true) => self.mark(place, NodeStatus::Draining),
                    (NodeStatus::Draining, false) => self.mark(place, NodeStatus::Up),
                    _ => {}
                }
            }
            Entry::Assign(sets) => self.assign(sets, shards)?,
            Entry::Change { shard, generation, change } => {
                self.change_set(*shard, *generation, change)?;
                shards.push(*shard);
            }
        }
        Ok(Response::Done)
    }

    fn mark(&mut self, place: Place, status: NodeStatus) {
        let node = &mut self.nodes[usize::from(place)];
        (node.status, node.changed) = (status, self.version);
    }

    fn present(&self, name: &NodeName, incarnation: Incarnation) -> Result<Place, Refused> {
        let known = |place: &Place| self.nodes[usize::from(*place)].incarnation == incarnation;
        self.place(name).filter(known).ok_or_else(|| Refused::UnknownNode(name.clone()))
    }

    /// Two have seen it fail, or all that could.
    //= GUARANTEES.md#G11
    fn evidence(&self, accused: &NodeName, observers: &[NodeName]) -> Result<(), Refused> {
        let able = |name: &NodeName| {
            name != accused && self.node(name).is_some_and(|node| node.status != NodeStatus::Down)
        };
        let mut seen: Vec<_> = observers.iter().filter(|name| able(name)).collect();
        seen.sort_unstable();
        seen.dedup();
        let could = self.nodes.iter().filter(|node| able(&node.registration.node)).count();
        if seen.len() >= could.min(2) { Ok(()) } else { Err(Refused::Evidence(accused.clone())) }
    }

    fn register(
        &mut self,
        registration: &Registration,
        at: Timestamp,
        shards: &mut Vec<ShardId>,
    ) -> Result<Response, Refused> {
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        let state = |changed| NodeState {
            registration: registration.clone(),
            incarnation,
            status: NodeStatus::Up,
            changed,
        };
        let Some(place) = self.place(&registration.node) else {
            if self.nodes.len() >= NODES_MAX {
                return Err(Refused::Unfit("the registry has no room for another node"));
            }
            let place = Place::try_from(self.nodes.len()).map_err(|_| Refused::Unfit("too many nodes"))?;
            self.places.insert(registration.node.clone(), place);
            self.nodes.push(state(self.version));
            return Ok(Response::Registered(incarnation));
        };
        let old = &mut self.nodes[usize::from(place)];
        let same_disk = old.registration.disk == registration.disk;
        *old = state(self.version);
        for (shard, set) in (0..).map(ShardId).zip(&mut self.sets) {
            if take_out(set, place) {
                shards.push(shard);
            } else if set.has(place) {
                // The last copy: nobody else has acknowledged since, so its catalog, if it is the same, is whole.
                set.generation = set.generation.next();
                if !same_disk {
                    set.lost_at = at;
                }
                shards.push(shard);
            }
        }
        Ok(Response::Registered(incarnation))
    }

    fn assign(
        &mut self,
        sets: &[(ShardId, Vec<NodeName>)],
        shards: &mut Vec<ShardId>,
    ) -> Result<(), Refused> {
        let mut checked = Vec::with_capacity(sets.len());
        for (shard, names) in sets {
            let set = self.sets.get(shard.0 as usize).ok_or(Refused::UnknownShard(*shard))?;
            if set.len() > 0 {
                return Err(Refused::Stale(set.generation));
            }
            if names.is_empty() || names.len() > self.settings.replication + 1 {
                return Err(Refused::Unfit("a set has one to `replication` + 1 replicas"));
            }
            let places = names.iter().map(|name| self.able(name)).collect::<Result<Vec<_>, _>>()?;
            if (1..places.len()).any(|at| places[..at].contains(&places[at])) {
                return Err(Refused::Unfit("a set names a node twice"));
            }
            checked.push((*shard, places));
        }
        for (shard, places) in checked {
            let set = &mut self.sets[shard.0 as usize];
            set.put(&places);
            set.generation = set.generation.next();
            shards.push(shard);
        }
        Ok(())
    }

    /// A node that can hold sessions now.
    fn able(&self, name: &NodeName) -> Result<Place, Refused> {
        let place = self.place(name).ok_or_else(|| Refused::UnknownNode(name.clone()))?;
        let node = &self.nodes[usize::from(place)];
        if node.status == NodeStatus::Down || !node.registration.stores {
            return Err(Refused::Unfit("a node that is down or holds no sessions cannot join a set"));
        }
        Ok(place)
    }

    fn change_set(&mut self, shard: ShardId, generation: Generation, change: &Change) -> Result<(), Refused> {
        let mut set = *self.sets.get(shard.0 as usize).ok_or(Refused::UnknownShard(shard))?;
        if set.generation != generation || set.len() == 0 {
            return Err(Refused::Stale(set.generation));
        }
        let named = |name: &NodeName| self.place(name).ok_or_else(|| Refused::UnknownNode(name.clone()));
        match change {
            Change::AddLearner(name) => {
                let place = self.able(name)?;
                if set.learner != NOBODY || set.has(place) {
                    return Err(Refused::Unfit("the set has a learner already, or the node is a replica"));
                }
                if set.len() > self.settings.replication + 1 {
                    return Err(Refused::Unfit("the set is full"));
                }
                set.learner = place;
            }
            Change::DropLearner if set.learner == NOBODY => {
                return Err(Refused::Unfit("the set has no learner"));
            }
            Change::DropLearner => set.learner = NOBODY,
            Change::Promote => {
                if set.learner == NOBODY || set.len() >= REPLICAS_MAX {
                    return Err(Refused::Unfit("the set has no learner, or is full"));
                }
                // A last copy that has failed is needed no longer.
                let failed = |place: &Place| self.nodes[usize::from(*place)].status == NodeStatus::Down;
                let mut members: Vec<_> = set.members().filter(|place| !failed(place)).collect();
                members.push(set.learner);
                set.put(&members);
                set.learner = NOBODY;
            }
            Change::Remove { node, observers } => {
                let place = named(node)?;
                if !set.has(place) || set.len() == 1 {
                    return Err(Refused::Unfit("the node is no replica of the shard, or its last"));
                }
                if set.len() <= self.settings.replication {
                    self.evidence(node, observers)?;
                }
                let members = set.without(place);
                set.put(&members);
            }
            Change::MakePrimary(name) => {
                let place = named(name)?;
                if !set.has(place) {
                    return Err(Refused::Unfit("the node is no replica of the shard"));
                }
                let mut members = vec![place];
                members.extend(set.without(place));
                set.put(&members);
            }
        }
        set.generation = set.generation.next();
        self.sets[shard.0 as usize] = set;
        Ok(())
    }

    /// Checks the state against itself.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn validate(&self) {
        for (shard, set) in self.sets.iter().enumerate() {
            let members: Vec<_> = set.members().collect();
            assert!(
                set.replicas[members.len()..].iter().all(|place| *place == NOBODY),
                "shard {shard} has a gap"
            );
            for (at, place) in members.iter().enumerate() {
                assert!(usize::from(*place) < self.nodes.len(), "shard {shard} names nobody");
                assert!(!members[..at].contains(place), "shard {shard} names a node twice");
            }
            assert!(!members.contains(&set.learner), "shard {shard} learns what it has");
            let down = |place: &&Place| self.nodes[usize::from(**place)].status == NodeStatus::Down;
            assert!(
                members.len() <= 1 || members.iter().filter(down).count() == 0,
                "shard {shard} keeps a failed replica beside others"
            );
        }
    }
}

/// Takes a node out of a set that has others; the next one becomes primary. False where nothing changed.
fn take_out(set: &mut Set, node: Place) -> bool {
    let learner = set.learner == node;
    let replica = set.has(node) && set.len() > 1;
    if learner {
        set.learner = NOBODY;
    }
    if replica {
        let members = set.without(node);
        set.put(&members);
    }
    if learner || replica {
        set.generation = set.generation.next();
    }
    learner || replica
}

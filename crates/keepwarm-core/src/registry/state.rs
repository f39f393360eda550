//! Nodes and sets, and how an entry changes them.

use std::collections::HashMap;
use std::sync::Arc;

use keepwarm_types::{Generation, Incarnation, NodeName, ShardCount, ShardId, Timestamp};

use super::entry::{Applied, Change, Entry, Refused, Registration, Response};
use super::sets::{NOBODY, Place, REPLICAS_MAX, Set, Sets};

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
    /// How it registered last; shared, because the registry is cloned with each entry.
    pub registration: Arc<Registration>,
    /// Which process of it.
    pub incarnation: Incarnation,
    /// Whether it takes part.
    pub status: NodeStatus,
    /// An operator wants it empty; lasts over its restarts, until it shall take part again.
    pub drained: bool,
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

/// Nodes, shards and the spec's version, after the entries so far. A clone shares what neither changes: some
/// microseconds for 65,536 shards and 1,000 nodes.
#[derive(Debug, Clone)]
pub struct Registry {
    pub(super) settings: RegistrySettings,
    pub(super) version: u64,
    pub(super) spec: (u64, [u8; 32]),
    pub(super) incarnations: u64,
    pub(super) nodes: Vec<NodeState>,
    pub(super) places: Arc<HashMap<NodeName, Place>>,
    pub(super) sets: Sets,
}

impl Registry {
    /// Before any entry.
    #[must_use]
    pub fn new(settings: RegistrySettings) -> Self {
        assert!(settings.replication + 2 <= REPLICAS_MAX, "replication is checked with the spec");
        Self {
            settings,
            version: 0,
            spec: (0, [0; 32]),
            incarnations: 0,
            nodes: Vec::new(),
            places: Arc::default(),
            sets: Sets::new(settings.shards.get() as usize),
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
        let set = self.sets.get(shard)?;
        let member = |place| self.member(place);
        (set.generation > Generation(0)).then(|| ReplicaSet {
            generation: set.generation,
            replicas: set.members().map(member).collect(),
            learner: set.learner().map(member),
            lost_at: (set.lost_at != Timestamp::NEVER).then_some(set.lost_at),
        })
    }

    /// The first of a shard's set, without the rest of it: what every request asks for.
    #[must_use]
    pub fn primary(&self, shard: ShardId) -> Option<Member> {
        self.sets.get(shard)?.members().next().map(|place| self.member(place))
    }

    pub(super) fn member(&self, place: Place) -> Member {
        let node = &self.nodes[usize::from(place)];
        Member { node: node.registration.node.clone(), incarnation: node.incarnation }
    }

    /// Whether a node is in any set.
    #[must_use]
    pub fn holds(&self, name: &NodeName) -> bool {
        self.place(name).is_some_and(|place| self.sets.iter().any(|(_, set)| set.has(place)))
    }

    /// Shards whose set has changed after `version`, for followers.
    pub fn shards_since(&self, version: u64) -> impl Iterator<Item = ShardId> + '_ {
        self.sets.since(version).map(|(shard, _)| shard)
    }

    /// Bytes of memory, for the figures.
    #[must_use]
    pub fn footprint(&self) -> usize {
        size_of::<Set>() * self.sets.len() + size_of::<NodeState>() * self.nodes.len()
    }

    pub(super) fn place(&self, name: &NodeName) -> Option<u16> {
        self.places.get(name).copied()
    }

    /// Takes the next agreed entry.
    pub fn apply(&mut self, entry: &Entry) -> Applied {
        self.version += 1;
        let mut shards = Vec::new();
        let response = self.change(entry, &mut shards).unwrap_or_else(Response::Refused);
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
                self.change_sets_of(place, shards, |set| set.take_out(place));
            }
            Entry::Return { node, incarnation } => {
                let place = self.present(node, *incarnation)?;
                let state = &self.nodes[usize::from(place)];
                // A process that nothing needs as it is joins anew.
                if state.status != NodeStatus::Down || !self.holds(node) {
                    return Err(Refused::unfit(
                        "only a node that is down and has last copies returns as it is",
                    ));
                }
                let status = if state.drained { NodeStatus::Draining } else { NodeStatus::Up };
                self.mark(place, status);
            }
            Entry::GiveUp { node, incarnation, at } => {
                let place = self.present(node, *incarnation)?;
                if self.nodes[usize::from(place)].status != NodeStatus::Down {
                    return Err(Refused::unfit("only a node that is down can be given up"));
                }
                self.change_sets_of(place, shards, |set| {
                    // The next assignment starts it anew.
                    set.put(&[]);
                    (set.learner, set.lost_at) = (NOBODY, *at);
                    set.generation = set.generation.next();
                    true
                });
            }
            Entry::Drain { node, draining } => {
                let place = self.place(node).ok_or_else(|| Refused::UnknownNode(node.clone()))?;
                self.nodes[usize::from(place)].drained = *draining;
                let status = match self.nodes[usize::from(place)].status {
                    NodeStatus::Down => NodeStatus::Down,
                    _ if *draining => NodeStatus::Draining,
                    _ => NodeStatus::Up,
                };
                self.mark(place, status);
            }
            Entry::Assign(sets) => self.assign(sets, shards)?,
            Entry::Change { shard, generation, change } => {
                self.change_set(*shard, *generation, change)?;
                shards.push(*shard);
            }
        }
        Ok(Response::Done)
    }

    /// Changes the sets that a node is in; `change` says whether it changed the one that it was given.
    fn change_sets_of(
        &mut self,
        node: Place,
        shards: &mut Vec<ShardId>,
        mut change: impl FnMut(&mut Set) -> bool,
    ) {
        for shard in self.sets.of(node) {
            if let Some(mut set) = self.sets.get(shard).copied()
                && change(&mut set)
            {
                self.put(shard, set);
                shards.push(shard);
            }
        }
    }

    fn put(&mut self, shard: ShardId, set: Set) {
        self.sets.put(shard, Set { changed: self.version, ..set });
    }

    fn mark(&mut self, place: Place, status: NodeStatus) {
        let node = &mut self.nodes[usize::from(place)];
        (node.status, node.changed) = (status, self.version);
    }

    fn present(&self, name: &NodeName, incarnation: Incarnation) -> Result<Place, Refused> {
        let known = |place: &Place| self.nodes[usize::from(*place)].incarnation == incarnation;
        self.place(name).filter(known).ok_or_else(|| Refused::UnknownNode(name.clone()))
    }

    /// Two have seen it fail.
    //= GUARANTEES.md#G11
    fn evidence(&self, accused: &NodeName, observers: &[NodeName]) -> Result<(), Refused> {
        let able = |name: &NodeName| {
            name != accused && self.node(name).is_some_and(|node| node.status != NodeStatus::Down)
        };
        let mut seen: Vec<_> = observers.iter().filter(|name| able(name)).collect();
        seen.sort_unstable();
        seen.dedup();
        if seen.len() >= self.observers_needed() { Ok(()) } else { Err(Refused::Evidence(accused.clone())) }
    }

    /// Nodes that must miss another before that has failed: two, of three or more. That others are down makes one alone
    /// no better a witness: it may be the one that is cut off, and its word be agreed upon once it is not any more.
    pub(super) fn observers_needed(&self) -> usize {
        self.nodes.len().saturating_sub(1).min(2)
    }

    fn register(
        &mut self,
        registration: &Registration,
        at: Timestamp,
        shards: &mut Vec<ShardId>,
    ) -> Result<Response, Refused> {
        let known = self.place(&registration.node);
        if let Some(place) = known {
            let present = &self.nodes[usize::from(place)];
            let again = *present.registration == *registration && present.status != NodeStatus::Down;
            if again {
                // The same process asks again, because it never saw the answer.
                return Ok(Response::Registered(present.incarnation));
            }
        } else if self.nodes.len() >= NODES_MAX {
            return Err(Refused::unfit("the registry has no room for another node"));
        }
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        let drained = known.is_some_and(|place| self.nodes[usize::from(place)].drained);
        let state = NodeState {
            registration: Arc::new(registration.clone()),
            incarnation,
            status: if drained { NodeStatus::Draining } else { NodeStatus::Up },
            drained,
            changed: self.version,
        };
        let Some(place) = known else {
            let place = Place::try_from(self.nodes.len()).map_err(|_| Refused::unfit("too many nodes"))?;
            Arc::make_mut(&mut self.places).insert(registration.node.clone(), place);
            self.nodes.push(state);
            return Ok(Response::Registered(incarnation));
        };
        let old = std::mem::replace(&mut self.nodes[usize::from(place)], state);
        let same_disk = old.registration.disk == registration.disk;
        self.change_sets_of(place, shards, |set| {
            if !set.take_out(place) {
                // The last copy: nobody else has acknowledged since, so its catalog, if it is the same, is whole.
                set.generation = set.generation.next();
                if !same_disk {
                    set.lost_at = at;
                }
            }
            true
        });
        Ok(Response::Registered(incarnation))
    }

    fn assign(
        &mut self,
        sets: &[(ShardId, Vec<NodeName>)],
        shards: &mut Vec<ShardId>,
    ) -> Result<(), Refused> {
        let mut checked = Vec::with_capacity(sets.len());
        for (shard, names) in sets {
            let set = self.sets.get(*shard).ok_or(Refused::UnknownShard(*shard))?;
            if set.len() > 0 {
                return Err(Refused::Stale(set.generation));
            }
            if names.is_empty() || names.len() > self.settings.replication + 1 {
                return Err(Refused::unfit("a set has one to `replication` + 1 replicas"));
            }
            let places = names.iter().map(|name| self.able(name)).collect::<Result<Vec<_>, _>>()?;
            if (1..places.len()).any(|at| places[..at].contains(&places[at])) {
                return Err(Refused::unfit("a set names a node twice"));
            }
            checked.push((*shard, places));
        }
        for (shard, places) in checked {
            // Named twice in one entry, the first counts.
            let fresh = self.sets.get(shard).copied().filter(|set| set.len() == 0);
            if let Some(mut set) = fresh {
                set.put(&places);
                set.generation = set.generation.next();
                self.put(shard, set);
                shards.push(shard);
            }
        }
        Ok(())
    }

    /// A node that can hold sessions now.
    fn able(&self, name: &NodeName) -> Result<Place, Refused> {
        let place = self.place(name).ok_or_else(|| Refused::UnknownNode(name.clone()))?;
        let node = &self.nodes[usize::from(place)];
        if node.status == NodeStatus::Down || !node.registration.stores {
            return Err(Refused::unfit("a node that is down or holds no sessions cannot join a set"));
        }
        Ok(place)
    }

    fn change_set(&mut self, shard: ShardId, generation: Generation, change: &Change) -> Result<(), Refused> {
        let mut set = *self.sets.get(shard).ok_or(Refused::UnknownShard(shard))?;
        if set.generation != generation || set.len() == 0 {
            return Err(Refused::Stale(set.generation));
        }
        let named = |name: &NodeName| self.place(name).ok_or_else(|| Refused::UnknownNode(name.clone()));
        match change {
            Change::AddLearner(name) => {
                let place = self.able(name)?;
                if set.learner != NOBODY || set.has(place) {
                    return Err(Refused::unfit("the set has a learner already, or the node is a replica"));
                }
                if set.len() > self.settings.replication + 1 {
                    return Err(Refused::unfit("the set is full"));
                }
                set.learner = place;
            }
            Change::DropLearner if set.learner == NOBODY => {
                return Err(Refused::unfit("the set has no learner"));
            }
            Change::DropLearner => set.learner = NOBODY,
            Change::Promote => {
                if set.learner == NOBODY || set.len() >= REPLICAS_MAX {
                    return Err(Refused::unfit("the set has no learner, or is full"));
                }
                // It may have bytes that nobody else has: if it still asks, it shall return first.
                let failed = |place: Place| self.nodes[usize::from(place)].status == NodeStatus::Down;
                if set.members().any(failed) {
                    return Err(Refused::unfit("a replica of the set is down"));
                }
                let mut members: Vec<_> = set.members().collect();
                members.push(set.learner);
                set.put(&members);
                set.learner = NOBODY;
            }
            Change::Remove { node, observers } => {
                let place = named(node)?;
                if !set.has(place) || set.len() == 1 {
                    return Err(Refused::unfit("the node is no replica of the shard, or its last"));
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
                    return Err(Refused::unfit("the node is no replica of the shard"));
                }
                let mut members = vec![place];
                members.extend(set.without(place));
                set.put(&members);
            }
        }
        set.generation = set.generation.next();
        self.put(shard, set);
        Ok(())
    }

    /// Checks the state against itself.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn validate(&self) {
        for (shard, set) in self.sets.iter() {
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

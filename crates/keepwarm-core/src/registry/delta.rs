//! What has changed since a version: how nodes that do not vote follow, and, since nothing, a snapshot.
//!
//! A delta holds whole nodes and whole sets, so that any number of changes between two versions is one, and a
//! follower that is far behind gets no more than the whole state. It is plain data, checked when it is merged.

use std::collections::HashSet;
use std::sync::Arc;

use keepwarm_types::{Generation, ShardId, Timestamp};

use super::sets::{NOBODY, Place, REPLICAS_MAX, Set};
use super::state::{NodeState, Registry};

/// One shard's set, its nodes by their place in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetState {
    /// Which shard.
    pub shard: ShardId,
    /// +1 with each change.
    pub generation: Generation,
    /// The registry's version at its last change.
    pub changed: u64,
    /// When all catalogs of the shard were lost, if they were.
    pub lost_at: Option<Timestamp>,
    /// The first is the primary.
    pub replicas: Vec<u16>,
    /// Who copies.
    pub learner: Option<u16>,
}

/// What has changed after version `since`, up to `version`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// Who has this version, or any up to `version`, can merge the delta.
    pub since: u64,
    /// The version that it leads to.
    pub version: u64,
    /// The spec's version and hash.
    pub spec: (u64, [u8; 32]),
    /// Incarnations given so far.
    pub incarnations: u64,
    /// Changed nodes, each with its place in the table, in order of place.
    pub nodes: Vec<(u16, NodeState)>,
    /// Changed sets, in order of shard.
    pub sets: Vec<SetState>,
}

/// Why a delta was not merged; the registry is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// Versions between the two are missing.
    #[error("the delta begins at version {since}, the registry is at {version}: ask again from {version}")]
    Gap {
        /// Where the delta begins.
        since: u64,
        /// Where the registry is.
        version: u64,
    },
    /// The delta contradicts itself or the registry.
    #[error("the delta is damaged: {0}; ask another node, from version 0")]
    Damaged(&'static str),
}

impl Registry {
    /// What has changed after `since`; everything, where `since` is zero.
    #[must_use]
    pub fn delta_since(&self, since: u64) -> Delta {
        let nodes = (0..).zip(&self.nodes).filter(|(_, node)| node.changed > since);
        Delta {
            since,
            version: self.version,
            spec: self.spec,
            incarnations: self.incarnations,
            nodes: nodes.map(|(place, node)| (place, node.clone())).collect(),
            sets: self
                .sets
                .since(since)
                .map(|(shard, set)| SetState {
                    shard,
                    generation: set.generation,
                    changed: set.changed,
                    lost_at: (set.lost_at != Timestamp::NEVER).then_some(set.lost_at),
                    replicas: set.members().collect(),
                    learner: set.learner(),
                })
                .collect(),
        }
    }

    /// Takes a delta over. False where it leads to no later version, and nothing was done.
    ///
    /// # Errors
    /// [`DeltaError`]: it begins too late or is damaged; the registry is as before.
    pub fn merge(&mut self, delta: &Delta) -> Result<bool, DeltaError> {
        if delta.version <= self.version {
            return Ok(false);
        }
        if delta.since > self.version {
            return Err(DeltaError::Gap { since: delta.since, version: self.version });
        }
        let mut next = self.clone();
        next.merge_nodes(delta)?;
        for state in &delta.sets {
            let set = set_from(state, next.nodes.len(), delta.version)?;
            if next.sets.get(state.shard).is_none() {
                return Err(DeltaError::Damaged("it names a shard that the cluster does not have"));
            }
            next.sets.put(state.shard, set);
        }
        (next.version, next.spec, next.incarnations) = (delta.version, delta.spec, delta.incarnations);
        *self = next;
        Ok(true)
    }

    fn merge_nodes(&mut self, delta: &Delta) -> Result<(), DeltaError> {
        for (place, state) in &delta.nodes {
            let name = &state.registration.node;
            let count = self.nodes.len();
            match self.nodes.get_mut(usize::from(*place)) {
                Some(known) if known.registration.node == *name => *known = state.clone(),
                Some(_) => return Err(DeltaError::Damaged("a node has another's place")),
                None if usize::from(*place) == count && *place != NOBODY => {
                    if Arc::make_mut(&mut self.places).insert(name.clone(), *place).is_some() {
                        return Err(DeltaError::Damaged("a node has two places"));
                    }
                    self.nodes.push(state.clone());
                }
                None => return Err(DeltaError::Damaged("the places of nodes have a gap")),
            }
        }
        Ok(())
    }
}

fn set_from(state: &SetState, nodes: usize, version: u64) -> Result<Set, DeltaError> {
    let known = |place: &Place| usize::from(*place) < nodes;
    if state.replicas.len() > REPLICAS_MAX || !state.replicas.iter().chain(&state.learner).all(known) {
        return Err(DeltaError::Damaged("a set names nodes that there are not"));
    }
    let distinct: HashSet<_> = state.replicas.iter().chain(&state.learner).collect();
    if distinct.len() != state.replicas.len() + usize::from(state.learner.is_some()) {
        return Err(DeltaError::Damaged("a set names a node twice"));
    }
    if state.changed > version {
        return Err(DeltaError::Damaged("a set is from the future"));
    }
    let mut set = Set {
        generation: state.generation,
        lost_at: state.lost_at.unwrap_or(Timestamp::NEVER),
        changed: state.changed,
        learner: state.learner.unwrap_or(NOBODY),
        ..Set::EMPTY
    };
    set.put(&state.replicas);
    Ok(set)
}

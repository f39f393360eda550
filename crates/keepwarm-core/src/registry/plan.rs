//! What the leader proposes next, so that each shard has its replicas and each node its share.

use std::collections::HashMap;

use keepwarm_types::{NodeName, ShardId};

use super::copyset::copysets;
use super::entry::{Change, Entry};
use super::state::{NodeStatus, Registry};

/// Shards that one node copies as a learner at once: copying is bounded by its link, and each costs a scan.
pub const LEARNERS_MAX: usize = 4;
/// A primary moves only where that leaves both with shares that differ by less than before.
const PRIMARIES_SLACK: usize = 1;

struct Storing<'a> {
    place: u16,
    name: &'a NodeName,
    zone: &'a str,
    draining: bool,
    replicas: usize,
    primaries: usize,
    learning: usize,
}

/// The next entries, at most `limit`; none where all is as it should be. `expected` storing nodes are in the spec:
/// first sets wait for as many as a set needs, so that a cluster does not begin on whoever is first.
#[must_use]
pub fn plan(registry: &Registry, expected: usize, limit: usize) -> Vec<Entry> {
    let mut nodes = storing(registry);
    let able = nodes.values().filter(|node| !node.draining).count();
    let size = (registry.settings().replication + 1).min(able);
    let (fresh, settled): (Vec<_>, Vec<_>) =
        registry.shards().partition(|shard| registry.places_of(*shard).1.is_empty());
    if !fresh.is_empty() && able > 0 && able >= (registry.settings().replication + 1).min(expected) {
        return vec![first_sets(&nodes, fresh, size)];
    }
    let mut entries = Vec::new();
    for shard in settled {
        if entries.len() >= limit {
            break;
        }
        if let Some(change) = next(registry, &mut nodes, shard, size) {
            let (generation, ..) = registry.places_of(shard);
            entries.push(Entry::Change { shard, generation, change });
        }
    }
    entries
}

fn storing(registry: &Registry) -> HashMap<u16, Storing<'_>> {
    let up =
        registry.nodes().iter().filter(|node| node.status != NodeStatus::Down && node.registration.stores);
    let mut nodes: HashMap<u16, Storing<'_>> = up
        .filter_map(|node| {
            let name = &node.registration.node;
            let place = registry.place(name)?;
            let draining = node.status == NodeStatus::Draining;
            let zone = node.registration.zone.as_str();
            Some((place, Storing { place, name, zone, draining, replicas: 0, primaries: 0, learning: 0 }))
        })
        .collect();
    for shard in registry.shards() {
        let (_, replicas, learner) = registry.places_of(shard);
        for (at, place) in replicas.iter().enumerate() {
            if let Some(node) = nodes.get_mut(place) {
                node.replicas += 1;
                node.primaries += usize::from(at == 0);
            }
        }
        if let Some(node) = learner.and_then(|place| nodes.get_mut(&place)) {
            node.replicas += 1;
            node.learning += 1;
        }
    }
    nodes
}

/// Every group takes as many shards as every other, and every member of a group is first for as many.
fn first_sets(nodes: &HashMap<u16, Storing<'_>>, shards: Vec<ShardId>, size: usize) -> Entry {
    let able: Vec<_> =
        nodes.values().filter(|node| !node.draining).map(|node| (node.place, node.zone)).collect();
    let groups = copysets(&able, size);
    let sets = shards.into_iter().enumerate().map(|(n, shard)| {
        let group = &groups[n % groups.len()];
        let first = n / groups.len();
        let turned = (0..group.len()).map(|at| nodes[&group[(first + at) % group.len()]].name.clone());
        (shard, turned.collect())
    });
    Entry::Assign(sets.collect())
}

/// What one shard needs next, if anything.
fn next(
    registry: &Registry,
    nodes: &mut HashMap<u16, Storing<'_>>,
    shard: ShardId,
    size: usize,
) -> Option<Change> {
    let (_, replicas, learner) = registry.places_of(shard);
    // While somebody copies, or nobody is there to copy from, the shard waits.
    if learner.is_some() || !nodes.contains_key(&replicas[0]) {
        return None;
    }
    let staying = replicas.iter().filter(|place| nodes.get(place).is_some_and(|node| !node.draining)).count();
    if staying < size {
        let zones: Vec<_> =
            replicas.iter().filter_map(|place| nodes.get(place)).map(|node| node.zone).collect();
        let free = |node: &&Storing<'_>| {
            !node.draining && !replicas.contains(&node.place) && node.learning < LEARNERS_MAX
        };
        let best = nodes
            .values()
            .filter(free)
            .min_by_key(|node| (zones.contains(&node.zone), node.replicas, node.place))?
            .place;
        let node = nodes.get_mut(&best)?;
        (node.learning, node.replicas) = (node.learning + 1, node.replicas + 1);
        return Some(Change::AddLearner(node.name.clone()));
    }
    // Enough without them: who is being emptied, or is one too many, leaves.
    let leaves = replicas.iter().rev().find(|place| nodes.get(place).is_some_and(|node| node.draining));
    let leaves = leaves.or_else(|| replicas.last().filter(|_| replicas.len() > size));
    if let Some(place) = leaves {
        let node = nodes.get_mut(place)?;
        node.replicas -= 1;
        return Some(Change::Remove { node: node.name.clone(), observers: Vec::new() });
    }
    let first = nodes.get(&replicas[0])?.primaries;
    let least = replicas[1..]
        .iter()
        .filter_map(|place| nodes.get(place))
        .min_by_key(|node| (node.primaries, node.place))?;
    if first > least.primaries + PRIMARIES_SLACK {
        let (least, name) = (least.place, least.name.clone());
        nodes.get_mut(&replicas[0])?.primaries -= 1;
        nodes.get_mut(&least)?.primaries += 1;
        return Some(Change::MakePrimary(name));
    }
    None
}

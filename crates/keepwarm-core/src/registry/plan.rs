//! What the leader proposes next, so that each shard has its replicas and each node its share.
//!
//! It never promotes a learner: only the shard's primary knows when that has everything. And it takes nobody out of a
//! set: who leaves next follows from the registry and from whom the primary finds slow ([`leavers`]), but only the primary
//! knows when no session counts on that member's copy any more, and proposes it then. Only for a primary of a version that
//! does not the plan removes members itself, where as many replicas stay as were promised.

use std::collections::{BTreeSet, HashMap, HashSet};

use keepwarm_types::{NodeName, ShardId};

use super::copyset::copysets;
use super::detector::Conditions;
use super::entry::{Change, Entry};
use super::sets::{Place, Set};
use super::state::{Member, NodeStatus, Registry};

/// Shards that one node copies as a learner at once: copying is bounded by its link, and each costs a scan.
pub const LEARNERS_MAX: usize = 4;
/// Shards whose first sets one entry gives: some 100 bytes each, so that an entry stays under 1 MiB.
pub const ASSIGN_MAX: usize = 8192;
/// A primary moves only where that leaves both with shares that differ by less than before.
const PRIMARIES_SLACK: usize = 1;

/// A node gets more only while another has more than this many times as much: groups of few nodes are worth more
/// than equal shares.
const SHARE_RATIO: usize = 2;

/// What the plan goes around in single sets.
struct Around {
    /// Who does not hear whom.
    apart: HashSet<(Place, Place)>,
    /// Who has ceded a shard.
    ceded: HashMap<ShardId, Vec<Place>>,
}

impl Around {
    fn new(registry: &Registry, conditions: &Conditions) -> Self {
        let place = |name: &NodeName| registry.place(name);
        let pair = |(from, to): &(NodeName, NodeName)| Some((place(from)?, place(to)?));
        let apart = conditions.apart.iter().filter_map(pair).collect();
        let ceded = conditions.ceded.iter();
        let ceded = ceded.map(|(shard, by)| (*shard, by.iter().filter_map(place).collect())).collect();
        Self { apart, ceded }
    }

    /// Who has ceded a shard.
    fn ceded(&self, shard: ShardId) -> &[Place] {
        self.ceded.get(&shard).map_or(&[], Vec::as_slice)
    }

    fn has_ceded(&self, node: Place, shard: ShardId) -> bool {
        self.ceded(shard).contains(&node)
    }

    /// Whether a node alone does not hear another one of the set.
    fn cut_off(&self, node: Place, set: &Set) -> bool {
        let mut others = set.members().chain(set.learner());
        !self.apart.is_empty() && others.any(|other| self.apart.contains(&(node, other)))
    }
}

#[derive(Clone)]
struct Storing<'a> {
    place: Place,
    name: &'a NodeName,
    zone: &'a str,
    draining: bool,
    leads: bool,
    learns: bool,
    /// To whom it is slow, if it is.
    slow_to: Option<&'a BTreeSet<NodeName>>,
    /// Whether its primaries propose who leaves.
    parts: bool,
    replicas: usize,
    primaries: usize,
    learning: usize,
}

impl Storing<'_> {
    const fn is_slow(&self) -> bool {
        self.slow_to.is_some()
    }

    /// Whether it can begin to copy one shard more.
    const fn takes_more(&self) -> bool {
        !self.draining && self.learns && self.learning < LEARNERS_MAX
    }
}

/// The next entries, at most `limit`, or the first sets of all shards that have none; none where all is as it should
/// be. `expected` storing nodes are in the spec: a shard's very first set waits for as many as a set needs, so that
/// a cluster does not begin on whoever is first.
#[must_use]
pub fn plan(registry: &Registry, expected: usize, limit: usize) -> Vec<Entry> {
    plan_under(registry, expected, limit, &Conditions::default())
}

/// As [`plan`], around what cannot be now.
#[must_use]
pub fn plan_under(registry: &Registry, expected: usize, limit: usize, conditions: &Conditions) -> Vec<Entry> {
    let around = Around::new(registry, conditions);
    let mut nodes = storing(registry, conditions, &around);
    let able = nodes.values().filter(|node| !node.draining).count();
    let wanted = registry.settings.replication + 1;
    let size = wanted.min(able);
    let enough = able > 0 && able >= wanted.min(expected);
    // A set that was given up starts anew on whoever there is.
    let begins = |set: &Set| set.len() == 0 && able > 0 && (enough || set.generation.0 > 0);
    let fresh: Vec<_> = registry.sets.iter().filter(|(_, set)| begins(set)).map(|(shard, _)| shard).collect();
    if !fresh.is_empty() {
        return first_sets(&nodes, &fresh, size);
    }
    let mut entries = Vec::new();
    // Primaries see the registry as it is, not as this plan will make it.
    let counted = nodes.clone();
    for (shard, set) in registry.sets.iter() {
        if entries.len() >= limit {
            break;
        }
        let leaver = leaver_of(set, &counted, size, registry.settings.replication);
        if let Some(change) = next(shard, set, &mut nodes, size, leaver, &around) {
            entries.push(Entry::Change { shard, generation: set.generation, change });
        }
    }
    if entries.is_empty() { share(registry, &mut nodes, size, limit) } else { entries }
}

/// Who is to leave these shards' sets next, by their primaries, which take `slow` for slow: who is being emptied, or one too
/// many. Never a primary: another one is made that first.
#[must_use]
pub fn leavers(
    registry: &Registry,
    shards: impl IntoIterator<Item = ShardId>,
    slow: &[Member],
) -> Vec<(ShardId, Member)> {
    let settings = registry.settings;
    let draining = |place| registry.nodes[usize::from(place)].status == NodeStatus::Draining;
    // What it takes to know more is a look at every set.
    let concerned = |shard: &ShardId| {
        let large = |set: &Set| set.len() > settings.replication + 1 || set.members().any(draining);
        registry.sets.get(*shard).is_some_and(large)
    };
    let shards: Vec<_> = shards.into_iter().filter(concerned).collect();
    if shards.is_empty() {
        return Vec::new();
    }
    let primaries: BTreeSet<_> =
        shards.iter().filter_map(|shard| registry.primary(*shard)).map(|member| member.node).collect();
    let slow = slow.iter().map(|member| (member.node.clone(), primaries.clone())).collect();
    let conditions = Conditions { slow, ..Conditions::default() };
    let nodes = storing(registry, &conditions, &Around::new(registry, &conditions));
    let able = nodes.values().filter(|node| !node.draining).count();
    let size = (settings.replication + 1).min(able);
    let leaver = |shard: ShardId| {
        let set = registry.sets.get(shard)?;
        let place = leaver_of(set, &nodes, size, settings.replication)?;
        (set.primary() != Some(place)).then(|| (shard, registry.member(place)))
    };
    shards.into_iter().filter_map(leaver).collect()
}

/// A node that has far less than others, because it is new, begins to copy some of their shards; when it has them,
/// the set is one too large and whoever has most leaves.
fn share(
    registry: &Registry,
    nodes: &mut HashMap<Place, Storing<'_>>,
    size: usize,
    limit: usize,
) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut least = least_of(nodes);
    for (shard, set) in registry.sets.iter() {
        let Some(bar) = least.filter(|_| entries.len() < limit).map(|least| SHARE_RATIO * (least + 1)) else {
            break;
        };
        let stays = |place: Place| nodes.get(&place).is_some_and(|node| !node.draining);
        let settled = set.learner().is_none() && set.len() == size && set.members().all(stays);
        let Some(from) = set.members().filter(|_| settled).max_by_key(|place| nodes[place].replicas) else {
            continue;
        };
        if nodes[&from].replicas <= bar {
            continue;
        }
        let Some(to) = best_learner(set, nodes).filter(|place| !nodes[place].is_slow()) else { continue };
        if nodes[&from].replicas <= SHARE_RATIO * (nodes[&to].replicas + 1) {
            continue;
        }
        if let Some(node) = nodes.get_mut(&from) {
            node.replicas -= 1;
        }
        if let Some(node) = nodes.get_mut(&to) {
            (node.learning, node.replicas) = (node.learning + 1, node.replicas + 1);
            let change = Change::AddLearner(node.name.clone());
            entries.push(Entry::Change { shard, generation: set.generation, change });
        }
        least = least_of(nodes);
    }
    entries
}

/// The fewest replicas of a node that could take more.
fn least_of(nodes: &HashMap<Place, Storing<'_>>) -> Option<usize> {
    let takes = nodes.values().filter(|node| node.takes_more() && !node.is_slow());
    takes.map(|node| node.replicas).min()
}

fn storing<'r>(
    registry: &'r Registry,
    conditions: &'r Conditions,
    around: &Around,
) -> HashMap<Place, Storing<'r>> {
    let mut nodes: HashMap<Place, Storing<'_>> = (0..)
        .zip(&registry.nodes)
        .filter(|(_, node)| node.status != NodeStatus::Down && node.registration.stores)
        .map(|(place, node)| {
            let draining = node.status == NodeStatus::Draining;
            let (name, zone) = (&node.registration.node, node.registration.zone.as_str());
            let slow_to = conditions.slow.get(name);
            let parts = !conditions.not_parting.contains(name);
            // Whoever waits for its copies would wait for its own, too.
            let leads = slow_to.is_none() && !conditions.not_leading.contains(name);
            let learns = !conditions.not_learning.contains(name);
            let (replicas, primaries, learning) = (0, 0, 0);
            (
                place,
                Storing {
                    place,
                    name,
                    zone,
                    draining,
                    leads,
                    learns,
                    slow_to,
                    parts,
                    replicas,
                    primaries,
                    learning,
                },
            )
        })
        .collect();
    for (shard, set) in registry.sets.iter() {
        for place in set.members() {
            if let Some(node) = nodes.get_mut(&place) {
                node.replicas += 1;
            }
        }
        // What was ceded counts as who ceded it, so that no other shard moves in its place.
        let led = set.primary().map(|primary| {
            let mut ceded = around.ceded(shard).iter().copied();
            ceded.find(|from| set.has(*from)).unwrap_or(primary)
        });
        if let Some(node) = led.and_then(|place| nodes.get_mut(&place)) {
            node.primaries += 1;
        }
        if let Some(node) = set.learner().and_then(|place| nodes.get_mut(&place)) {
            node.replicas += 1;
            node.learning += 1;
        }
    }
    nodes
}

/// Every group takes as many shards as every other, and every member of a group that can lead is first for as many.
fn first_sets(nodes: &HashMap<Place, Storing<'_>>, shards: &[ShardId], size: usize) -> Vec<Entry> {
    let able: Vec<_> =
        nodes.values().filter(|node| !node.draining).map(|node| (node.place, node.zone)).collect();
    let groups = copysets(&able, size);
    let sets: Vec<_> = shards
        .iter()
        .enumerate()
        .map(|(n, shard)| {
            let group = &groups[n % groups.len()];
            let first = n / groups.len();
            let mut turned: Vec<_> =
                (0..group.len()).map(|at| &nodes[&group[(first + at) % group.len()]]).collect();
            turned.sort_by_key(|node| !node.leads);
            (*shard, turned.into_iter().map(|node| node.name.clone()).collect::<Vec<_>>())
        })
        .collect();
    sets.chunks(ASSIGN_MAX).map(|sets| Entry::Assign(sets.to_vec())).collect()
}

/// What one shard needs next, if anything.
fn next(
    shard: ShardId,
    set: &Set,
    nodes: &mut HashMap<Place, Storing<'_>>,
    size: usize,
    leaver: Option<Place>,
    around: &Around,
) -> Option<Change> {
    // Nobody is there to copy from: the shard waits.
    let primary = set.primary().filter(|place| nodes.contains_key(place))?;
    let slow = nodes.get(&primary).is_some_and(|node| node.is_slow());
    if (slow || around.cut_off(primary, set))
        && let Some(change) = better_primary(shard, set, primary, nodes, around, false)
    {
        return Some(change);
    }
    if let Some(learner) = set.learner() {
        // While somebody copies, it waits too, unless that one shall be emptied or can take nothing.
        let useless = nodes.get(&learner).is_none_or(|node| node.draining || !node.learns);
        return useless.then_some(Change::DropLearner);
    }
    let stays = |place: &Place| nodes.get(place).is_some_and(|node| !node.draining);
    let staying = set.members().filter(stays).count();
    let is_slow = |place: Place| nodes.get(&place).is_some_and(|node| node.is_slow());
    // In first, then out: a slow copy is better than none.
    let dawdles = set.len() == size && set.members().any(|place| slow_to(place, set, nodes));
    if staying < size || dawdles && best_learner(set, nodes).is_some_and(|place| !is_slow(place)) {
        if let Some(place) = best_learner(set, nodes) {
            let node = nodes.get_mut(&place)?;
            (node.learning, node.replicas) = (node.learning + 1, node.replicas + 1);
            return Some(Change::AddLearner(node.name.clone()));
        }
    } else if let Some(leaver) = leaver {
        if leaver == primary {
            return better_primary(shard, set, primary, nodes, around, true);
        }
        let node = nodes.get_mut(&leaver)?;
        node.replicas -= 1;
        let name = node.name.clone();
        // Its primary proposes it, once no session counts on that copy.
        let old = nodes.get(&primary).is_some_and(|node| !node.parts);
        return old.then_some(Change::Remove { node: name, observers: Vec::new() });
    }
    better_primary(shard, set, primary, nodes, around, false)
}

/// Enough without them: who is being emptied, or is one too many, leaves. As many as promised stay.
fn leaver_of(
    set: &Set,
    nodes: &HashMap<Place, Storing<'_>>,
    size: usize,
    replication: usize,
) -> Option<Place> {
    let stays = |place: &Place| nodes.get(place).is_some_and(|node| !node.draining);
    let staying = set.members().filter(stays).count();
    if set.learner().is_some() || staying < size || set.len() <= replication.max(1) {
        return None;
    }
    let draining = set.members().rev().find(|place| !stays(place));
    draining.or_else(|| surplus(set, nodes).filter(|_| set.len() > size))
}

/// Who leaves a set that is too large: one that is slow to its primary, then one whose zone is there twice, then who has most,
/// then the last.
fn surplus(set: &Set, nodes: &HashMap<Place, Storing<'_>>) -> Option<Place> {
    let zone = |place: Place| nodes.get(&place).map(|node| node.zone);
    let twice = |place: Place| set.members().filter(|other| zone(*other) == zone(place)).count() > 1;
    set.members()
        .enumerate()
        .max_by_key(|(at, place)| {
            let node = nodes.get(place);
            (slow_to(*place, set, nodes), twice(*place), node.map_or(0, |node| node.replicas), *at)
        })
        .map(|(_, place)| place)
}

/// Whether a set's primary finds a member slow: who waits for it says who leaves, so nobody else's word counts for that.
fn slow_to(place: Place, set: &Set, nodes: &HashMap<Place, Storing<'_>>) -> bool {
    let Some(primary) = set.primary().and_then(|place| nodes.get(&place)) else { return false };
    nodes.get(&place).and_then(|node| node.slow_to).is_some_and(|slow_to| slow_to.contains(primary.name))
}

/// Who has least of the nodes that could join the set: one that is slow last, one of another zone first.
fn best_learner(set: &Set, nodes: &HashMap<Place, Storing<'_>>) -> Option<Place> {
    let zones: Vec<_> = set.members().filter_map(|place| nodes.get(&place)).map(|node| node.zone).collect();
    let free = |node: &&Storing<'_>| node.takes_more() && !set.has(node.place);
    nodes
        .values()
        .filter(free)
        .min_by_key(|node| (node.is_slow(), zones.contains(&node.zone), node.replicas, node.place))
        .map(|node| node.place)
}

/// Another replica, where the primary is to leave, is being emptied, can run no session, is cut off from one of the set, or
/// leads more than its share.
fn better_primary(
    shard: ShardId,
    set: &Set,
    primary: Place,
    nodes: &mut HashMap<Place, Storing<'_>>,
    around: &Around,
    leaves: bool,
) -> Option<Change> {
    let first = nodes.get(&primary)?;
    let least = set
        .members()
        .skip(1)
        .filter(|place| !around.cut_off(*place, set))
        .filter_map(|place| nodes.get(&place))
        .filter(|node| !node.draining)
        .min_by_key(|node| (!node.leads, around.has_ceded(node.place, shard), node.primaries, node.place))?;
    let fitter = least.leads && !first.leads;
    let unfit = leaves || first.draining || fitter || around.cut_off(primary, set);
    let ceded = || set.members().any(|place| around.has_ceded(place, shard));
    if !unfit && (first.leads && !least.leads || ceded()) {
        return None;
    }
    if unfit || first.primaries > least.primaries + PRIMARIES_SLACK {
        let (least, name) = (least.place, least.name.clone());
        let first = nodes.get_mut(&primary)?;
        first.primaries = first.primaries.saturating_sub(1);
        nodes.get_mut(&least)?.primaries += 1;
        return Some(Change::MakePrimary(name));
    }
    None
}

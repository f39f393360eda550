//! The registry's state machine.

mod delta;
mod detector;
mod planning;

use std::collections::{BTreeMap, BTreeSet};

use keepwarm_types::{Generation, Incarnation, NodeName, ShardCount, ShardId, Timestamp};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};
use uuid::Uuid;

use super::{
    Change, Entry, Member, NodeStatus, Refused, Registration, Registry, RegistrySettings, Response, copysets,
    leavers, plan,
};

fn name(n: u16) -> NodeName {
    format!("n{n}").parse().unwrap()
}

fn registration(n: u16, disk: u128) -> Registration {
    Registration {
        node: name(n),
        disk: Uuid::from_u128(disk),
        peer: format!("10.0.0.{n}:7100"),
        http: format!("10.0.0.{n}:7000"),
        zone: format!("rack-{}", n % 3),
        stores: true,
        certificate: [0; 32],
        process: Uuid::new_v4(),
    }
}

fn register(registry: &mut Registry, n: u16, disk: u128) -> Incarnation {
    let entry = Entry::Register { registration: registration(n, disk), at: Timestamp(77) };
    match registry.apply(&entry).response {
        Response::Registered(incarnation) => incarnation,
        other => panic!("{other:?}"),
    }
}

fn cluster(nodes: u16, shards: u64, replication: usize) -> Registry {
    let shards = ShardCount::new(shards).unwrap();
    let mut registry = Registry::new(RegistrySettings { shards, replication });
    for n in 1..=nodes {
        register(&mut registry, n, u128::from(n));
    }
    settle(&mut registry, nodes.into());
    registry
}

/// What primaries propose whose sessions have all their copies where they shall stay.
fn by_primaries(registry: &Registry, slow: &[Member]) -> Vec<Entry> {
    let leaving: BTreeMap<_, _> = leavers(registry, registry.shards(), slow).into_iter().collect();
    let proposed = |shard| {
        let set = registry.set(shard)?;
        let change = match (&set.learner, leaving.get(&shard)) {
            (Some(_), _) => Change::Promote,
            (None, Some(member)) => Change::Remove { node: member.node.clone(), observers: Vec::new() },
            (None, None) => return None,
        };
        Some(Entry::Change { shard, generation: set.generation, change })
    };
    registry.shards().filter_map(proposed).collect()
}

/// Plans and applies until nothing is left to do, together with the primaries.
fn settle(registry: &mut Registry, expected: usize) {
    for _ in 0..10_000 {
        let mut entries = plan(registry, expected, 64);
        entries.extend(by_primaries(registry, &[]));
        if entries.is_empty() {
            return;
        }
        for entry in entries {
            assert_eq!(registry.apply(&entry).response, Response::Done, "{entry:?}");
        }
        registry.validate();
    }
    panic!("the plan never ends");
}

fn primaries(registry: &Registry) -> BTreeMap<NodeName, usize> {
    let mut count = BTreeMap::new();
    for shard in registry.shards() {
        *count.entry(registry.set(shard).unwrap().replicas[0].node.clone()).or_default() += 1;
    }
    count
}

fn down(registry: &mut Registry, n: u16, observers: &[u16]) -> Response {
    let incarnation = registry.node(&name(n)).unwrap().incarnation;
    let observers = observers.iter().map(|n| name(*n)).collect();
    registry.apply(&Entry::Down { node: name(n), incarnation, observers }).response
}

#[test]
fn first_sets_are_full_and_even_and_wait_for_enough_nodes() {
    let shards = ShardCount::new(64).unwrap();
    let mut registry = Registry::new(RegistrySettings { shards, replication: 2 });
    register(&mut registry, 1, 1);
    assert!(plan(&registry, 3, 8).is_empty(), "one of three is not enough");
    assert_eq!(registry.set(ShardId(0)), None);
    register(&mut registry, 2, 2);
    register(&mut registry, 3, 3);
    settle(&mut registry, 3);
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert_eq!((set.replicas.len(), set.generation), (3, Generation(1)));
    }
    assert!(primaries(&registry).values().all(|count| (21..=22).contains(count)));
}

//= GUARANTEES.md#G11
#[test]
fn one_entry_moves_all_shards_of_a_failed_node_and_its_return_takes_nothing_over() {
    let mut registry = cluster(3, 64, 2);
    let old = registry.node(&name(1)).unwrap().incarnation;
    let owned: Vec<_> =
        registry.shards().filter(|shard| registry.set(*shard).unwrap().replicas[0].node == name(1)).collect();
    assert_eq!(down(&mut registry, 1, &[2]), Response::Refused(Refused::Evidence(name(1))));
    assert_eq!(
        down(&mut registry, 1, &[2, 2, 1]),
        Response::Refused(Refused::Evidence(name(1))),
        "one and himself"
    );
    assert_eq!(down(&mut registry, 1, &[2, 3]), Response::Done);
    registry.validate();
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert_eq!((set.replicas.len(), set.generation), (2, Generation(2)));
    }
    assert!(owned.iter().all(|shard| registry.set(*shard).unwrap().replicas[0].node != name(1)));
    let new = register(&mut registry, 1, 1);
    assert!(new > old);
    assert!(
        registry.shards().all(|shard| registry.set(shard).unwrap().replicas.len() == 2),
        "it learns first"
    );
    settle(&mut registry, 3);
    let set = registry.set(ShardId(0)).unwrap();
    assert!(set.replicas.contains(&Member { node: name(1), incarnation: new }));
    assert!(
        primaries(&registry).values().all(|count| (20..=23).contains(count)),
        "{:?}",
        primaries(&registry)
    );
}

#[test]
fn a_new_incarnation_leaves_every_set_unless_it_is_the_last_copy() {
    let mut registry = cluster(2, 4, 1);
    let second = register(&mut registry, 1, 1);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!(set.replicas.iter().map(|member| &member.node).collect::<Vec<_>>(), [&name(2)]);
    let third = register(&mut registry, 2, 2);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!(set.replicas, [Member { node: name(2), incarnation: third }], "its catalog has everything");
    assert_eq!(set.lost_at, None);
    let fourth = register(&mut registry, 2, 99);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!(
        (set.replicas[0].incarnation, set.lost_at),
        (fourth, Some(Timestamp(77))),
        "an empty disk says so"
    );
    assert!(second < third && third < fourth);
}

#[test]
fn the_last_copy_is_never_taken_on_suspicion_but_may_be_given_up() {
    let mut registry = cluster(3, 4, 1);
    let set = registry.set(ShardId(0)).unwrap();
    let last = set.replicas[1].clone();
    let others: Vec<_> = (1..=3).filter(|n| name(*n) != set.replicas[0].node).collect();
    let first: u16 = set.replicas[0].node.as_str()[1..].parse().unwrap();
    assert_eq!(down(&mut registry, first, &others), Response::Done);
    register(&mut registry, first, first.into());
    let n: u16 = last.node.as_str()[1..].parse().unwrap();
    let witness: Vec<_> = (1..=3).filter(|other| *other != n).collect();
    assert_eq!(down(&mut registry, n, &witness), Response::Done);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!(set.replicas, std::slice::from_ref(&last), "503 until it returns or has provably gone");
    let give_up = Entry::GiveUp { node: last.node.clone(), incarnation: last.incarnation, at: Timestamp(88) };
    assert_eq!(registry.apply(&give_up).response, Response::Done);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!((set.replicas.len(), set.lost_at), (0, Some(Timestamp(88))));
    settle(&mut registry, 1);
    assert!(!registry.set(ShardId(0)).unwrap().replicas.is_empty());
}

/// The other two of three nodes.
fn others(n: u16) -> Vec<u16> {
    (1..=3).filter(|other| *other != n).collect()
}

//= GUARANTEES.md#G10
#[test]
fn a_last_copy_that_was_taken_for_failed_returns_before_its_learner_is_promoted() {
    let mut registry = cluster(3, 1, 1);
    let set = registry.set(ShardId(0)).unwrap();
    let number = |member: &Member| member.node.as_str()[1..].parse::<u16>().unwrap();
    let (gone, last) = (number(&set.replicas[0]), set.replicas[1].clone());
    assert_eq!(down(&mut registry, gone, &others(gone)), Response::Done);
    register(&mut registry, gone, gone.into());
    let generation = |registry: &Registry| registry.set(ShardId(0)).unwrap().generation;
    let change = |generation, change| Entry::Change { shard: ShardId(0), generation, change };
    let learn = change(generation(&registry), Change::AddLearner(name(gone)));
    assert_eq!(registry.apply(&learn).response, Response::Done);
    let back = Entry::Return { node: last.node.clone(), incarnation: last.incarnation };
    assert!(matches!(registry.apply(&back).response, Response::Refused(Refused::Unfit(_))), "it is there");
    assert_eq!(down(&mut registry, number(&last), &others(number(&last))), Response::Done);
    let promote = change(generation(&registry), Change::Promote);
    assert!(
        matches!(registry.apply(&promote).response, Response::Refused(Refused::Unfit(_))),
        "its bytes may be nowhere else"
    );
    assert_eq!(registry.apply(&back).response, Response::Done);
    assert_eq!(registry.node(&last.node).unwrap().status, NodeStatus::Up);
    assert_eq!(registry.apply(&promote).response, Response::Done);
    let set = registry.set(ShardId(0)).unwrap();
    assert_eq!((set.replicas.len(), &set.replicas[0]), (2, &last), "it stays the owner");
    // Who has nothing that others need joins anew.
    assert_eq!(down(&mut registry, number(&last), &others(number(&last))), Response::Done);
    assert!(matches!(registry.apply(&back).response, Response::Refused(Refused::Unfit(_))));
}

//= GUARANTEES.md#G11
#[test]
fn a_set_changes_only_at_the_generation_that_was_meant() {
    let mut registry = cluster(3, 4, 2);
    let set = registry.set(ShardId(1)).unwrap();
    let second = set.replicas[1].node.clone();
    let move_to = Entry::Change {
        shard: ShardId(1),
        generation: set.generation,
        change: Change::MakePrimary(second.clone()),
    };
    assert_eq!(registry.apply(&move_to).response, Response::Done);
    let later = registry.set(ShardId(1)).unwrap();
    assert_eq!(later.replicas[0].node, second);
    assert_eq!(registry.apply(&move_to).response, Response::Refused(Refused::Stale(later.generation)));
    assert_eq!(registry.set(ShardId(1)), Some(later));
}

#[test]
fn below_the_promised_copies_one_accuser_is_not_enough() {
    let mut registry = cluster(3, 4, 2);
    let set = registry.set(ShardId(2)).unwrap();
    let [first, second, third] = &set.replicas[..] else { panic!("three") };
    let remove = |registry: &Registry, node: &NodeName, observers: &[&NodeName]| Entry::Change {
        shard: ShardId(2),
        generation: registry.set(ShardId(2)).unwrap().generation,
        change: Change::Remove {
            node: node.clone(),
            observers: observers.iter().map(|name| (*name).clone()).collect(),
        },
    };
    let entry = remove(&registry, &third.node, &[]);
    assert_eq!(registry.apply(&entry).response, Response::Done, "two copies stay");
    let entry = remove(&registry, &second.node, &[&first.node]);
    assert_eq!(registry.apply(&entry).response, Response::Refused(Refused::Evidence(second.node.clone())));
    let entry = remove(&registry, &second.node, &[&first.node, &third.node]);
    assert_eq!(registry.apply(&entry).response, Response::Done);
    let entry = remove(&registry, &first.node, &[&second.node, &third.node]);
    assert!(
        matches!(registry.apply(&entry).response, Response::Refused(Refused::Unfit(_))),
        "the last stays"
    );
}

#[test]
fn a_drained_node_is_emptied_by_others_first() {
    let mut registry = cluster(4, 32, 2);
    registry.apply(&Entry::Drain { node: name(2), draining: true });
    for _ in 0..1000 {
        for shard in registry.shards() {
            let staying = registry.set(shard).unwrap();
            assert!(staying.replicas.len() >= 3, "never fewer than before");
        }
        let mut entries = plan(&registry, 4, 16);
        entries.extend(by_primaries(&registry, &[]));
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            assert_eq!(registry.apply(&entry).response, Response::Done);
        }
    }
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert!(set.replicas.len() == 3 && set.replicas.iter().all(|member| member.node != name(2)));
    }
}

#[test]
fn an_older_spec_or_the_same_version_with_other_content_is_refused() {
    let mut registry = cluster(1, 4, 1);
    let spec = |version, content| Entry::Spec { version, hash: [content; 32] };
    assert_eq!(registry.apply(&spec(2, 1)).response, Response::Done);
    assert_eq!(registry.apply(&spec(2, 1)).response, Response::Done, "the same again");
    assert_eq!(registry.apply(&spec(2, 2)).response, Response::Refused(Refused::Spec(2)));
    assert_eq!(registry.apply(&spec(1, 3)).response, Response::Refused(Refused::Spec(2)));
    assert_eq!(registry.spec(), (2, [1; 32]));
}

#[test]
fn groups_are_few_and_across_zones() {
    let zones = ["a", "b", "c", "d"];
    let nodes: Vec<(u16, &str)> = (0..64).map(|n| (n, zones[usize::from(n) % 4])).collect();
    let groups = copysets(&nodes, 3);
    assert!(groups.len() <= 3 * 64_usize.div_ceil(3), "{}", groups.len());
    let mut seen: BTreeSet<u16> = BTreeSet::new();
    for group in &groups {
        let apart: BTreeSet<_> = group.iter().map(|n| zones[usize::from(*n) % 4]).collect();
        assert_eq!((group.len(), apart.len()), (3, 3), "{group:?}");
        seen.extend(group);
    }
    assert_eq!(seen.len(), 64);
    assert_eq!(copysets(&nodes[..2], 3), [vec![0, 1]]);
}

#[test]
fn sixty_five_thousand_shards_take_a_few_megabytes() {
    let registry = cluster(10, 65_536, 2);
    assert!(registry.footprint() < 4 << 20, "{}", registry.footprint());
    let least = primaries(&registry).values().copied().min().unwrap();
    assert!(least > 6000, "{least} of 6,553");
}

#[derive(Debug, Clone)]
enum Op {
    Register(u16, bool),
    Down(u16, Vec<u16>),
    Drain(u16, bool),
    Return(u16),
    Promote(u32),
    Plan,
    Stale(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let node = || 1u16..6;
    prop_oneof![
        (node(), any::<bool>()).prop_map(|(n, same)| Op::Register(n, same)),
        (node(), prop::collection::vec(node(), 0..3)).prop_map(|(n, seen)| Op::Down(n, seen)),
        (node(), any::<bool>()).prop_map(|(n, on)| Op::Drain(n, on)),
        node().prop_map(Op::Return),
        (0u32..8).prop_map(Op::Promote),
        proptest::strategy::Just(Op::Plan),
        (0u32..8).prop_map(Op::Stale),
    ]
}

proptest! {
    /// Whatever happens: generations never go back, a set that once had replicas keeps one, and no set
    /// names an incarnation that is not the node's present one.
    #[test]
    fn sets_never_empty_and_generations_never_go_back(ops in prop::collection::vec(op(), 1..120)) {
        let shards = ShardCount::new(8).unwrap();
        let mut registry = Registry::new(RegistrySettings { shards, replication: 2 });
        let mut disks = 100;
        let mut seen: BTreeMap<ShardId, Generation> = BTreeMap::new();
        for op in ops {
            let before = registry.clone();
            let mut entries = Vec::new();
            match op {
                Op::Register(n, same) => {
                    disks += 1;
                    let disk = if same { u128::from(n) } else { disks };
                    entries.push(Entry::Register { registration: registration(n, disk), at: Timestamp(1) });
                }
                Op::Down(n, seen) => {
                    let incarnation = registry.node(&name(n)).map_or(Incarnation(0), |node| node.incarnation);
                    entries.push(Entry::Down { node: name(n), incarnation, observers: seen.into_iter().map(name).collect() });
                }
                Op::Return(n) => {
                    let incarnation = registry.node(&name(n)).map_or(Incarnation(0), |node| node.incarnation);
                    entries.push(Entry::Return { node: name(n), incarnation });
                }
                Op::Drain(n, draining) => entries.push(Entry::Drain { node: name(n), draining }),
                Op::Promote(shard) | Op::Stale(shard) => {
                    let stale = matches!(op, Op::Stale(..));
                    let generation = registry.set(ShardId(shard)).map_or(Generation(0), |set| set.generation);
                    let generation = if stale { Generation(generation.0.wrapping_sub(1)) } else { generation };
                    entries.push(Entry::Change { shard: ShardId(shard), generation, change: Change::Promote });
                }
                Op::Plan => entries = plan(&registry, 3, 8),
            }
            for entry in entries {
                let applied = registry.apply(&entry);
                registry.validate();
                if let Response::Refused(_) = applied.response {
                    assert!(applied.shards.is_empty());
                }
                for shard in &applied.shards {
                    assert!(registry.shards_since(applied.version - 1).any(|changed| changed == *shard));
                }
            }
            for shard in registry.shards() {
                let Some(set) = registry.set(shard) else { continue };
                assert!(!set.replicas.is_empty());
                let last = seen.entry(shard).or_insert(set.generation);
                assert!(set.generation >= *last);
                let unchanged = set.generation == *last && before.set(shard).is_some();
                assert!(!unchanged || before.set(shard).unwrap().replicas.len() == set.replicas.len());
                *last = set.generation;
                for member in set.replicas.iter().chain(&set.learner) {
                    let node = registry.node(&member.node).unwrap();
                    assert_eq!(node.incarnation, member.incarnation);
                    assert!(set.replicas.len() == 1 || node.status != NodeStatus::Down);
                }
            }
        }
    }
}

//! What the leader proposes next, and what it must not.

use std::collections::BTreeSet;

use keepwarm_types::{ShardCount, ShardId, Timestamp};

use super::{cluster, down, name, primaries, register, settle};
use crate::registry::{
    ASSIGN_MAX, Change, Conditions, Entry, Member, NodeStatus, Registry, RegistrySettings, Response, leavers,
    plan, plan_under,
};

fn changes(registry: &Registry, expected: usize) -> Vec<Change> {
    let change = |entry| match entry {
        Entry::Change { change, .. } => change,
        other => panic!("{other:?}"),
    };
    plan(registry, expected, 1000).into_iter().map(change).collect()
}

#[test]
fn draining_more_than_can_be_spared_takes_the_lead_away_and_no_copies() {
    let mut registry = cluster(3, 16, 2);
    for n in [1, 2] {
        registry.apply(&Entry::Drain { node: name(n), draining: true });
    }
    settle(&mut registry, 3);
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert!(set.replicas.len() >= 2, "as many copies as were promised");
        assert_eq!(set.replicas[0].node, name(3), "who stays leads");
    }
    assert_eq!(plan(&registry, 3, 64), [], "and nothing is proposed for ever");
}

#[test]
fn a_node_that_takes_part_again_gets_its_share_back() {
    let mut registry = cluster(4, 32, 2);
    registry.apply(&Entry::Drain { node: name(2), draining: true });
    settle(&mut registry, 4);
    assert!(!primaries(&registry).contains_key(&name(2)));
    registry.apply(&Entry::Drain { node: name(2), draining: false });
    down(&mut registry, 1, &[3, 4]);
    settle(&mut registry, 4);
    assert!(primaries(&registry)[&name(2)] >= 8, "{:?}", primaries(&registry));
}

#[test]
fn a_node_that_can_run_nothing_leads_no_first_set_either() {
    let settings = RegistrySettings { shards: ShardCount::new(32).unwrap(), replication: 2 };
    let mut registry = Registry::new(settings);
    for n in 1..=4 {
        register(&mut registry, n, n.into());
    }
    let conditions = Conditions { not_leading: [name(2)].into(), ..Conditions::default() };
    for entry in plan_under(&registry, 4, 64, &conditions) {
        assert!(matches!(entry, Entry::Assign(_)), "{entry:?}");
        assert_eq!(registry.apply(&entry).response, Response::Done);
    }
    assert_eq!(primaries(&registry).len(), 3);
    assert!(!primaries(&registry).contains_key(&name(2)));
    for entry in plan_under(&registry, 4, 64, &conditions) {
        let to_another =
            matches!(&entry, Entry::Change { change: Change::MakePrimary(to), .. } if *to != name(2));
        assert!(to_another, "the others are given equal shares, and that is all: {entry:?}");
    }
}

#[test]
fn what_was_ceded_is_not_given_back_for_equal_shares_nor_other_shards_in_its_place() {
    let mut registry = cluster(3, 16, 2);
    assert_eq!(plan(&registry, 3, 64), []);
    let led = |registry: &Registry, n: u16| -> Vec<ShardId> {
        let by = |shard: &ShardId| registry.primary(*shard).unwrap().node == name(n);
        registry.shards().filter(by).collect()
    };
    let ceded = led(&registry, 1)[..3].to_vec();
    for shard in &ceded {
        let generation = registry.set(*shard).unwrap().generation;
        let change = Change::MakePrimary(name(3));
        registry.apply(&Entry::Change { shard: *shard, generation, change });
    }
    let conditions = |by: &[u16]| Conditions {
        ceded: ceded.iter().map(|shard| (*shard, by.iter().map(|n| name(*n)).collect())).collect(),
        ..Conditions::default()
    };
    let under = |registry: &Registry, conditions: &Conditions| plan_under(registry, 3, 64, conditions);
    assert_ne!(under(&registry, &Conditions::default()), [], "shares are not equal");
    assert_eq!(under(&registry, &conditions(&[1])), [], "and that is as it should be");
    // Whoever cannot lead gives them away, to somebody who has not ceded them if there is one.
    let fenced = Conditions { not_leading: [name(3)].into(), ..conditions(&[1]) };
    let mut moved = registry.clone();
    for _ in 0..64 {
        let Some(entry) = under(&moved, &fenced).into_iter().next() else { break };
        assert_eq!(moved.apply(&entry).response, Response::Done);
    }
    assert!(led(&moved, 3).is_empty());
    assert!(ceded.iter().all(|shard| moved.primary(*shard).unwrap().node == name(2)));
    // And else to one that has.
    let fenced = Conditions { not_leading: [name(3)].into(), ..conditions(&[1, 2]) };
    settle(&mut registry, 3);
    for _ in 0..64 {
        let Some(entry) = under(&registry, &fenced).into_iter().next() else { break };
        assert_eq!(registry.apply(&entry).response, Response::Done);
    }
    assert!(led(&registry, 3).is_empty());
    assert_eq!(under(&registry, &fenced), [], "and nothing is proposed for ever");
}

#[test]
fn for_a_primary_of_a_version_before_the_plan_says_who_leaves_and_its_own_word_on_who_is_slow_counts() {
    let mut registry = cluster(4, 16, 2);
    for shard in registry.shards() {
        let has = |n: u16, registry: &Registry| {
            registry.set(shard).unwrap().replicas.iter().any(|member| member.node == name(n))
        };
        let missing = (1..=4).find(|n| !has(*n, &registry)).unwrap();
        for change in [Change::AddLearner(name(missing)), Change::Promote] {
            let generation = registry.set(shard).unwrap().generation;
            let applied = registry.apply(&Entry::Change { shard, generation, change });
            assert_eq!(applied.response, Response::Done);
        }
    }
    // 2 is slow to 3 and to 4; 1 and 3 run the version before.
    let conditions = Conditions {
        slow: [(name(2), [name(3), name(4)].into())].into(),
        not_parting: [name(1), name(3)].into(),
        ..Conditions::default()
    };
    let slow = Member { node: name(2), incarnation: registry.node(&name(2)).unwrap().incarnation };
    let entries = plan_under(&registry, 4, 64, &conditions);
    let removes = |leaver: Member| Change::Remove { node: leaver.node, observers: Vec::new() };
    let own = |shard, slow: &[Member]| leavers(&registry, [shard], slow).pop().map(|(_, member)| member);
    let mut seen = BTreeSet::new();
    for shard in registry.shards() {
        let primary = registry.primary(shard).unwrap().node;
        let planned = entries.iter().find_map(|entry| match entry {
            Entry::Change { shard: of, change, .. } if *of == shard => Some(change.clone()),
            _ => None,
        });
        let expected = match primary.as_str() {
            "n1" => Some(removes(own(shard, &[]).expect("one is too many"))),
            "n3" => Some(removes(slow.clone())),
            // It proposes that itself.
            "n4" => {
                assert_eq!(own(shard, std::slice::from_ref(&slow)), Some(slow.clone()));
                None
            }
            _ => {
                assert!(matches!(planned, Some(Change::MakePrimary(_))), "{shard}: {planned:?}");
                planned.clone()
            }
        };
        assert_eq!(planned, expected, "{shard} of {primary}");
        seen.insert(primary);
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

#[test]
fn given_up_shards_start_anew_on_whoever_is_there() {
    let mut registry = cluster(3, 8, 2);
    for (n, observers) in [(1, [2, 3]), (2, [1, 3])] {
        assert_eq!(down(&mut registry, n, &observers), Response::Done);
        register(&mut registry, n, n.into());
    }
    assert_eq!(down(&mut registry, 3, &[1, 2]), Response::Done);
    assert_eq!(plan(&registry, 3, 64), [], "the last copy was on 3: everything waits for it");
    let incarnation = registry.node(&name(3)).unwrap().incarnation;
    registry.apply(&Entry::GiveUp { node: name(3), incarnation, at: Timestamp(5) });
    settle(&mut registry, 3);
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert_eq!(
            (set.replicas.len(), set.lost_at),
            (2, Some(Timestamp(5))),
            "two of three are enough for that"
        );
    }
}

#[test]
fn a_learner_that_shall_be_emptied_is_given_up() {
    let mut registry = cluster(4, 4, 2);
    down(&mut registry, 1, &[2, 3]);
    let learns = plan(&registry, 4, 64);
    for entry in &learns {
        assert_eq!(registry.apply(entry).response, Response::Done);
    }
    let learning = registry.shards().find_map(|shard| registry.set(shard).unwrap().learner).unwrap().node;
    registry.apply(&Entry::Drain { node: learning, draining: true });
    assert!(changes(&registry, 4).contains(&Change::DropLearner));
}

#[test]
fn the_plan_never_promotes_and_waits_for_who_copies() {
    let mut registry = cluster(4, 4, 2);
    down(&mut registry, 1, &[2, 3]);
    for entry in plan(&registry, 4, 64) {
        registry.apply(&entry);
    }
    let promoted = |change: &Change| matches!(change, Change::Promote | Change::AddLearner(_));
    assert!(!changes(&registry, 4).iter().any(promoted));
}

#[test]
fn first_sets_of_many_shards_come_in_several_entries() {
    let registry = {
        let mut registry = cluster(1, 65_536, 2);
        let incarnation = registry.node(&name(1)).unwrap().incarnation;
        assert_eq!(down(&mut registry, 1, &[]), Response::Done);
        registry.apply(&Entry::GiveUp { node: name(1), incarnation, at: Timestamp(1) });
        register(&mut registry, 1, 1);
        registry
    };
    let entries = plan(&registry, 1, 1);
    let sizes: Vec<_> = entries
        .iter()
        .map(|entry| match entry {
            Entry::Assign(sets) => sets.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(sizes, vec![ASSIGN_MAX; 8]);
}

#[test]
fn a_shard_named_twice_in_one_entry_gets_one_set() {
    let mut registry = Registry::new(cluster(3, 4, 2).settings());
    register(&mut registry, 1, 1);
    let sets = vec![(ShardId(0), vec![name(1)]), (ShardId(0), vec![name(1)])];
    let applied = registry.apply(&Entry::Assign(sets));
    assert_eq!((applied.response, applied.shards), (Response::Done, vec![ShardId(0)]));
    assert_eq!(registry.set(ShardId(0)).unwrap().generation.0, 1);
}

#[test]
fn a_new_node_gets_a_share_and_sets_end_as_large_as_before() {
    let mut registry = cluster(3, 64, 2);
    register(&mut registry, 4, 4);
    settle(&mut registry, 4);
    let mut held = 0;
    for shard in registry.shards() {
        let set = registry.set(shard).unwrap();
        assert_eq!(set.replicas.len(), 3);
        held += usize::from(set.replicas.iter().any(|member| member.node == name(4)));
    }
    assert!((24..=48).contains(&held), "{held} of 64");
    assert!(primaries(&registry)[&name(4)] > 0);
}

#[test]
fn a_drain_lasts_over_a_restart_until_it_is_taken_back() {
    let mut registry = cluster(4, 4, 2);
    registry.apply(&Entry::Drain { node: name(2), draining: true });
    down(&mut registry, 2, &[1, 3]);
    register(&mut registry, 2, 2);
    assert_eq!(registry.node(&name(2)).unwrap().status, NodeStatus::Draining);
    down(&mut registry, 2, &[1, 3]);
    registry.apply(&Entry::Drain { node: name(2), draining: false });
    assert_eq!(registry.node(&name(2)).unwrap().status, NodeStatus::Down, "a drain is no sign of life");
    register(&mut registry, 2, 2);
    assert_eq!(registry.node(&name(2)).unwrap().status, NodeStatus::Up);
}

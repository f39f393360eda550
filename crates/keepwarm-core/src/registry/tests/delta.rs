//! Deltas lead a follower where the entries led the others, and damaged ones lead nowhere.

use keepwarm_types::{Generation, ShardCount, ShardId, Timestamp};
use proptest::prelude::{prop, proptest};

use super::{Op, cluster, down, name, op, register, registration, settle};
use crate::registry::{Change, Delta, DeltaError, Entry, Registry, RegistrySettings, SetState, plan};

fn follower(registry: &Registry) -> Registry {
    let mut follower = Registry::new(registry.settings());
    assert_eq!(follower.merge(&registry.delta_since(0)), Ok(true));
    follower
}

#[test]
fn a_delta_holds_what_has_changed_and_no_more() {
    let mut registry = cluster(4, 1024, 2);
    let mut behind = follower(&registry);
    let since = registry.version();
    let generation = registry.set(ShardId(700)).unwrap().generation;
    let to = registry.set(ShardId(700)).unwrap().replicas[1].node.clone();
    registry.apply(&Entry::Change { shard: ShardId(700), generation, change: Change::MakePrimary(to) });
    registry.apply(&Entry::Drain { node: name(2), draining: true });
    let delta = registry.delta_since(since);
    assert_eq!(delta.sets.iter().map(|set| set.shard).collect::<Vec<_>>(), [ShardId(700)]);
    assert_eq!(delta.nodes.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [1]);
    assert_eq!(behind.merge(&delta), Ok(true));
    assert_eq!(behind.delta_since(0), registry.delta_since(0));
    assert_eq!(behind.merge(&delta), Ok(false), "nothing new");
}

#[test]
fn a_delta_that_begins_too_late_is_refused() {
    let mut registry = cluster(3, 4, 2);
    let mut behind = follower(&registry);
    let version = behind.version();
    down(&mut registry, 1, &[2, 3]);
    register(&mut registry, 1, 1);
    let late = registry.delta_since(version + 1);
    assert_eq!(behind.merge(&late), Err(DeltaError::Gap { since: version + 1, version }));
    assert_eq!(behind.merge(&registry.delta_since(version)), Ok(true));
}

#[test]
fn damaged_deltas_change_nothing() {
    let registry = cluster(3, 4, 2);
    let whole = registry.delta_since(0);
    let refused = |damage: &dyn Fn(&mut Delta)| {
        let mut delta = whole.clone();
        damage(&mut delta);
        let mut follower = Registry::new(registry.settings());
        assert!(matches!(follower.merge(&delta), Err(DeltaError::Damaged(_))), "{delta:?}");
        assert_eq!(follower.version(), 0);
    };
    refused(&|delta| delta.sets[0].replicas[0] = 9);
    refused(&|delta| delta.sets[0].replicas = vec![0, 0]);
    refused(&|delta| delta.sets[0].learner = Some(delta.sets[0].replicas[0]));
    refused(&|delta| delta.sets[0].replicas = vec![0; 9]);
    refused(&|delta| delta.sets[0].shard = ShardId(99));
    refused(&|delta| delta.sets[0].changed = u64::MAX);
    refused(&|delta| drop(delta.nodes.remove(1)));
    refused(&|delta| delta.nodes[1].1 = delta.nodes[0].1.clone());
    refused(&|delta| delta.nodes[2].0 = u16::MAX);
    let mut beyond = whole.clone();
    beyond.sets.push(SetState {
        shard: ShardId(u32::MAX),
        generation: Generation(1),
        changed: 1,
        lost_at: None,
        replicas: vec![0],
        learner: None,
    });
    assert!(Registry::new(registry.settings()).merge(&beyond).is_err());
}

#[test]
fn clones_share_what_an_entry_does_not_change() {
    let mut registry = cluster(3, 65_536, 2);
    let before = registry.clone();
    down(&mut registry, 1, &[2, 3]);
    assert_eq!(before.set(ShardId(65_535)).unwrap().replicas.len(), 3, "a clone keeps its own");
    settle(&mut registry, 3);
    assert_eq!(registry.set(ShardId(65_535)).unwrap().replicas.len(), 2);
}

proptest! {
    /// A follower that merges now and then is where the others are.
    #[test]
    fn a_follower_converges(ops in prop::collection::vec((op(), proptest::bool::ANY), 1..80)) {
        let shards = ShardCount::new(8).unwrap();
        let mut registry = Registry::new(RegistrySettings { shards, replication: 2 });
        let mut follower = registry.clone();
        for (op, merges) in ops {
            let entries = match op {
                Op::Register(n, _) => {
                    vec![Entry::Register { registration: registration(n, n.into()), at: Timestamp(1) }]
                }
                Op::Drain(n, draining) => vec![Entry::Drain { node: name(n), draining }],
                Op::Down(n, _) if registry.node(&name(n)).is_some() => {
                    down(&mut registry, n, &[1, 2, 3, 4, 5]);
                    Vec::new()
                }
                _ => plan(&registry, 3, 8),
            };
            for entry in entries {
                registry.apply(&entry);
            }
            if merges {
                follower.merge(&registry.delta_since(follower.version())).unwrap();
                follower.validate();
                assert_eq!(follower.delta_since(0), registry.delta_since(0));
            }
        }
    }
}

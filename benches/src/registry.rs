//! The registry: what a node costs, and the entry that moves a failed node's shards, in a large cluster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use keepwarm_core::registry::{Entry, Registration, Registry, RegistrySettings, Response, plan};
use keepwarm_registry::snapshot_bytes;
use keepwarm_types::{NodeName, ShardCount, ShardId, Timestamp};
use uuid::Uuid;

use crate::brain::live_bytes;
use crate::{ROUNDS, median};

const NODES: u16 = 1000;
const SHARDS: u64 = 65_536;
/// One entry may take this much of a fail-over's second.
const LIMIT_MS: f64 = 5.0;

fn name(n: u16) -> NodeName {
    format!("node-{n}").parse().unwrap()
}

fn register(registry: &mut Registry, n: u16) {
    let registration = Registration {
        node: name(n),
        disk: Uuid::from_u128(n.into()),
        peer: format!("10.0.{}.{}:7100", n / 250, n % 250),
        http: format!("10.0.{}.{}:7000", n / 250, n % 250),
        zone: format!("rack-{}", n % 32),
        stores: true,
        certificate: [0; 32],
        process: Uuid::from_u128(n.into()),
    };
    registry.apply(&Entry::Register { registration, at: Timestamp(1) });
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

pub(crate) fn run() {
    let shards = ShardCount::new(SHARDS).unwrap();
    let mut registry = Registry::new(RegistrySettings { shards, replication: 2 });
    let before = live_bytes();
    for n in 0..NODES {
        register(&mut registry, n);
    }
    let each = (live_bytes() - before) as f64 / f64::from(NODES);
    println!(
        "{NODES} nodes, {SHARDS} shards: {each:.0} bytes a node, {} KiB of sets",
        registry.footprint() >> 10
    );
    let started = Instant::now();
    for entry in plan(&registry, NODES.into(), 64) {
        assert_eq!(registry.apply(&entry).response, Response::Done);
    }
    println!("first sets of all shards: {:.1} ms", ms(started));

    let mut owned: BTreeMap<NodeName, usize> = BTreeMap::new();
    for shard in registry.shards() {
        for member in registry.set(shard).unwrap().replicas {
            *owned.entry(member.node).or_default() += 1;
        }
    }
    let (mut down, mut publish, mut next, mut one) = (vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        let mut registry = registry.clone();
        let victim = name(round as u16);
        let incarnation = registry.node(&victim).unwrap().incarnation;
        let observers = vec![name(900), name(901)];
        // As a voter does: what watchers hold stays as it was, so each changed page is copied.
        let watched = Arc::new(registry.clone());
        let started = Instant::now();
        let applied = registry.apply(&Entry::Down { node: victim.clone(), incarnation, observers });
        down.push(ms(started));
        assert_eq!(applied.shards.len(), owned[&victim]);
        let started = Instant::now();
        let published = Arc::new(registry.clone());
        publish.push(ms(started));
        let started = Instant::now();
        let entries = plan(&registry, NODES.into(), 64);
        next.push(ms(started));
        assert_eq!(entries.len(), 64);
        let started = Instant::now();
        for entry in &entries {
            registry.apply(entry);
        }
        one.push(ms(started) / entries.len() as f64);
        drop((watched, published));
    }
    let down = median(down);
    println!(
        "an entry that moves a failed node's {} shards: {down:.2} ms ({:.0} % of its limit of {LIMIT_MS} ms)",
        owned[&name(0)],
        down / LIMIT_MS * 100.0
    );
    println!(
        "publishing it: {:.3} ms; the next plan: {:.2} ms; a shard's own change: {:.4} ms",
        median(publish),
        median(next),
        median(one)
    );

    let (mut encode, mut small) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let bytes = snapshot_bytes(&registry);
        encode.push(ms(started));
        let started = Instant::now();
        let delta = registry.delta_since(registry.version() - 1);
        small.push(ms(started));
        std::hint::black_box((bytes, delta));
    }
    let bytes = snapshot_bytes(&registry).len();
    println!(
        "a snapshot: {} KiB ({:.1} bytes a shard), {:.1} ms; a follower's delta of the last entry: {:.3} ms",
        bytes >> 10,
        bytes as f64 / SHARDS as f64,
        median(encode),
        median(small)
    );
    assert!(registry.set(ShardId(0)).is_some());
}

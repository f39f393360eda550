//! openraft's own suite over our log, and our bytes.

mod golden;

use std::sync::Arc;

use keepwarm_catalog::{Catalog, CatalogSettings, RaftLog, Sync};
use keepwarm_core::registry::{
    Change, Entry, Refused, Registration, Registry, RegistrySettings, Response, plan,
};
use keepwarm_types::{Generation, Incarnation, NodeName, ShardCount, ShardId, Timestamp};
use keepwarm_wire::{Version, Versions};
use openraft::testing::{StoreBuilder, Suite};
use proptest::prelude::{any, prop, proptest};
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;

use crate::codec::domain::{RawEntry, RawResponse};
use crate::log_store::LogStore;
use crate::machine::{Machine, registry_from, snapshot_bytes};
use crate::raft_types::{StorageError, TypeConfig};
use crate::wire::{Answer, Request};

/// Every version that is spoken.
fn versions() -> impl Iterator<Item = Version> + Clone {
    let only = |number| Versions { oldest: number, newest: number };
    (Versions::ALL.oldest..=Versions::ALL.newest)
        .map(move |number| Versions::ALL.common(only(number)).unwrap())
}

fn settings() -> RegistrySettings {
    RegistrySettings { shards: ShardCount::new(16).unwrap(), replication: 2 }
}

fn name(n: u16) -> NodeName {
    format!("n{n}").parse().unwrap()
}

fn registration(n: u16) -> Registration {
    Registration {
        node: name(n),
        disk: Uuid::from_u128(n.into()),
        peer: format!("10.0.0.{n}:7100"),
        http: format!("10.0.0.{n}:7000"),
        zone: format!("rack-{}", n % 3),
        stores: true,
        certificate: [7; 32],
        process: Uuid::from_u128(9),
    }
}

fn opened(log: RaftLog) -> (LogStore, Machine) {
    let (publish, _) = watch::channel(Arc::new(Registry::new(settings())));
    (LogStore::open(log.clone()).unwrap(), Machine::open(log, settings(), publish).unwrap())
}

struct OnDisk;

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for OnDisk {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError> {
        let folder = tempfile::tempdir().unwrap();
        let shards = settings().shards;
        let wanted = CatalogSettings { cluster: "test".to_owned(), shards, sync: Sync::Always };
        let (catalog, _) = Catalog::open(folder.path(), &wanted).unwrap();
        let (store, machine) = opened(catalog.raft_log().unwrap());
        Ok((folder, store, machine))
    }
}

struct InMemory;

impl StoreBuilder<TypeConfig, LogStore, Machine, ()> for InMemory {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError> {
        let (store, machine) = opened(RaftLog::ephemeral().unwrap());
        Ok(((), store, machine))
    }
}

#[test]
fn openrafts_suite_passes_over_the_log_on_disk() {
    Suite::test_all(OnDisk).unwrap();
}

#[test]
fn openrafts_suite_passes_over_the_log_in_memory() {
    Suite::test_all(InMemory).unwrap();
}

fn entries() -> Vec<Entry> {
    let change = |change| Entry::Change { shard: ShardId(3), generation: Generation(9), change };
    let observers = vec![name(2), name(3)];
    vec![
        Entry::Spec { version: 3, hash: [1; 32] },
        Entry::Register { registration: registration(1), at: Timestamp(5) },
        Entry::Down { node: name(1), incarnation: Incarnation(4), observers: observers.clone() },
        Entry::Return { node: name(1), incarnation: Incarnation(4) },
        Entry::GiveUp { node: name(1), incarnation: Incarnation(4), at: Timestamp(6) },
        Entry::Drain { node: name(1), draining: true },
        Entry::Assign(vec![(ShardId(1), vec![name(2), name(1)]), (ShardId(2), vec![name(1)])]),
        change(Change::AddLearner(name(5))),
        change(Change::DropLearner),
        change(Change::Promote),
        change(Change::Remove { node: name(2), observers }),
        change(Change::MakePrimary(name(3))),
    ]
}

fn responses() -> Vec<Response> {
    let refused = [
        Refused::Stale(Generation(4)),
        Refused::UnknownNode(name(1)),
        Refused::UnknownShard(ShardId(8)),
        Refused::Unfit("no".into()),
        Refused::Evidence(name(2)),
        Refused::Spec(4),
    ];
    let done = [Response::Done, Response::Registered(Incarnation(3))];
    refused.into_iter().map(Response::Refused).chain(done).collect()
}

#[test]
fn entries_and_answers_survive_the_wire() {
    for (entry, version) in
        entries().into_iter().flat_map(|entry| versions().map(move |v| (entry.clone(), v)))
    {
        let request = Request::Propose { entry: (&entry).into(), wait_ms: 7 };
        let Ok(Request::Propose { entry: back, .. }) = Request::decode(1, &request.encode(1, version)) else {
            panic!("another request")
        };
        assert_eq!(Entry::try_from(back), Ok(entry));
    }
    for (response, version) in
        responses().into_iter().flat_map(|response| versions().map(move |v| (response.clone(), v)))
    {
        let answer = Answer::Applied(RawResponse::from(&response));
        let Ok(Answer::Applied(back)) = Answer::decode(1, &answer.encode(1, version)) else {
            panic!("another answer")
        };
        assert_eq!(Response::try_from(back), Ok(response));
    }
}

#[test]
fn another_cluster_and_another_version_are_named() {
    for version in versions() {
        let bytes = Request::Probe.encode(1, version);
        assert!(Request::decode(2, &bytes).unwrap_err().0.contains("cluster"));
        for beyond in [Versions::ALL.oldest - 1, Versions::ALL.newest + 1] {
            let mut other = bytes.to_vec();
            other[..2].copy_from_slice(&beyond.to_le_bytes());
            let said = Request::decode(1, &other).unwrap_err().0;
            assert!(said.contains(&format!("version {beyond}, this node reads {}", Versions::ALL)), "{said}");
        }
    }
}

#[test]
fn a_registry_is_the_same_after_a_snapshot() {
    let mut registry = Registry::new(settings());
    for n in 1..=4 {
        registry.apply(&Entry::Register { registration: registration(n), at: Timestamp(1) });
    }
    for entry in plan(&registry, 4, 8) {
        registry.apply(&entry);
    }
    registry.apply(&Entry::Spec { version: 2, hash: [9; 32] });
    let observers = vec![name(1), name(2)];
    registry.apply(&Entry::Down { node: name(4), incarnation: Incarnation(4), observers });
    let back = registry_from(&snapshot_bytes(&registry), settings()).unwrap();
    back.validate();
    assert_eq!(back.delta_since(0), registry.delta_since(0));
    for entry in plan(&registry, 4, 8) {
        assert_eq!(registry.clone().apply(&entry), back.clone().apply(&entry), "and goes on alike");
    }
}

proptest! {
    #[test]
    fn decoders_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), said in 0..4u16, flip in 0usize..400, bit in 0u8..8) {
        // Zero: the noise itself says which version and which cluster.
        if said > 0 && bytes.len() > 18 {
            bytes[..2].copy_from_slice(&said.to_le_bytes());
            bytes[2..18].copy_from_slice(&1_u128.to_le_bytes());
        }
        let _ = Request::decode(1, &bytes);
        let _ = Answer::decode(1, &bytes);
        for (entry, version) in entries().into_iter().zip(versions().cycle()) {
            let mut bytes = Request::Propose { entry: RawEntry::from(&entry), wait_ms: 0 }.encode(1, version).to_vec();
            let at = flip % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(Request::Propose { entry, .. }) = Request::decode(1, &bytes) {
                let _ = Entry::try_from(entry);
            }
        }
        let _ = registry_from(&bytes, settings());
    }
}

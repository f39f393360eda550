//! A session that has no room at its owner runs at a replica that has it.

use keepwarm_node::Whereabouts;
use keepwarm_types::ShardCount;

use super::three::{end, session, started, whole};
use super::*;

const SHARDS: u64 = 16;

fn moving<T: std::fmt::Debug>(answer: &Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Refused(Refusal::Moving(_))))
}

/// The node that owns a session, once the asked one knows another.
async fn owner_after<'n>(nodes: &'n [Node], asked: &Handle, key: &SessionKey) -> &'n Node {
    let Whereabouts::At(name) = asked.whereabouts(key.id) else { panic!("it has not moved") };
    let node = nodes.iter().find(|node| *node.handle().name() == name).unwrap();
    until("the new owner knows", || async { node.handle().whereabouts(key.id) == Whereabouts::Here }).await;
    node
}

/// A session without bytes whose place is as wished; the node leads several shards.
async fn empty(handle: &Handle, fits: impl Fn(&SessionKey) -> bool) -> SessionKey {
    loop {
        let key = create(handle, Order::Token, 600_000).await;
        if fits(&key) {
            return key;
        }
        handle.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_no_gpu_of_its_owner_can_hold_runs_at_a_replica_that_can() {
    let folder = tempfile::tempdir().unwrap();
    // 8 MiB at the others.
    let nodes = started(folder.path(), SHARDS, |config| {
        for node in &mut config.nodes[..2] {
            node.gpus[0].memory = Bytes(2 << 20);
        }
    })
    .await;
    let handle = nodes[0].handle();
    let bytes = pattern(7, 6000);
    let key = session(&handle, &bytes).await;
    let here = ActivateRequest { only_here: true, ..ActivateRequest::default() };
    for request in [here, ActivateRequest { gpu: Some(GpuIndex(0)), ..ActivateRequest::default() }] {
        let refused = handle.activate(&key, request.clone()).await;
        let full = matches!(refused, Err(Error::NoCapacity { .. } | Error::Unavailable { .. }));
        assert!(full && handle.whereabouts(key.id) == Whereabouts::Here, "{request:?}: {refused:?}");
    }
    let small = ActivateRequest { node: Some("n2".parse().unwrap()), ..ActivateRequest::default() };
    let refused = handle.activate(&key, small).await;
    let Err(Error::NoCapacity { reason, .. }) = &refused else { panic!("{refused:?}") };
    assert_eq!(reason, "the largest GPU of node 'n2' that could run it has 2MiB");
    let moved = handle.activate(&key, ActivateRequest::default()).await;
    assert!(moving(&moved), "{moved:?}");
    let owner = owner_after(&nodes, &handle, &key).await.handle();
    assert_eq!(*owner.name(), *nodes[2].handle().name(), "the only one that can");
    let activation = owner.activate(&key, ActivateRequest::default()).await.unwrap();
    assert_ne!(activation.source, Source::None);
    assert_eq!(read(&owner, &key, Selection::default()).await.unwrap(), bytes);
    assert!(!handle.shards_of(handle.name()).is_empty(), "the other shards stay");
    owner.release(&key, activation.lease.id).await.unwrap();
    end(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_owner_is_full_of_leased_ones_runs_elsewhere_and_takes_nobodys_lease() {
    let folder = tempfile::tempdir().unwrap();
    let nodes = started(folder.path(), SHARDS, |_| {}).await;
    let handle = nodes[0].handle();
    let bytes = pattern(8, 12_000);
    let first = session(&handle, &bytes).await;
    // 6 of 8 MiB.
    let long = ActivateRequest { ttl: Some(Millis(600_000)), ..ActivateRequest::default() };
    let leased = handle.activate(&first, long).await.unwrap();
    let shard_of = |key: &SessionKey| ShardCount::new(SHARDS).unwrap().shard_of(key.id);
    // One in the leased one's shard stays where it is, whoever has room; and it says so to who names a node.
    let same = empty(&handle, |key| shard_of(key) == shard_of(&first)).await;
    append(&handle, &same, 0, &bytes).await.unwrap();
    let refused = handle.activate(&same, ActivateRequest::default()).await;
    assert!(matches!(refused, Err(Error::NoCapacity { .. })), "{refused:?}");
    let named = ActivateRequest { node: Some("n2".parse().unwrap()), ..ActivateRequest::default() };
    let Err(Error::Unavailable { reason, .. }) = handle.activate(&same, named.clone()).await else {
        panic!("it has no lease")
    };
    assert_eq!(reason, "other sessions of its shard are leased (1)");
    let of_leased = handle.activate(&first, named.clone()).await;
    assert!(matches!(of_leased, Err(Error::Refused(Refusal::Leased { .. }))), "{of_leased:?}");

    let second = empty(&handle, |key| shard_of(key) != shard_of(&first)).await;
    append(&handle, &second, 0, &bytes).await.unwrap();
    whole(&handle, &second).await;
    let moved = handle.activate(&second, ActivateRequest::default()).await;
    assert!(moving(&moved), "{moved:?}");
    let owner = owner_after(&nodes, &handle, &second).await.handle();
    let activation = owner.activate(&second, ActivateRequest::default()).await.unwrap();
    assert_ne!(activation.source, Source::None);
    assert_eq!(handle.get(&first).await.unwrap().lease.unwrap().id, leased.lease.id);
    handle.release(&first, leased.lease.id).await.unwrap();
    owner.release(&second, activation.lease.id).await.unwrap();
    // Whoever has the blocks holds their memory.
    drop((leased, activation));
    // And back, to who asks for it.
    let back = ActivateRequest { node: Some(handle.name().clone()), ..ActivateRequest::default() };
    let moved = owner.activate(&second, back.clone()).await;
    assert!(moving(&moved), "{moved:?}");
    until("it is here again", || async { handle.whereabouts(second.id) == Whereabouts::Here }).await;
    let activation = handle.activate(&second, back).await.unwrap();
    handle.release(&second, activation.lease.id).await.unwrap();
    // A node that cannot hold it is not asked to, nor one that has no such GPU.
    let nine = ActivateRequest { gpu: Some(GpuIndex(9)), ..named };
    assert!(matches!(handle.activate(&second, nine).await, Err(Error::InvalidField { .. })));
    end(nodes).await;
}

//! A node at work: bytes in and out, eviction, restart, failing devices, panicking actors.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cede;
mod cuda;
mod damage;
mod faults;
mod lossy;
mod near;
mod three;

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keepwarm_config::{BatchConfig, Config, GpuConfig, ModelConfig, SingleNode};
use keepwarm_core::session::{Form, Labels, Layout, Order, Part, Planes, Protect, State, TranscriptDelta};
use keepwarm_core::shard::{Precondition, Refusal, WriteMode, Written};
use keepwarm_node::{
    ActivateRequest, CreateRequest, Error, ForkRequest, GpuState, Handle, Node, Receipt, Selection, TurnPart,
    TurnRequest, WriteDone, WriteRequest, WriteStart,
};
use keepwarm_test_devices::gpus;
use keepwarm_types::{
    Bytes, ColdReason, GpuIndex, Millis, Outcome, Owner, SessionKey, Source, TenantName, Tier, Tokens,
};
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(20);

fn config(folder: Option<&Path>, pinned: u64) -> Config {
    config_on(gpus(Bytes(8 << 20), 2), folder, pinned)
}

fn config_on(gpus: Vec<GpuConfig>, folder: Option<&Path>, pinned: u64) -> Config {
    Config::single(SingleNode {
        name: "n1".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        gpus,
        pinned: Bytes(pinned),
        data_dir: folder.map(Path::to_owned),
        // An engine gets memory to work in, which these tests read GPUs' bytes through.
        models: vec![ModelConfig {
            name: "tiny".to_owned(),
            source: "tiny:5".to_owned(),
            instances: (1, 1),
            batch: BatchConfig::default(),
        }],
    })
}

async fn start(folder: Option<&Path>, pinned: u64) -> Node {
    Node::start(config(folder, pinned), &"n1".parse().unwrap()).await.unwrap()
}

fn tenant() -> TenantName {
    "default".parse().unwrap()
}

fn layout(order: Order) -> Arc<Layout> {
    let planes = Planes { tokens_per_block: 16, planes: 8, plane_bytes_per_token: 64, order };
    let part = Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: None };
    Arc::new(Layout::new("model", "print", vec![part]).unwrap())
}

const TOKEN: usize = 512;

async fn create(handle: &Handle, order: Order, protect_ms: u64) -> SessionKey {
    let request = CreateRequest {
        id: None,
        layout: layout(order),
        protect: Protect::For(Millis(protect_ms)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    handle.create(&tenant(), request).await.unwrap().0.manifest.key.clone()
}

async fn append(handle: &Handle, key: &SessionKey, offset: u64, bytes: &[u8]) -> Result<Written, Error> {
    let request = WriteRequest {
        part: "kv".to_owned(),
        mode: WriteMode::Append { offset },
        precondition: Precondition::default(),
        txn: None,
        body: Some(Bytes(bytes.len() as u64)),
        digest: None,
    };
    let WriteStart::Sink(mut sink) = handle.open_write(key, request).await? else { panic!("repeated") };
    for chunk in bytes.chunks(5000) {
        sink.write(chunk).await?;
    }
    match sink.finish().await? {
        WriteDone::Committed(written, _) => Ok(written),
        WriteDone::Staged(_) => panic!("staged"),
    }
}

async fn read(handle: &Handle, key: &SessionKey, selection: Selection) -> Result<Vec<u8>, Error> {
    let chunks = handle.open_read(key, "kv").await?.select(selection)?;
    let mut bytes = Vec::new();
    for chunk in chunks {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

fn pattern(seed: u64, tokens: usize) -> Vec<u8> {
    (0..tokens * TOKEN).map(|n| (n as u64 * 31 + seed * 7919) as u8).collect()
}

async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_back_as_they_went_in_in_any_selection() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 1000).await;
    let bytes = pattern(1, 70);
    append(&handle, &key, 0, &bytes[..20 * TOKEN]).await.unwrap();
    append(&handle, &key, 20, &bytes[20 * TOKEN..]).await.unwrap();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), bytes);
    let tokens = Selection { tokens: Some((5, Some(40))), ..Selection::default() };
    assert_eq!(read(&handle, &key, tokens).await.unwrap(), bytes[5 * TOKEN..40 * TOKEN]);
    let range = Selection { bytes: Some((1000, 30_000)), ..Selection::default() };
    assert_eq!(read(&handle, &key, range).await.unwrap(), bytes[1000..30_000]);
    let planes = Selection { planes: Some((2, 3)), ..Selection::default() };
    let expected: Vec<u8> = bytes.chunks(TOKEN).flat_map(|token| &token[128..256]).copied().collect();
    assert_eq!(read(&handle, &key, planes).await.unwrap(), expected);
    let beyond = Selection { tokens: Some((5, Some(71))), ..Selection::default() };
    assert!(matches!(read(&handle, &key, beyond).await, Err(Error::Range { .. })));
    node.shutdown(DEADLINE).await;
}

/// A plane-ordered body from its tokens: blocks of 16, each plane by plane.
fn planes(tokens: &[u8], first: usize) -> Vec<u8> {
    let count = tokens.len() / TOKEN;
    let mut out = Vec::new();
    let mut at = 0;
    while at < count {
        let take = (16 - (first + at) % 16).min(count - at);
        for plane in 0..8 {
            for token in at..at + take {
                out.extend_from_slice(&tokens[token * TOKEN + plane * 64..][..64]);
            }
        }
        at += take;
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plane_ordered_tail_is_continued_plane_by_plane() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Plane, 1000).await;
    let tokens = pattern(2, 45);
    append(&handle, &key, 0, &planes(&tokens[..21 * TOKEN], 0)).await.unwrap();
    append(&handle, &key, 21, &planes(&tokens[21 * TOKEN..], 21)).await.unwrap();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), planes(&tokens, 0));
    append(&handle, &key, 32, &planes(&tokens[32 * TOKEN..40 * TOKEN], 0)).await.unwrap();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), planes(&tokens[..40 * TOKEN], 0));
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G2
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_body_leaves_the_session_as_it_was() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 1000).await;
    append(&handle, &key, 0, &pattern(1, 10)).await.unwrap();
    let (_, before) = handle.used().await;
    let request = |body| WriteRequest {
        part: "kv".to_owned(),
        mode: WriteMode::Append { offset: 10 },
        precondition: Precondition::default(),
        txn: None,
        body: Some(Bytes(body)),
        digest: None,
    };
    let WriteStart::Sink(mut sink) = handle.open_write(&key, request(TOKEN as u64 * 20)).await.unwrap()
    else {
        panic!()
    };
    sink.write(&[1; 700]).await.unwrap();
    assert!(matches!(sink.finish().await, Err(Error::BodyLength(_))));
    assert!(matches!(
        handle.open_write(&key, request(100)).await,
        Err(Error::Refused(Refusal::InvalidField { .. }))
    ));
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), pattern(1, 10));
    until("the broken write's memory comes back", || async { handle.used().await.1 == before }).await;
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_from_pinned_to_hbm_and_make_room_for_others() {
    let node = start(None, 64 << 20).await;
    let handle = node.handle();
    let mut keys = Vec::new();
    // 3 MiB each: two fit the 8 MiB of a GPU.
    for n in 0..8 {
        let key = create(&handle, Order::Token, 60_000).await;
        append(&handle, &key, 0, &pattern(n, 6144)).await.unwrap();
        keys.push(key);
    }
    for round in 0..3 {
        for (n, key) in keys.iter().enumerate() {
            let activation = handle.activate(key, ActivateRequest::default()).await.unwrap();
            let owner = Owner { tenant: tenant(), birth: activation.manifest.birth };
            let blocks = handle.on_cpu(&owner, activation.home.gpu, &activation.blocks[0]).await.unwrap();
            let bytes: Vec<u8> =
                blocks.iter().flat_map(|block| block.bytes(&owner).unwrap()).copied().collect();
            assert_eq!(bytes, pattern(n as u64, 6144), "round {round}");
            handle.release(key, activation.lease.id).await.unwrap();
        }
    }
    let warm = handle.activate(&keys[7], ActivateRequest::default()).await.unwrap();
    assert_eq!((warm.source, warm.bytes_moved), (Source::Hbm, Bytes(0)));
    assert!(matches!(
        handle.activate(&keys[7], ActivateRequest::default()).await,
        Err(Error::Refused(Refusal::Leased { .. }))
    ));
    assert_eq!(handle.demote(&keys[7], Tier::Pinned).await.unwrap().outcome, Outcome::Rejected);
    node.shutdown(DEADLINE).await;
}

/// A turn's blocks may not leave before their checkpoint has ended: whoever needs their room waits for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_restored_right_after_anothers_turn_on_a_gpu_with_room_for_one() {
    let node = start(None, 128 << 20).await;
    let handle = node.handle();
    let long = 10_000;
    let other = create(&handle, Order::Token, 60_000).await;
    append(&handle, &other, 0, &pattern(1, long)).await.unwrap();
    for _ in 0..8 {
        let key = create(&handle, Order::Plane, 60_000).await;
        turn(&handle, &key, long).await;
        let gpu = handle.get(&key).await.unwrap().home.map(|home| home.gpu);
        let activation =
            handle.activate(&other, ActivateRequest { gpu, ..ActivateRequest::default() }).await.unwrap();
        assert_eq!(activation.source, Source::Pinned, "it had left for the turn");
        handle.release(&other, activation.lease.id).await.unwrap();
        drop(activation);
        handle.settled(&key).await.unwrap();
        handle.demote(&other, Tier::Pinned).await.unwrap();
    }
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_pressure_unprotected_sessions_go_cold_and_protected_ones_stay() {
    let node = start(None, 16 << 20).await;
    let handle = node.handle();
    let kept = create(&handle, Order::Token, 600_000).await;
    append(&handle, &kept, 0, &pattern(100, 4096)).await.unwrap();
    let mut keys = Vec::new();
    for n in 0..12 {
        let key = create(&handle, Order::Token, 0).await;
        append(&handle, &key, 0, &pattern(n, 4096)).await.unwrap();
        keys.push(key);
    }
    assert_eq!(handle.get(&keys[0]).await.unwrap().manifest.state, State::Cold(ColdReason::Evicted));
    assert!(matches!(
        read(&handle, &keys[0], Selection::default()).await,
        Err(Error::Refused(Refusal::Cold { .. }))
    ));
    assert_eq!(read(&handle, &kept, Selection::default()).await.unwrap(), pattern(100, 4096));
    for _ in 0..8 {
        let key = create(&handle, Order::Token, 600_000).await;
        match append(&handle, &key, 0, &pattern(1, 4096)).await {
            Ok(_) => {}
            Err(Error::NoCapacity { tier: Tier::Pinned, retry_after, .. }) => {
                assert!(retry_after >= Millis(1000));
                node.shutdown(DEADLINE).await;
                return;
            }
            Err(other) => panic!("{other}"),
        }
    }
    panic!("protected sessions of 18 MiB were taken into 16 MiB");
}

/// A turn as an executor runs it: working blocks in HBM, sealed, committed, checkpointed.
async fn turn(handle: &Handle, key: &SessionKey, tokens: usize) {
    let activation = handle.activate(key, ActivateRequest::default()).await.unwrap();
    let owner = Owner { tenant: key.tenant.clone(), birth: activation.manifest.birth };
    let count = tokens.div_ceil(16);
    let scratch = handle.scratch(&owner, activation.home.gpu, Bytes(16 * TOKEN as u64), count).await.unwrap();
    let packed = planes(&pattern(9, tokens), 0);
    let blocks = scratch.into_iter().zip(packed.chunks(16 * TOKEN)).map(|(mut block, bytes)| {
        block.write(0, bytes).unwrap();
        block.seal(bytes.len()).unwrap()
    });
    let blocks = handle.on_gpu(&owner, activation.home.gpu, blocks.collect()).await.unwrap();
    let part = TurnPart { part: 0, first_block: 0, blocks, length: Bytes((tokens * TOKEN) as u64) };
    let transcript = TranscriptDelta { tokens: (0..tokens as u32).collect(), ..TranscriptDelta::default() };
    let request =
        TurnRequest { lease: activation.lease.id, gpu: activation.home.gpu, transcript, parts: vec![part] };
    assert_eq!(handle.turn(key, request).await.unwrap().length, Tokens(tokens as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turns_transcript_is_committed_and_its_state_follows() {
    let folder = tempfile::tempdir().unwrap();
    let node = start(Some(folder.path()), 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Plane, 60_000).await;
    turn(&handle, &key, 37).await;
    handle.settled(&key).await.unwrap();
    let info = handle.get(&key).await.unwrap();
    assert_eq!((info.manifest.length_tokens, info.lease), (Tokens(37), None));
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), planes(&pattern(9, 37), 0));
    let again = handle.activate(&key, ActivateRequest::default()).await.unwrap();
    assert_eq!((again.source, again.bytes_moved), (Source::Hbm, Bytes(0)), "the turn's blocks stayed");
    let report = node.shutdown(DEADLINE).await;
    assert_eq!((report.unfinished, report.checkpoints), (0, 0));
    drop((handle, again));
    let node = restarted(folder.path()).await;
    let handle = node.handle();
    let (info, transcript) = handle.transcript(&key).await.unwrap();
    assert_eq!(info.manifest.state, State::Cold(ColdReason::Restarted));
    assert_eq!(transcript.tokens, (0..37).collect::<Vec<u32>>());
    let cold = handle.activate(&key, ActivateRequest::default()).await.unwrap();
    assert_eq!((cold.source, cold.manifest.transcript_tokens), (Source::None, Tokens(37)));
    node.shutdown(DEADLINE).await;
}

/// The old node's catalog closes when its last user is gone.
async fn restarted(folder: &Path) -> Node {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match Node::start(config(Some(folder), 32 << 20), &"n1".parse().unwrap()).await {
            Ok(node) => return node,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_sessions_give_their_memory_back() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    for round in 0..50 {
        let key = create(&handle, Order::Token, 60_000).await;
        append(&handle, &key, 0, &pattern(round, 200)).await.unwrap();
        let activation = handle.activate(&key, ActivateRequest::default()).await.unwrap();
        drop(activation);
        let receipt = handle.delete(&key).await.unwrap();
        assert_eq!(receipt.freed.len(), 2, "{receipt:?}");
        assert!(matches!(handle.get(&key).await, Err(Error::Refused(Refusal::Deleted { .. }))));
    }
    until("all memory is back", || async { handle.used().await == (Bytes(0), Bytes(0)) }).await;
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_counts_only_what_nobody_else_holds() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let parent = create(&handle, Order::Token, 60_000).await;
    append(&handle, &parent, 0, &pattern(1, 64)).await.unwrap();
    let (_, child) = handle.fork(&parent, ForkRequest::default()).await.unwrap();
    let child = child.manifest.key.clone();
    append(&handle, &child, 64, &pattern(2, 32)).await.unwrap();
    let whole = 64 * TOKEN as u64;
    let pinned = |receipt: &Receipt| {
        let pinned = receipt.freed.iter().filter(|freed| freed.tier == Tier::Pinned);
        pinned.map(|freed| freed.bytes.0).sum::<u64>()
    };
    let first = handle.delete(&parent).await.unwrap();
    assert_eq!(pinned(&first), 0, "the fork has all of it: {first:?}");
    assert_eq!(read(&handle, &child, Selection::default()).await.unwrap()[..64 * TOKEN], pattern(1, 64));
    let second = handle.delete(&child).await.unwrap();
    assert_eq!(pinned(&second), whole + 32 * TOKEN as u64, "{second:?}");
    assert!(second.freed.iter().all(|freed| !freed.scrubbed), "nothing was zeroed yet: {second:?}");
    let read_on = create(&handle, Order::Token, 60_000).await;
    append(&handle, &read_on, 0, &pattern(3, 64)).await.unwrap();
    let reader = handle.open_read(&read_on, "kv").await.unwrap();
    let third = handle.delete(&read_on).await.unwrap();
    assert_eq!(pinned(&third), 0, "a reader holds it: {third:?}");
    drop(reader);
    until("all memory is back", || async { handle.used().await == (Bytes(0), Bytes(0)) }).await;
    node.shutdown(DEADLINE).await;
}

//! Sessions whose cold form is FP8: what comes back is what the CPU's functions say, and it degrades once.

use futures::StreamExt;
use keepwarm_core::session::{Fp8, Manifest, Number};
use keepwarm_memory::fp8::{self, Shape, dequantise_block, quantise_block};
use keepwarm_node::archive;

use super::*;

const SHAPE: Shape = Shape { number: fp8::Number::F16, planes: 8 };
const BLOCK: usize = 16 * TOKEN;

async fn lossy(handle: &Handle) -> SessionKey {
    let layout = layout(Order::Plane).with_cold(Some(Fp8 { from: Number::F16 })).unwrap();
    let request = CreateRequest {
        id: None,
        layout: Arc::new(layout),
        protect: Protect::For(Millis(60_000)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    handle.create(&tenant(), request).await.unwrap().0.manifest.key.clone()
}

/// Halves between -2 and 2, all different from their neighbours.
fn halves(seed: u64, tokens: usize) -> Vec<u8> {
    let bits = |n: u64| (n.wrapping_add(seed << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16;
    (0..(tokens * TOKEN / 2) as u64).flat_map(|n| (bits(n) & 0xbfff).to_le_bytes()).collect()
}

/// What is left of raw blocks after their way to a cold tier.
fn rounded(raw: &[u8]) -> Vec<u8> {
    let one = |block: &[u8]| dequantise_block(&SHAPE, &quantise_block(&SHAPE, block).unwrap()).unwrap();
    raw.chunks(BLOCK).flat_map(one).collect()
}

/// A turn that leaves these raw bytes from a block on, whatever was there.
async fn leave(handle: &Handle, key: &SessionKey, first_block: usize, raw: &[u8]) {
    let activation = handle.activate(key, ActivateRequest::default()).await.unwrap();
    let (owner, gpu) = (Owner { tenant: tenant(), birth: activation.manifest.birth }, activation.home.gpu);
    let scratch = handle.scratch(&owner, gpu, Bytes(BLOCK as u64), raw.len().div_ceil(BLOCK)).await.unwrap();
    let blocks = scratch.into_iter().zip(raw.chunks(BLOCK)).map(|(mut block, bytes)| {
        block.write(0, bytes).unwrap();
        block.seal(bytes.len()).unwrap()
    });
    let blocks = handle.on_gpu(&owner, gpu, blocks.collect()).await.unwrap();
    let length = first_block * BLOCK + raw.len();
    let part = TurnPart { part: 0, first_block: first_block as u32, blocks, length: Bytes(length as u64) };
    let before = activation.manifest.transcript_tokens;
    let tokens = (before.0 as u32..(length / TOKEN) as u32).collect();
    let transcript = TranscriptDelta { keep_tokens: before, tokens, ..TranscriptDelta::default() };
    let request = TurnRequest { lease: activation.lease.id, gpu, transcript, parts: vec![part] };
    handle.turn(key, request).await.unwrap();
    handle.settled(key).await.unwrap();
}

/// Where a session's state was, and its bytes on the GPU.
async fn on_gpu(handle: &Handle, key: &SessionKey) -> (Source, Vec<u8>) {
    let activation = handle.activate(key, ActivateRequest::default()).await.unwrap();
    let owner = Owner { tenant: tenant(), birth: activation.manifest.birth };
    let blocks = handle.on_cpu(&owner, activation.home.gpu, &activation.blocks[0]).await.unwrap();
    let bytes = blocks.iter().flat_map(|block| block.bytes(&owner).unwrap()).copied().collect();
    handle.release(key, activation.lease.id).await.unwrap();
    (activation.source, bytes)
}

async fn manifest(handle: &Handle, key: &SessionKey) -> Arc<Manifest> {
    Arc::clone(&handle.get(key).await.unwrap().manifest)
}

#[tokio::test(flavor = "multi_thread")]
async fn state_comes_back_rounded_once_however_often_it_leaves() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = lossy(&handle).await;
    let raw = halves(1, 37);
    assert_ne!(rounded(&raw), raw);
    leave(&handle, &key, 0, &raw).await;
    let first = manifest(&handle, &key).await;
    // 37 tokens of 512 bytes in three blocks with 8 scales each.
    assert_eq!((first.parts[0].length, first.stored_bytes()), (Bytes(37 * 512), Bytes(37 * 256 + 3 * 32)));
    assert_eq!(on_gpu(&handle, &key).await, (Source::Hbm, raw.clone()), "a GPU has what the engine left");
    for _ in 0..2 {
        assert_eq!(handle.demote(&key, Tier::Pinned).await.unwrap().outcome, Outcome::Accepted);
        assert_eq!(on_gpu(&handle, &key).await, (Source::Pinned, rounded(&raw)));
    }
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), rounded(&raw));
    // A turn goes on in the restored tail: full blocks stay as they are stored, and the tail is a new one.
    let mut tail = rounded(&raw)[2 * BLOCK..].to_vec();
    tail.extend(halves(2, 3));
    leave(&handle, &key, 2, &tail).await;
    let second = manifest(&handle, &key).await;
    assert_eq!(
        second.parts[0].blocks[..2],
        first.parts[0].blocks[..2],
        "what did not change was not stored again"
    );
    assert_ne!(second.parts[0].blocks[2].instance, first.parts[0].blocks[2].instance);
    handle.demote(&key, Tier::Pinned).await.unwrap();
    let expected = [&rounded(&raw)[..2 * BLOCK], &rounded(&tail)].concat();
    assert_eq!(on_gpu(&handle, &key).await, (Source::Pinned, expected));
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read_rounded_and_what_was_read_is_written_unchanged() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = lossy(&handle).await;
    let raw = halves(3, 40);
    let written = append(&handle, &key, 0, &raw).await.unwrap();
    assert_eq!((written.length, written.length_tokens), (Bytes(40 * 512), Tokens(40)));
    let once = read(&handle, &key, Selection::default()).await.unwrap();
    assert_eq!(once, rounded(&raw));
    append(&handle, &key, 0, &once).await.unwrap();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), once);
    // Selections are of the raw bytes.
    let range = Selection { bytes: Some((1000, 15_001)), ..Selection::default() };
    assert_eq!(read(&handle, &key, range).await.unwrap(), once[1000..15_001]);
    let tokens = Selection { tokens: Some((33, None)), planes: Some((1, 1)), ..Selection::default() };
    let plane = &once[2 * BLOCK..][8 * 64..16 * 64];
    assert_eq!(read(&handle, &key, tokens).await.unwrap(), plane[64..]);
    let reader = handle.open_read(&key, "kv").await.unwrap();
    assert_eq!((reader.length(), reader.digest()), (Bytes(40 * 512), None));
    assert_eq!(reader.compute_digest().unwrap(), twox_hash::XxHash3_128::oneshot(&once));
    let inside = append(&handle, &key, 40, &halves(4, 1)).await;
    let refused = |error: &Error| matches!(error, Error::Refused(Refusal::InvalidField { field, .. }) if field == "offset");
    assert!(refused(&inside.unwrap_err()));
    // Without a length, block by block.
    let request = WriteRequest {
        part: "kv".to_owned(),
        mode: WriteMode::Append { offset: 32 },
        precondition: Precondition::default(),
        txn: None,
        body: None,
        digest: None,
    };
    let WriteStart::Sink(mut sink) = handle.open_write(&key, request).await.unwrap() else {
        panic!("repeated")
    };
    let more = halves(5, 50);
    for chunk in more.chunks(777) {
        sink.write(chunk).await.unwrap();
    }
    sink.finish().await.unwrap();
    let all = [&once[..2 * BLOCK], &rounded(&more)].concat();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), all);
    // An archive has the stored blocks, and its import the same.
    let pieces: Vec<_> = archive::export(&handle, &key).await.unwrap().map(Result::unwrap).collect();
    assert!(pieces.iter().map(|piece| piece.len()).sum::<usize>() < all.len());
    let stream = futures::stream::iter(pieces.into_iter().map(Ok)).boxed();
    let id = keepwarm_types::SessionId::new(uuid::Uuid::new_v4()).unwrap();
    let taken = archive::import(&handle, &tenant(), Some(id), stream).await.unwrap();
    let checksums =
        |manifest: &Manifest| manifest.instances().map(|block| block.checksum).collect::<Vec<_>>();
    assert_eq!(checksums(&taken.manifest), checksums(&*manifest(&handle, &key).await));
    assert!(taken.manifest.layout.is_lossy());
    assert_eq!(read(&handle, &taken.manifest.key, Selection::default()).await.unwrap(), all);
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn stored_bytes_that_are_damaged_are_an_error_and_not_numbers() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = lossy(&handle).await;
    append(&handle, &key, 0, &halves(6, 40)).await.unwrap();
    handle.flip_pinned_bit(&key).await.unwrap();
    assert!(matches!(read(&handle, &key, Selection::default()).await, Err(Error::Corrupt { .. })));
    until("the damaged copy is let go", || async {
        manifest(&handle, &key).await.state == State::Cold(ColdReason::Corrupt)
    })
    .await;
    append(&handle, &key, 0, &halves(6, 40)).await.unwrap();
    handle.flip_pinned_bit(&key).await.unwrap();
    let restored = handle.activate(&key, ActivateRequest::default()).await;
    assert!(matches!(restored, Err(Error::Corrupt { .. })));
    assert_eq!(manifest(&handle, &key).await.state, State::Cold(ColdReason::Corrupt));
    node.shutdown(DEADLINE).await;
}

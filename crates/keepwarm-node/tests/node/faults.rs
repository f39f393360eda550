//! What fails: devices, copies, actors, bytes. Alone, and under load.

use super::*;

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_sticky_device_is_fenced_and_its_sessions_run_elsewhere() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    let first = handle
        .activate(&key, ActivateRequest { gpu: Some(GpuIndex(0)), ..ActivateRequest::default() })
        .await
        .unwrap();
    handle.release(&key, first.lease.id).await.unwrap();
    handle.demote(&key, Tier::Pinned).await.unwrap();
    handle.faults(GpuIndex(0)).unwrap().sticky_after(0);
    let error = handle
        .activate(&key, ActivateRequest { gpu: Some(GpuIndex(0)), ..ActivateRequest::default() })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(matches!(&handle.gpus()[0].state, GpuState::Fenced(reason) if reason.contains("sticky")));
    let second = handle.activate(&key, ActivateRequest::default()).await.unwrap();
    assert_eq!((second.home.gpu, second.source), (GpuIndex(1), Source::Pinned));
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flipped_on_the_way_to_hbm_is_refused_and_the_session_lives() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    handle.faults(GpuIndex(0)).unwrap().flip_after(2);
    let wish = ActivateRequest { gpu: Some(GpuIndex(0)), ..ActivateRequest::default() };
    let error = handle.activate(&key, wish.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { at: "restore", .. }), "{error}");
    assert_eq!(handle.activate(&key, wish).await.unwrap().source, Source::Pinned, "the pinned copy is whole");
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_gpu_actor_costs_a_restore_and_nothing_else() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    let first = handle.activate(&key, ActivateRequest::default()).await.unwrap();
    handle.release(&key, first.lease.id).await.unwrap();
    let home = first.home.gpu;
    drop(first);
    let mut events = handle.events();
    handle.panic_gpu(home);
    let told = tokio::time::timeout(DEADLINE, async {
        loop {
            if events.recv().await.unwrap().kind == "failure" {
                return;
            }
        }
    });
    told.await.expect("the failure is told");
    let wish = ActivateRequest { gpu: Some(home), ..ActivateRequest::default() };
    until("the GPU serves again", || async { handle.activate(&key, wish.clone()).await.is_ok() }).await;
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), pattern(3, 100));
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_shard_comes_back_cold_from_the_catalog() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    handle.panic_shard(&key);
    until("the shard is back", || async {
        matches!(handle.get(&key).await, Ok(info) if info.manifest.state == State::Cold(ColdReason::Restarted))
    })
    .await;
    append(&handle, &key, 0, &pattern(4, 50)).await.unwrap();
    assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), pattern(4, 50));
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn damaged_pinned_bytes_are_dropped_and_the_session_says_so() {
    let node = start(None, 32 << 20).await;
    let handle = node.handle();
    let key = create(&handle, Order::Token, 60_000).await;
    append(&handle, &key, 0, &pattern(3, 100)).await.unwrap();
    handle.flip_pinned_bit(&key).await.unwrap();
    let error = handle.activate(&key, ActivateRequest::default()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let again = handle.activate(&key, ActivateRequest::default()).await.unwrap();
    assert_eq!((again.source, again.manifest.state), (Source::None, State::Cold(ColdReason::Corrupt)));
    node.shutdown(DEADLINE).await;
}

/// Bytes of which no two tokens are alike.
fn varied(seed: u64, tokens: usize) -> Vec<u8> {
    (0..tokens * TOKEN).map(|n| ((n + n / TOKEN * 3) as u64 * 31 + seed * 7919) as u8).collect()
}

/// Activates, on a GPU or on any, compares what is in HBM with what was acknowledged, and releases.
pub(crate) async fn run(
    handle: &Handle,
    key: &SessionKey,
    gpu: Option<GpuIndex>,
    acked: &[u8],
) -> Result<GpuIndex, Error> {
    let wish = ActivateRequest { gpu, ..ActivateRequest::default() };
    let activation = handle.activate(key, wish).await?;
    let owner = Owner { tenant: tenant(), birth: activation.manifest.birth };
    let blocks = handle.on_cpu(&owner, activation.home.gpu, &activation.blocks[0]).await;
    // A device that failed since must not keep the session leased.
    handle.release(key, activation.lease.id).await?;
    let bytes: Vec<u8> = blocks?.iter().flat_map(|block| block.bytes(&owner).unwrap()).copied().collect();
    assert!(bytes == acked, "HBM has other bytes than were acknowledged");
    Ok(activation.home.gpu)
}

/// Writes to sessions, reads and activates them, until told to stop. Gives what was acknowledged of each.
async fn load(handle: Handle, seed: u64, served: watch::Sender<u64>, stop: Arc<AtomicBool>) -> Load {
    let mut sessions = Vec::new();
    for n in 0..3 {
        sessions.push((create(&handle, Order::Token, 60_000).await, varied(seed * 3 + n, 600), 0));
    }
    let mut refused = Vec::new();
    for round in 0_usize.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let at = round % 3;
        let (key, bytes, acked) = &mut sessions[at];
        let more = (*acked + 7).min(600);
        if more > *acked {
            match append(&handle, key, *acked as u64, &bytes[*acked * TOKEN..more * TOKEN]).await {
                Ok(_) => *acked = more,
                Err(error) => refused.push(error),
            }
        }
        let acked = &bytes[..*acked * TOKEN];
        let gpu = [Some(GpuIndex(0)), Some(GpuIndex(1)), None][round / 3 % 3];
        match run(&handle, key, gpu, acked).await {
            Ok(_) => served.send_modify(|served| *served += 1),
            Err(error) => refused.push(error),
        }
        assert!(acked.is_empty() || read(&handle, key, Selection::default()).await.unwrap() == acked);
    }
    (sessions, refused)
}

/// Sessions, with their bytes and how many tokens of them were acknowledged; and who was refused.
pub(crate) type Load = (Vec<(SessionKey, Vec<u8>, usize)>, Vec<Error>);

/// Injects a fault under load, and gives the node, what it must still have, and whether anyone was refused.
pub(crate) async fn fault_under_load(node: Node, fault: impl FnOnce(&Handle)) -> (Node, Load) {
    let handle = node.handle();
    let (served, mut watched) = watch::channel(0);
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> =
        (0..4).map(|n| tokio::spawn(load(handle.clone(), n, served.clone(), Arc::clone(&stop)))).collect();
    tokio::time::timeout(DEADLINE, watched.wait_for(|served| *served >= 40)).await.unwrap().unwrap();
    fault(&handle);
    tokio::time::timeout(DEADLINE, watched.wait_for(|served| *served >= 160)).await.unwrap().unwrap();
    stop.store(true, Ordering::SeqCst);
    let (mut sessions, mut refused) = Load::default();
    for task in tasks {
        let (more, errors) = task.await.expect("no wrong bytes");
        sessions.extend(more);
        refused.extend(errors);
    }
    for error in &refused {
        let explicit = matches!(error, Error::Unavailable { .. } | Error::Overloaded { .. });
        assert!(explicit, "{error:?}");
    }
    (node, (sessions, refused))
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_actor_that_panics_under_load_loses_no_acknowledged_byte() {
    let (node, (sessions, _)) =
        fault_under_load(start(None, 64 << 20).await, |handle| handle.panic_gpu(GpuIndex(0))).await;
    let handle = node.handle();
    for (key, bytes, acked) in &sessions {
        let bytes = &bytes[..acked * TOKEN];
        assert!(read(&handle, key, Selection::default()).await.unwrap() == bytes);
        let gpu = Some(GpuIndex(0));
        until("the GPU serves again", || async { run(&handle, key, gpu, bytes).await.is_ok() }).await;
    }
    assert_eq!(handle.gpus()[0].state, GpuState::Up);
    node.shutdown(DEADLINE).await;
}

//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_turns_sticky_under_load_loses_no_acknowledged_byte() {
    let sticky = |handle: &Handle| handle.faults(GpuIndex(0)).unwrap().sticky_after(3);
    let (node, (sessions, refused)) = fault_under_load(start(None, 64 << 20).await, sticky).await;
    let handle = node.handle();
    assert!(!refused.is_empty(), "who asked for the fenced device is told");
    assert!(matches!(&handle.gpus()[0].state, GpuState::Fenced(reason) if reason.contains("sticky")));
    for (key, bytes, acked) in &sessions {
        let bytes = &bytes[..acked * TOKEN];
        assert!(read(&handle, key, Selection::default()).await.unwrap() == bytes);
        assert_eq!(run(&handle, key, None, bytes).await.unwrap(), GpuIndex(1), "the other one restores");
    }
    node.shutdown(DEADLINE).await;
}

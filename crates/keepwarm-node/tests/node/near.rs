//! Sessions that go from one GPU of a node to another: over a link where there is one, else, and where that fails, from pinned
//! memory. Each case is a process of its own, with a machine of its own.

use std::process::Command;

use keepwarm_test_devices::softcuda;

use super::cuda::start_on;
use super::faults::run;
use super::*;

/// Set in a child process of a test: what it is to do.
const CHILD: &str = "KEEPWARM_TEST_CHILD";
/// Bytes of the sessions here: four blocks of 16 tokens, and a tail of 6.
const TOKENS: usize = 70;

/// Runs this test once more, alone, on that machine; the word is for the child, which gets it from here.
fn child(test: &str, machine: &str, word: &str) -> Option<String> {
    if let Ok(word) = std::env::var(CHILD) {
        return Some(word);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("near::{test}"), "--exact", "--nocapture"]).env(CHILD, word);
    let ended = command.env("SOFTCUDA_DEVICES", machine).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    let complained = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.contains("1 passed"), "'{word}': {said}\n{complained}");
    None
}

const LINKED: &str = "gpus=2,memory=256MiB,uuids=process";

/// How often this process has called a function of the driver's.
fn calls(symbol: &str) -> u64 {
    let statistics = softcuda().statistics();
    let digits = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>();
    statistics.split_once(&format!("\"{symbol}\":")).map_or(0, |(_, rest)| digits(rest).parse().unwrap())
}

fn on(gpu: u16) -> ActivateRequest {
    ActivateRequest { gpu: Some(GpuIndex(gpu)), ..ActivateRequest::default() }
}

/// Activates on a GPU and releases; gives the source and how much was moved. The bytes must be these.
async fn activated(handle: &Handle, key: &SessionKey, gpu: u16, bytes: &[u8]) -> (Source, Bytes) {
    let activation = handle.activate(key, on(gpu)).await.unwrap();
    handle.release(key, activation.lease.id).await.unwrap();
    let told = (activation.source, activation.bytes_moved);
    drop(activation);
    assert_eq!(run(handle, key, Some(GpuIndex(gpu)), bytes).await.unwrap(), GpuIndex(gpu));
    told
}

/// A session that is resident on GPU 0.
async fn resident(handle: &Handle, seed: u64) -> (SessionKey, Vec<u8>) {
    let (key, bytes) = (create(handle, Order::Token, 60_000).await, pattern(seed, TOKENS));
    append(handle, &key, 0, &bytes).await.unwrap();
    assert_eq!(activated(handle, &key, 0, &bytes).await, (Source::Pinned, Bytes(bytes.len() as u64)));
    (key, bytes)
}

/// The moves of a session so far.
async fn moves(handle: &Handle, key: &SessionKey) -> Vec<(String, String, u64)> {
    let moves = handle.explain(key).await.unwrap().moves.into_iter();
    moves.map(|moved| (moved.from, moved.to, moved.bytes.0)).collect()
}

fn step(from: &str, to: &str, bytes: usize) -> (String, String, u64) {
    (from.to_owned(), to.to_owned(), bytes as u64)
}

/// Threads of this process whose name begins so.
fn threads(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|thread| thread.starts_with(name)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_straight_from_one_gpu_to_another() {
    if child("a_session_goes_straight_from_one_gpu_to_another", LINKED, "both ways").is_none() {
        return;
    }
    let node = start_on(0).await;
    let handle = node.handle();
    let (key, bytes) = resident(&handle, 1).await;
    assert_eq!(calls("cuCtxEnablePeerAccess"), 0, "a link before anybody needs it");
    let down = calls("cuMemcpyHtoDAsync_v2");
    let verdict = handle.migrate(&key, None, Some(GpuIndex(1))).await.unwrap();
    assert_eq!(verdict.outcome, Outcome::Accepted, "{verdict:?}");
    assert!(calls("cuMemcpyPeerAsync") > 0);
    let all = bytes.len();
    assert_eq!(moves(&handle, &key).await.last().unwrap(), &step("hbm:0", "hbm:1", all));
    assert_eq!(activated(&handle, &key, 1, &bytes).await, (Source::Hbm, Bytes(0)));
    // And back: what was at the first one left with the migration.
    assert_eq!(activated(&handle, &key, 0, &bytes).await, (Source::Hbm, Bytes(all as u64)));
    assert_eq!(moves(&handle, &key).await.last().unwrap(), &step("hbm:1", "hbm:0", all));
    assert_eq!(calls("cuMemcpyHtoDAsync_v2"), down, "bytes came from pinned memory");
    let told = handle.metrics().encode();
    for (from, to) in [("hbm:0", "hbm:1"), ("hbm:1", "hbm:0")] {
        let line = format!("keepwarm_moves_bytes_total{{from=\"{from}\",to=\"{to}\"}} {all}\n");
        assert!(told.contains(&line), "{told}");
    }
    // The next one finds the links there.
    let (other, others) = resident(&handle, 2).await;
    assert_eq!(activated(&handle, &other, 1, &others).await, (Source::Hbm, Bytes(all as u64)));
    assert_eq!(calls("cuCtxEnablePeerAccess"), 2);
    let streams: Vec<_> = handle.gpus()[1].scratch.iter().map(|pools| pools.stream).collect();
    assert_eq!(streams, ["in", "out", "links"]);
    if std::env::var_os("SOFTCUDA_KERNELS").is_some() {
        assert!(handle.gpus()[1].scratch.iter().all(|pools| pools.used > Bytes(0)), "{:?}", handle.gpus()[1]);
    }
    // Nothing keeps what was copied.
    for key in [&key, &other] {
        handle.delete(key).await.unwrap();
    }
    until("all memory", || async { handle.used().await == (Bytes(0), Bytes(0)) }).await;
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_other_gpu_has_not_comes_from_pinned_memory_in_the_same_load() {
    let name = "what_the_other_gpu_has_not_comes_from_pinned_memory_in_the_same_load";
    if child(name, LINKED, "mixed").is_none() {
        return;
    }
    let node = start_on(0).await;
    let handle = node.handle();
    let (key, mut bytes) = resident(&handle, 1).await;
    let more = pattern(2, 20);
    append(&handle, &key, TOKENS as u64, &more).await.unwrap();
    bytes.extend(more);
    // Full blocks are the same instances as before, the tail is another.
    let (near, all) = (64 * TOKEN, bytes.len());
    assert_eq!(activated(&handle, &key, 1, &bytes).await, (Source::Pinned, Bytes(all as u64)));
    let moves = moves(&handle, &key).await;
    assert_eq!(moves[moves.len() - 2..], [step("hbm:0", "hbm:1", near), step("pinned", "hbm:1", all - near)]);
    // A fork is another life that names the same instances.
    let request = ForkRequest { length: Some(Tokens(64)), ..ForkRequest::default() };
    handle.demote(&key, Tier::Pinned).await.unwrap();
    assert_eq!(activated(&handle, &key, 0, &bytes).await.0, Source::Pinned);
    let fork = handle.fork(&key, request).await.unwrap().1.manifest.key.clone();
    let (source, moved) = activated(&handle, &fork, 1, &bytes[..near]).await;
    assert_eq!((source, moved), (Source::Hbm, Bytes(near as u64)));
    node.shutdown(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gpus_without_a_way_between_them_are_asked_once_and_pinned_memory_serves() {
    let name = "gpus_without_a_way_between_them_are_asked_once_and_pinned_memory_serves";
    if child(name, "gpus=2,memory=256MiB,peers=none,uuids=process", "no peers").is_none() {
        return;
    }
    let node = start_on(0).await;
    let handle = node.handle();
    for seed in 0..3 {
        let (key, bytes) = resident(&handle, seed).await;
        handle.migrate(&key, None, Some(GpuIndex(1))).await.unwrap();
        assert_eq!(moves(&handle, &key).await.last().unwrap(), &step("pinned", "hbm:1", bytes.len()));
        assert_eq!(activated(&handle, &key, 1, &bytes).await, (Source::Hbm, Bytes(0)));
    }
    assert_eq!((calls("cuDeviceCanAccessPeer"), calls("cuMemcpyPeerAsync")), (1, 0));
    node.shutdown(DEADLINE).await;
}

/// A fault while a session is copied from GPU 0 to GPU 1; which of them it fences, if any, and with which words.
const FAULTS: [(&str, Option<(usize, &str)>); 7] = [
    ("cuMemcpyPeerAsync corrupt 777", None),
    ("cuMemcpyPeerAsync fail 1", Some((0, "cuMemcpyPeerAsync answered 1"))),
    ("cuMemcpyPeerAsync async-sticky 700", Some((0, "CUDA_ERROR_ILLEGAL_ADDRESS"))),
    ("cuEventRecord fail 2 device=0", Some((0, "CUDA_ERROR_OUT_OF_MEMORY"))),
    ("lose 999 device=0", Some((0, "999"))),
    ("hang device=0", Some((0, "it hangs"))),
    ("lose 999 device=1", Some((1, "999"))),
];

//= GUARANTEES.md#G5
//= GUARANTEES.md#G9
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_over_a_link_that_fails_is_made_from_pinned_memory_and_no_caller_sees_it() {
    let name = "a_copy_over_a_link_that_fails_is_made_from_pinned_memory_and_no_caller_sees_it";
    let mut word = None;
    for fault in 0..FAULTS.len() {
        word = child(name, LINKED, &fault.to_string());
        if word.is_some() {
            break;
        }
    }
    let Some(word) = word else { return };
    let (fault, fenced) = FAULTS[word.parse::<usize>().unwrap()];
    let succeeds = fenced.is_none_or(|(hit, _)| hit == 0);
    let node = start_on(0).await;
    let handle = node.handle();
    // A link that works, and a session that stays where it is.
    let (before, _) = resident(&handle, 1).await;
    handle.migrate(&before, None, Some(GpuIndex(1))).await.unwrap();
    assert!(threads("hbm:0-hbm:1") > 0);
    let (key, bytes) = resident(&handle, 2).await;
    softcuda().order(fault).unwrap();
    let activation = handle.activate(&key, on(1)).await;
    assert_eq!(activation.is_ok(), succeeds, "'{fault}': {activation:?}");
    for (index, gpu) in handle.gpus().iter().enumerate() {
        match (fenced, &gpu.state) {
            (Some((hit, told)), GpuState::Fenced(reason)) => {
                assert!(hit == index && reason.contains(told), "'{fault}': GPU {index}: {reason}");
            }
            (Some((hit, _)), GpuState::Up) => assert_ne!(hit, index, "'{fault}' did not fence"),
            (None, state) => assert_eq!(*state, GpuState::Up, "'{fault}'"),
        }
    }
    match activation {
        Ok(activation) => {
            let told = (activation.source, activation.bytes_moved);
            assert_eq!(told, (Source::Pinned, Bytes(bytes.len() as u64)), "'{fault}'");
            handle.release(&key, activation.lease.id).await.unwrap();
            drop(activation);
            assert_eq!(run(&handle, &key, Some(GpuIndex(1)), &bytes).await.unwrap(), GpuIndex(1));
            assert_eq!(moves(&handle, &key).await.last().unwrap(), &step("pinned", "hbm:1", bytes.len()));
        }
        Err(error) => {
            assert!(matches!(error, Error::Unavailable { .. }), "'{fault}': {error}");
            assert_eq!(run(&handle, &key, None, &bytes).await.unwrap(), GpuIndex(0));
        }
    }
    if fenced.is_none() {
        // What may be damaged is not kept, and not copied again.
        let there = handle.explain(&key).await.unwrap().gpus[0].1;
        assert_eq!(there, Bytes(0), "'{fault}'");
        let failures = "keepwarm_checksum_failures_total{where=\"link\"} 1\n";
        assert!(handle.metrics().encode().contains(failures), "'{fault}'");
        assert_eq!(activated(&handle, &key, 0, &bytes).await, (Source::Hbm, Bytes(bytes.len() as u64)));
    } else {
        softcuda().order("resume device=0").unwrap();
        until("the link is given up", || async { threads("hbm:0-hbm:1") == 0 }).await;
    }
    node.shutdown(DEADLINE).await;
}

/// Neither device is fenced then: the source issues nothing, and no event of it is late.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_on_which_nothing_moves_is_given_up_and_later_loads_do_not_wait_for_it() {
    let name = "a_link_on_which_nothing_moves_is_given_up_and_later_loads_do_not_wait_for_it";
    if child(name, LINKED, "stands still").is_none() {
        return;
    }
    let node = start_on(0).await;
    let handle = node.handle();
    let (first, first_bytes) = resident(&handle, 1).await;
    let (second, second_bytes) = resident(&handle, 2).await;
    handle.faults(GpuIndex(0)).unwrap().hang(true);
    let whole = Bytes(first_bytes.len() as u64);
    assert_eq!(activated(&handle, &first, 1, &first_bytes).await, (Source::Pinned, whole));
    let begun = Instant::now();
    assert_eq!(activated(&handle, &second, 1, &second_bytes).await, (Source::Pinned, whole));
    // Far less than the first one waited, on however busy a machine.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(handle.gpus().iter().all(|gpu| gpu.state == GpuState::Up), "who is at fault nobody knows");
    handle.faults(GpuIndex(0)).unwrap().hang(false);
    until("the link ends", || async { threads("hbm:0-hbm:1") == 0 }).await;
    for key in [&first, &second] {
        handle.delete(key).await.unwrap();
    }
    until("all memory", || async { handle.used().await == (Bytes(0), Bytes(0)) }).await;
    node.shutdown(DEADLINE).await;
}

//! A million appends and deletes: what the process takes of memory early on, and at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use keepwarm_config::{Config, DeviceKind, GpuConfig, SingleNode, SyncMode};
use keepwarm_core::session::{Form, Labels, Layout, Order, Part, Planes, Protect};
use keepwarm_core::shard::{Precondition, WriteMode};
use keepwarm_node::{CreateRequest, Handle, Node, WriteDone, WriteRequest, WriteStart};
use keepwarm_types::{Bytes, Millis};

const OPERATIONS: u64 = 6_000_000;
/// Writes of a session before it is deleted.
const APPENDS: u64 = 9;
const WRITERS: u64 = 16;
const TOKEN_BYTES: u32 = 64;
const DEADLINE: Duration = Duration::from_secs(20);

/// Resident bytes of this process (`/proc/self/statm`, in pages of 4 KiB).
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / f64::from(1 << 20)
}

async fn life(handle: &Handle, layout: &Arc<Layout>, done: &AtomicU64) {
    let request = CreateRequest {
        id: None,
        layout: Arc::clone(layout),
        protect: Protect::For(Millis(60_000)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    let (info, _) = handle.create(&"default".parse().unwrap(), request).await.unwrap();
    let key = info.manifest.key.clone();
    let body = [7; 3 * TOKEN_BYTES as usize];
    for nth in 0..APPENDS {
        let request = WriteRequest {
            part: "kv".to_owned(),
            mode: WriteMode::Append { offset: nth * 3 },
            precondition: Precondition::default(),
            txn: None,
            body: Some(Bytes(body.len() as u64)),
            digest: None,
        };
        let WriteStart::Sink(mut sink) = handle.open_write(&key, request).await.unwrap() else {
            panic!("seen before")
        };
        sink.write(&body).await.unwrap();
        assert!(matches!(sink.finish().await.unwrap(), WriteDone::Committed(..)));
        done.fetch_add(1, Ordering::Relaxed);
    }
    handle.delete(&key).await.unwrap();
    done.fetch_add(1, Ordering::Relaxed);
}

async fn measure() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::single(SingleNode {
        name: "n1".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        gpus: vec![GpuConfig { device: DeviceKind::Host, memory: Bytes(16 << 20) }],
        pinned: Bytes(64 << 20),
        data_dir: Some(folder.path().join("n1")),
        models: Vec::new(),
    });
    // The disk's own speed is not the question here.
    config.sync = SyncMode::Interval;
    let node = Node::start(config, &"n1".parse().unwrap()).await.unwrap();
    let handle = node.handle();
    let planes =
        Planes { tokens_per_block: 16, planes: 1, plane_bytes_per_token: TOKEN_BYTES, order: Order::Token };
    let part = Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: None };
    let layout = Arc::new(Layout::new("m", "f", vec![part]).unwrap());
    let done = Arc::new(AtomicU64::new(0));
    let (begun, mut marks) = (Instant::now(), Vec::new());
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let (handle, layout, done) = (handle.clone(), Arc::clone(&layout), Arc::clone(&done));
        writers.spawn(async move {
            while done.load(Ordering::Relaxed) < OPERATIONS {
                life(&handle, &layout, &done).await;
            }
        });
    }
    while !writers.is_empty() {
        let next = tokio::time::timeout(Duration::from_millis(50), writers.join_next()).await;
        if let Ok(Some(ended)) = next {
            ended.unwrap();
        }
        if marks.len() as u64 * OPERATIONS / 10 <= done.load(Ordering::Relaxed) {
            marks.push(resident());
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let (hbm, pinned) = handle.used().await;
    let total = done.load(Ordering::Relaxed);
    let shown: Vec<_> = marks.iter().map(|mib| format!("{mib:.0}")).collect();
    println!(
        "{total} appends and deletes, {:.0} a second; resident MiB at each tenth: {}; arenas then: HBM {hbm}, pinned {pinned}",
        total as f64 / seconds,
        shown.join(" ")
    );
    node.shutdown(DEADLINE).await;
}

pub(crate) fn run() {
    tokio::runtime::Runtime::new().unwrap().block_on(measure());
}

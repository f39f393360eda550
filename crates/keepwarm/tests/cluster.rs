//! Three nodes as processes: killed, killed and started at once, stopped past their take-over; what was acknowledged
//! is there, through every node, byte for byte.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on fails, and says why")]

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keepwarm_client::{Client, Form, Layout, NewSession, Order, PartBody, PartLayout, WriteOptions};
use tokio::time::timeout;
use uuid::Uuid;

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a client waits for one node before it asks another.
const PATIENCE: Duration = Duration::from_secs(2);
/// Writers, each with a session of its own.
const WRITERS: usize = 6;
/// Bytes of a token.
const TOKEN: usize = 16;

fn keepwarm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_keepwarm"))
}

/// A base with free ports at base+1.. and base+101..; they may be taken before they are bound, which fails loudly.
fn free_base(nodes: u16) -> u16 {
    let free = |base: u16| {
        (1..=nodes).all(|n| {
            TcpListener::bind(("127.0.0.1", base + n)).is_ok()
                && UdpSocket::bind(("127.0.0.1", base + 100 + n)).is_ok()
        })
    };
    let start = 20_000 + u16::try_from(std::process::id() % 200).unwrap() * 200;
    (0..60)
        .map(|n| 20_000 + (start - 20_000 + n * 200) % 40_000)
        .find(|base| free(*base))
        .expect("free ports")
}

struct Node {
    name: String,
    url: String,
    child: Option<Child>,
    /// Kept open: a node that starts anew says again that it is ready.
    out: Option<BufReader<ChildStdout>>,
}

struct Cluster {
    folder: PathBuf,
    nodes: Vec<Node>,
    _kept: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Self {
        let kept = tempfile::tempdir().unwrap();
        let folder = kept.path().join("c");
        let base = free_base(3);
        let made = keepwarm()
            .args(["init", "--nodes", "3", "--port-base", &base.to_string(), "--dir"])
            .arg(&folder)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let file = folder.join("cluster.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("256MiB", "16MiB").replace("512MiB", "64MiB")).unwrap();
        let node = |n: u16| Node {
            name: format!("n{n}"),
            url: format!("http://127.0.0.1:{}", base + n),
            child: None,
            out: None,
        };
        let mut cluster = Self { folder, nodes: (1..=3).map(node).collect(), _kept: kept };
        for node in &mut cluster.nodes {
            node.spawn(&cluster.folder);
        }
        for at in 0..3 {
            cluster.nodes[at].ready();
        }
        cluster
    }

    fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.url.clone()).collect()
    }
}

impl Node {
    fn spawn(&mut self, folder: &Path) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join(format!("{}.log", self.name)));
        let child = keepwarm()
            .args(["serve", "--node", &self.name, "--config"])
            .arg(folder.join("cluster.toml"))
            .env("RUST_LOG", "warn,openraft=off")
            .stdout(Stdio::piped())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    fn ready(&mut self) {
        let mut out = BufReader::new(self.child.as_mut().unwrap().stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        self.out = Some(out);
        assert!(line.starts_with("ready http="), "{} did not start: '{line}'", self.name);
    }

    fn signal(&self, signal: &str) {
        let id = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &id]).status().unwrap().success());
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.folder.join(format!("{}.log", node.name)));
                println!("log of {}:\n{}", node.name, log.unwrap_or_default());
            }
            if let Some(child) = &mut node.child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn layout() -> Layout {
    let form =
        Form::Paged { tokens_per_block: 16, planes: 1, plane_bytes_per_token: 16, order: Order::Token };
    Layout {
        model: "m".to_owned(),
        fingerprint: "f".to_owned(),
        parts: vec![PartLayout { name: "kv".to_owned(), form }],
    }
}

/// The bytes of a session's token: any of them names its origin.
fn token(session: Uuid, at: u64) -> [u8; TOKEN] {
    let mut bytes = *session.as_bytes();
    for (byte, count) in bytes[8..].iter_mut().zip(at.to_le_bytes()) {
        *byte ^= count;
    }
    bytes
}

/// What the writers met.
#[derive(Default)]
struct Report {
    acknowledged: AtomicU64,
    unclear: AtomicU64,
    /// Longest time that a session could not be written, in milliseconds.
    longest_ms: AtomicU64,
    stop: AtomicBool,
    /// The last thing that went wrong.
    last: Mutex<String>,
}

async fn length(clients: &[Client], id: Uuid, from: usize) -> u64 {
    let begun = Instant::now();
    for n in from.. {
        match timeout(PATIENCE, clients[n % clients.len()].session(id)).await {
            Ok(Ok(session)) => return session.length_tokens,
            other => assert!(begun.elapsed() < DEADLINE, "session {id} does not come back: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unreachable!("the deadline ends it")
}

/// Appends token after token through one node after the other; what was acknowledged may never be gone.
async fn write(clients: Vec<Client>, id: Uuid, report: Arc<Report>) -> u64 {
    let mut acknowledged = 0;
    let mut last = Instant::now();
    for n in 0.. {
        if report.stop.load(Ordering::SeqCst) {
            break;
        }
        let client = &clients[n % clients.len()];
        let body = PartBody::from(token(id, acknowledged).to_vec());
        let options = WriteOptions::default();
        match timeout(PATIENCE, client.append_part(id, "kv", acknowledged, body, &options)).await {
            Ok(Ok(_)) => acknowledged += 1,
            other => {
                *report.last.lock().unwrap() = format!("{other:?}");
                report.unclear.fetch_add(1, Ordering::SeqCst);
                let now = length(&clients, id, n + 1).await;
                assert!(
                    now >= acknowledged,
                    "session {id}: {acknowledged} tokens were acknowledged, {now} are there"
                );
                assert!(
                    now <= acknowledged + 1,
                    "session {id}: {now} tokens, one after {acknowledged} was sent"
                );
                acknowledged = now;
            }
        }
        report.acknowledged.fetch_add(1, Ordering::SeqCst);
        let took = u64::try_from(last.elapsed().as_millis()).unwrap();
        report.longest_ms.fetch_max(took, Ordering::SeqCst);
        last = Instant::now();
    }
    acknowledged
}

/// Waits until writers have got further by some tokens each.
async fn goes_on(report: &Report) {
    let (begun, from) = (Instant::now(), report.acknowledged.load(Ordering::SeqCst));
    while report.acknowledged.load(Ordering::SeqCst) < from + 20 * WRITERS as u64 {
        let last = || report.last.lock().unwrap().clone();
        assert!(begun.elapsed() < DEADLINE, "the writers stand still; the last error: {}", last());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until every promised copy is there.
async fn whole(clients: &[Client]) {
    let begun = Instant::now();
    loop {
        if let Ok(cluster) = clients[0].cluster().await
            && cluster.nodes.iter().all(|node| node.status == "up" && node.pinned.is_some())
            && (cluster.under_replicated_shards, cluster.under_replicated_sessions) == (0, 0)
        {
            return;
        }
        assert!(begun.elapsed() < DEADLINE, "copies stay missing: {:?}", clients[0].cluster().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

//= GUARANTEES.md#G10
//= GUARANTEES.md#G11
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_outlives_kills_quick_restarts_and_pauses() {
    let mut cluster = Cluster::start();
    let clients: Vec<_> = cluster.urls().iter().map(|url| Client::new(url).unwrap()).collect();
    let report = Arc::new(Report::default());
    whole(&clients).await;
    let mut writers = Vec::new();
    for n in 0..WRITERS {
        let session = NewSession::new(layout());
        clients[n % 3].create(&session).await.unwrap();
        let writing = write(clients.clone(), session.id, Arc::clone(&report));
        writers.push((session.id, tokio::spawn(writing)));
    }
    goes_on(&report).await;
    for (round, fault) in ["kill", "kill and start at once", "stop and go on"].into_iter().enumerate() {
        println!("fault: {fault}");
        let folder = cluster.folder.clone();
        let node = &mut cluster.nodes[round % 3];
        match fault {
            "kill" => {
                node.kill();
                goes_on(&report).await;
                node.spawn(&folder);
                node.ready();
            }
            "kill and start at once" => {
                node.kill();
                node.spawn(&folder);
                node.ready();
            }
            _ => {
                node.signal("STOP");
                goes_on(&report).await;
                node.signal("CONT");
            }
        }
        goes_on(&report).await;
        whole(&clients).await;
    }
    report.stop.store(true, Ordering::SeqCst);
    for (id, writer) in writers {
        let written = writer.await.unwrap();
        let expected: Vec<u8> = (0..written).flat_map(|at| token(id, at)).collect();
        for client in &clients {
            let read = client.part(id, "kv").await.unwrap();
            assert_eq!(read.bytes().await.unwrap(), expected, "session {id}");
        }
    }
    println!(
        "{} acknowledged, {} unclear, longest wait {} ms",
        report.acknowledged.load(Ordering::SeqCst),
        report.unclear.load(Ordering::SeqCst),
        report.longest_ms.load(Ordering::SeqCst)
    );
}

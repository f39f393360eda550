//! What several nodes cost and give: from a kill to the first answer of a survivor, and a replicated append beside
//! a local one. Processes of the real binary, on loopback.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keepwarm_client::{Client, Form, Layout, NewSession, PartBody, PartLayout, WriteOptions};
use uuid::Uuid;

use crate::median;

/// Kills of an owner.
const KILLS: usize = 100;
/// How long a client waits for one answer before it asks again.
const PATIENCE: Duration = Duration::from_millis(500);
/// Sessions, spread over the owners.
const SESSIONS: usize = 12;
/// Appends of each size.
const APPENDS: u64 = 200;
/// Longest wait for a survivor's answer, or for all copies.
const DEADLINE: Duration = Duration::from_secs(60);

struct Node {
    name: String,
    url: String,
    child: Child,
}

fn program() -> PathBuf {
    let built =
        Command::new("cargo").args(["build", "--release", "--quiet", "--package", "keepwarm"]).status();
    assert!(built.unwrap().success(), "the binary is built");
    std::env::current_exe().unwrap().parent().unwrap().join("keepwarm")
}

fn free_base() -> u16 {
    let free = |base: u16| {
        let tcp = |n| TcpListener::bind(("127.0.0.1", base + n)).is_ok();
        (1..=3).all(|n| tcp(n) && UdpSocket::bind(("127.0.0.1", base + 100 + n)).is_ok())
    };
    (100..300).map(|n| n * 200).find(|base| free(*base)).expect("free ports")
}

fn spawn(program: &Path, arguments: &[&str]) -> Child {
    let command = Command::new(program).args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = command.unwrap();
    let mut line = String::new();
    // Its only line says that it serves; what it may say later is read by nobody.
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("ready"), "{line}");
    child
}

fn serve(program: &Path, file: &Path, name: &str) -> Child {
    Command::new(program)
        .args(["serve", "--node", name, "--config"])
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

async fn whole(client: &Client) {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        if let Ok(cluster) = client.cluster().await
            && cluster.nodes.iter().all(|node| node.status == "up" && node.pinned.is_some())
            && (cluster.under_replicated_shards, cluster.under_replicated_sessions) == (0, 0)
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("copies stay missing");
}

fn bytes_layout() -> Layout {
    let form = Form::Bytes { block_bytes: Some(1 << 20) };
    Layout {
        model: "m".to_owned(),
        fingerprint: "f".to_owned(),
        parts: vec![PartLayout { name: "b".to_owned(), form, cold: None }],
    }
}

/// Median milliseconds of an append of so many bytes.
async fn append(client: &Client, bytes: usize) -> f64 {
    let session = NewSession::new(bytes_layout());
    client.create(&session).await.unwrap();
    let mut took = Vec::new();
    for n in 0..APPENDS.min((48 << 20) / bytes as u64) {
        let body = PartBody::from(vec![7; bytes]);
        let began = Instant::now();
        let at = n * bytes as u64;
        client.append_part(session.id, "b", at, body, &WriteOptions::default()).await.unwrap();
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    client.delete(session.id).await.unwrap();
    median(took)
}

async fn measure(program: &Path, file: &Path, nodes: &mut [Node]) {
    let clients: Vec<_> =
        nodes.iter().map(|node| Client::builder(&node.url).fixed().build().unwrap()).collect();
    let begun = Instant::now();
    while clients[0].ready(false).await.is_err() && begun.elapsed() < DEADLINE {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    whole(&clients[0]).await;
    let mut alone =
        spawn(program, &["serve", "--ephemeral", "--http", "127.0.0.1:17999", "--pinned", "256MiB"]);
    let local = Client::new("http://127.0.0.1:17999").unwrap();
    for bytes in [64 << 10, 1 << 20] {
        let (one, three) = (append(&local, bytes).await, append(&clients[0], bytes).await);
        println!(
            "append of {:>4} KiB   one node, catalog in memory {one:.2} ms   two copies, three catalogs on disk {three:.2} ms",
            bytes >> 10
        );
    }
    alone.kill().unwrap();
    alone.wait().unwrap();
    let mut ids: Vec<Uuid> = Vec::new();
    for n in 0..SESSIONS {
        let session = NewSession::new(bytes_layout());
        clients[n % 3].create(&session).await.unwrap();
        let body = PartBody::from(vec![n as u8; 256 << 10]);
        clients[n % 3].append_part(session.id, "b", 0, body, &WriteOptions::default()).await.unwrap();
        ids.push(session.id);
    }
    // How long, and whether the killed node led the registry.
    let mut took: Vec<(f64, bool)> = Vec::new();
    for kill in 0..KILLS {
        let asked = ids[kill % ids.len()];
        let owner = clients[kill % 3].session(asked).await.unwrap().owner;
        let victim = nodes.iter().position(|node| node.name == owner).unwrap();
        let survivor = &clients[(victim + 1) % 3];
        let led = survivor.cluster().await.unwrap().registry_leader.as_deref() == Some(&owner);
        nodes[victim].child.kill().unwrap();
        let began = Instant::now();
        nodes[victim].child.wait().unwrap();
        loop {
            let answer = tokio::time::timeout(PATIENCE, survivor.part(asked, "b")).await;
            if let Ok(Ok(part)) = answer
                && part.bytes().await.is_ok_and(|bytes| bytes.len() == 256 << 10)
            {
                break;
            }
            assert!(began.elapsed() < DEADLINE, "nobody answers for {asked}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        took.push((began.elapsed().as_secs_f64() * 1e3, led));
        nodes[victim].child = serve(program, file, &nodes[victim].name);
        whole(survivor).await;
    }
    tell("any node", took.iter().map(|(ms, _)| *ms).collect());
    tell("the registry's leader", took.iter().filter(|(_, led)| *led).map(|(ms, _)| *ms).collect());
    tell("another node", took.iter().filter(|(_, led)| !led).map(|(ms, _)| *ms).collect());
}

/// From a kill to a survivor's whole answer.
fn tell(killed: &str, mut took: Vec<f64>) {
    took.sort_by(f64::total_cmp);
    let Some(worst) = took.last() else { return };
    let at = |percent: usize| took[(took.len() * percent).div_ceil(100) - 1];
    println!(
        "kill -9 of {killed}, {} times: median {:.0} ms, p90 {:.0} ms, p99 {:.0} ms, worst {worst:.0} ms (aim: p99 under 1000)",
        took.len(),
        at(50),
        at(90),
        at(99)
    );
}

/// Runs it.
pub(crate) fn run() {
    let program = program();
    let folder = tempfile::tempdir().unwrap();
    let (dir, base) = (folder.path().join("c"), free_base());
    let base_text = base.to_string();
    let made = Command::new(&program)
        .args(["init", "--nodes", "3", "--port-base", &base_text, "--dir"])
        .arg(&dir)
        .stdout(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let file = dir.join("cluster.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace("256MiB", "16MiB").replace("512MiB", "192MiB");
    std::fs::write(&file, text).unwrap();
    let node = |n: u16| {
        let name = format!("n{n}");
        let child = serve(&program, &file, &name);
        Node { name, url: format!("http://127.0.0.1:{}", base + n), child }
    };
    let mut nodes: Vec<_> = (1..=3).map(node).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(measure(&program, &file, &mut nodes));
    for mut node in nodes {
        node.child.kill().unwrap();
        node.child.wait().unwrap();
    }
}

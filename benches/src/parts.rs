//! A part's PUT and GET over loopback, next to a bare axum server that copies into a buffer and hashes, and to
//! Redis' SET and GET of the same sizes. All clients are plain sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::routing::get;
use bytes::Bytes as Buffer;
use futures::StreamExt;
use keepwarm_api::{ApiState, Credentials, router, serve};
use keepwarm_config::{Config, DeviceKind, GpuConfig, SingleNode};
use keepwarm_core::session::{Form, Labels, Layout, Part, Protect};
use keepwarm_engine::chat::NoModels;
use keepwarm_node::{CreateRequest, Node};
use keepwarm_types::{Bytes, Millis};
use twox_hash::XxHash3_128;

use crate::{ROUNDS, median};

const SIZES: [usize; 3] = [2 << 20, 16 << 20, 64 << 20];
/// Bytes that one measurement moves.
const MOVED: usize = 512 << 20;
const CONNECTIONS: [usize; 2] = [1, 8];

type Store = Arc<Mutex<HashMap<String, Buffer>>>;

async fn bare_put(
    State(store): State<Store>,
    Path(name): Path<String>,
    headers: axum::http::HeaderMap,
    body: Body,
) -> String {
    let length = headers
        .get("content-length")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse().ok());
    let mut buffer = Vec::with_capacity(length.unwrap_or(0));
    let mut hasher = XxHash3_128::new();
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.unwrap();
        buffer.extend_from_slice(&chunk);
        hasher.write(&chunk);
    }
    store.lock().unwrap().insert(name, buffer.into());
    hasher.finish_128().to_string()
}

async fn bare_get(State(store): State<Store>, Path(name): Path<String>) -> Buffer {
    let buffer = store.lock().unwrap().get(&name).cloned().unwrap_or_default();
    std::hint::black_box(XxHash3_128::oneshot(&buffer));
    buffer
}

/// A server's way to be put to and got from, for connection `n`.
trait Peer: Send + Sync {
    fn put(&self, stream: &mut TcpStream, n: usize, body: &[u8]);
    fn get(&self, stream: &mut TcpStream, n: usize, into: &mut Vec<u8>);
    fn address(&self) -> SocketAddr;
}

struct Http {
    address: SocketAddr,
    paths: Vec<String>,
}

/// Reads up to and with `end`; gives what was read and what came behind it.
fn until(stream: &mut TcpStream, end: &[u8]) -> (String, Vec<u8>) {
    let (mut read, mut piece) = (Vec::new(), [0; 16 << 10]);
    loop {
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "the server ended the connection");
        read.extend_from_slice(&piece[..count]);
        if let Some(at) = read.windows(end.len()).position(|window| window == end) {
            let rest = read.split_off(at + end.len());
            return (String::from_utf8(read).unwrap(), rest);
        }
    }
}

/// Reads an answer into a buffer.
fn answer(stream: &mut TcpStream, into: &mut Vec<u8>) {
    let (head, rest) = until(stream, b"\r\n\r\n");
    let head = head.to_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    fill(stream, into, rest, length.trim().parse().unwrap());
}

fn fill(stream: &mut TcpStream, into: &mut Vec<u8>, rest: Vec<u8>, length: usize) {
    into.resize(length, 0);
    into[..rest.len()].copy_from_slice(&rest);
    stream.read_exact(&mut into[rest.len()..]).unwrap();
}

impl Peer for Http {
    fn put(&self, stream: &mut TcpStream, n: usize, body: &[u8]) {
        let request =
            format!("PUT {} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", self.paths[n], body.len());
        stream.write_all(request.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        answer(stream, &mut Vec::new());
    }

    fn get(&self, stream: &mut TcpStream, n: usize, into: &mut Vec<u8>) {
        stream.write_all(format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", self.paths[n]).as_bytes()).unwrap();
        answer(stream, into);
    }

    fn address(&self) -> SocketAddr {
        self.address
    }
}

struct Redis {
    address: SocketAddr,
    process: Child,
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Redis {
    fn start() -> Option<Self> {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let arguments = [
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--port",
            &address.port().to_string(),
        ];
        let process = Command::new("redis-server")
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "redis-server does not answer");
            std::thread::yield_now();
        }
        Some(Self { address, process })
    }
}

impl Peer for Redis {
    fn put(&self, stream: &mut TcpStream, n: usize, body: &[u8]) {
        let key = format!("k{n}");
        let request = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), body.len());
        stream.write_all(request.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream.write_all(b"\r\n").unwrap();
        assert!(until(stream, b"\r\n").0.starts_with("+OK"));
    }

    fn get(&self, stream: &mut TcpStream, n: usize, into: &mut Vec<u8>) {
        let key = format!("k{n}");
        stream.write_all(format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len()).as_bytes()).unwrap();
        let (length, rest) = until(stream, b"\r\n");
        fill(stream, into, rest, length.trim().strip_prefix('$').unwrap().parse::<usize>().unwrap() + 2);
    }

    fn address(&self) -> SocketAddr {
        self.address
    }
}

/// GB/s of one round.
fn round(peer: &dyn Peer, connections: usize, size: usize, put: bool) -> f64 {
    let each = (MOVED / size / connections).max(1);
    let body = vec![7u8; size];
    let started = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..connections {
            let body = &body;
            scope.spawn(move || {
                let mut stream = TcpStream::connect(peer.address()).unwrap();
                stream.set_nodelay(true).unwrap();
                let mut into = Vec::with_capacity(size + 2);
                for _ in 0..each {
                    if put { peer.put(&mut stream, n, body) } else { peer.get(&mut stream, n, &mut into) }
                }
            });
        }
    });
    (each * connections * size) as f64 / started.elapsed().as_secs_f64() / 1e9
}

async fn keepwarm() -> Http {
    let config = Config::single(SingleNode {
        name: "n1".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        gpus: vec![GpuConfig { device: DeviceKind::Host, memory: Bytes(64 << 20) }],
        pinned: Bytes(3 << 30),
        data_dir: None,
        models: Vec::new(),
    });
    let node = Node::start(config, &"n1".parse().unwrap()).await.unwrap();
    let handle = node.handle();
    let mut paths = Vec::new();
    for _ in 0..8 {
        let part =
            Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: 1 << 20 }, cold: None };
        let request = CreateRequest {
            id: None,
            layout: Arc::new(Layout::new("m", "f", vec![part]).unwrap()),
            protect: Protect::For(Millis(900_000)),
            ttl: None,
            labels: Labels::new(),
            near: None,
        };
        let (info, _) = handle.create(&"default".parse().unwrap(), request).await.unwrap();
        paths.push(format!("/v1/sessions/{}/parts/b", info.manifest.key.id));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app =
        router(ApiState { handle, chat: Arc::new(NoModels), credentials: Arc::new(Credentials::default()) });
    tokio::spawn(async move {
        serve(listener, app, std::future::pending(), Duration::ZERO).await.unwrap();
        drop(node);
    });
    Http { address, paths }
}

async fn bare() -> Http {
    let app = Router::new()
        .route("/{name}", get(bare_get).put(bare_put))
        .layer(axum::extract::DefaultBodyLimit::disable());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app.with_state(Store::default())).await.unwrap() });
    Http { address, paths: (0..8).map(|n| format!("/k{n}")).collect() }
}

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (ours, bare) = runtime.block_on(async { (keepwarm().await, bare().await) });
    let redis = Redis::start();
    if redis.is_none() {
        println!("skipped: Redis (there is no redis-server: apt-get install redis-server)");
    }
    println!(
        "{:<6} {:>6} {:>5} {:>10} {:>10} {:>10} {:>9} {:>9}",
        "", "MiB", "conns", "keepwarm", "bare", "redis", "/bare", "/redis"
    );
    for size in SIZES {
        for connections in CONNECTIONS {
            // What a GET finds is what the PUT before it left.
            for put in [true, false] {
                let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
                for warm in 0..=ROUNDS {
                    let (x, y) = (round(&ours, connections, size, put), round(&bare, connections, size, put));
                    let z = redis.as_ref().map_or(f64::NAN, |redis| round(redis, connections, size, put));
                    if warm > 0 {
                        a.push(x);
                        b.push(y);
                        c.push(z);
                    }
                }
                let ratio = |other: &[f64]| median(a.iter().zip(other).map(|(a, b)| a / b).collect());
                let (to_bare, to_redis) = (ratio(&b), ratio(&c));
                println!(
                    "{:<6} {:>6} {:>5} {:>8.2}   {:>8.2}   {:>8.2}   {:>8.2}x {:>8.2}x",
                    if put { "PUT" } else { "GET" },
                    size >> 20,
                    connections,
                    median(a),
                    median(b),
                    median(c),
                    to_bare,
                    to_redis
                );
            }
        }
    }
    runtime.shutdown_background();
}

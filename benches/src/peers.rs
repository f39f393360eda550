//! Bytes between two processes over loopback: keepwarm's links, beside a bare quinn sender and receiver with the same
//! certificates, datagrams and windows, and beside Redis through TLS with the same cipher.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use keepwarm_transport::quic::{QuicSettings, QuicTransport, TlsMaterial};
use keepwarm_transport::{Class, Frame, Incoming, PeerId, Transport};
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::Versions;

use crate::redis_tls::RedisTls;
use crate::{ROUNDS, median};

/// Says to this program that it is the receiving process, and of which side.
const CHILD: &str = "KEEPWARM_BENCH_PEER";
/// Bytes of a round.
const ROUND_BYTES: usize = 2 << 30;
/// Bytes of an object, and of a piece that is handed to a stream.
const OBJECT_BYTES: usize = 2 << 20;
/// Objects on their way at once.
const OBJECTS_AT_ONCE: usize = 4;
/// Longest piece that is read at once.
const READ_BYTES: usize = 1 << 20;
/// `/proc` counts time in these, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    LongStream,
    StreamPerObject,
}

impl Shape {
    /// How many streams of how many pieces.
    const fn streams(self) -> (usize, usize) {
        match self {
            Self::LongStream => (1, ROUND_BYTES / OBJECT_BYTES),
            Self::StreamPerObject => (ROUND_BYTES / OBJECT_BYTES, 1),
        }
    }
}

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn settings(node: &str) -> QuicSettings {
    QuicSettings {
        local: PeerId { node: name(node), incarnation: Incarnation(1) },
        cluster: "bench".to_owned(),
        cluster_id: 1,
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: TlsMaterial::LoopbackOnly,
        versions: Versions::ALL,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Whether this process is the receiving one.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// The receiving process: says where it listens, and takes what comes until it is killed.
pub(crate) fn child() {
    let links = std::env::var(CHILD).is_ok_and(|side| side == "links");
    runtime().block_on(if links {
        futures::future::Either::Left(take_links())
    } else {
        futures::future::Either::Right(take_bare())
    });
}

async fn take_links() {
    let (links, mut incoming) = QuicTransport::start(settings("b")).unwrap();
    println!("{}", links.address().unwrap());
    // Who dials is known by name; where it listens is of no use.
    links.set_peers(vec![(name("a"), "127.0.0.1:9".to_owned())]);
    while let Some(event) = incoming.recv().await {
        if let Incoming::Stream { mut stream, .. } = event {
            tokio::spawn(async move {
                while let Ok(Some(_)) = stream.read_chunk(READ_BYTES).await {}
                stream.finish();
            });
        }
    }
}

async fn take_bare() {
    let (endpoint, _) = QuicTransport::bare(&settings("b")).unwrap();
    println!("{}", endpoint.local_addr().unwrap());
    let connection = endpoint.accept().await.unwrap().await.unwrap();
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        tokio::spawn(async move {
            while let Ok(Some(_)) = receive.read_chunk(READ_BYTES, true).await {}
            let _ = send.finish();
        });
    }
}

/// The receiving process, and where it listens.
struct Receiver(Child, String);

impl Receiver {
    fn spawn(side: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(CHILD, side)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self(child, address.trim().to_owned())
    }

    /// Seconds on a processor, of both processes.
    fn seconds(&self) -> f64 {
        seconds_of("self") + seconds_of(&self.0.id().to_string())
    }
}

/// Seconds that a process has been on a processor.
pub(crate) fn seconds_of(process: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // User and system time are the 14th and 15th field; the 3rd is the first after the name.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS_PER_SECOND
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

enum Sender {
    Links(Arc<QuicTransport>),
    /// The endpoint lives as long as its connection is used.
    Bare {
        connection: quinn::Connection,
        _endpoint: quinn::Endpoint,
    },
}

impl Sender {
    async fn links(to: &Receiver) -> Self {
        let (links, mut incoming) = QuicTransport::start(settings("a")).unwrap();
        links.set_peers(vec![(name("b"), to.1.clone())]);
        while !matches!(incoming.recv().await.unwrap(), Incoming::Up(..)) {}
        tokio::spawn(async move { while incoming.recv().await.is_some() {} });
        Self::Links(links)
    }

    async fn bare(to: &Receiver) -> Self {
        let (endpoint, client) = QuicTransport::bare(&settings("a")).unwrap();
        let connecting = endpoint.connect_with(client, to.1.parse().unwrap(), "keepwarm").unwrap();
        Self::Bare { connection: connecting.await.unwrap(), _endpoint: endpoint }
    }

    async fn stream(&self, piece: &Bytes, pieces: usize) {
        match self {
            Self::Links(links) => {
                let header = Frame { kind: 1, payload: Bytes::new() };
                let mut stream = links.open(&name("b"), Class::Restore, header).await.unwrap();
                for _ in 0..pieces {
                    stream.write_chunk(piece.clone()).await.unwrap();
                }
                stream.finish();
                assert_eq!(stream.read_chunk(1).await.unwrap(), None);
            }
            Self::Bare { connection, .. } => {
                let (mut send, mut receive) = connection.open_bi().await.unwrap();
                for _ in 0..pieces {
                    send.write_chunk(piece.clone()).await.unwrap();
                }
                send.finish().unwrap();
                assert!(receive.read_chunk(1, true).await.unwrap().is_none());
            }
        }
    }

    /// GB/s, and seconds on a processor for each GB.
    async fn round(&self, to: &Receiver, piece: &Bytes, shape: Shape) -> (f64, f64) {
        let (streams, pieces) = shape.streams();
        let (began, used) = (Instant::now(), to.seconds());
        stream::iter(0..streams).for_each_concurrent(OBJECTS_AT_ONCE, |_| self.stream(piece, pieces)).await;
        let gigabytes = ROUND_BYTES as f64 / 1e9;
        (gigabytes / began.elapsed().as_secs_f64(), (to.seconds() - used) / gigabytes)
    }

    /// Microseconds of a tiny request and its answer: a stream that carries nothing.
    async fn round_trip(&self) -> f64 {
        const TIMES: u32 = 200;
        let began = Instant::now();
        for _ in 0..TIMES {
            self.stream(&Bytes::from_static(b"x"), 1).await;
        }
        began.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES)
    }
}

/// GB/s and CPU seconds per GB.
type Figures = (f64, f64);

/// Of bare quinn, of the links and of Redis, where there is one.
type Round = (Figures, Figures, Option<Figures>);

/// Runs it.
pub(crate) fn run() {
    let (theirs, ours) = (Receiver::spawn("bare"), Receiver::spawn("links"));
    let redis = RedisTls::start();
    if let Err(why) = &redis {
        println!("skipped: Redis through TLS ({why})");
    }
    runtime().block_on(async {
        let (bare, links) = (Sender::bare(&theirs).await, Sender::links(&ours).await);
        let piece = Bytes::from(vec![7; OBJECT_BYTES]);
        // One connection of Redis's is its one long stream; several are its objects side by side.
        let shapes = [
            ("one long stream", Shape::LongStream, 1),
            ("a stream per 2 MiB", Shape::StreamPerObject, OBJECTS_AT_ONCE),
        ];
        for (word, shape, connections) in shapes {
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                let b = bare.round(&theirs, &piece, shape).await;
                let l = links.round(&ours, &piece, shape).await;
                let r = redis.as_ref().ok().map(|redis| redis.round(connections, ROUND_BYTES, &piece));
                rounds.push((b, l, r));
            }
            let of = |pick: &dyn Fn(&Round) -> f64| median(rounds.iter().map(pick).collect());
            println!(
                "{word:<20} bare quinn {:.2} GB/s ({:.2} cpu s/GB)   links {:.2} GB/s ({:.2})   ratio {:.2}",
                of(&|r| r.0.0),
                of(&|r| r.0.1),
                of(&|r| r.1.0),
                of(&|r| r.1.1),
                of(&|r| r.1.0 / r.0.0),
            );
            if redis.is_ok() {
                let redis = |round: &Round| round.2.unwrap_or((f64::NAN, f64::NAN));
                println!(
                    "{:<20} Redis, TLS {:.2} GB/s ({:.2} cpu s/GB)   links / Redis {:.2}",
                    "",
                    of(&|r| redis(r).0),
                    of(&|r| redis(r).1),
                    of(&|r| r.1.0 / redis(r).0),
                );
            }
        }
        let times: Vec<_> = [bare.round_trip().await, links.round_trip().await].into();
        println!("{:<20} bare quinn {:.0} us   links {:.0} us", "request and answer", times[0], times[1]);
    });
}

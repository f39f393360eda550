//! Peers that must not be: each is told or noted clearly, and nobody else is disturbed.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod conformance;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use conformance::{Node, frame, id, name, soon, until};
use keepwarm_transport::Transport;
use keepwarm_transport::certificate::{Authority, Identity, TlsPaths};
use keepwarm_transport::quic::{QuicError, QuicSettings, QuicTransport, TlsMaterial};
use keepwarm_types::Incarnation;
use keepwarm_wire::{Frame, Hello, HelloAnswer, VERSION, Versions, decode_header, encode_frame};
use quinn::Connection;

const DAYS: u32 = 30;
const CLUSTER_ID: u128 = 7;

/// Writes a node's files, signed by `authority`, trusting `trusted`.
fn files(dir: &Path, authority: &Authority, trusted: &[&Authority], node: &str, days: u32) -> TlsPaths {
    let at = |file: String| dir.join(file);
    let paths = TlsPaths {
        ca: at(format!("{node}-ca.pem")),
        certificate: at(format!("{node}.pem")),
        key: at(format!("{node}.key")),
    };
    let pem = authority.issue(&name(node), days).unwrap();
    std::fs::write(&paths.certificate, pem.certificate).unwrap();
    std::fs::write(&paths.key, pem.key).unwrap();
    let trusted: String = trusted.iter().map(|authority| authority.certificate()).collect();
    std::fs::write(&paths.ca, trusted).unwrap();
    paths
}

fn settings(cluster: &str, node: &str, incarnation: u64, paths: &TlsPaths) -> QuicSettings {
    QuicSettings {
        local: id(node, incarnation),
        cluster: cluster.to_owned(),
        cluster_id: CLUSTER_ID,
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: TlsMaterial::Files(paths.clone()),
        versions: Versions::ALL,
    }
}

struct Started {
    node: Node,
    links: Arc<QuicTransport>,
    address: String,
}

fn start(settings: QuicSettings) -> Started {
    let (links, incoming) = QuicTransport::start(settings).unwrap();
    let address = links.address().unwrap().to_string();
    Started { node: Node::new(Arc::clone(&links) as Arc<dyn Transport>, incoming), links, address }
}

fn know(who: &Started, peers: &[(&str, &str)]) {
    who.links.set_peers(peers.iter().map(|(node, address)| (name(node), (*address).to_owned())).collect());
}

async fn reason(who: &Started, peer: &str, part: &str) {
    let status = || who.links.peers().into_iter().find(|status| status.node == name(peer)).unwrap();
    let has = || status().up.is_none() && status().reason.is_some_and(|why| why.contains(part));
    let waiting = until(part, has);
    let wrong = || panic!("no '{part}' but {:?}", status());
    tokio::time::timeout(conformance::PATIENCE / 2, waiting).await.unwrap_or_else(|_| wrong());
}

/// Two nodes of one cluster that are up, and where their files lie.
struct Pair {
    dir: tempfile::TempDir,
    authority: Authority,
    /// Its name is higher than `k`'s.
    m: Started,
    k: Started,
}

async fn pair(others: &[&str]) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::generate("prod", DAYS).unwrap();
    let node =
        |node| start(settings("prod", node, 5, &files(dir.path(), &authority, &[&authority], node, DAYS)));
    let (mut m, mut k) = (node("m"), node("k"));
    let mut all = vec![("m", m.address.clone()), ("k", k.address.clone())];
    // Nobody listens there.
    all.extend(others.iter().map(|other| (*other, "127.0.0.1:9".to_owned())));
    let all: Vec<_> = all.iter().map(|(node, address)| (*node, address.as_str())).collect();
    know(&m, &all);
    know(&k, &all);
    m.node.up("k").await;
    k.node.up("m").await;
    Pair { dir, authority, m, k }
}

impl Pair {
    /// The two still speak, on the connection that they had.
    async fn undisturbed(&mut self) {
        self.k.links.send(&name("m"), frame(1, "still")).unwrap();
        assert_eq!(self.m.node.frame().await, frame(1, "still"));
        let went = self.m.node.incoming.try_recv();
        assert!(!matches!(went, Ok(keepwarm_transport::Incoming::Down(..))), "{went:?}");
    }

    /// A connection to `m` with the certificate of a node, that has said nothing yet.
    async fn raw(&self, node: &str) -> (quinn::Endpoint, Connection) {
        let paths = files(self.dir.path(), &self.authority, &[&self.authority], node, DAYS);
        let (endpoint, client) = QuicTransport::bare(&settings("prod", node, 1, &paths)).unwrap();
        let to: SocketAddr = self.m.address.parse().unwrap();
        let connection = endpoint.connect_with(client, to, "keepwarm").unwrap().await.unwrap();
        (endpoint, connection)
    }
}

async fn say(connection: &Connection, bytes: &[u8]) -> Option<Frame> {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    let _ = send.finish();
    let answer = receive.read_to_end(keepwarm_wire::FRAME_BYTES_MAX).await.ok()?;
    let (head, payload) = answer.split_first_chunk()?;
    decode_header(head).ok()?.frame(payload.to_vec().into()).ok()
}

fn hello(node: &str, incarnation: u64) -> Hello {
    Hello {
        cluster: "prod".to_owned(),
        cluster_id: CLUSTER_ID,
        node: name(node),
        incarnation: Incarnation(incarnation),
        versions: Versions::ALL,
    }
}

async fn answered(connection: &Connection, hello: &Hello) -> HelloAnswer {
    let answer = say(connection, &encode_frame(&hello.frame()).unwrap()).await;
    HelloAnswer::read(&answer.unwrap(), Versions::ALL).unwrap()
}

fn refused(answer: HelloAnswer, part: &str) {
    let HelloAnswer::Refused(why) = answer else { panic!("{answer:?}") };
    assert!(why.contains(part), "{why}");
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_is_refused_and_both_sides_say_so() {
    let mut pair = pair(&["a", "z"]).await;
    let strange = Authority::generate("prod", DAYS).unwrap();
    for node in ["a", "z"] {
        // It trusts the cluster; the cluster does not trust it. One dials `m`, the other shows itself.
        let paths = files(pair.dir.path(), &strange, &[&pair.authority], node, DAYS);
        let stranger = start(settings("prod", node, 1, &paths));
        know(&stranger, &[("m", &pair.m.address)]);
        reason(&stranger, "m", "authority").await;
        know(&pair.m, &[("k", &pair.k.address), (node, &stranger.address)]);
        reason(&pair.m, node, "authority").await;
    }
    pair.undisturbed().await;
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused_though_its_authority_is_trusted() {
    let mut pair = pair(&[]).await;
    let other = Authority::generate("stage", DAYS).unwrap();
    let trusted = [&pair.authority, &other];
    let a = start(settings("prod", "a", 1, &files(pair.dir.path(), &pair.authority, &trusted, "a", DAYS)));
    let b = start(settings("stage", "b", 1, &files(pair.dir.path(), &other, &trusted, "b", DAYS)));
    know(&a, &[("b", &b.address)]);
    know(&b, &[("a", &a.address)]);
    reason(&a, "b", "cluster 'stage'").await;
    reason(&b, "a", "cluster").await;
    pair.undisturbed().await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_both_sides_say_so() {
    let mut pair = pair(&["a"]).await;
    let paths = files(pair.dir.path(), &pair.authority, &[&pair.authority], "a", 0);
    let ends = Identity::load(&paths).unwrap().shown.expires_at;
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    until("it has expired", || now() > ends + 1).await;
    let old = start(settings("prod", "a", 1, &paths));
    know(&old, &[("m", &pair.m.address)]);
    reason(&old, "m", "expired").await;
    know(&pair.m, &[("k", &pair.k.address), ("a", &old.address)]);
    reason(&pair.m, "a", "expired").await;
    pair.undisturbed().await;
}

#[tokio::test]
async fn rubbish_from_anybody_disturbs_nobody() {
    let mut pair = pair(&["a"]).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..2_000_u32 {
        let rubbish: Vec<u8> = (0..n % 1_500).map(|at| (at.wrapping_mul(n) >> 3) as u8).collect();
        let _ = socket.send_to(&rubbish, &pair.m.address).await;
    }
    pair.undisturbed().await;
    let (_endpoint, connection) = pair.raw("a").await;
    assert_eq!(say(&connection, b"GET / HTTP/1.1\r\nHost: keepwarm\r\n\r\n").await, None);
    soon("the end of a peer that does not say hello", connection.closed()).await;
    reason(&pair.m, "a", "not a frame").await;
    pair.undisturbed().await;
}

#[tokio::test]
async fn one_who_connects_and_says_nothing_is_cut_off() {
    let mut pair = pair(&["a"]).await;
    let (_endpoint, connection) = pair.raw("a").await;
    soon("the end of a silent connection", connection.closed()).await;
    pair.undisturbed().await;
}

#[tokio::test]
async fn a_hello_that_does_not_fit_is_answered_by_its_reason() {
    let mut pair = pair(&["a", "b"]).await;
    let asked = |hello: Hello| {
        let raw = pair.raw("a");
        async move {
            let (_endpoint, connection) = raw.await;
            answered(&connection, &hello).await
        }
    };
    let far = Versions { oldest: VERSION + 1, newest: VERSION + 2 };
    let both = format!("the peer speaks versions {far}, this node {}", Versions::ALL);
    refused(asked(Hello { versions: far, ..hello("a", 1) }).await, &both);
    refused(asked(Hello { cluster_id: 8, ..hello("a", 1) }).await, "bootstrap");
    refused(asked(hello("b", 1)).await, "its certificate 'a'");
    reason(&pair.m, "a", "its certificate 'a'").await;
    pair.undisturbed().await;
}

#[tokio::test]
async fn a_node_beyond_the_spec_is_refused() {
    let mut pair = pair(&[]).await;
    let (_endpoint, connection) = pair.raw("a").await;
    refused(answered(&connection, &hello("a", 1)).await, "not in the spec");
    pair.undisturbed().await;
}

#[tokio::test]
async fn an_earlier_start_is_refused_even_after_the_later_one_has_gone() {
    let mut pair = pair(&["a"]).await;
    let (_later, connection) = pair.raw("a").await;
    assert!(matches!(answered(&connection, &hello("a", 3)).await, HelloAnswer::Accepted(_)));
    assert_eq!(pair.m.node.up("a").await, id("a", 3));
    let (_earlier, refused_one) = pair.raw("a").await;
    refused(answered(&refused_one, &hello("a", 2)).await, "later start");
    let (_twin, refused_one) = pair.raw("a").await;
    connection.open_uni().await.unwrap().write_all(&[1]).await.unwrap();
    refused(answered(&refused_one, &hello("a", 3)).await, "two processes");
    assert_eq!(connection.close_reason(), None, "the one that was there is not disturbed");

    let (_latest, replaces) = pair.raw("a").await;
    assert!(matches!(answered(&replaces, &hello("a", 4)).await, HelloAnswer::Accepted(_)));
    assert_eq!(pair.m.node.down("a").await.0, id("a", 3));
    assert_eq!(pair.m.node.up("a").await, id("a", 4));
    replaces.close(0_u32.into(), b"gone");
    pair.m.node.down("a").await;
    let (_earlier, refused_one) = pair.raw("a").await;
    refused(answered(&refused_one, &hello("a", 3)).await, "later start");
    pair.undisturbed().await;
}

#[tokio::test]
async fn a_frame_that_is_too_long_or_none_ends_its_connection_alone() {
    let mut pair = pair(&["a"]).await;
    let mut oversized = encode_frame(&frame(1, "")).unwrap().to_vec();
    oversized[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    for (incarnation, bytes, part) in [(1, oversized, "more than"), (2, vec![0x55; 64], "not a frame")] {
        let (_endpoint, connection) = pair.raw("a").await;
        assert!(matches!(answered(&connection, &hello("a", incarnation)).await, HelloAnswer::Accepted(_)));
        pair.m.node.up("a").await;
        let mut frames = connection.open_uni().await.unwrap();
        frames.write_all(&[2]).await.unwrap();
        frames.write_all(&bytes).await.unwrap();
        let why = soon("the end of the connection", connection.closed()).await.to_string();
        assert!(why.contains(part), "{why}");
        pair.m.node.down("a").await;
    }
    pair.undisturbed().await;
}

#[tokio::test]
async fn certificates_and_authorities_change_without_a_restart() {
    let mut pair = pair(&["a"]).await;
    let next = Authority::generate("prod", DAYS).unwrap();
    let dir = pair.dir.path().to_owned();
    let both = [&pair.authority, &next];
    let before = pair.m.links.fingerprint();

    // A file that is wrong is named, and what was in force stays.
    let paths = files(&dir, &pair.authority, &both, "m", DAYS);
    std::fs::write(&paths.key, "no key").unwrap();
    let error = pair.m.links.reload().unwrap_err().to_string();
    assert!(error.contains("m.key"), "{error}");
    assert_eq!(pair.m.links.fingerprint(), before);

    // First everybody trusts both, then nodes show certificates of the next.
    files(&dir, &next, &both, "m", DAYS);
    files(&dir, &next, &both, "k", DAYS);
    pair.m.links.reload().unwrap();
    pair.k.links.tls().reload().unwrap();
    assert_ne!(pair.m.links.fingerprint(), before);
    pair.undisturbed().await;
    pair.k.links.disconnect(&name("m"));
    pair.m.node.down("k").await;
    pair.m.node.up("k").await;

    // A node that trusts the next alone, and shows it, is a peer.
    let mut a = start(settings("prod", "a", 1, &files(&dir, &next, &[&next], "a", DAYS)));
    know(&pair.m, &[("k", &pair.k.address), ("a", &a.address)]);
    know(&a, &[("m", &pair.m.address)]);
    assert_eq!(a.node.up("m").await, id("m", 5));
    pair.m.node.up("a").await;
}

#[tokio::test]
async fn without_certificates_nothing_beyond_loopback_is_bound_or_dialled() {
    let open = |listen: &str| QuicSettings {
        local: id("a", 1),
        cluster: "test".to_owned(),
        cluster_id: CLUSTER_ID,
        listen: listen.parse().unwrap(),
        tls: TlsMaterial::LoopbackOnly,
        versions: Versions::ALL,
    };
    let refused = QuicTransport::start(open("0.0.0.0:0")).unwrap_err();
    assert!(matches!(refused, QuicError::Open(_)), "{refused}");
    let a = start(open("127.0.0.1:0"));
    know(&a, &[("z", "192.0.2.1:7600")]);
    reason(&a, "z", "beyond loopback").await;
}

#[tokio::test]
async fn files_of_another_node_or_that_do_not_belong_together_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::generate("prod", DAYS).unwrap();
    let paths = files(dir.path(), &authority, &[&authority], "a", DAYS);
    let other = files(dir.path(), &authority, &[&authority], "b", DAYS);
    let error = |settings| QuicTransport::start(settings).unwrap_err().to_string();
    let wrong = error(settings("prod", "b", 1, &paths));
    assert!(wrong.contains("a.pem") && wrong.contains("keepwarm cert"), "{wrong}");
    let mixed = TlsPaths { key: other.key, ..paths.clone() };
    assert!(error(settings("prod", "a", 1, &mixed)).contains("b.key"));
    let missing = TlsPaths { ca: dir.path().join("nowhere.pem"), ..paths };
    assert!(error(settings("prod", "a", 1, &missing)).contains("nowhere.pem"));
    let loaded = Authority::load(authority.certificate(), &authority.key()).unwrap();
    assert_eq!(loaded.cluster(), "prod");
    let stranger = Authority::generate("prod", DAYS).unwrap();
    assert!(Authority::load(authority.certificate(), &stranger.key()).is_err());
}

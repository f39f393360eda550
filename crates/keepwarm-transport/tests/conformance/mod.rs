//! What any form of links must do, whatever is below: each form runs all of it.
#![allow(dead_code, unused_imports, reason = "not every file of tests runs the suite")]
#![allow(clippy::unwrap_used, clippy::result_large_err, reason = "a test may fail, and hands events back")]

mod versions;

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keepwarm_transport::{ByteStream, Class, Frame, Incoming, LinkError, PeerId, Responder, Transport};
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{Version, Versions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

pub(crate) use versions::*;

/// How long anything that should happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A form of links.
pub(crate) trait Form {
    /// A process joins that speaks these versions, and knows nobody yet; says where it is reached.
    fn join_speaking(&mut self, node: &str, incarnation: u64, versions: Versions) -> (Node, String);
    /// A process joins that speaks all versions.
    fn join(&mut self, node: &str, incarnation: u64) -> (Node, String) {
        self.join_speaking(node, incarnation, Versions::ALL)
    }
    /// The process is gone without a word.
    fn crash(&mut self, node: Node);
}

/// A process and what comes in.
pub(crate) struct Node {
    pub(crate) links: Arc<dyn Transport>,
    pub(crate) incoming: mpsc::Receiver<Incoming>,
    /// What came and was not asked for yet.
    early: VecDeque<Incoming>,
}

impl Node {
    pub(crate) fn new(links: Arc<dyn Transport>, incoming: mpsc::Receiver<Incoming>) -> Self {
        Self { links, incoming, early: VecDeque::new() }
    }

    pub(crate) fn name(&self) -> NodeName {
        self.links.local().node.clone()
    }

    /// The first event, of those that came and those to come, that `pick` takes; the others stay in order.
    pub(crate) async fn expect<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(Incoming) -> Result<T, Incoming>,
    ) -> T {
        for _ in 0..self.early.len() {
            match pick(self.early.pop_front().unwrap()) {
                Ok(found) => return found,
                Err(other) => self.early.push_back(other),
            }
        }
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                match pick(self.incoming.recv().await.expect("the links live")) {
                    Ok(found) => return found,
                    Err(other) => self.early.push_back(other),
                }
            }
        });
        let waited = found.await.ok();
        waited.unwrap_or_else(|| {
            panic!("{}: no {what}: {:?} {:?}", self.name(), self.early, self.links.peers())
        })
    }

    pub(crate) async fn up(&mut self, peer: &str) -> PeerId {
        self.up_speaking(peer).await.0
    }

    pub(crate) async fn up_speaking(&mut self, peer: &str) -> (PeerId, Version) {
        self.expect("Up", |event| match event {
            Incoming::Up(id, version) if id.node.as_str() == peer => Ok((id, version)),
            other => Err(other),
        })
        .await
    }

    pub(crate) async fn down(&mut self, peer: &str) -> (PeerId, String) {
        self.expect("Down", |event| match event {
            Incoming::Down(id, why) if id.node.as_str() == peer => Ok((id, why)),
            other => Err(other),
        })
        .await
    }

    pub(crate) async fn frame(&mut self) -> Frame {
        self.expect("Frame", |event| match event {
            Incoming::Frame(_, frame) => Ok(frame),
            other => Err(other),
        })
        .await
    }

    pub(crate) async fn call(&mut self) -> (Class, Frame, Responder) {
        self.expect("Call", |event| match event {
            Incoming::Call { class, request, answer, .. } => Ok((class, request, answer)),
            other => Err(other),
        })
        .await
    }

    pub(crate) async fn stream(&mut self) -> (Class, Frame, ByteStream) {
        self.expect("Stream", |event| match event {
            Incoming::Stream { class, header, stream, .. } => Ok((class, header, stream)),
            other => Err(other),
        })
        .await
    }
}

pub(crate) fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

pub(crate) fn frame(kind: u16, payload: impl Into<Bytes>) -> Frame {
    Frame { kind, payload: payload.into() }
}

pub(crate) fn id(node: &str, incarnation: u64) -> PeerId {
    PeerId { node: name(node), incarnation: Incarnation(incarnation) }
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never: {what}");
}

/// Nodes that are all up for each other.
pub(crate) async fn cluster(form: &mut impl Form, nodes: &[&str]) -> Vec<Node> {
    let mut joined: Vec<_> = nodes.iter().map(|node| form.join(node, 1)).collect();
    let all: Vec<_> = joined.iter().map(|(node, address)| (node.name(), address.clone())).collect();
    for (node, _) in &joined {
        node.links.set_peers(all.clone());
    }
    for (node, _) in &mut joined {
        for peer in nodes {
            if *peer != node.name().as_str() {
                node.up(peer).await;
            }
        }
    }
    joined.into_iter().map(|(node, _)| node).collect()
}

pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.unwrap_or_else(|_| panic!("too slow: {what}"))
}

pub(crate) async fn frames_arrive_in_order(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    for n in 0..2_000_u32 {
        nodes[0].links.send(&name("b"), frame(7, n.to_le_bytes().to_vec())).unwrap();
        nodes[1].links.send(&name("a"), frame(8, n.to_le_bytes().to_vec())).unwrap();
    }
    for n in 0..2_000_u32 {
        assert_eq!(nodes[1].frame().await, frame(7, n.to_le_bytes().to_vec()));
        assert_eq!(nodes[0].frame().await, frame(8, n.to_le_bytes().to_vec()));
    }
    let status = nodes[0].links.peers();
    assert!(
        status[0].up.is_some() && status[0].last_heard.is_some() && status[0].bytes[1].0 > 0,
        "{status:?}"
    );
}

pub(crate) async fn a_call_is_answered_or_ends_at_its_deadline(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let (a, mut b) = (nodes.remove(0), nodes.remove(0));
    let asking = {
        let links = Arc::clone(&a.links);
        tokio::spawn(
            async move { links.call(&name("b"), Class::Ownership, frame(1, "ping"), PATIENCE).await },
        )
    };
    let (class, request, answer) = b.call().await;
    assert_eq!((class, request), (Class::Ownership, frame(1, "ping")));
    answer.send(frame(2, "pong"));
    assert_eq!(soon("an answer", asking).await.unwrap(), Ok(frame(2, "pong")));

    let late = a.links.call(&name("b"), Class::Ownership, frame(1, "late"), Duration::from_millis(50)).await;
    assert_eq!(late, Err(LinkError::Deadline(name("b"))));
    let (_, _, mut kept) = b.call().await;
    soon("the end of a call past its deadline", kept.unwanted()).await;
}

pub(crate) async fn a_dropped_responder_is_an_error_and_a_dropped_call_is_seen(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let (a, mut b) = (nodes.remove(0), nodes.remove(0));
    let ask = |text: &'static str| {
        let links = Arc::clone(&a.links);
        tokio::spawn(async move { links.call(&name("b"), Class::Relay, frame(1, text), PATIENCE).await })
    };
    let asking = ask("nobody answers");
    drop(b.call().await);
    assert!(matches!(soon("an error", asking).await.unwrap(), Err(LinkError::Closed(_))));

    let asking = ask("given up");
    let (_, _, mut answer) = b.call().await;
    asking.abort();
    soon("the caller's going", answer.unwanted()).await;
}

/// Bytes that are nowhere the same.
fn pattern(length: usize) -> Bytes {
    (0..length as u64 / 8).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()).collect()
}

pub(crate) async fn sixty_four_mebibytes_arrive_whole_in_both_directions(mut form: impl Form) {
    const LENGTH: usize = 64 << 20;
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let (a, mut b) = (nodes.remove(0), nodes.remove(0));
    let sent = pattern(LENGTH);
    let opened = a.links.open(&name("b"), Class::Restore, frame(3, "blocks")).await.unwrap();
    let (class, header, stream) = b.stream().await;
    assert_eq!((class, header), (Class::Restore, frame(3, "blocks")));

    // There in chunks, back through the buffered interface.
    let (mut back, mut there) = opened.split();
    let (mut read, mut write) = stream.split();
    let bytes = sent.clone();
    let send = tokio::spawn(async move {
        let mut rest = bytes;
        while !rest.is_empty() {
            there.write_chunk(rest.split_to(rest.len().min(2 << 20))).await.unwrap();
        }
        there.finish();
    });
    let echo = tokio::spawn(async move {
        let mut got = Vec::with_capacity(LENGTH);
        while let Some(chunk) = read.read_chunk(1 << 20).await.unwrap() {
            assert!(chunk.len() <= 1 << 20);
            got.extend_from_slice(&chunk);
        }
        write.write_all(&got).await.unwrap();
        write.shutdown().await.unwrap();
        got
    });
    let mut returned = Vec::with_capacity(LENGTH);
    soon("64 MiB there and back", back.read_to_end(&mut returned)).await.unwrap();
    send.await.unwrap();
    assert!(echo.await.unwrap() == sent && returned == sent);
    let bytes = a.links.peers()[0].bytes[Class::Restore as usize];
    assert!(bytes.0 >= LENGTH as u64 && bytes.1 >= LENGTH as u64, "{bytes:?}");
}

pub(crate) async fn a_reset_is_an_error_and_no_end(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let (a, mut b) = (nodes.remove(0), nodes.remove(0));
    for dropped in [false, true] {
        let mut opened = a.links.open(&name("b"), Class::Checkpoint, frame(3, "")).await.unwrap();
        opened.write_chunk(Bytes::from_static(b"half")).await.unwrap();
        let (_, _, mut stream) = b.stream().await;
        if dropped {
            drop(opened);
        } else {
            opened.reset();
        }
        let mut got = Vec::new();
        let read = soon("a reset", stream.read_to_end(&mut got)).await;
        assert!(read.is_err(), "took {got:?} for the whole");
        let written = soon("a writer that is told", async {
            loop {
                if let Err(error) = stream.write_chunk(Bytes::from_static(b"answer")).await {
                    return error;
                }
                tokio::task::yield_now().await;
            }
        });
        assert!(matches!(written.await, LinkError::Closed(_)));
    }
}

pub(crate) async fn readers_that_stop_hold_up_nobody_else(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b", "c"]).await;
    let (a, mut b, mut c) = (nodes.remove(0), nodes.remove(0), nodes.remove(0));
    // More streams than any window of a connection would hold, each filled until its writer stands still.
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut opened = a.links.open(&name("b"), Class::Checkpoint, frame(3, "")).await.unwrap();
        held.push(b.stream().await.2);
        let chunk = Bytes::from(vec![7; 1 << 20]);
        let filling = async {
            for _ in 0..64 {
                opened.write_chunk(chunk.clone()).await.unwrap();
            }
        };
        assert!(
            tokio::time::timeout(Duration::from_millis(300), filling).await.is_err(),
            "there is no bound"
        );
        tokio::spawn(async move {
            let _ = opened.write_chunk(chunk).await;
            std::future::pending::<()>().await;
        });
    }
    for peer in [&mut b, &mut c] {
        a.links.send(&peer.name(), frame(9, "still here")).unwrap();
        assert_eq!(peer.frame().await, frame(9, "still here"));
    }
    let heard = || a.links.peers()[0].last_heard;
    let before = heard();
    until("heartbeats pass stalled streams", || heard() > before).await;
    let mut free = a.links.open(&name("b"), Class::Restore, frame(3, "free")).await.unwrap();
    let (_, _, mut stream) = b.stream().await;
    free.write_chunk(Bytes::from(vec![1; 4 << 20])).await.unwrap();
    free.finish();
    let mut got = Vec::new();
    soon("a stream beside stalled ones", stream.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got.len(), 4 << 20);
}

pub(crate) async fn a_full_queue_refuses_and_an_unknown_peer_is_not_connected(mut form: impl Form) {
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let a = nodes.remove(0);
    // Nobody reads what comes in at b.
    let full = (0..1_000_000).find_map(|_| a.links.send(&name("b"), frame(1, vec![0; 4096])).err());
    assert_eq!(full, Some(LinkError::Full(name("b"))));
    assert_eq!(a.links.send(&name("z"), frame(1, "")), Err(LinkError::NotConnected(name("z"))));
    let call = a.links.call(&name("z"), Class::Relay, frame(1, ""), PATIENCE).await;
    assert_eq!(call, Err(LinkError::NotConnected(name("z"))));
    let oversized = a.links.send(&name("b"), frame(1, vec![0; keepwarm_wire::FRAME_BYTES_MAX + 1]));
    assert!(matches!(oversized, Err(LinkError::Closed(_))), "{oversized:?}");
}

pub(crate) async fn a_crashed_peer_goes_down_and_comes_back_with_its_next_start(mut form: impl Form) {
    // Whichever has the lower name, it must be seen at once.
    for (crashes, stays) in [("b", "a"), ("a", "b")] {
        let mut nodes = cluster(&mut form, &["a", "b"]).await;
        let at = nodes.iter().position(|node| node.name().as_str() == crashes).unwrap();
        form.crash(nodes.remove(at));
        let mut left = nodes.remove(0);
        let (gone, _) = left.down(crashes).await;
        assert_eq!(gone, id(crashes, 1));
        assert_eq!(
            left.links.send(&name(crashes), frame(1, "")),
            Err(LinkError::NotConnected(name(crashes)))
        );
        assert!(left.links.peers()[0].reason.is_some());

        let (mut back, address) = form.join(crashes, 2);
        left.links.set_peers(vec![(name(crashes), address)]);
        back.links.set_peers(vec![(name(stays), form_address(&left, stays))]);
        assert_eq!(left.up(crashes).await, id(crashes, 2));
        assert_eq!(back.up(stays).await, id(stays, 1));
        left.links.send(&name(crashes), frame(1, "again")).unwrap();
        assert_eq!(back.frame().await, frame(1, "again"));
        form.crash(left);
        form.crash(back);
    }
}

/// Where a node is reached: what it told its peers.
fn form_address(node: &Node, name: &str) -> String {
    ADDRESSES.with(|all| all.borrow().get(name).cloned()).unwrap_or_else(|| node.name().to_string())
}

thread_local! {
    /// Addresses of this test's nodes, by name.
    pub(crate) static ADDRESSES: std::cell::RefCell<std::collections::BTreeMap<String, String>> = std::cell::RefCell::default();
}

/// All of it, as tests of one form.
#[macro_export]
macro_rules! conformance {
    ($form:expr) => {
        $crate::conformance!(@ $form,
            frames_arrive_in_order
            a_call_is_answered_or_ends_at_its_deadline
            a_dropped_responder_is_an_error_and_a_dropped_call_is_seen
            sixty_four_mebibytes_arrive_whole_in_both_directions
            a_reset_is_an_error_and_no_end
            readers_that_stop_hold_up_nobody_else
            a_full_queue_refuses_and_an_unknown_peer_is_not_connected
            a_crashed_peer_goes_down_and_comes_back_with_its_next_start
            two_peers_speak_the_lower_of_their_newest
            peers_that_are_too_far_apart_are_told_both_ranges
            a_rolling_restart_takes_up_a_new_version_while_all_else_flows);
    };
    (@ $form:expr, $($test:ident)+) => {
        $(
            #[tokio::test]
            async fn $test() {
                conformance::$test($form).await;
            }
        )+
    };
}

//! The in-memory form: the conformance suite, and what only tests ask of it.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod conformance;

use std::sync::Arc;
use std::time::Duration;

use conformance::{Form, Node, cluster, frame, id, name, until};
use keepwarm_transport::Transport;
use keepwarm_transport::memory::Network;
use keepwarm_wire::Versions;

struct InMemory(Network);

impl InMemory {
    fn new() -> Self {
        Self(Network::with_silence(Duration::from_millis(200)))
    }
}

impl Form for InMemory {
    fn join_speaking(&mut self, node: &str, incarnation: u64, versions: Versions) -> (Node, String) {
        let (links, incoming) = self.0.join_speaking(id(node, incarnation), versions);
        (Node::new(links, incoming), node.to_owned())
    }

    fn crash(&mut self, node: Node) {
        self.0.crash(&node.name());
    }
}

conformance!(InMemory::new());

#[tokio::test]
async fn a_cut_loses_nothing_that_heals_in_time_and_breaks_the_link_otherwise() {
    let mut form = InMemory(Network::with_silence(Duration::from_secs(1)));
    let network = form.0.clone();
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    network.cut_one_way(&name("a"), &name("b"));
    nodes[0].links.send(&name("b"), frame(1, "held")).unwrap();
    network.heal(&name("a"), &name("b"));
    assert_eq!(nodes[1].frame().await, frame(1, "held"));

    network.cut_one_way(&name("a"), &name("b"));
    nodes[0].links.send(&name("b"), frame(1, "lost")).unwrap();
    nodes[0].down("b").await;
    nodes[1].down("a").await;
    network.heal(&name("a"), &name("b"));
    nodes[0].up("b").await;
    nodes[1].up("a").await;
    nodes[0].links.send(&name("b"), frame(1, "after")).unwrap();
    assert_eq!(nodes[1].frame().await, frame(1, "after"));
}

#[tokio::test]
async fn what_is_delayed_arrives_that_much_later() {
    let mut form = InMemory::new();
    let network = form.0.clone();
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    network.delay(Duration::from_millis(70));
    let sent = tokio::time::Instant::now();
    nodes[0].links.send(&name("b"), frame(1, "slow")).unwrap();
    nodes[1].frame().await;
    assert!(sent.elapsed() >= Duration::from_millis(70));
    assert_eq!(nodes[0].links.peers()[0].rtt, Some(Duration::from_millis(140)));
}

#[tokio::test]
async fn of_two_processes_with_one_name_the_later_start_wins() {
    let mut form = InMemory::new();
    let mut nodes = cluster(&mut form, &["a", "b"]).await;
    let (later, _) = form.join("b", 2);
    later.links.set_peers(vec![(name("a"), "a".to_owned())]);
    nodes[0].down("b").await;
    assert_eq!(nodes[0].up("b").await, id("b", 2));
    let (earlier, _) = form.join("b", 1);
    earlier.links.set_peers(vec![(name("a"), "a".to_owned())]);
    let links: Arc<dyn Transport> = earlier.links;
    until("the earlier start is told", || {
        links.peers()[0].reason.as_ref().is_some_and(|why| why.contains("later"))
    })
    .await;
    assert_eq!(nodes[0].links.peers()[0].up, Some(id("b", 2).incarnation));
}

//! The QUIC form over loopback: the conformance suite.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod conformance;

use std::sync::Arc;

use conformance::{ADDRESSES, Form, Node, id};
use keepwarm_transport::Transport;
use keepwarm_transport::quic::{QuicSettings, QuicTransport, TlsMaterial};
use keepwarm_wire::Versions;

#[derive(Default)]
struct Quic;

impl Form for Quic {
    fn join_speaking(&mut self, node: &str, incarnation: u64, versions: Versions) -> (Node, String) {
        let (links, incoming) = QuicTransport::start(QuicSettings {
            local: id(node, incarnation),
            cluster: "test".to_owned(),
            cluster_id: 7,
            listen: "127.0.0.1:0".parse().unwrap(),
            tls: TlsMaterial::LoopbackOnly,
            versions,
        })
        .unwrap();
        let address = links.address().unwrap().to_string();
        ADDRESSES.with(|all| all.borrow_mut().insert(node.to_owned(), address.clone()));
        (Node::new(links as Arc<dyn Transport>, incoming), address)
    }

    fn crash(&mut self, node: Node) {
        // As near as one process comes: a kill is tested by the cluster's tests.
        node.links.close();
    }
}

conformance!(Quic);

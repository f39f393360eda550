//! What other nodes send, and to whom it belongs.

use std::sync::{Arc, OnceLock};

use keepwarm_core::registry::Member;
use keepwarm_registry::RegistryHandle;
use keepwarm_transport::{Frame, Incoming, PeerId};
use keepwarm_types::NodeName;
use keepwarm_wire::blocks::BlocksHeader;
use keepwarm_wire::control::RelayHeader;
use keepwarm_wire::kinds;
use tokio::sync::mpsc;

use super::{Cluster, IncomingRelay, RelayStream, RelayedCaller, blocks};
use crate::shard::ShardMsg;

/// Takes what comes until the links end. Before `cluster` is set only the registry is served.
pub(super) async fn run(
    mut incoming: mpsc::Receiver<Incoming>,
    registry: RegistryHandle,
    cluster: Arc<OnceLock<Arc<Cluster>>>,
) {
    while let Some(event) = incoming.recv().await {
        match event {
            Incoming::Up(peer, version) => {
                tracing::info!(node = %peer.node, %version, "a peer is up");
                if let Some(cluster) = cluster.get() {
                    linked(cluster, &peer.node);
                }
            }
            Incoming::Down(peer, why) => tracing::info!(node = %peer.node, %why, "a peer is down"),
            Incoming::Frame(peer, frame) => {
                if let Some(cluster) = cluster.get() {
                    said(cluster, &peer, &frame).await;
                }
            }
            Incoming::Call { from, request, answer, .. } if request.kind == kinds::REGISTRY => {
                let registry = registry.clone();
                tokio::spawn(async move {
                    let payload = registry.handle(&from.node, answer.version(), request.payload).await;
                    answer.send(Frame { kind: kinds::REGISTRY, payload });
                });
            }
            Incoming::Call { request, answer, .. } if request.kind == kinds::LOAD => {
                if let Some(handle) = cluster.get().and_then(|cluster| cluster.node()) {
                    tokio::spawn(async move {
                        if let Some(load) = super::load::answer(&handle, answer.version()).await {
                            answer.send(load);
                        }
                    });
                }
            }
            Incoming::Call { from, request, .. } => {
                tracing::warn!(node = %from.node, kind = request.kind, "a call of an unknown kind");
            }
            Incoming::Stream { from, header, stream, .. } => {
                if let Some(cluster) = cluster.get() {
                    opened(cluster, &from, &header, stream);
                }
            }
        }
    }
}

/// What the node's replicas did not answer is sent to it again.
fn linked(cluster: &Cluster, node: &NodeName) {
    let (Some(handle), map) = (cluster.node(), cluster.map()) else { return };
    let Some(state) = map.node(node) else { return };
    let member = Member { node: node.clone(), incarnation: state.incarnation };
    for shard in handle.links().shards() {
        let _ = shard.cast(ShardMsg::Linked(member.clone()));
    }
}

/// A message between replicas: its place is waited for, so that a fast peer fills its link, not a mailbox.
//= GUARANTEES.md#G8
async fn said(cluster: &Cluster, peer: &PeerId, frame: &Frame) {
    let Some(handle) = cluster.node() else { return };
    let envelope = match keepwarm_wire::envelope::decode(frame, &cluster.layouts) {
        Ok(envelope) => envelope,
        Err(error) => {
            tracing::warn!(node = %peer.node, %error, "a message between replicas cannot be read");
            return;
        }
    };
    if envelope.from.node != peer.node {
        tracing::warn!(node = %peer.node, said = %envelope.from.node, "a peer speaks for another node");
        return;
    }
    let Ok(permit) = handle.admission().replica_in().await else { return };
    if let Some(shard) = handle.links().shard_at(envelope.shard) {
        let _ = shard.cast(ShardMsg::Peer(envelope, permit));
    }
}

fn opened(cluster: &Arc<Cluster>, from: &PeerId, header: &Frame, stream: keepwarm_transport::ByteStream) {
    let Some(handle) = cluster.node() else { return };
    match header.kind {
        kinds::BLOCKS_HEADER => match BlocksHeader::decode(header) {
            Ok(header) => drop(tokio::spawn(blocks::serve(handle.clone(), header, stream))),
            Err(error) => tracing::warn!(node = %from.node, %error, "a batch of blocks cannot be read"),
        },
        kinds::RELAY_HEADER => match RelayHeader::decode(header) {
            Ok(header) => {
                let caller = RelayedCaller {
                    tenant: header.tenant,
                    admin: header.admin,
                    request_id: header.request_id,
                };
                let relay =
                    IncomingRelay { caller, from: from.node.clone(), stream: RelayStream::new(stream) };
                if cluster.relays.try_send(relay).is_err() {
                    tracing::warn!(node = %from.node, "too many relayed requests wait: one was refused");
                }
            }
            Err(error) => tracing::warn!(node = %from.node, %error, "a relayed request cannot be read"),
        },
        kind => tracing::warn!(node = %from.node, kind, "a stream of an unknown kind"),
    }
}

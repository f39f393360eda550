//! What a shard actor has to do with other nodes, as tasks that report back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use keepwarm_catalog::Catalog;
use keepwarm_core::registry::{Change, Entry, Member, ReplicaSet, Response};
use keepwarm_core::replica::{Content, CopyFailed, CopyId, Envelope, Message};
use keepwarm_core::session::{BlockRef, TranscriptDelta};
use keepwarm_memory::Block;
use keepwarm_registry::ProposeError;
use keepwarm_types::{Bytes, ShardId, Tokens};
use ractor::ActorRef;

use super::message::ShardMsg;
use crate::cluster::Whose;
use crate::handle::Handle;

/// How long the registry may take for one question or one change.
const REGISTRY_DEADLINE: Duration = Duration::from_secs(5);

/// Blocks on their way to or from another node.
pub(super) struct Moved {
    pub(super) id: CopyId,
    /// The other node.
    pub(super) with: Member,
    pub(super) whose: Whose,
    pub(super) blocks: Vec<BlockRef>,
}

/// A message that cannot be sent is lost; the core sends it again.
pub(super) fn send(handle: &Handle, envelope: Envelope) {
    if let Some(cluster) = handle.cluster_link() {
        cluster.say(envelope);
    }
}

/// Completes a session with its transcript, and sends it.
pub(super) fn send_whole(handle: &Handle, catalog: &Catalog, mut envelope: Envelope) {
    let Some(cluster) = handle.cluster_link() else { return };
    let (cluster, catalog) = (Arc::clone(cluster), catalog.clone());
    tokio::task::spawn_blocking(move || {
        let Message::Install(install) = &mut envelope.message else { return };
        let Content::Live(manifest, content) = &mut install.content else { return };
        let (stamp, transcript) = match catalog.whole(&install.key) {
            Ok(Some(whole)) => whole,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(key = %install.key, %error, "a session cannot be sent whole");
                return;
            }
        };
        // It is not there yet, or another one since: the core asks again.
        if manifest.stamp != stamp {
            return;
        }
        *content = TranscriptDelta {
            keep_tokens: Tokens::ZERO,
            keep_messages: 0,
            tokens: transcript.tokens,
            messages: transcript.messages,
        };
        cluster.say(envelope);
    });
}

/// Copies blocks to another node.
pub(super) fn copy(handle: &Handle, to: &ActorRef<ShardMsg>, moved: Moved, guards: Option<Vec<Block>>) {
    let (Some(cluster), Some(guards)) = (handle.cluster_link(), guards) else {
        let _ = to.cast(ShardMsg::Copied(moved.id, Err(CopyFailed::Gone)));
        return;
    };
    let (cluster, to, handle) = (Arc::clone(cluster), to.clone(), handle.clone());
    tokio::spawn(async move {
        let Moved { id, with, whose, .. } = moved;
        let bytes = guards.iter().map(|block| Bytes(block.length() as u64)).sum();
        let started = Instant::now();
        let pushed = cluster.push(&with, &whose, guards).await;
        if whose.spare && pushed.is_ok() {
            handle.note_move(
                &whose.key,
                "pinned",
                &format!("peer:{}", with.node),
                bytes,
                "room",
                started.elapsed(),
            );
        }
        let _ = to.cast(ShardMsg::Copied(id, pushed.map(|()| Vec::new())));
    });
}

/// Fetches blocks from another node.
pub(super) fn fetch(handle: &Handle, to: &ActorRef<ShardMsg>, moved: Moved) {
    let Some(cluster) = handle.cluster_link() else { return };
    let (cluster, to, handle) = (Arc::clone(cluster), to.clone(), handle.clone());
    tokio::spawn(async move {
        let Moved { id, with, whose, blocks } = moved;
        let started = Instant::now();
        let pulled = cluster.pull(&with, &whose, blocks).await;
        if let Ok(pulled) = &pulled {
            let bytes = pulled.iter().map(|block| Bytes(block.length() as u64)).sum();
            let why = if whose.spare { "room" } else { "fetch" };
            handle.note_move(
                &whose.key,
                &format!("peer:{}", with.node),
                "pinned",
                bytes,
                why,
                started.elapsed(),
            );
        }
        let _ = to.cast(ShardMsg::Copied(id, pulled));
    });
}

/// Proposes a change of the shard's set.
pub(super) fn propose(
    handle: &Handle,
    to: &ActorRef<ShardMsg>,
    shard: ShardId,
    set: &Arc<ReplicaSet>,
    change: Change,
) {
    let Some(cluster) = handle.cluster_link() else { return };
    let (cluster, generation, to) = (Arc::clone(cluster), set.generation, to.clone());
    // A shard that is ceded waits for what becomes of it.
    let cedes = matches!(change, Change::MakePrimary(_));
    tokio::spawn(async move {
        let entry = Entry::Change { shard, generation, change };
        match cluster.registry().propose(entry, REGISTRY_DEADLINE).await {
            Ok(Response::Refused(reason)) => {
                tracing::debug!(%shard, %reason, "a change of the set was refused");
                let _ = to.cast(ShardMsg::ProposalFailed(generation));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%shard, %error, "a change of the set was not taken");
                if !cedes || matches!(error, ProposeError::Unavailable(_)) {
                    let _ = to.cast(ShardMsg::ProposalFailed(generation));
                }
            }
        }
    });
}

/// Asks the registry whether this set is the present one.
pub(super) fn confirm(
    handle: &Handle,
    to: &ActorRef<ShardMsg>,
    shard: ShardId,
    set: &Arc<ReplicaSet>,
    round: u64,
) {
    let Some(cluster) = handle.cluster_link() else {
        // A cluster of one: nobody could have taken over.
        let _ = to.cast(ShardMsg::RegistryConfirmed(round));
        return;
    };
    let (cluster, set, to) = (Arc::clone(cluster), Arc::clone(set), to.clone());
    tokio::spawn(async move {
        if let Err(error) = cluster.registry().confirm(REGISTRY_DEADLINE).await {
            tracing::debug!(%shard, %error, "the registry does not confirm a generation now");
            return;
        }
        let present = cluster.registry().watch().borrow().set(shard);
        match present {
            Some(present) if present == *set => {
                let _ = to.cast(ShardMsg::RegistryConfirmed(round));
            }
            Some(present) => {
                let _ = to.cast(ShardMsg::Set(Arc::new(present)));
            }
            None => {}
        }
    });
}

//! Where a new session goes: here, or to another node that is far better off. Others are asked only while this node is
//! pressed, two of them at a time: the better of two random choices is nearly as good as the best of all (Mitzenmacher,
//! "The Power of Two Choices in Randomized Load Balancing", 2001), and costs one round trip whatever the cluster's size.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use keepwarm_core::placement::{Needs, NodeLoad, choose_node, choose_successor};
use keepwarm_core::registry::NodeStatus;
use keepwarm_transport::{Class, Frame};
use keepwarm_types::{NodeName, SessionId};
use keepwarm_wire::control::LoadAnswer;
use tokio::time::Instant;
use uuid::Uuid;

use super::Cluster;
use crate::handle::Handle;

/// How many others are asked.
const ASKED: usize = 2;
/// How long they may take: a new session waits.
const ANSWER_DEADLINE: Duration = Duration::from_millis(100);
/// How long it may take where a session has nowhere to run but there.
const SURE_DEADLINE: Duration = Duration::from_secs(1);
/// How long what was found holds: many sessions that are made at once cost one question.
const HOLDS: Duration = Duration::from_millis(250);

/// What was last found.
#[derive(Debug, Default)]
pub(super) struct Found(Mutex<Option<(Instant, Option<NodeName>)>>);

impl Found {
    fn now(&self) -> Option<Option<NodeName>> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        found.as_ref().filter(|(at, _)| at.elapsed() < HOLDS).map(|(_, node)| node.clone())
    }

    fn set(&self, node: Option<NodeName>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), node));
    }
}

impl Cluster {
    /// The node that takes a new session; none where it stays here.
    pub(crate) async fn home_for_new(&self, here: &NodeLoad) -> Option<NodeName> {
        if !here.pressed() {
            return None;
        }
        if let Some(found) = self.found.now() {
            return found;
        }
        let loads = self.ask_loads(self.some_others(), ANSWER_DEADLINE).await;
        let node = choose_node(here, &loads).cloned();
        self.found.set(node.clone());
        node
    }

    /// Some other nodes that own shards and are not being emptied, at random.
    fn some_others(&self) -> Vec<NodeName> {
        let map = self.told.borrow().clone();
        let me = &self.member().node;
        let owners: BTreeSet<_> =
            map.shards().filter_map(|shard| map.primary(shard)).map(|primary| primary.node).collect();
        let up = |name: &NodeName| map.node(name).is_some_and(|node| node.status == NodeStatus::Up);
        let mut others: Vec<_> = owners.into_iter().filter(|name| name != me && up(name)).collect();
        let mut some = Vec::new();
        while some.len() < ASKED && !others.is_empty() {
            let at = Uuid::new_v4().as_u128() % others.len() as u128;
            some.push(others.swap_remove(at as usize));
        }
        some
    }

    /// How these nodes are, as far as they say so in time.
    async fn ask_loads(&self, nodes: Vec<NodeName>, deadline: Duration) -> Vec<(NodeName, NodeLoad)> {
        let asked = nodes.into_iter().map(|node| async move {
            let load = self.ask_load(&node, deadline).await?;
            Some((node, load))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// The replica of a session's shard that has what the session needs, where this node has not.
    pub(crate) async fn successor(&self, id: SessionId, needs: Needs, here: &NodeLoad) -> Option<NodeName> {
        let loads = self.ask_loads(self.others_of(id), SURE_DEADLINE).await;
        choose_successor(here, &loads, needs).cloned()
    }

    /// How a node is that a session shall run on; none where it does not say so in time, or cannot.
    pub(crate) async fn load_of(&self, node: &NodeName) -> Option<NodeLoad> {
        self.ask_load(node, SURE_DEADLINE).await
    }

    async fn ask_load(&self, node: &NodeName, deadline: Duration) -> Option<NodeLoad> {
        let question = LoadAnswer::question(self.transport.version(node)?).ok()?;
        let answer = self.transport.call(node, Class::Ownership, question, deadline).await.ok()?;
        LoadAnswer::decode(&answer).ok().map(|answer| answer.0)
    }
}

/// Answers another node that asks.
pub(super) async fn answer(handle: &Handle, version: keepwarm_wire::Version) -> Option<Frame> {
    let load = handle.load_now().await.ok()?;
    LoadAnswer(load).encode(version).ok()
}

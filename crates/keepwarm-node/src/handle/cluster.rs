//! Other nodes: where a session belongs, the way there, and what the cluster looks like from here.

use std::collections::BTreeMap;
use std::sync::Arc;

use keepwarm_core::placement::NodeLoad;
use keepwarm_core::registry::NodeStatus;
use keepwarm_types::{NodeName, SessionId, ShardId};
use tokio::sync::oneshot;

use super::inner::{Handle, restarting, send};
use crate::cluster::{Cluster, RelayStream, RelayedCaller};
use crate::error::Error;
use crate::pinned::PinnedMsg;

/// Where a request belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// To this node.
    Here,
    /// To another.
    At(NodeName),
    /// To none: the shard has no owner now.
    Nobody,
}

impl Handle {
    /// This node's part in a cluster of several; none in a cluster of one.
    pub(crate) fn cluster_link(&self) -> Option<&Arc<Cluster>> {
        self.inner().cluster.as_ref()
    }

    /// Whether there are other nodes.
    #[must_use]
    pub fn in_cluster(&self) -> bool {
        self.inner().cluster.is_some()
    }

    /// The node that owns a session's shard, as this node knows it now.
    #[must_use]
    pub fn whereabouts(&self, id: SessionId) -> Whereabouts {
        let Some(cluster) = self.cluster_link() else { return Whereabouts::Here };
        match cluster.owner(id) {
            None => Whereabouts::Nobody,
            Some(owner) if owner == *cluster.member() => Whereabouts::Here,
            Some(owner) => Whereabouts::At(owner.node),
        }
    }

    /// The node that shall take a new session, where that is another than this one: far less pressed, or able to run it.
    pub async fn home_for_new(&self) -> Option<NodeName> {
        let cluster = self.cluster_link()?;
        let here = self.load_now().await.ok()?;
        cluster.home_for_new(&here).await
    }

    /// How this node is.
    pub(crate) async fn load_now(&self) -> Result<NodeLoad, Error> {
        let gpus: Vec<_> = self.inner().boards.iter().map(|board| board.load()).collect();
        let (reply, told) = oneshot::channel();
        send(self.links().pinned()?, PinnedMsg::Info(reply), "pinned memory")?;
        let pinned = told.await.map_err(|_| restarting("pinned memory"))?.arena;
        Ok(NodeLoad::of(&gpus, pinned.used, pinned.reserved))
    }

    /// A node that owns shards, for a session without an id: this one, where it does.
    #[must_use]
    pub fn anywhere(&self) -> Whereabouts {
        let Some(cluster) = self.cluster_link() else { return Whereabouts::Here };
        if !cluster.owned().is_empty() {
            return Whereabouts::Here;
        }
        cluster.any_owner().map_or(Whereabouts::Nobody, Whereabouts::At)
    }

    /// Resolves at the next change of the shard map after this call; never in a cluster of one.
    pub fn map_changes(&self) -> impl Future<Output = ()> + Send + use<> {
        let told = self.cluster_link().map(|cluster| cluster.told());
        async move {
            if let Some(mut told) = told
                && told.changed().await.is_ok()
            {
                return;
            }
            // A cluster of one, or the node stops: nothing changes any more.
            std::future::pending::<()>().await;
        }
    }

    /// Opens a way for one request to another node.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: nothing was sent.
    pub async fn relay(&self, to: &NodeName, caller: &RelayedCaller) -> Result<RelayStream, Error> {
        let cluster = self.cluster_link().ok_or_else(|| Error::unknown_node(to))?;
        cluster.relay(to, caller).await
    }

    /// The other nodes that the registry takes for alive.
    #[must_use]
    pub fn others(&self) -> Vec<NodeName> {
        let Some(cluster) = self.cluster_link() else { return Vec::new() };
        let map = cluster.map();
        let alive = map.nodes().iter().filter(|node| node.status != NodeStatus::Down);
        alive.map(|node| node.registration.node.clone()).filter(|node| node != self.name()).collect()
    }

    /// Where the nodes that are not down answer HTTP, by name, this one's included.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<String, String> {
        let own = (self.name().to_string(), self.inner().node.http.clone());
        let map = self.cluster_link().map(|cluster| cluster.map());
        let nodes = map.iter().flat_map(|map| map.nodes()).filter(|node| node.status != NodeStatus::Down);
        let others = nodes.map(|node| (node.registration.node.to_string(), node.registration.http.clone()));
        others.chain([own]).collect()
    }

    /// Shards that a node owns, and those that nobody does.
    #[must_use]
    pub fn shards_of(&self, node: &NodeName) -> Vec<ShardId> {
        let Some(cluster) = self.cluster_link() else { return Vec::new() };
        cluster.owned_by(node)
    }

    /// Shards that this node answers for: all, in a cluster of one.
    pub(crate) fn own_shards(&self) -> Vec<ShardId> {
        match self.cluster_link() {
            Some(cluster) => cluster.owned(),
            None => (0..self.links().count.get()).map(ShardId).collect(),
        }
    }
}

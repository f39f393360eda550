//! This node's part in a cluster of several: its links, its registry, and what travels over them.
//!
//! - **Owns** the transport and the registry's handle; knows where each shard's primary is.
//! - `start`: links, registry, registration, in this order. `watch`: the registry's news to the shards, and who hears
//!   whom to the registry. `inbound`: what other nodes send, to whom it belongs. `blocks`: bytes between pinned
//!   arenas. `relay`: a client's request on its way to the owner. `load`: which node takes a new session. `cede`: shards that
//!   another replica takes over, for it has room.
//!
//! Tasks here end with the node. None holds a lock across an await; whatever waits has a deadline.

mod blocks;
mod cede;
mod inbound;
mod load;
mod relay;
mod start;
mod watch;

use std::sync::{Arc, OnceLock};

use keepwarm_core::registry::{Member, Registry};
use keepwarm_core::replica::Envelope;
use keepwarm_registry::RegistryHandle;
use keepwarm_transport::Transport;
use keepwarm_types::{NodeName, SessionId, ShardCount, ShardId};
use keepwarm_wire::LayoutCache;
use tokio::sync::{mpsc, watch as tokio_watch};
use tokio::task::AbortHandle;

use crate::handle::{Handle, WeakHandle};
pub(crate) use blocks::Whose;
pub use relay::{IncomingRelay, RelayStream, RelayedCaller};
pub use start::JoinError;
pub(crate) use start::join;

/// This node's part in the cluster.
pub(crate) struct Cluster {
    member: Member,
    count: ShardCount,
    transport: Arc<dyn Transport>,
    registry: RegistryHandle,
    map: tokio_watch::Receiver<Arc<Registry>>,
    /// The registry that the shards have been told of: a request that follows it finds them there.
    told: tokio_watch::Sender<Arc<Registry>>,
    layouts: LayoutCache,
    /// The node's actors, once they run; they own this, so it must not own them.
    handle: OnceLock<WeakHandle>,
    relays: mpsc::Sender<IncomingRelay>,
    found: load::Found,
    ceded: cede::Ceded,
    /// Reports to the registry's leader so far.
    reports: tokio_watch::Sender<u64>,
    tasks: std::sync::Mutex<Vec<AbortHandle>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({})", self.member.node)
    }
}

impl Cluster {
    /// The node's actors, while they run.
    fn node(&self) -> Option<Handle> {
        self.handle.get().and_then(WeakHandle::upgrade)
    }

    /// This process.
    pub(crate) const fn member(&self) -> &Member {
        &self.member
    }

    pub(crate) const fn registry(&self) -> &RegistryHandle {
        &self.registry
    }

    pub(crate) fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// The registry as it is known here now.
    pub(crate) fn map(&self) -> Arc<Registry> {
        self.map.borrow().clone()
    }

    /// Changes of the map that the shards have been told of.
    pub(crate) fn told(&self) -> tokio_watch::Receiver<Arc<Registry>> {
        self.told.subscribe()
    }

    /// The primary of a session's shard; none while the shard has no set.
    pub(crate) fn owner(&self, id: SessionId) -> Option<Member> {
        self.told.borrow().primary(self.count.shard_of(id))
    }

    /// A node that owns shards.
    pub(crate) fn any_owner(&self) -> Option<NodeName> {
        let map = self.told.borrow().clone();
        map.shards().find_map(|shard| map.primary(shard)).map(|primary| primary.node)
    }

    /// Shards whose primary this process is.
    pub(crate) fn owned(&self) -> Vec<ShardId> {
        self.owned_where(|primary| *primary == self.member)
    }

    /// Shards whose primary a node is.
    pub(crate) fn owned_by(&self, node: &NodeName) -> Vec<ShardId> {
        self.owned_where(|primary| primary.node == *node)
    }

    fn owned_where(&self, fits: impl Fn(&Member) -> bool) -> Vec<ShardId> {
        let map = self.told.borrow().clone();
        map.shards().filter(|shard| map.primary(*shard).as_ref().is_some_and(&fits)).collect()
    }

    /// Tells another node's replica. What cannot be sent is lost; the core sends it again.
    pub(crate) fn say(&self, envelope: Envelope) {
        let to = envelope.to.node.clone();
        let Some(version) = self.transport.version(&to) else {
            tracing::trace!(%to, "a message was not sent: the node is not connected");
            return;
        };
        let frame = match keepwarm_wire::envelope::encode(&envelope, version) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%to, %error, "a message between replicas cannot be encoded");
                return;
            }
        };
        if let Err(error) = self.transport.send(&to, frame) {
            tracing::trace!(%to, %error, "a message was not sent");
        }
    }

    /// Ends links and tasks.
    pub(crate) async fn leave(&self) {
        for task in self.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..) {
            task.abort();
        }
        self.registry.clone().shutdown().await;
        self.transport.close();
    }
}

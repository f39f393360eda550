//! What openraft is told about our types.

use std::fmt;
use std::sync::Arc;

use keepwarm_core::registry::{Entry, Response};
use keepwarm_types::NodeName;
use twox_hash::XxHash3_64;
use uuid::Uuid;

/// A proposed entry; openraft clones it for each voter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proposal(pub(crate) Arc<Entry>);

/// Whose a raft id is. The name is missing in openraft's own defaults alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RaftPeer {
    pub(crate) name: Option<NodeName>,
    pub(crate) disk: Uuid,
}

impl fmt::Display for RaftPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name}/{}", self.disk),
            None => write!(f, "(nobody)"),
        }
    }
}

/// Who votes is a node's name on one disk: an empty disk is somebody else.
#[must_use]
pub(crate) fn raft_id(name: &NodeName, disk: Uuid) -> u64 {
    let mut bytes = name.as_str().as_bytes().to_vec();
    bytes.push(0);
    bytes.extend(disk.as_bytes());
    XxHash3_64::oneshot(&bytes)
}

openraft::declare_raft_types!(
    /// The registry's group.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Response,
        NodeId = u64,
        Node = RaftPeer,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Vec<u8>,
        Responder = openraft::impls::OneshotResponder<TypeConfig>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type Raft = openraft::Raft<TypeConfig>;
pub(crate) type LogEntry = openraft::Entry<TypeConfig>;
pub(crate) type StorageError = openraft::StorageError<u64>;

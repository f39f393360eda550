//! What the consensus group agrees upon, one entry at a time, and what each entry answers.

use std::borrow::Cow;

use keepwarm_types::{Generation, Incarnation, NodeName, ShardId, Timestamp};
use uuid::Uuid;

/// A process that wants to take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Its node's name in the spec.
    pub node: NodeName,
    /// Its data folder's identity: a new, empty folder has a new one.
    pub disk: Uuid,
    /// Where peers reach it.
    pub peer: String,
    /// Where clients reach it.
    pub http: String,
    /// What fails together.
    pub zone: String,
    /// Whether it can hold sessions; a voter without memory cannot.
    pub stores: bool,
    /// SHA-256 of its certificate.
    pub certificate: [u8; 32],
    /// Drawn when the process starts: asked twice, because an answer was lost, it is registered once.
    pub process: Uuid,
}

/// A change of one shard's set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This node begins to copy.
    AddLearner(NodeName),
    /// The learner is given up.
    DropLearner,
    /// The learner has every manifest: it becomes a replica.
    Promote,
    /// This replica leaves. Where fewer than `replication` stay, somebody beside the accuser must have seen it fail.
    Remove {
        /// Who leaves.
        node: NodeName,
        /// Who saw it fail, the proposer among them.
        observers: Vec<NodeName>,
    },
    /// This replica becomes the first.
    MakePrimary(NodeName),
}

/// One agreed step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A new version of the spec is in force.
    Spec {
        /// Its `version`.
        version: u64,
        /// BLAKE3 of its text.
        hash: [u8; 32],
    },
    /// A process starts; answers with its incarnation.
    Register {
        /// Who.
        registration: Registration,
        /// When, by the leader's clock; only shown, never compared.
        at: Timestamp,
    },
    /// An incarnation has failed, as several saw.
    Down {
        /// Which node.
        node: NodeName,
        /// Which process of it.
        incarnation: Incarnation,
        /// Who saw it.
        observers: Vec<NodeName>,
    },
    /// An incarnation that was taken for failed is heard again, and is the last copy of some shards: it takes part again.
    Return {
        /// Which node.
        node: NodeName,
        /// Which process of it.
        incarnation: Incarnation,
    },
    /// A failed or last copy is given up by an operator or after `give_up_after`: its shards start anew, as lost.
    GiveUp {
        /// Which node.
        node: NodeName,
        /// Which process of it.
        incarnation: Incarnation,
        /// When, by the leader's clock.
        at: Timestamp,
    },
    /// A node shall be emptied, or take part again.
    Drain {
        /// Which node.
        node: NodeName,
        /// Emptied, or not.
        draining: bool,
    },
    /// The first sets of shards that never had one.
    Assign(Vec<(ShardId, Vec<NodeName>)>),
    /// A compare-and-set on one shard's generation.
    Change {
        /// Which shard.
        shard: ShardId,
        /// The generation that it must have.
        generation: Generation,
        /// What changes.
        change: Change,
    },
}

/// Why an entry changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The shard has moved on.
    #[error("the shard is at generation {0}")]
    Stale(Generation),
    /// No such node, or not this incarnation of it.
    #[error("{0} is not known in this incarnation")]
    UnknownNode(NodeName),
    /// No such shard.
    #[error("there is no shard {0}")]
    UnknownShard(ShardId),
    /// The change does not fit the set.
    #[error("{0}")]
    Unfit(Cow<'static, str>),
    /// One observer alone, where a copy would be missed.
    #[error("{0} was seen to fail by too few")]
    Evidence(NodeName),
    /// An older spec, or other content under the same version.
    #[error("the spec is at version {0}: raise `version` with each change")]
    Spec(u64),
}

impl Refused {
    pub(super) const fn unfit(why: &'static str) -> Self {
        Self::Unfit(Cow::Borrowed(why))
    }
}

/// What an entry answers to whoever proposed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// Done.
    Done,
    /// The process is this incarnation.
    Registered(Incarnation),
    /// Nothing changed.
    Refused(Refused),
}

/// What applying an entry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The registry's version after it.
    pub version: u64,
    /// For the proposer.
    pub response: Response,
    /// Shards whose set changed, in order.
    pub shards: Vec<ShardId>,
}

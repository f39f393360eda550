//! Why the node did not do what was asked: each a different, explicit answer.

use keepwarm_core::shard::Refusal;
use keepwarm_types::{Bytes, Millis, NodeName, Tier};

/// When to try again while a shard's owner changes: a take-over is a fraction of a second.
const MOVING_RETRY: Millis = Millis(300);

/// A request that was not carried out. All but [`Error::Refused`] with
/// [`Refusal::OutcomeUnknown`] are definite: nothing was applied and nothing will be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The shard refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A tier has no room, and nothing there may move.
    #[error("no room for {wanted} in {tier}: {reason}")]
    NoCapacity {
        /// Which tier.
        tier: Tier,
        /// How much was wanted.
        wanted: Bytes,
        /// What stands in the way.
        reason: String,
        /// When it may fit.
        retry_after: Millis,
    },
    /// Stored bytes do not have their checksum; they are never given out as data.
    #[error("corrupt bytes found at {at}: {detail}")]
    Corrupt {
        /// The boundary that found it: `read`, `restore`, `checkpoint`, `import`.
        at: &'static str,
        /// Which block, expected and found.
        detail: String,
    },
    /// The body is longer than the limit, or than it said.
    #[error("the body has more than {limit}")]
    BodyTooLarge {
        /// What is allowed.
        limit: Bytes,
    },
    /// The body ended early or has a length that cannot be.
    #[error("{0}")]
    BodyLength(String),
    /// The body does not have the digest that it said.
    #[error("the body's {algorithm} digest differs from Repr-Digest")]
    DigestMismatch {
        /// `xxh3-128` or `sha-256`.
        algorithm: &'static str,
    },
    /// A range or token span outside the part.
    #[error("{reason}")]
    Range {
        /// What is there.
        reason: String,
        /// The part's length.
        length: Bytes,
    },
    /// A bounded queue is full.
    #[error("overloaded: {what}")]
    Overloaded {
        /// What is full.
        what: &'static str,
        /// When to try again.
        retry_after: Millis,
    },
    /// Not now: starting, stopping, or a device is fenced.
    #[error("unavailable: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
        /// When to try again.
        retry_after: Millis,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    Draining,
    /// No such node in the cluster.
    #[error("there is no node '{0}' in this cluster")]
    UnknownNode(String),
    /// A field of the request cannot be.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field, as the API names it.
        field: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// An archive cannot be read.
    #[error("the archive is not usable: {0}")]
    Archive(String),
    /// A fault of keepwarm itself; details are in the log under the request's id.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// When to try again, for answers that carry `Retry-After`.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Millis> {
        match self {
            Self::NoCapacity { retry_after, .. }
            | Self::Overloaded { retry_after, .. }
            | Self::Unavailable { retry_after, .. }
            | Self::Refused(
                Refusal::Overloaded { retry_after, .. } | Refusal::QuotaExceeded { retry_after, .. },
            ) => Some(*retry_after),
            Self::Draining | Self::Refused(Refusal::Unavailable(_)) => Some(Millis(1000)),
            Self::Refused(Refusal::Moving(_)) => Some(MOVING_RETRY),
            _ => None,
        }
    }

    /// The node that was named does not exist here.
    #[must_use]
    pub fn unknown_node(name: &NodeName) -> Self {
        Self::UnknownNode(name.to_string())
    }
}

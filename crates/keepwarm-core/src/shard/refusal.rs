//! Why a shard refuses: each a different, explicit answer, definite unless it says otherwise.

use keepwarm_types::{Birth, Bytes, ColdReason, Millis, Revision, Timestamp, Tokens, WriteId};

/// A definite "no" (but for [`Refusal::OutcomeUnknown`]): the request was not applied and never will be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such session of this tenant, or another tenant's.
    #[error("there is no such session")]
    UnknownSession,
    /// The layout has no such part.
    #[error("the layout has no part '{0}'")]
    UnknownPart(String),
    /// The part has never been written.
    #[error("the part '{0}' has not been written yet")]
    UnwrittenPart(String),
    /// The session's TTL passed.
    #[error("the session expired")]
    Expired {
        /// The life that ended.
        birth: Birth,
    },
    /// The session was deleted.
    #[error("the session was deleted")]
    Deleted {
        /// The life that ended.
        birth: Birth,
    },
    /// The session has no bytes in any tier.
    #[error(
        "the session is cold ({reason}): its bytes are gone, its transcript is kept; write it again from 0"
    )]
    Cold {
        /// Why.
        reason: ColdReason,
    },
    /// The write does not begin where the part ends.
    #[error("the write begins at {offset}, the part allows {length_tokens} tokens or {length} bytes")]
    OffsetMismatch {
        /// Where the write began, in its own unit.
        offset: u64,
        /// The session's length.
        length_tokens: Tokens,
        /// The part's length.
        length: Bytes,
        /// The session's revision.
        revision: Revision,
    },
    /// The commit would leave a part short of the session's length.
    #[error("part '{part}' has {have} tokens of {need}")]
    Incomplete {
        /// The part that is short.
        part: String,
        /// What it has.
        have: Tokens,
        /// What it needs.
        need: Tokens,
    },
    /// The layout differs from the session's.
    #[error("the layout differs from the session's")]
    LayoutMismatch,
    /// Somebody holds the write lease.
    #[error("another holds the session's lease")]
    Leased {
        /// Until when.
        expires_at: Timestamp,
    },
    /// The lease has ended or is another.
    #[error("the lease has ended")]
    LeaseExpired,
    /// The request contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// The precondition names another revision.
    #[error("the session is at another revision")]
    RevisionMismatch {
        /// The present life.
        birth: Birth,
        /// The present revision.
        revision: Revision,
        /// The session's length.
        length_tokens: Tokens,
        /// The last write that carried an id.
        last_write_id: Option<WriteId>,
    },
    /// A field of the request cannot be.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field, as the API names it.
        field: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// A bounded queue is full.
    #[error("too many {what} wait already")]
    Overloaded {
        /// What waits.
        what: &'static str,
        /// When to try again.
        retry_after: Millis,
    },
    /// The tenant has as much as it may have.
    #[error("the tenant's quota of {what} is used up")]
    QuotaExceeded {
        /// Of what.
        what: &'static str,
        /// When to try again.
        retry_after: Millis,
    },
    /// The catalog cannot take writes now; nothing was changed.
    #[error("the catalog cannot be written: {0}")]
    Unavailable(&'static str),
    /// The owner of the session's shard is changing, or cannot reach who it needs; nothing was changed.
    #[error("the session's owner cannot answer now: {0}")]
    Moving(&'static str),
    /// Every catalog of the session's shard was lost, after the session may have been made.
    #[error("the session may have been lost with every copy of its shard")]
    Lost {
        /// When the loss was found.
        at: Timestamp,
    },
    /// May be, or may become, applied.
    #[error("the outcome is unknown")]
    OutcomeUnknown,
}

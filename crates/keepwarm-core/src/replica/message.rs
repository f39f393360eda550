//! What replicas of a shard say to each other.

use std::sync::Arc;

use keepwarm_types::{Birth, Generation, SessionKey, ShardId};

use crate::registry::{Member, ReplicaSet};
use crate::session::{Manifest, Stamp, TranscriptDelta};
use crate::shard::{Record, Tombstone};

/// A message with its place: which shard, between which processes, and the set that its sender knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// Which shard.
    pub shard: ShardId,
    /// The process that sends.
    pub from: Member,
    /// The process that is meant: another incarnation of the node is not.
    pub to: Member,
    /// The sender's set; a later one than the receiver's is taken up.
    pub set: Arc<ReplicaSet>,
    /// +1 for each message of the sending replica: what it said of a session before its last word on it that was
    /// heard is late, and not taken.
    pub sent: u64,
    /// What is said.
    pub message: Message,
}

/// What is said.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Take this change.
    Prepare(Box<Prepare>),
    /// All have these changes: what only earlier ones named may go. Repeated until it is noted.
    Committed(Vec<(SessionKey, Stamp)>),
    /// All heads of earlier offices are settled: what only their predecessors named may go. Repeated until it is noted.
    Settled {
        /// The generation in which this office began.
        before: Generation,
    },
    /// These commits, or that, were heard.
    Noted {
        /// Of `Committed`.
        heads: Vec<(SessionKey, Stamp)>,
        /// Of `Settled`.
        before: Option<Generation>,
    },
    /// Say which of these heads you do not have; drop what is in the span and not among them.
    Compare(Compare),
    /// This is the session, whatever you have.
    Install(Box<Install>),
    /// Are we still in this generation?
    Confirm {
        /// Names the question.
        round: u64,
    },
    /// The change is on disk here.
    Prepared {
        /// Whose.
        key: SessionKey,
        /// Which.
        stamp: Stamp,
        /// Whether its bytes are here, where they should be.
        holding: bool,
    },
    /// The change does not follow what is here: send the session whole.
    NeedWhole {
        /// Whose.
        key: SessionKey,
    },
    /// The answer to a comparison; what was to be dropped is dropped.
    Compared {
        /// Which comparison.
        id: u64,
        /// Sessions whose head here is another.
        differing: Vec<SessionKey>,
        /// Sessions whose head here is the same, and whose bytes should be here and are not.
        lacking: Vec<SessionKey>,
    },
    /// The session is here as sent.
    Installed {
        /// Whose.
        key: SessionKey,
        /// Its head; none where it is absent now.
        head: Option<Stamp>,
        /// Whether its bytes are here, where they should be.
        holding: bool,
    },
    /// We are.
    Confirmed {
        /// The question.
        round: u64,
    },
    /// The receiver's set is old: the envelope has the present one.
    Stale,
    /// The holder has no room: let this session's bytes go, if they may.
    Evict {
        /// Whose.
        key: SessionKey,
        /// Which life.
        birth: Birth,
    },
}

/// A change of one session.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepare {
    /// Whose.
    pub key: SessionKey,
    /// The head that it follows; none for a session that was not there.
    pub previous: Option<Stamp>,
    /// Names it.
    pub stamp: Stamp,
    /// What it does.
    pub record: Record,
}

/// Heads to compare.
#[derive(Debug, Clone, PartialEq)]
pub struct Compare {
    /// Names the question.
    pub id: u64,
    /// Which sessions are meant.
    pub span: Span,
    /// All heads within the span, by key.
    pub heads: Vec<(SessionKey, Stamp)>,
}

/// A stretch of the shard's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// One session.
    One(SessionKey),
    /// Those after `after` (or from the first on), up to and with `through` (or to the last).
    Between {
        /// Exclusive.
        after: Option<SessionKey>,
        /// Inclusive.
        through: Option<SessionKey>,
    },
}

impl Span {
    /// Whether the key is within.
    #[must_use]
    pub fn has(&self, key: &SessionKey) -> bool {
        match self {
            Self::One(one) => one == key,
            Self::Between { after, through } => {
                after.as_ref().is_none_or(|after| key > after)
                    && through.as_ref().is_none_or(|through| key <= through)
            }
        }
    }
}

/// A session whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Install {
    /// Whose.
    pub key: SessionKey,
    /// What it is.
    pub content: Content,
}

/// What a session is.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Alive, with all of its transcript.
    Live(Arc<Manifest>, TranscriptDelta),
    /// Ended.
    Ended(Tombstone),
    /// Not there.
    Absent,
}

impl Content {
    /// Its stamp.
    #[must_use]
    pub fn head(&self) -> Option<Stamp> {
        match self {
            Self::Live(manifest, _) => Some(manifest.stamp),
            Self::Ended(tombstone) => Some(tombstone.stamp),
            Self::Absent => None,
        }
    }
}

//! What a shard wants done.

use std::sync::Arc;

use keepwarm_types::{Birth, Bytes, InstanceId, Revision, SessionKey, Timestamp, Tokens};

use super::event::{Request, RequestId};
use super::refusal::Refusal;
use super::state::Tombstone;
use super::view::Answer;
use crate::session::{Manifest, Stamp, TranscriptDelta};

/// Names a set of records on their way to the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// One effect, to be carried out in the order given.
#[derive(Debug)]
pub enum Command {
    /// Write these records in one transaction, then report [`super::Event::Persisted`].
    Persist(Ticket, Vec<Record>),
    /// The guards that came with this request's write belong to the shard now: the pinned tier keeps them,
    /// with one reference each.
    Adopt(RequestId, Vec<InstanceId>),
    /// One more manifest names these instances.
    Retain(Vec<InstanceId>),
    /// One manifest or stage less names these instances.
    Release(Vec<InstanceId>),
    /// What the pinned tier's residency should know of a session.
    Reside(Residence),
    /// A session's life is over, or its bytes changed other than by its lease holder: caches drop what they have.
    Invalidate(SessionKey, Birth),
    /// A session has ended for good.
    Ended(SessionKey),
    /// This request waited for a change, after which the bytes that it needs are on other nodes only: the replica takes
    /// it up from the start. A shard alone holds all of its bytes.
    Again(Request),
    /// Answer a request.
    Reply(RequestId, Result<Box<Answer>, Refusal>),
}

/// A session as the pinned tier sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residence {
    /// Whose.
    pub key: SessionKey,
    /// Which life.
    pub birth: Birth,
    /// Bytes that its manifest and stages name; zero when it holds none.
    pub bytes: Bytes,
    /// Bytes of the session, wherever they are: what a quota counts.
    pub stored: Bytes,
    /// Never dropped to make room before this.
    pub protected_until: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
    /// Whether a lease runs.
    pub leased: bool,
    /// When it was last used.
    pub last_used_at: Timestamp,
}

/// One change of the catalog.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// This manifest is the session's truth, with this change of its transcript.
    Manifest(Arc<Manifest>, TranscriptChange),
    /// The session is gone; remembered for a day.
    Tombstone {
        /// Which.
        key: SessionKey,
        /// The life that ended.
        birth: Birth,
        /// Its last revision.
        revision: Revision,
        /// When.
        at: Timestamp,
        /// Whether it expired, rather than being deleted.
        expired: bool,
        /// Names this end.
        stamp: Stamp,
    },
    /// The tombstone's day is over.
    Forget(SessionKey),
    /// This life of the session never was: a change that was not acknowledged, and that the primary lacks.
    Drop(SessionKey, Birth),
}

impl Record {
    /// Whose it is.
    #[must_use]
    pub fn key(&self) -> &SessionKey {
        match self {
            Self::Manifest(manifest, _) => &manifest.key,
            Self::Tombstone { key, .. } | Self::Forget(key) | Self::Drop(key, _) => key,
        }
    }

    /// What it makes the session's head; none where it takes the head away.
    #[must_use]
    pub fn stamp(&self) -> Option<Stamp> {
        match self {
            Self::Manifest(manifest, _) => Some(manifest.stamp),
            Self::Tombstone { stamp, .. } => Some(*stamp),
            Self::Forget(_) | Self::Drop(..) => None,
        }
    }

    /// The record of an end.
    #[must_use]
    pub const fn tombstone(key: SessionKey, grave: &Tombstone) -> Self {
        let Tombstone { birth, revision, at, expired, stamp } = *grave;
        Self::Tombstone { key, birth, revision, at, expired, stamp }
    }

    /// What is remembered of the end that this records.
    #[must_use]
    pub const fn grave(&self) -> Option<Tombstone> {
        match self {
            Self::Tombstone { birth, revision, at, expired, stamp, .. } => Some(Tombstone {
                birth: *birth,
                revision: *revision,
                at: *at,
                expired: *expired,
                stamp: *stamp,
            }),
            Self::Manifest(..) | Self::Forget(_) | Self::Drop(..) => None,
        }
    }
}

/// What happens to the transcript along with a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TranscriptChange {
    /// Nothing.
    Keep,
    /// A prefix stays, new tokens and messages follow.
    Delta(TranscriptDelta),
    /// It is cut to so many tokens; messages that end beyond them go.
    CutTokens(Tokens),
    /// It begins as a prefix of another session's.
    CopyFrom {
        /// Whose.
        parent: SessionKey,
        /// That session's life.
        birth: Birth,
        /// That session's state when the prefix was taken.
        stamp: Stamp,
        /// So many tokens.
        tokens: Tokens,
        /// So many messages.
        messages: u32,
    },
}

//! What a shard keeps of one session beside its manifest.
//!
//! An idle session is one manifest and a few words; whatever only a session at work has is boxed.

use std::collections::VecDeque;
use std::sync::Arc;

use keepwarm_types::{Bytes, Epoch, InstanceId, LeaseId, SessionKey, Timestamp, TxnId};

use super::command::Ticket;
use super::event::{Request, RequestId};
use super::refusal::Refusal;
use super::view::{LeaseView, SessionView};
use crate::session::{Home, Lease, Manifest, PartState, Stamp};

/// A session of the shard. Without a manifest it is still on its way to its first commit.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) manifest: Option<Arc<Manifest>>,
    pub(super) last_used: Timestamp,
    pub(super) work: Option<Box<Work>>,
}

/// What only a session at work has.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) lease: Option<Lease>,
    pub(super) epoch: Option<Epoch>,
    pub(super) home: Option<Home>,
    pub(super) stages: Vec<Stage>,
    pub(super) pending: Option<Pending>,
    /// Forks on their way to the catalog, which takes their beginning from this session as it is now.
    pub(super) lent: Vec<SessionKey>,
    pub(super) queue: VecDeque<Request>,
}

impl Work {
    /// Whether the session can take no change now: one is on its way, or forks of it as it is.
    fn busy(&self) -> bool {
        self.pending.is_some() || !self.lent.is_empty()
    }

    /// Whether a transaction or a request waits for its end.
    pub(super) fn is_changing(&self) -> bool {
        !self.stages.is_empty() || !self.queue.is_empty()
    }

    fn idle(&self) -> bool {
        self.lease.is_none()
            && self.epoch.is_none()
            && self.home.is_none()
            && !self.is_changing()
            && !self.busy()
    }
}

/// A transaction's staged parts.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) txn: TxnId,
    /// Part index and the whole state that the part will have.
    pub(super) parts: Vec<(usize, PartState)>,
    /// Instances that the stage brought, by part index; those of the committed base are not among them.
    pub(super) brought: Vec<(usize, InstanceId)>,
    pub(super) bytes: Bytes,
    pub(super) expires_at: Timestamp,
}

/// A change on its way to the catalog.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) ticket: Ticket,
    /// Who asked; nobody for an expiry or a write whose outcome was answered as unknown.
    pub(super) request: Option<RequestId>,
    /// The manifest once committed; none for an end.
    pub(super) next: Option<Arc<Manifest>>,
    /// Names that fall away once committed.
    pub(super) released: Vec<InstanceId>,
    /// Names that fall away if it is certain not to be committed.
    pub(super) undo: Vec<InstanceId>,
    pub(super) after: After,
    /// The records of a change whose outcome is unknown, to be tried again.
    pub(super) in_doubt: Option<Vec<super::command::Record>>,
}

/// How a session ends, and with it what its name answers from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Deleted,
    Expired,
    /// As if it had never been.
    Abandoned,
}

/// What follows a commit.
#[derive(Debug)]
pub(super) enum After {
    /// Answer with the session.
    Session { new: bool, clipped: bool },
    /// The parent may change again, and lists a branch; answer with the session.
    Forked { branch: bool, clipped: bool },
    /// Answer with the revision; the part's length.
    Written { length: Bytes },
    /// Answer with the end, whose name this is, and when it was.
    Ended(End, Stamp, Timestamp),
    /// Answer that it is done; caches must let go.
    Cold,
    /// Nobody asked.
    Quiet,
}

impl Entry {
    pub(super) fn work(&mut self) -> &mut Work {
        self.work.get_or_insert_default()
    }

    /// Drops the box where nothing is in it.
    pub(super) fn settle(&mut self) {
        if self.work.as_ref().is_some_and(|work| work.idle()) {
            self.work = None;
        }
    }

    /// Whether a change is on its way to the catalog.
    pub(super) fn is_pending(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.pending.is_some())
    }

    /// Whether it can take no change now.
    pub(super) fn busy(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.busy())
    }

    pub(super) fn manifest(&self) -> Result<&Arc<Manifest>, Refusal> {
        self.manifest.as_ref().ok_or(Refusal::UnknownSession)
    }

    pub(super) fn lease(&self, now: Timestamp) -> Option<&Lease> {
        self.work.as_ref().and_then(|work| work.lease.as_ref()).filter(|lease| lease.expires_at > now)
    }

    pub(super) fn home(&self) -> Option<&Home> {
        self.work.as_ref().and_then(|work| work.home.as_ref())
    }

    /// Refuses unless nobody, or exactly `held`, has the lease.
    pub(super) fn writable(&self, now: Timestamp, held: Option<LeaseId>) -> Result<(), Refusal> {
        match (self.lease(now), held) {
            (Some(lease), Some(held)) if lease.id == held => Ok(()),
            (Some(lease), None) => Err(Refusal::Leased { expires_at: lease.expires_at }),
            (_, Some(_)) => Err(Refusal::LeaseExpired),
            (None, None) => Ok(()),
        }
    }

    pub(super) fn staged_bytes(&self) -> Bytes {
        self.work.iter().flat_map(|work| &work.stages).map(|stage| stage.bytes).sum()
    }

    pub(super) fn view(&self, now: Timestamp) -> Result<SessionView, Refusal> {
        Ok(SessionView {
            manifest: Arc::clone(self.manifest()?),
            home: self.home().cloned(),
            lease: self.lease(now).map(|lease| LeaseView { id: lease.id, expires_at: lease.expires_at }),
            last_used_at: self.last_used,
        })
    }
}

//! Proposing and confirming, here or at whoever leads.

use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::registry::{Entry, Response};
use keepwarm_types::NodeName;
use openraft::error::{ClientWriteError, RaftError};
use tokio::time::{Instant, timeout_at};

use crate::codec::domain::encode_entry;
use crate::link::RegistryLinkError;
use crate::network::CallFailed;
use crate::raft_types::Proposal;
use crate::shared::{Shared, Standing, millis};
use crate::wire::{Answer, Request};

/// Between two tries to find a leader: half a heartbeat.
const PAUSE: Duration = Duration::from_millis(25);

/// Proposals that wait at the leader: far more than a plan, every node's registration at once among them.
pub(crate) const PROPOSALS_MAX: usize = 4096;
/// Longest entry: the first sets of 8,192 shards are 0.2 MiB.
pub(crate) const ENTRY_BYTES_MAX: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Certainly nothing was proposed.
    #[error("the registry cannot be reached: {0}; nothing was changed, try again")]
    Unavailable(String),
    /// It may have been proposed, and may be applied yet.
    #[error(
        "the registry has not answered in time: the change may be applied or not; watch it, or try again"
    )]
    Unknown,
}

/// What one try came to.
pub(crate) enum Tried<T> {
    Done(T),
    /// Certainly nothing; maybe this one leads.
    NotLeader(Option<NodeName>),
    /// Certainly nothing.
    Unavailable(String),
    Unknown,
}

impl Shared {
    /// Proposes here, if this node leads.
    pub(crate) async fn propose_here(&self, entry: Entry, until: Instant) -> Tried<Response> {
        let Some(raft) = self.raft.as_ref().filter(|_| self.leads()) else {
            return Tried::NotLeader(self.leader().filter(|leader| *leader != self.settings.node));
        };
        let Ok(_room) = self.room.try_acquire() else {
            return Tried::Unavailable(format!("{PROPOSALS_MAX} proposals wait already"));
        };
        match timeout_at(until, raft.client_write(Proposal(Arc::new(entry)))).await {
            Ok(Ok(written)) => Tried::Done(written.data),
            // Also said of entries that were appended and then given up, which another may still commit.
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Tried::Unknown,
            Ok(Err(_)) | Err(_) => Tried::Unknown,
        }
    }

    /// Confirms here, if this node leads: the version that has everything acknowledged before the call.
    pub(crate) async fn confirm_here(&self, until: Instant) -> Tried<u64> {
        let Some(raft) = self.raft.as_ref().filter(|_| self.leads()) else {
            return Tried::NotLeader(self.leader().filter(|leader| *leader != self.settings.node));
        };
        match timeout_at(until, raft.ensure_linearizable()).await {
            Ok(Ok(_)) => Tried::Done(self.registry.borrow().version()),
            Ok(Err(error)) => Tried::Unavailable(error.to_string()),
            Err(_) => Tried::Unavailable("the other voters have not answered in time".to_owned()),
        }
    }

    /// Asks another node; `read` takes its answer.
    async fn ask<T>(
        &self,
        to: &NodeName,
        request: &Request,
        until: Instant,
        read: impl FnOnce(Answer) -> Option<T>,
    ) -> Tried<T> {
        let left = until.saturating_duration_since(Instant::now());
        match self.network.call(to, request, left).await {
            Ok(Answer::NotLeader(leader)) => Tried::NotLeader(leader.and_then(|name| name.parse().ok())),
            Ok(Answer::Unavailable(why) | Answer::Refused(why)) => Tried::Unavailable(why),
            Ok(answer) => read(answer).map_or(Tried::Unknown, Tried::Done),
            Err(CallFailed::Link(error @ RegistryLinkError::Unreachable(_))) => {
                Tried::Unavailable(error.to_string())
            }
            Err(_) => Tried::Unknown,
        }
    }

    /// Whom to ask: who leads, or else the voters in turn.
    pub(crate) fn next_voter(&self, turn: usize) -> Option<NodeName> {
        let others: Vec<_> =
            self.settings.voters.iter().filter(|name| **name != self.settings.node).collect();
        (!others.is_empty()).then(|| others[turn % others.len()].clone())
    }

    /// Proposes until somebody answers, or nobody could have been asked until the deadline.
    pub(crate) async fn propose(&self, entry: Entry, deadline: Duration) -> Result<Response, ProposeError> {
        let until = Instant::now() + deadline;
        let bytes = encode_entry(&(&entry).into()).len();
        if bytes > ENTRY_BYTES_MAX {
            let why = format!("an entry of {bytes} bytes; {ENTRY_BYTES_MAX} are the most");
            return Err(ProposeError::Unavailable(why));
        }
        let mut why = "no leader is known".to_owned();
        for turn in 0.. {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.alive()?;
            let tried = match self.leader() {
                Some(leader) if leader != self.settings.node => {
                    let request = Request::Propose { entry: (&entry).into(), wait_ms: millis(left) };
                    self.ask(&leader, &request, until, read_applied).await
                }
                None if self.raft.is_none() => match self.next_voter(turn) {
                    Some(voter) => {
                        let request = Request::Propose { entry: (&entry).into(), wait_ms: millis(left) };
                        self.ask(&voter, &request, until, read_applied).await
                    }
                    None => Tried::Unavailable("no voters are named".to_owned()),
                },
                _ => self.propose_here(entry.clone(), until).await,
            };
            match tried {
                Tried::Done(response) => return Ok(response),
                Tried::Unknown => return Err(ProposeError::Unknown),
                Tried::NotLeader(leader) => self.set_hint(leader),
                Tried::Unavailable(error) => {
                    self.set_hint(None);
                    why = error;
                }
            }
            tokio::time::sleep_until(until.min(Instant::now() + PAUSE)).await;
        }
        Err(ProposeError::Unavailable(why))
    }

    /// Confirms at the leader and waits until its version is applied here.
    pub(crate) async fn confirm(&self, deadline: Duration) -> Result<u64, ProposeError> {
        let until = Instant::now() + deadline;
        let mut why = "no leader is known".to_owned();
        for turn in 0.. {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.alive()?;
            let other = match self.leader() {
                Some(leader) => Some(leader).filter(|leader| *leader != self.settings.node),
                None if self.raft.is_none() => self.next_voter(turn),
                None => None,
            };
            let tried = match other {
                Some(other) => {
                    let request = Request::Confirm { wait_ms: millis(left) };
                    self.ask(&other, &request, until, read_confirmed).await
                }
                None => self.confirm_here(until).await,
            };
            match tried {
                Tried::Done(version) => {
                    let mut seen = self.registry.subscribe();
                    let applied = timeout_at(until, seen.wait_for(|registry| registry.version() >= version));
                    return match applied.await {
                        Ok(Ok(registry)) => Ok(registry.version()),
                        _ => Err(ProposeError::Unavailable("this node is behind".to_owned())),
                    };
                }
                Tried::NotLeader(leader) => self.set_hint(leader),
                Tried::Unavailable(error) => {
                    self.set_hint(None);
                    why = error;
                }
                // Reading changes nothing: it can be asked again.
                Tried::Unknown => self.set_hint(None),
            }
            tokio::time::sleep_until(until.min(Instant::now() + PAUSE)).await;
        }
        Err(ProposeError::Unavailable(why))
    }

    /// Whether this node's own group still runs; where it does not, everything fails at once.
    fn alive(&self) -> Result<(), ProposeError> {
        match &*self.standing.borrow() {
            Standing::Failed { why } => {
                Err(ProposeError::Unavailable(format!("this node's registry has failed: {why}")))
            }
            _ => Ok(()),
        }
    }
}

fn read_applied(answer: Answer) -> Option<Response> {
    match answer {
        Answer::Applied(response) => response.try_into().ok(),
        _ => None,
    }
}

fn read_confirmed(answer: Answer) -> Option<u64> {
    match answer {
        Answer::Confirmed(version) => Some(version),
        _ => None,
    }
}

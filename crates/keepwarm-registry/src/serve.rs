//! Requests of other nodes.

use std::time::Duration;

use keepwarm_core::registry::{CEDED_MAX, Delta, Fitness, HealthReport, Member};
use keepwarm_types::{Incarnation, NodeName, ShardId};
use openraft::Snapshot;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::codec::domain::RawDelta;
use crate::codec::{BadBytes, bad, name};
use crate::propose::{ENTRY_BYTES_MAX, Tried};
use crate::raft_types::Raft;
use crate::shared::Shared;
use crate::wire::{Answer, Request};

/// Longest that a request is kept waiting here, whatever it asks for.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// What a request has beside an entry.
const HEADROOM_BYTES: usize = 1 << 10;

fn wait(wait_ms: u64) -> Duration {
    Duration::from_millis(wait_ms).min(WAIT_MAX)
}

fn until(wait_ms: u64) -> Instant {
    Instant::now() + wait(wait_ms)
}

impl Shared {
    /// Answers one request; never fails, for a failure is an answer too.
    pub(crate) async fn handle(&self, from: &NodeName, bytes: &[u8]) -> Answer {
        if !self.settings.nodes.contains(from) {
            return Answer::Refused(format!("{from} is no node of this cluster's spec"));
        }
        let request = match Request::decode(self.settings.cluster_id, bytes) {
            Ok(request) => request,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        match self.answer(from, request, bytes.len()).await {
            Ok(answer) => answer,
            Err(error) => Answer::Refused(error.to_string()),
        }
    }

    fn reported(&self, from: &NodeName, report: HealthReport) -> Answer {
        if report.from != *from {
            return Answer::Refused(format!("{from} reports as {}", report.from));
        }
        if !self.leads() {
            return Answer::NotLeader(self.leader_text());
        }
        // A full queue loses a report that the next one replaces.
        let _ = self.reports.try_send(report);
        Answer::Taken
    }

    async fn answer(&self, from: &NodeName, request: Request, bytes: usize) -> Result<Answer, BadBytes> {
        Ok(match request {
            Request::Append { to, .. } | Request::Vote { to, .. } | Request::Snapshot { to, .. } => {
                match &self.raft {
                    Some(raft) if to == self.id => raft_answer(raft, request).await?,
                    _ => Answer::Refused(format!(
                        "{} has another disk now, or does not vote",
                        self.settings.node
                    )),
                }
            }
            Request::Propose { .. } if bytes > HEADROOM_BYTES + ENTRY_BYTES_MAX => {
                Answer::Refused(format!("an entry of {bytes} bytes; {ENTRY_BYTES_MAX} are the most"))
            }
            Request::Propose { entry, wait_ms } => {
                let entry = entry.try_into()?;
                match self.propose_here(entry, until(wait_ms)).await {
                    Tried::Done(response) => Answer::Applied((&response).into()),
                    other => failed(other),
                }
            }
            Request::Confirm { wait_ms } => match self.confirm_here(until(wait_ms)).await {
                Tried::Done(version) => Answer::Confirmed(version),
                other => failed(other),
            },
            Request::Report(report) => self.reported(from, report.try_into()?),
            Request::Standing { report, leads, learns, slow, ceded } => {
                let member = |(node, incarnation): (String, u64)| {
                    Ok::<_, BadBytes>(Member { node: name(&node)?, incarnation: Incarnation(incarnation) })
                };
                let slow = slow.into_iter().map(member).collect::<Result<_, _>>()?;
                if ceded.len() > CEDED_MAX {
                    return Err(bad(format!("{} ceded shards; {CEDED_MAX} are the most", ceded.len())));
                }
                let ceded = ceded.into_iter().map(ShardId).collect();
                let fitness = Fitness { leads, learns };
                let report = HealthReport { fitness, slow, ceded, ..report.try_into()? };
                self.reported(from, report)
            }
            Request::Follow { since, wait_ms } => {
                let delta = self.news(since, wait(wait_ms)).await;
                Answer::Delta { delta: RawDelta::from(&delta), leader: self.leader_text() }
            }
            Request::Probe => Answer::Probed {
                disk: self.settings.disk.as_u128(),
                in_cluster: match &self.raft {
                    Some(raft) => raft.is_initialized().await.unwrap_or(true),
                    None => false,
                },
            },
            Request::Join { node, disk } => {
                let node = name(&node)?;
                if node != *from {
                    return Ok(Answer::Refused(format!("{from} joins as {node}")));
                }
                self.let_in(&node, Uuid::from_u128(disk)).await
            }
        })
    }

    /// What has changed after a version, waiting a little for something to change.
    async fn news(&self, since: u64, wait: Duration) -> Delta {
        let mut seen = self.registry.subscribe();
        // Nothing new in time is an answer too: an empty delta.
        let _ = timeout(wait, seen.wait_for(|registry| registry.version() > since)).await;
        let registry = seen.borrow().clone();
        registry.delta_since(since.min(registry.version()))
    }
}

fn failed<T>(tried: Tried<T>) -> Answer {
    match tried {
        Tried::Done(_) | Tried::Unknown => Answer::Unknown,
        Tried::NotLeader(leader) => Answer::NotLeader(leader.map(|name| name.to_string())),
        Tried::Unavailable(why) => Answer::Unavailable(why),
    }
}

async fn raft_answer(raft: &Raft, request: Request) -> Result<Answer, BadBytes> {
    let stopped = |error: &dyn ToString| Answer::Unavailable(error.to_string());
    Ok(match request {
        Request::Append { vote, prev, entries, commit, .. } => {
            let request = AppendEntriesRequest {
                vote: vote.into(),
                prev_log_id: prev.map(Into::into),
                entries: entries.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
                leader_commit: commit.map(Into::into),
            };
            match raft.append_entries(request).await {
                Ok(AppendEntriesResponse::Success) => Answer::Appended,
                Ok(AppendEntriesResponse::PartialSuccess(id)) => {
                    Answer::AppendedPart(id.as_ref().map(Into::into))
                }
                Ok(AppendEntriesResponse::Conflict) => Answer::Conflict,
                Ok(AppendEntriesResponse::HigherVote(vote)) => Answer::HigherVote((&vote).into()),
                Err(error) => stopped(&error),
            }
        }
        Request::Vote { vote, last, .. } => {
            match raft.vote(VoteRequest::new(vote.into(), last.map(Into::into))).await {
                Ok(answer) => Answer::Voted {
                    vote: (&answer.vote).into(),
                    granted: answer.vote_granted,
                    last: answer.last_log_id.as_ref().map(Into::into),
                },
                Err(error) => stopped(&error),
            }
        }
        Request::Snapshot { vote, meta, bytes, .. } => {
            let snapshot = Snapshot { meta: meta.try_into()?, snapshot: Box::new(bytes) };
            match raft.install_full_snapshot(vote.into(), snapshot).await {
                Ok(answer) => Answer::Installed((&answer.vote).into()),
                Err(error) => stopped(&error),
            }
        }
        _ => Answer::Refused("not a request of the group".to_owned()),
    })
}

//! Who votes: founding a cluster, letting a node in, putting a new disk in an old one's place.
//!
//! A vote belongs to a name on one disk. Founding needs the bootstrap file and an answer of every voter of the spec
//! that it is in no cluster: were one missing, it could be the one that remembers the cluster. Everybody else
//! asks to be let in: first as a learner, which copies the log; then, in one change of the group, in the place of the
//! voter of the same name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use keepwarm_types::NodeName;
use openraft::error::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, Membership};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::raft_types::{Raft, RaftPeer, raft_id};
use crate::settings::Bootstrap;
use crate::shared::{Metrics, Shared, Standing};
use crate::wire::{Answer, Request};

/// Between two tries to found or to join.
const RETRY: Duration = Duration::from_millis(100);
/// A voter looks this often whether it still is one.
const CHECK: Duration = Duration::from_millis(500);
/// An answer about founding or joining takes no longer.
const CALL_DEADLINE: Duration = Duration::from_secs(1);
/// A change of the group is agreed upon within this, or tried again.
const CHANGE_DEADLINE: Duration = Duration::from_secs(3);
/// A learner this close to the end of the log may vote: a few heartbeats' worth.
const LAG_MAX: u64 = 64;

/// What asking everybody about founding came to.
enum Probed {
    /// Everybody is there and in no cluster: these are the voters.
    Free(BTreeMap<u64, RaftPeer>),
    /// Somebody is in a cluster.
    Taken(NodeName),
    /// Somebody has not answered.
    Missing(Vec<NodeName>),
}

impl Shared {
    fn waits(&self, why: String) {
        let now = Standing::Waiting { why };
        self.standing.send_if_modified(|standing| {
            let changed = *standing != now;
            if changed {
                tracing::info!(?now, "the registry waits");
                *standing = now;
            }
            changed
        });
    }

    /// Founds or joins, and joins again whenever this node is not a voter though the spec says so.
    pub(crate) async fn take_part(self: Arc<Self>) {
        let Some(raft) = &self.raft else { return };
        let alone = self.settings.voters.len() == 1;
        let may_found = alone || matches!(self.settings.bootstrap, Bootstrap::Allowed { .. });
        if may_found && !self.found(raft).await {
            return;
        }
        if alone {
            // Nobody else could lead: no need to wait for an election.
            if let Err(error) = raft.trigger().elect().await {
                tracing::error!(%error, "the registry did not start to lead");
            }
            return;
        }
        for turn in 0.. {
            let metrics = raft.metrics().borrow().clone();
            if metrics.running_state.is_err() {
                return;
            }
            if votes(&metrics, self.id) && metrics.current_leader.is_some() {
                sleep(CHECK).await;
                continue;
            }
            self.ask_to_join(turn).await;
            sleep(RETRY).await;
        }
    }

    /// False where the group has stopped.
    async fn found(&self, raft: &Raft) -> bool {
        loop {
            match raft.is_initialized().await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(_) => return false,
            }
            match self.probe().await {
                Probed::Free(voters) => match raft.initialize(voters).await {
                    Ok(()) => {
                        tracing::info!(cluster = %self.settings.cluster, "the cluster is founded");
                        return true;
                    }
                    Err(error) => tracing::warn!(%error, "the cluster was not founded"),
                },
                Probed::Taken(by) => {
                    tracing::warn!(%by, "there is a cluster already: the bootstrap file is not used; this node joins");
                    return true;
                }
                Probed::Missing(names) => {
                    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
                    self.waits(format!("founding waits for {}: start them", names.join(", ")));
                }
            }
            sleep(RETRY).await;
        }
    }

    async fn probe(&self) -> Probed {
        let own = RaftPeer { name: Some(self.settings.node.clone()), disk: self.settings.disk };
        let mut voters = BTreeMap::from([(self.id, own)]);
        let others: Vec<_> =
            self.settings.voters.iter().filter(|name| **name != self.settings.node).cloned().collect();
        let calls = others.iter().map(|name| self.network.call(name, &Request::Probe, CALL_DEADLINE));
        let answers = futures::future::join_all(calls).await;
        let mut missing = Vec::new();
        for (name, answer) in others.into_iter().zip(answers) {
            match answer {
                Ok(Answer::Probed { in_cluster: true, .. }) => return Probed::Taken(name),
                Ok(Answer::Probed { disk, .. }) => {
                    let disk = Uuid::from_u128(disk);
                    voters.insert(raft_id(&name, disk), RaftPeer { name: Some(name), disk });
                }
                _ => missing.push(name),
            }
        }
        if missing.is_empty() { Probed::Free(voters) } else { Probed::Missing(missing) }
    }

    async fn ask_to_join(&self, turn: usize) {
        let other = self.leader().filter(|leader| *leader != self.settings.node);
        let Some(to) = other.or_else(|| self.next_voter(turn)) else { return };
        let request =
            Request::Join { node: self.settings.node.to_string(), disk: self.settings.disk.as_u128() };
        match self.network.call(&to, &request, CALL_DEADLINE).await {
            Ok(Answer::NotLeader(leader)) => {
                self.set_hint(leader.and_then(|name| name.parse().ok()));
                if self.raft.as_ref().is_some_and(|raft| !in_group(&raft.metrics().borrow(), self.id)) {
                    self.waits(
                        "no voter leads yet: run `keepwarm init` on one node, or start the others".to_owned(),
                    );
                }
            }
            Ok(Answer::Refused(why)) => self.waits(format!("{to} does not let this node in: {why}")),
            Ok(Answer::Joined { .. }) => self.set_hint(Some(to)),
            Ok(_) => {}
            Err(_) => self.set_hint(None),
        }
    }

    /// The leader's side of joining: learner first, then voter in the place of the same name's old disk.
    pub(crate) async fn let_in(&self, node: &NodeName, disk: Uuid) -> Answer {
        let Some(raft) = self.raft.as_ref().filter(|_| self.leads()) else {
            return Answer::NotLeader(
                self.leader().filter(|leader| *leader != self.settings.node).map(|name| name.to_string()),
            );
        };
        if !self.settings.voters.contains(node) {
            return Answer::Refused(format!("{node} is no voter of the spec"));
        }
        let Ok(_one) = self.membership.try_lock() else {
            return Answer::Unavailable("another change of the group is under way".to_owned());
        };
        let id = raft_id(node, disk);
        let metrics = raft.metrics().borrow().clone();
        if votes(&metrics, id) {
            return Answer::Joined { votes: true };
        }
        if !in_group(&metrics, id) {
            let peer = RaftPeer { name: Some(node.clone()), disk };
            return match timeout(CHANGE_DEADLINE, raft.add_learner(id, peer, false)).await {
                Ok(Ok(_)) => Answer::Joined { votes: false },
                Ok(Err(error)) => changed_too_fast(error),
                Err(_) => Answer::Unknown,
            };
        }
        if !caught_up(&metrics, id) {
            return Answer::Joined { votes: false };
        }
        let membership = metrics.membership_config.membership();
        let stays = |voter: &u64| {
            let name = membership.get_node(voter).and_then(|peer| peer.name.as_ref());
            name.is_some_and(|name| name != node && self.settings.voters.contains(name))
        };
        let mut voters: BTreeSet<u64> = membership.voter_ids().filter(stays).collect();
        voters.insert(id);
        tracing::info!(%node, %disk, "a voter is let in");
        match timeout(CHANGE_DEADLINE, raft.change_membership(voters, false)).await {
            Ok(Ok(_)) => Answer::Joined { votes: true },
            Ok(Err(error)) => changed_too_fast(error),
            Err(_) => Answer::Unknown,
        }
    }

    /// Ends a change of the group that a former leader began, and takes out whom the spec no longer names, one step
    /// at a time.
    pub(crate) async fn tend_group(&self) {
        let Some(raft) = self.raft.as_ref().filter(|_| self.leads()) else { return };
        let Ok(_one) = self.membership.try_lock() else { return };
        let metrics = raft.metrics().borrow().clone();
        let Some(step) = next_step(metrics.membership_config.membership(), &self.settings.voters) else {
            return;
        };
        tracing::info!(?step, "the group is brought in line with the spec");
        match timeout(CHANGE_DEADLINE, raft.change_membership(step, false)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the group was not changed: it is tried again"),
            Err(_) => tracing::warn!("the group was not changed in time: it is tried again"),
        }
    }

    /// Says how this node takes part, as the group goes on; ends when the group stops.
    pub(crate) async fn observe(self: Arc<Self>) {
        let Some(raft) = &self.raft else { return };
        let mut metrics = raft.metrics();
        loop {
            let now = metrics.borrow_and_update().clone();
            if let Err(fatal) = &now.running_state {
                tracing::error!(%fatal, "the registry has stopped on this node");
                let why = format!("{fatal}; repair it and restart the node");
                self.standing.send_replace(Standing::Failed { why });
                return;
            }
            let group = now.membership_config.membership();
            let standing = if counts(&now, self.id) {
                Some(Standing::Voter)
            } else if in_group(&now, self.id) {
                Some(Standing::Learner)
            } else {
                let elsewhere = group.nodes().next().is_some();
                elsewhere.then(|| Standing::Waiting { why: "the group goes on without this node".to_owned() })
            };
            if let Some(standing) = standing {
                self.standing.send_if_modified(|known| {
                    let changed = *known != standing;
                    *known = standing;
                    changed
                });
            }
            if metrics.changed().await.is_err() {
                let why = "the registry has stopped: restart the node".to_owned();
                self.standing.send_replace(Standing::Failed { why });
                return;
            }
        }
    }
}

/// What brings the group in line with the spec; none where it is.
fn next_step(group: &Membership<u64, RaftPeer>, spec: &[NodeName]) -> Option<ChangeMembers<u64, RaftPeer>> {
    let configs = group.get_joint_config();
    let last = configs.last()?;
    if configs.len() > 1 {
        return Some(ChangeMembers::ReplaceAllVoters(last.clone()));
    }
    let name = |id: &u64| group.get_node(id).and_then(|peer| peer.name.as_ref());
    let named = |id: &u64| name(id).is_some_and(|name| spec.contains(name));
    let stay: BTreeSet<u64> = last.iter().copied().filter(named).collect();
    // Never fewer than a majority of the spec: the new ones are let in first.
    if stay.len() < last.len() && stay.len() > spec.len() / 2 {
        return Some(ChangeMembers::ReplaceAllVoters(stay));
    }
    // Whoever was let in, and has another disk by now or left the spec, would be sent to for ever.
    let stale = |id: &u64| !named(id) || last.iter().any(|voter| name(voter) == name(id));
    let gone: BTreeSet<u64> = group.learner_ids().filter(stale).collect();
    (!gone.is_empty()).then_some(ChangeMembers::RemoveNodes(gone))
}

fn votes(metrics: &Metrics, id: u64) -> bool {
    metrics.membership_config.membership().voter_ids().any(|voter| voter == id)
}

/// Whether its vote counts whatever becomes of a change that is under way.
fn counts(metrics: &Metrics, id: u64) -> bool {
    let configs = metrics.membership_config.membership().get_joint_config();
    !configs.is_empty() && configs.iter().all(|config| config.contains(&id))
}

fn in_group(metrics: &Metrics, id: u64) -> bool {
    metrics.membership_config.membership().get_node(&id).is_some()
}

fn caught_up(metrics: &Metrics, id: u64) -> bool {
    let matched = metrics.replication.as_ref().and_then(|replication| *replication.get(&id)?);
    let last = metrics.last_log_index.unwrap_or(0);
    matched.is_some_and(|matched| matched.index + LAG_MAX >= last)
}

fn changed_too_fast(error: RaftError<u64, ClientWriteError<u64, RaftPeer>>) -> Answer {
    Answer::Unavailable(error.to_string())
}

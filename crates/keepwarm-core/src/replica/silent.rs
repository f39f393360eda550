//! Members that hold changes up: a learner that does not keep up is given up, a secondary that does not answer leaves.
//!
//! A node that has failed is the detector's to find. Here it is one replica of a node that is well otherwise: its disk
//! takes nothing, or its shard stands still. Whoever leaves may come again as a learner.

use keepwarm_types::{Millis, Timestamp};

use super::event::ReplicaCommand;
use super::office::Office;
use super::state::{Part, Replica};
use super::sweep::Peer;
use crate::registry::Change;

/// How long a change waits for a learner: that is no copy yet, and clients wait.
const LEARNER_PATIENCE: Millis = Millis(2000);
/// How long after one proposal that somebody leaves there is another: the registry has answered by then.
const ACCUSED_AGAIN: Millis = Millis(1000);

impl Replica {
    /// Proposes that whoever has kept a change waiting for too long leaves the set, where enough stay: the one that has
    /// been silent for longest.
    pub(super) fn leave_the_silent(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let deadline = self.settings.write_deadline;
        let more_than_enough = self.set.replicas.len() > self.settings.replication.max(1);
        let Part::Primary(office) = &self.part else { return };
        let accused = office.accused.is_some_and(|at| now.since(at) < ACCUSED_AGAIN);
        if office.proposed.is_some() || accused {
            return;
        }
        let silent = |peer: &Peer| {
            let since = self.silent_since(office, peer)?;
            let patience = if peer.learner { LEARNER_PATIENCE } else { deadline };
            let leaves = now.since(since) >= patience && (peer.learner || more_than_enough);
            leaves.then(|| (since, peer.learner, peer.member.node.clone()))
        };
        let Some((_, learner, node)) = office.peers.iter().filter_map(silent).min() else { return };
        let change = if learner {
            Change::DropLearner
        } else {
            Change::Remove { node, observers: vec![self.settings.member.node.clone()] }
        };
        let Part::Primary(office) = &mut self.part else { return };
        office.propose(now, false);
        office.accused = Some(now);
        out.push(ReplicaCommand::Propose(change));
    }

    /// Since when the others wait for a member: for its word on a change that it has, or on the generation. One that
    /// is being sent a change's bytes once more is at work, and who has just come is not blamed for what is older.
    fn silent_since(&self, office: &Office, peer: &Peer) -> Option<Timestamp> {
        let changes = office.changes.iter().filter_map(|(ticket, change)| {
            let open = !change.acked.contains(&peer.member) && !self.again_under_way(*ticket, &peer.member);
            change.sent_at.filter(|_| open)
        });
        let rounds = &office.rounds;
        let unconfirmed = !peer.learner && !rounds.waiting.is_empty() && peer.confirmed < rounds.begun;
        let oldest = changes.chain(unconfirmed.then_some(rounds.began_at)).min()?;
        Some(oldest.max(peer.joined))
    }
}

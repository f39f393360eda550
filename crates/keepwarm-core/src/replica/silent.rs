//! Members that hold changes up: a learner that does not keep up is given up, a secondary that does not answer leaves.
//!
//! A node that has failed is the detector's to find. Here it is one replica of a node that is well otherwise: its disk
//! takes nothing, or its shard stands still. Whoever leaves may come again as a learner.

use keepwarm_types::{Millis, Timestamp};

use super::event::ReplicaCommand;
use super::state::{Part, Replica};
use super::sweep::Peer;
use crate::registry::Change;

/// How long a change waits for a learner: that is no copy yet, and clients wait.
const LEARNER_PATIENCE: Millis = Millis(2000);

impl Replica {
    /// Proposes that whoever has kept a change waiting for too long leaves the set, where enough stay.
    pub(super) fn leave_the_silent(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let (deadline, enough) = (self.settings.write_deadline, self.settings.replication.max(1));
        let more_than_enough = self.set.replicas.len() > enough;
        let me = self.settings.member.node.clone();
        let Part::Primary(office) = &mut self.part else { return };
        if office.proposed.is_some() {
            return;
        }
        let asked = office.rounds.waiting.front().map(|(round, _, since)| (*round, *since));
        let silent = |peer: &&Peer| {
            let patience = if peer.learner { LEARNER_PATIENCE } else { deadline };
            let late = |since: Timestamp| now.since(since) >= patience;
            let holds_up = office
                .changes
                .values()
                .any(|change| change.sent_at.is_some_and(late) && !change.acked.contains(&peer.member));
            let unconfirmed = asked.is_some_and(|(round, since)| late(since) && peer.confirmed < round);
            if peer.learner { holds_up } else { more_than_enough && (holds_up || unconfirmed) }
        };
        let Some(peer) = office.peers.iter().filter(silent).max_by_key(|peer| peer.learner) else { return };
        let change = if peer.learner {
            Change::DropLearner
        } else {
            Change::Remove { node: peer.member.node.clone(), observers: vec![me] }
        };
        office.proposed = Some(now);
        out.push(ReplicaCommand::Propose(change));
    }
}

//! A member that is to leave the set takes nobody's copies with it: others have them first.
//!
//! The registry says who ([`leavers`](crate::registry::leavers)). From then on that member's copy counts for no session: what
//! has too few others is healed, new sessions go elsewhere, and once none is short the primary proposes that it leaves.

use std::sync::Arc;

use keepwarm_types::{Generation, Millis, Timestamp};

use super::change::Changing;
use super::event::ReplicaCommand;
use super::state::{Part, Replica};
use crate::registry::{Change, Member};
use crate::session::Manifest;

/// How long after one look at all sessions there is another.
const COUNTED_AGAIN: Millis = Millis(500);

impl Replica {
    /// Who is to leave, as far as a primary knows.
    pub(super) const fn leaving(&self) -> Option<&Member> {
        match &self.part {
            Part::Primary(office) => office.leaving.as_ref(),
            Part::Follower(_) => None,
        }
    }

    /// Takes note of who is to leave.
    pub(super) fn leaves(
        &mut self,
        now: Timestamp,
        generation: Generation,
        member: Option<Member>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let enough = self.set.replicas.len() > self.settings.replication.max(1);
        let secondary = |member: &Member| self.set.replicas.iter().skip(1).any(|replica| replica == member);
        let fits = generation == self.set.generation
            && member.as_ref().is_none_or(|member| enough && secondary(member));
        let Part::Primary(office) = &mut self.part else { return };
        if !fits || office.parting || office.leaving == member {
            return;
        }
        (office.leaving, office.counted) = (member, None);
        let holders = self.default_holders();
        let Part::Primary(office) = &mut self.part else { return };
        office.shard.set_office(generation, holders);
        self.look_at_holders();
        self.heal(now, out);
        self.let_leave(now, out);
    }

    /// Proposes that who is to leave does, where no session counts on its copy: neither as it is, nor as a change that is on
    /// its way makes it.
    //= GUARANTEES.md#G10
    pub(super) fn let_leave(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &self.part else { return };
        let Some(member) = office.leaving.clone() else { return };
        let counts = |manifest: &Arc<Manifest>| manifest.holders.contains(&member) && self.too_few(manifest);
        // What is known to be healed, or not to be, saves the look at all others.
        let healing = || office.sick.keys().any(|sick| office.shard.committed(sick).is_some_and(counts));
        let counted = office.counted.is_some_and(|at| now.since(at) < COUNTED_AGAIN);
        if counted || office.proposed.is_some() || healing() {
            return;
        }
        let next = office.changes.values().filter_map(Changing::manifest);
        let short = self.manifests().chain(next).any(counts);
        if short {
            self.look_at_holders();
        }
        let Part::Primary(office) = &mut self.part else { return };
        office.counted = Some(now);
        if !short {
            office.propose(now, false);
            office.parting = true;
            let change = Change::Remove { node: member.node, observers: Vec::new() };
            out.push(ReplicaCommand::Propose(change));
        }
    }
}

//! A shard goes to another replica, where one of its sessions shall run: its primary proposes that, once nobody loses by it.
//!
//! A lease ends with its primary, a staged transaction too, and a change on its way would be of unknown outcome. So while there
//! is any of these the shard stays; and from the proposal until its outcome is known none begins, and whoever asks for one comes
//! again. What the registry agrees upon is a compare-and-set of this generation.

use keepwarm_types::{NodeName, Timestamp};

use super::event::ReplicaCommand;
use super::state::{Part, Replica};
use crate::registry::Change;
use crate::shard::{Answer, Refusal, Request, Verb};

impl Replica {
    /// Takes a [`Verb::Cede`]: answered with [`Answer::Done`] when it is proposed.
    pub(super) fn cede(
        &mut self,
        now: Timestamp,
        request: &Request,
        to: &NodeName,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let answer = match self.why_not_cede(now, request, to) {
            Some(refusal) => Err(refusal),
            None => {
                let Part::Primary(office) = &mut self.part else { return };
                office.propose(now, true);
                out.push(ReplicaCommand::Propose(Change::MakePrimary(to.clone())));
                Ok(Box::new(Answer::Done))
            }
        };
        out.push(ReplicaCommand::Reply(request.id, answer));
    }

    fn why_not_cede(&self, now: Timestamp, request: &Request, to: &NodeName) -> Option<Refusal> {
        let Part::Primary(office) = &self.part else {
            return Some(Refusal::Moving("another node owns it"));
        };
        let conflict = |why: String| Some(Refusal::Conflict(why));
        if office.committed_head(&request.key).is_none() || office.shard.grave(&request.key).is_some() {
            return Some(Refusal::UnknownSession);
        }
        if let Some(expires_at) = office.shard.leased_until(now, &request.key) {
            return Some(Refusal::Leased { expires_at });
        }
        let can = |member: &crate::registry::Member| {
            member.node == *to && *member != self.settings.member && office.leaving.as_ref() != Some(member)
        };
        if !self.set.replicas.iter().any(can) {
            return conflict(format!("node '{to}' has no replica of its shard that stays"));
        }
        if office.proposed.is_some() {
            return conflict("its shard's replicas change just now".to_owned());
        }
        match office.shard.at_work(now) {
            (0, 0) if office.changes.is_empty() => None,
            (0, _) => conflict("changes of its shard's sessions are under way".to_owned()),
            (leased, _) => conflict(format!("other sessions of its shard are leased ({leased})")),
        }
    }

    /// Whether a request has to wait for the outcome of a proposal to cede the shard.
    pub(super) fn cedes_before(&self, verb: &Verb) -> bool {
        matches!(&self.part, Part::Primary(office) if office.is_ceding()) && verb.begins_something()
    }
}

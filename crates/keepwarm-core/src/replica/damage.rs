//! A copy that is damaged where it lies: another holder's bytes take its place.
//!
//! Checksums find it when the bytes cross a boundary: a restore, a read, a copy to another node. Here it is let go as by a
//! move, with a commit of who holds the bytes from now on; what is too few then is copied again, as after a holder's end. Only
//! where nobody else has them the session goes cold.

use keepwarm_types::{Birth, InstanceId, SessionKey, Timestamp};

use super::event::ReplicaCommand;
use super::state::{Part, Replica};
use crate::session::{Stamp, State};
use crate::shard::{Answer, Event, Request, Verb};

impl Replica {
    /// This node found its own copy damaged. The session is settled, as for every request.
    //= GUARANTEES.md#G5
    pub(super) fn condemn(
        &mut self,
        now: Timestamp,
        request: Request,
        what: (Birth, InstanceId),
        out: &mut Vec<ReplicaCommand>,
    ) {
        match self.without_this_copy(&request.key, Some(what)) {
            None => self.hold(now, request.id, Ok(Box::new(Answer::Done)), out),
            Some(verb) => self.drive(now, Event::Request(Request { verb, ..request }), None, out),
        }
    }

    /// The same, found when the bytes of this state were sent to another node.
    pub(super) fn found_damaged(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        met: Stamp,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &self.part else { return };
        // What it is since then may have other bytes. If not, it is found again when it is sent again.
        if office.committed_head(key) != Some(met) {
            return;
        }
        if office.shard.changing(key) || self.saving.contains_key(key) || !office.is_settled(key) {
            return;
        }
        if let Some(verb) = self.without_this_copy(key, None) {
            self.ask_shard(now, key.clone(), verb, out);
        }
    }

    /// The change by which this node's copy counts no more; none where it does not, or does not have what is meant.
    fn without_this_copy(&self, key: &SessionKey, what: Option<(Birth, InstanceId)>) -> Option<Verb> {
        let me = &self.settings.member;
        let Part::Primary(office) = &self.part else { return None };
        let manifest = office.shard.committed(key)?;
        let mut blocks = manifest.instances().map(|block| block.instance);
        let damaged = match what {
            Some((birth, damaged)) => blocks.find(|block| manifest.birth == birth && *block == damaged)?,
            None => blocks.next()?,
        };
        if manifest.state != State::Warm || !manifest.holders.contains(me) {
            return None;
        }
        let (birth, met) = (manifest.birth, manifest.stamp);
        let others =
            manifest.holders.iter().filter(|holder| *holder != me && self.set.replicas.contains(holder));
        let holders: Vec<_> = others.cloned().collect();
        if holders.is_empty() {
            return Some(Verb::Condemn { birth, damaged });
        }
        Some(Verb::Place { birth, met, holders: holders.into(), brought: Vec::new() })
    }
}

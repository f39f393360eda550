//! Where planted bugs forge, hide and rewrite messages.

use std::sync::Arc;

use keepwarm_core::replica::{Content, Envelope, Message, ReplicaEvent, Role};
use keepwarm_core::session::Stamp;
use keepwarm_core::shard::Record;
use keepwarm_types::{SessionKey, ShardId};

use super::bug::Bug;
use super::world::{Happening, Local, World};

impl World {
    /// A message as a bug lets it be sent; none where it is answered on the spot instead.
    pub fn misled(&mut self, at: usize, envelope: Envelope) -> Option<Envelope> {
        let to = &envelope.to;
        let set = &envelope.set;
        let last = set.replicas.len() > 1 && set.replicas.last() == Some(to);
        let changing = set.learner.is_some() && set.replicas.get(1) == Some(to);
        let second = set.replicas.iter().position(|member| member == to).is_some_and(|place| place > 1);
        let answer = match &envelope.message {
            Message::Prepare(prepare)
                if (self.bug(Bug::AcknowledgedBeforeTheLast) && last)
                    || (self.bug(Bug::OldSetForgotten) && changing) =>
            {
                Message::Prepared { key: prepare.key.clone(), stamp: prepare.stamp, holding: true }
            }
            Message::Confirm { round } if self.bug(Bug::ConfirmedByOne) && second => {
                Message::Confirmed { round: *round }
            }
            _ => return Some(envelope),
        };
        self.forge(at, &envelope, answer);
        // The message itself may come through, or not.
        self.chance(300).then_some(envelope)
    }

    /// An answer that nobody gave.
    fn forge(&mut self, to: usize, asked: &Envelope, message: Message) {
        let forged = Envelope {
            shard: asked.shard,
            from: asked.to.clone(),
            to: asked.from.clone(),
            set: Arc::clone(&asked.set),
            sent: 0,
            message,
        };
        let Some(life) = self.nodes[to].process.as_ref().map(|process| process.life) else { return };
        let wait = 1 + self.below(4);
        self.after(
            wait,
            Happening::At { node: to, life, what: Local::Event(asked.shard, ReplicaEvent::Peer(forged)) },
        );
    }

    /// A message as a bug lets it be taken; none where it is answered without the replica.
    pub fn mistaken(&mut self, at: usize, mut envelope: Envelope) -> Option<Envelope> {
        let from = self.place(&envelope.from);
        let replica = self.replica(at, envelope.shard)?;
        let earlier = envelope.set.generation < replica.set().generation;
        let learner = envelope.set.learner.as_ref() == Some(&envelope.to);
        let answer = match &mut envelope.message {
            Message::Prepare(prepare) if self.options.bug == Some(Bug::GenerationNotChecked) && earlier => {
                Message::Prepared { key: prepare.key.clone(), stamp: prepare.stamp, holding: true }
            }
            Message::Confirm { round } if self.options.bug == Some(Bug::GenerationNotChecked) && earlier => {
                Message::Confirmed { round: *round }
            }
            Message::Compare(compare)
                if (self.options.bug == Some(Bug::NotReconciled) && !learner)
                    || (self.options.bug == Some(Bug::PromotedUnfilled) && learner) =>
            {
                Message::Compared { id: compare.id, differing: Vec::new(), lacking: Vec::new() }
            }
            Message::Prepare(prepare)
                if self.options.bug == Some(Bug::DuplicateByRevision)
                    && matches!(&prepare.record, Record::Manifest(next, _)
                    if replica.manifest(&prepare.key).is_some_and(|here| {
                        here.birth == next.birth && here.revision == next.revision
                    })) =>
            {
                Message::Prepared { key: prepare.key.clone(), stamp: prepare.stamp, holding: true }
            }
            _ => {
                self.mistake_heads(from, at, &mut envelope);
                return Some(envelope);
            }
        };
        self.forge(from, &envelope, answer);
        None
    }

    /// Heads of a comparison, as a bug lets them be compared.
    fn mistake_heads(&mut self, from: usize, at: usize, envelope: &mut Envelope) {
        let shard = envelope.shard;
        let (Some(sender), Some(receiver)) = (self.replica(from, shard), self.replica(at, shard)) else {
            return;
        };
        let bug = self.options.bug;
        let taken = |key: &SessionKey, stamp: Stamp| -> Stamp {
            let here = receiver.manifest(key);
            let there = sender.manifest(key);
            match (bug, here, there) {
                (Some(Bug::DeleteForgotten), Some(here), None) => here.stamp,
                (Some(Bug::DuplicateByRevision), Some(here), Some(there))
                    if (here.birth, here.revision) == (there.birth, there.revision) =>
                {
                    here.stamp
                }
                _ => stamp,
            }
        };
        match &mut envelope.message {
            Message::Compare(compare) => {
                for (key, stamp) in &mut compare.heads {
                    *stamp = taken(key, *stamp);
                }
            }
            Message::Install(install)
                if bug == Some(Bug::DeleteForgotten) && matches!(install.content, Content::Ended(_)) =>
            {
                install.content = Content::Absent;
            }
            _ => {}
        }
    }

    /// What a primary's change supersedes goes before the change is committed.
    pub fn free_early(&mut self, at: usize, shard: ShardId, records: &[Record]) {
        let Some(replica) = self.replica(at, shard).filter(|replica| replica.role() == Role::Primary) else {
            return;
        };
        let mut freed = Vec::new();
        for record in records {
            let Record::Manifest(next, _) = record else { continue };
            let leaves = !next.holders.iter().any(|holder| Some(holder) == self.nodes[at].member());
            let kept = next.instances().map(|block| block.instance);
            let kept: Vec<_> = kept.filter(|_| !leaves).collect();
            let old = replica.manifest(&next.key).into_iter().flat_map(|manifest| manifest.instances());
            freed.extend(old.map(|block| block.instance).filter(|instance| !kept.contains(instance)));
        }
        if self.bug(Bug::FreedOnPrepare)
            && let Some(process) = &mut self.nodes[at].process
        {
            freed.into_iter().for_each(|instance| process.memory.unname(instance));
        }
    }

    /// The news of a commit that has not been.
    pub fn freed_early(&self, envelope: &Envelope) -> Option<Envelope> {
        let Message::Prepare(prepare) = &envelope.message else { return None };
        let message = Message::Committed(vec![(prepare.key.clone(), prepare.stamp)]);
        self.bug(Bug::FreedOnPrepare).then(|| Envelope { message, ..envelope.clone() })
    }
}

//! Writes: planned, laid with the old tail's units, sent, staged and committed; all at one node.

use keepwarm_core::session::{BlockRef, Manifest, TranscriptDelta};
use keepwarm_core::shard::{
    Answer, Commit, PlanWrite, Precondition, Refusal, Verb, Write, WriteMode, WritePlan, Written,
};
use keepwarm_types::{Bytes, LeaseId, SessionKey, Tokens, TxnId, WriteId};

use super::{Came, Client, came};
use crate::cluster_sim::bug::Bug;
use crate::cluster_sim::keys::unit;
use crate::cluster_sim::world::Pins;
use crate::sim::memory::Stamp;
use crate::sim::oracle::{AttemptId, Content, Fate, Floor};

impl Client {
    fn demand(&self, manifest: &Manifest, lease: Option<LeaseId>) -> Precondition {
        let write_id = (self.world.below(2) == 0).then(|| WriteId(self.uuid()));
        Precondition { etag: Some(manifest.etag()), lease, write_id }
    }

    /// More state after what there is: at once where the session has no transcript, else in a transaction with
    /// tokens.
    pub async fn append(
        &mut self,
        key: &SessionKey,
        manifest: &Manifest,
        lease: Option<LeaseId>,
        again: bool,
    ) {
        let Some(base) = self.base(manifest) else { return };
        let counted = manifest.layout.parts()[0].form.planes().is_some();
        let count = 1 + self.world.below(9);
        let ahead = counted && (!base.transcript.is_empty() || self.world.below(4) == 0);
        let mut next = base.clone();
        let added = self.stamps(key, count);
        next.parts[0].extend(&added);
        let demand = self.demand(manifest, lease);
        let offset = WriteMode::Append { offset: base.parts[0].len() as u64 };
        if !ahead {
            let attempt = self.begin(manifest, next);
            let mut fate = self.written(key, manifest, offset, &added, demand, None, Some(&attempt)).await;
            if fate == Fate::Unknown && demand.write_id.is_some() && again {
                self.world.pause(self.world.below(600)).await;
                fate = self.written(key, manifest, offset, &added, demand, None, Some(&attempt)).await;
                if fate == Fate::Refused {
                    fate = Fate::Unknown;
                }
            }
            self.settle(&attempt, fate);
            return;
        }
        let txn = TxnId(self.uuid());
        let length = next.parts[0].len() as u64;
        let keep = base.transcript.len() as u64;
        let tokens = length.saturating_sub(keep) + self.world.below(2);
        let tokens: Vec<u32> = (0..tokens).map(|_| self.fresh() as u32).collect();
        next.transcript.extend(&tokens);
        let staged = Precondition { lease, ..Precondition::default() };
        if self.written(key, manifest, offset, &added, staged, Some(txn), None).await != Fate::Committed {
            return;
        }
        let attempt = self.begin(manifest, next);
        let floor = self.floor(key);
        let delta = TranscriptDelta { keep_tokens: Tokens(keep), tokens, ..TranscriptDelta::default() };
        let asked = self.fresh();
        let commit = Commit {
            txn,
            length_tokens: Tokens(length),
            transcript: Some(delta),
            precondition: demand,
            asked,
        };
        let fate = match self.ask(key, || Verb::Commit(commit.clone())).await {
            (at, Came::Done(answer, _)) => {
                let Answer::Written(written) = *answer else { panic!("not a write") };
                self.made(at, &attempt, &written, &floor);
                Fate::Committed
            }
            (_, Came::No(_)) => Fate::Refused,
            (_, Came::Unknown) => Fate::Unknown,
        };
        self.settle(&attempt, fate);
    }

    pub(super) fn begin(&self, manifest: &Manifest, content: Content) -> AttemptId {
        let revision = manifest.revision.0 + 1;
        self.world
            .with(|world| world.promises.oracle.attempt(&manifest.key, manifest.birth, revision, content))
    }

    /// A write said that it made a revision.
    pub(super) fn made(&self, at: usize, attempt: &AttemptId, written: &Written, floor: &Floor) {
        let revision = written.revision.0;
        self.settle(attempt, Fate::Committed);
        if revision != attempt.revision || written.birth != attempt.birth {
            let upon = attempt.revision - 1;
            let why = format!("{}: a write upon revision {upon} made {revision}", attempt.key);
            self.world.with(|world| world.check(Err(why)));
        }
        if written.manifest.revision == written.revision {
            self.saw(at, &written.manifest, None, floor);
        }
    }

    /// Sends the units of the part; staged for a transaction, else they are a revision of their own.
    async fn written(
        &mut self,
        key: &SessionKey,
        manifest: &Manifest,
        mode: WriteMode,
        units: &[Stamp],
        precondition: Precondition,
        txn: Option<TxnId>,
        attempt: Option<&AttemptId>,
    ) -> Fate {
        let part = &manifest.layout.parts()[0];
        let (name, unit) = (part.name.to_string(), unit(&part.form));
        let floor = self.floor(key);
        let body = Some(Bytes(units.len() as u64 * unit));
        let plan = PlanWrite { part: name.clone(), mode, precondition, body, txn };
        let (at, plan, pins) = match self.ask(key, || Verb::PlanWrite(plan.clone())).await {
            (at, Came::Done(answer, pins)) => match *answer {
                Answer::Plan(plan) => (at, *plan, pins),
                other => panic!("not a plan: {other:?}"),
            },
            // Nothing was sent yet that could change anything.
            (_, Came::No(_) | Came::Unknown) => return Fate::Refused,
        };
        if let (Some(written), Some(attempt)) = (&plan.repeated, attempt) {
            self.world.done(&pins);
            self.made(at, attempt, written, &floor);
            return Fate::Committed;
        }
        let Some(blocks) = self.lay(key, &plan, at, &pins, units, unit).await else { return Fate::Refused };
        let brought = blocks.iter().map(|block| block.instance).collect();
        let length = Bytes(plan.base.0 + u64::from(plan.tail_bytes) + units.len() as u64 * unit);
        let write = Write {
            part: name,
            birth: plan.birth,
            tail: plan.tail.map(|tail| tail.instance),
            mode,
            precondition,
            txn,
            first_block: plan.first_block,
            blocks,
            length,
            digest: None,
            asked: units.first().copied().unwrap_or(0),
        };
        match came(self.world.call(at, key, Verb::Write(write), brought).await) {
            Came::Done(answer, _) => match *answer {
                Answer::Staged(_) => Fate::Committed,
                Answer::Written(written) => {
                    if let Some(attempt) = attempt {
                        self.made(at, attempt, &written, &floor);
                    }
                    Fate::Committed
                }
                other => panic!("not a write: {other:?}"),
            },
            Came::No(Refusal::OutcomeUnknown) | Came::Unknown => Fate::Unknown,
            Came::No(_) => Fate::Refused,
        }
    }

    /// The blocks of a write: the old tail's units, then the new ones.
    async fn lay(
        &mut self,
        key: &SessionKey,
        plan: &WritePlan,
        at: usize,
        pins: &Pins,
        units: &[Stamp],
        unit: u64,
    ) -> Option<Vec<BlockRef>> {
        let mut all = Vec::new();
        if let Some(tail) = &plan.tail {
            match self.world.read(tail, pins) {
                Some(Ok(content)) => {
                    let kept = (u64::from(plan.tail_bytes) / unit) as usize;
                    all = content.into_iter().take(kept).collect();
                }
                Some(Err(content)) => {
                    let why = format!("{key}: a tail that nobody damaged reads as {content:?}");
                    self.world.with(|world| world.check(Err(why)));
                    return None;
                }
                None => return None,
            }
            self.overwrite(tail, pins, units);
        }
        self.world.done(pins);
        all.extend(units);
        let per_block = (plan.block_bytes / unit) as usize;
        let contents: Vec<_> = all.chunks(per_block).map(<[Stamp]>::to_vec).collect();
        let life = self.world.with(|world| {
            world.nodes[at].process.as_ref().filter(|process| !process.paused).map(|process| process.life)
        })?;
        let blocks = self.world.take(at, life, key, &contents, unit)?;
        self.world.pause(self.world.below(25)).await;
        let gone = self.world.below(20) == 0;
        let lost = self.world.with(|world| world.process(at, life).is_none());
        if gone || lost {
            // A client that goes away with its body half sent.
            let instances = blocks.iter().map(|block| block.instance).collect();
            self.world.done(&Pins { at, life, instances });
            return None;
        }
        Some(blocks)
    }

    fn overwrite(&self, tail: &BlockRef, pins: &Pins, units: &[Stamp]) {
        self.world.with(|world| {
            if world.bug(Bug::TailOverwritten)
                && let Some(process) = world.process(pins.at, pins.life)
                && let Some(slot) = process.memory.get_mut(tail.instance)
            {
                slot.content.extend(units);
            }
        });
    }

    /// All of the part anew.
    pub(super) async fn replace(&mut self, key: &SessionKey, manifest: &Manifest) {
        let Some(base) = self.base(manifest) else { return };
        if !base.transcript.is_empty() {
            return;
        }
        let count = self.world.below(14);
        let units = self.stamps(key, count);
        let next = Content { parts: vec![units.clone()], transcript: Vec::new() };
        let attempt = self.begin(manifest, next);
        let demand = self.demand(manifest, None);
        let fate =
            self.written(key, manifest, WriteMode::Replace, &units, demand, None, Some(&attempt)).await;
        self.settle(&attempt, fate);
    }
}

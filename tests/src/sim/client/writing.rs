//! Writes: planned, laid with the old tail's units, sent, staged and committed.

use keepwarm_core::session::{BlockRef, Manifest, TranscriptDelta};
use keepwarm_core::shard::{
    Answer, Commit, PlanWrite, Precondition, Verb, Write, WriteMode, WritePlan, Written,
};
use keepwarm_types::{Bytes, LeaseId, SessionKey, Timestamp, Tokens, TxnId};

use super::{Came, Client, came, unit};
use crate::sim::bug::Bug;
use crate::sim::memory::Stamp;
use crate::sim::oracle::{AttemptId, Content, Fate, Floor};
use crate::sim::world::Pins;

impl Client {
    /// More state after what there is: at once where the layout allows it, else in a transaction with tokens.
    pub(super) async fn append(
        &mut self,
        key: &SessionKey,
        manifest: &Manifest,
        lease: Option<LeaseId>,
        again: bool,
    ) {
        let Some(base) = self.base(manifest) else { return };
        let counted = manifest.layout.parts()[0].form.planes().is_some();
        let count = 1 + self.world.below(9);
        let single = manifest.layout.parts().len() == 1 && base.transcript.is_empty();
        let ahead = counted && (!single || self.world.below(4) == 0);
        let mut next = base.clone();
        let mut added = Vec::new();
        for units in &mut next.parts {
            let new = self.stamps(key, count);
            units.extend(&new);
            added.push(new);
        }
        let demand = self.demand(manifest, lease);
        let offset = |index: usize| WriteMode::Append { offset: base.parts[index].len() as u64 };
        if !ahead {
            let attempt = self.begin(manifest, next);
            let mut fate = self.written(key, manifest, offset(0), &added[0], demand, None, &attempt).await;
            if fate == Fate::Unknown && demand.write_id.is_some() && again {
                self.world.pause(self.world.below(200)).await;
                fate = self.written(key, manifest, offset(0), &added[0], demand, None, &attempt).await;
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
        for (index, units) in added.iter().enumerate() {
            let attempt = AttemptId::none(key);
            let staged = Precondition { lease, ..Precondition::default() };
            let fate =
                self.written(key, manifest, offset(index), units, staged, Some((txn, index)), &attempt).await;
            if fate != Fate::Committed {
                return;
            }
        }
        self.commit(manifest, next, Tokens(length), Tokens(keep), tokens, txn, demand).await;
    }

    async fn commit(
        &mut self,
        manifest: &Manifest,
        next: Content,
        length_tokens: Tokens,
        keep_tokens: Tokens,
        tokens: Vec<u32>,
        txn: TxnId,
        precondition: Precondition,
    ) {
        let attempt = self.begin(manifest, next);
        let (floor, sent) = (self.floor(&manifest.key), self.world.with(|world| world.now));
        let delta = TranscriptDelta { keep_tokens, tokens, ..TranscriptDelta::default() };
        let transcript = Some(delta);
        let asked = self.fresh();
        let commit = Commit { txn, length_tokens, transcript, precondition, asked };
        let fate = match came(self.world.call(&manifest.key, Verb::Commit(commit), Vec::new()).await) {
            Came::Done(answer, _) => {
                let Answer::Written(written) = *answer else { panic!("not a write") };
                self.made(&attempt, &written, &floor, sent);
                Fate::Committed
            }
            Came::No(_) => Fate::Refused,
            Came::Unknown => Fate::Unknown,
        };
        self.settle(&attempt, fate);
    }

    pub(super) fn begin(&self, manifest: &Manifest, content: Content) -> AttemptId {
        let revision = manifest.revision.0 + 1;
        self.world.with(|world| world.oracle.attempt(&manifest.key, manifest.birth, revision, content))
    }

    /// A write said that it made a revision.
    pub(super) fn made(&self, attempt: &AttemptId, written: &Written, floor: &Floor, sent: Timestamp) {
        let revision = written.revision.0;
        self.settle(attempt, Fate::Committed);
        self.world.with(|world| {
            if revision != attempt.revision || written.birth != attempt.birth {
                world.check(Err(format!(
                    "{}: a write upon revision {} made {revision}",
                    attempt.key,
                    attempt.revision - 1
                )));
            }
            world.oracle.used(&attempt.key, attempt.birth, sent);
        });
        if written.manifest.revision == written.revision {
            self.saw(&written.manifest, None, floor);
        }
    }

    /// Sends the units of one part; `staged` for a transaction, else they are a revision of their own.
    async fn written(
        &mut self,
        key: &SessionKey,
        manifest: &Manifest,
        mode: WriteMode,
        units: &[Stamp],
        precondition: Precondition,
        staged: Option<(TxnId, usize)>,
        attempt: &AttemptId,
    ) -> Fate {
        let index = staged.map_or(0, |(_, index)| index);
        let part = &manifest.layout.parts()[index];
        let (name, unit) = (part.name.to_string(), unit(&part.form));
        let txn = staged.map(|(txn, _)| txn);
        let (floor, sent) = (self.floor(key), self.world.with(|world| world.now));
        let body = Some(Bytes(units.len() as u64 * unit));
        let plan = PlanWrite { part: name.clone(), mode, precondition, body, txn };
        let (plan, pins) = match came(self.world.call(key, Verb::PlanWrite(plan), Vec::new()).await) {
            Came::Done(answer, pins) => match *answer {
                Answer::Plan(plan) => (*plan, pins),
                other => panic!("not a plan: {other:?}"),
            },
            // Nothing was sent yet that could change anything.
            Came::No(_) | Came::Unknown => return Fate::Refused,
        };
        if let Some(written) = &plan.repeated {
            self.world.done(&pins);
            self.made(attempt, written, &floor, sent);
            return Fate::Committed;
        }
        let Some(blocks) = self.lay(key, &plan, &pins, units, unit).await else { return Fate::Refused };
        let brought = blocks.iter().map(|block| block.instance).collect();
        let length = Bytes(plan.base.0 + u64::from(plan.tail_bytes) + units.len() as u64 * unit);
        let tail = plan.tail.map(|tail| tail.instance);
        let asked = units.first().copied().unwrap_or(0);
        let (birth, first_block) = (plan.birth, plan.first_block);
        let write = Write {
            part: name,
            birth,
            tail,
            mode,
            precondition,
            txn,
            first_block,
            blocks,
            length,
            digest: None,
            asked,
        };
        match came(self.world.call(key, Verb::Write(write), brought).await) {
            Came::Done(answer, _) => match *answer {
                Answer::Staged(_) => Fate::Committed,
                Answer::Written(written) => {
                    self.made(attempt, &written, &floor, sent);
                    Fate::Committed
                }
                other => panic!("not a write: {other:?}"),
            },
            Came::No(_) => Fate::Refused,
            Came::Unknown => Fate::Unknown,
        }
    }

    /// The blocks of a write: the old tail's units, then the new ones.
    async fn lay(
        &mut self,
        key: &SessionKey,
        plan: &WritePlan,
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
                Some(Err(())) => {
                    self.world.done(pins);
                    self.condemn(key, plan.birth).await;
                    return None;
                }
                None => return None,
            }
            if self.world.with(|world| world.options.bug == Some(Bug::TailOverwritten)) {
                let first = units.first().copied().unwrap_or(0);
                all.iter_mut().for_each(|old| *old = first);
            }
        }
        self.world.done(pins);
        all.extend(units);
        let per_block = (plan.block_bytes / unit) as usize;
        let contents: Vec<_> = all.chunks(per_block).map(<[Stamp]>::to_vec).collect();
        if !self.world.room(&key.tenant, contents.len()).await {
            return None;
        }
        let life = self.world.with(|world| world.life);
        let sizes = vec![unit; contents.len()];
        let blocks = self.world.take(contents, &sizes)?;
        self.world.pause(self.world.below(25)).await;
        if self.world.below(20) == 0 {
            // A client that goes away with its body half sent.
            self.world.give_back(&blocks, life);
            return None;
        }
        if self.world.with(|world| world.life != life) {
            return None;
        }
        Some(blocks)
    }

    /// All of a part anew, of a session that has one.
    pub(super) async fn replace(&mut self, key: &SessionKey, manifest: &Manifest) {
        let Some(base) = self.base(manifest) else { return };
        let [_] = manifest.layout.parts() else { return };
        if !base.transcript.is_empty() {
            return;
        }
        let units = {
            let count = self.world.below(14);
            self.stamps(key, count)
        };
        let next = Content { parts: vec![units.clone()], transcript: Vec::new() };
        let attempt = self.begin(manifest, next);
        let demand = self.demand(manifest, None);
        let fate = self.written(key, manifest, WriteMode::Replace, &units, demand, None, &attempt).await;
        self.settle(&attempt, fate);
    }
}

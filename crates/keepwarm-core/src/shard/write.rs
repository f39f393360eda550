//! Writing: plan, stage, commit, turn.

use std::collections::HashSet;
use std::sync::Arc;

use keepwarm_types::{Bytes, InstanceId, SessionKey, Timestamp, Tokens, TxnId};

use super::change::Change;
use super::command::{Command, TranscriptChange};
use super::cut::{cut_to_tokens, fall_out_of_window};
use super::entry::{After, Entry, Stage};
use super::event::{Commit, PlanWrite, Precondition, RequestId, Turn, Write, WriteMode};
use super::refusal::Refusal;
use super::state::{Handled, STAGE_TTL, Shard, TXNS_MAX, Timer};
use super::view::{Answer, Staged, WritePlan, Written};
use crate::session::{
    Form, Manifest, Order, Part, PartState, State, TranscriptDelta, WRITE_IDS_KEPT, WriteMemo,
};

/// Where a write's new blocks begin.
struct Placement {
    first_block: u32,
    /// Bytes of the tail that begin the first new block.
    tail_bytes: u32,
    base: Bytes,
    unit: u64,
    exact: Option<Bytes>,
}

impl Shard {
    pub(super) fn plan_write(&self, now: Timestamp, key: &SessionKey, plan: &PlanWrite) -> Handled {
        let entry = self.live(key)?;
        let manifest = entry.manifest()?;
        let index = part_index(manifest, &plan.part)?;
        let part = &manifest.layout.parts()[index];
        let form = &part.form;
        let repeated =
            plan.precondition.write_id.and_then(|id| manifest.writes.iter().find(|memo| memo.id == id));
        if repeated.is_none() {
            check(entry, now, &plan.precondition)?;
        }
        let base = effective(entry, plan.txn, index)?;
        let placement = match (place(part, &base, plan.mode, manifest), repeated) {
            (Ok(placement), _) => placement,
            // A repeated write meets the state that it made itself.
            (Err(_), Some(memo)) => return Ok(Some(Answer::Plan(Box::new(repeat(manifest, part, memo))))),
            (Err(refusal), None) => return Err(refusal),
        };
        if let Some(body) = plan.body {
            check_length(form, &placement, body)?;
        }
        let tail = (placement.tail_bytes > 0)
            .then(|| base.blocks.get((placement.first_block - base.first_block) as usize).copied())
            .flatten();
        Ok(Some(Answer::Plan(Box::new(WritePlan {
            birth: manifest.birth,
            revision: manifest.revision,
            first_block: placement.first_block,
            tail,
            tail_bytes: placement.tail_bytes,
            block_bytes: form.block_bytes(),
            part: part.clone(),
            base: placement.base,
            planes: form.planes().filter(|planes| planes.order == Order::Plane).copied(),
            unit: placement.unit,
            exact: placement.exact,
            repeated: None,
        }))))
    }

    pub(super) fn write(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        write: Write,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        if manifest.birth != write.birth {
            return Err(mismatch(&manifest));
        }
        if let Some(answer) = remembered(&manifest, &write.precondition, write.asked)? {
            return Ok(Some(answer));
        }
        check(entry, now, &write.precondition)?;
        let index = part_index(&manifest, &write.part)?;
        let base = effective(entry, write.txn, index)?;
        let state = lay(&manifest.layout.parts()[index], &base, &write, &manifest)?;
        let brought: Vec<_> = write.blocks.iter().map(|block| block.instance).collect();
        if let Some(txn) = write.txn {
            let staged = self.stage(now, key, txn, index, state, brought.clone(), out)?;
            out.push(Command::Adopt(id, brought));
            self.reside(now, key, out);
            return Ok(Some(Answer::Staged(staged)));
        }
        let length = state.length;
        let mut next = Manifest::clone(&manifest);
        wake(&mut next);
        next.parts[index] = state;
        next.length_tokens = common_length(&next)?;
        if next.transcript_tokens.0 > 0 && next.length_tokens > next.transcript_tokens {
            return Err(Refusal::Conflict(
                "the session has a transcript: commit the tokens together with their state (?txn= and commit)".to_owned(),
            ));
        }
        let mut released = self.superseded(&manifest, &mut next);
        released.extend(unnamed(&brought, &next));
        self.seal(now, &mut next, write.precondition, write.asked, length);
        out.push(Command::Adopt(id, brought.clone()));
        let after = After::Written { length };
        let change = Change {
            request: Some(id),
            next: Arc::new(next),
            transcript: TranscriptChange::Keep,
            released,
            undo: brought,
            after,
        };
        self.prepare(key, change, out);
        Ok(None)
    }

    /// Puts a part's future state into a transaction.
    fn stage(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        txn: TxnId,
        index: usize,
        state: PartState,
        brought: Vec<InstanceId>,
        out: &mut Vec<Command>,
    ) -> Result<Staged, Refusal> {
        let expires_at = now + STAGE_TTL;
        let length = state.length;
        let entry = self.entry(key)?;
        let stages = &mut entry.work().stages;
        let place = match stages.iter().position(|stage| stage.txn == txn) {
            Some(place) => place,
            None if stages.len() >= TXNS_MAX => {
                entry.settle();
                return Err(Refusal::Overloaded {
                    what: "transactions of this session",
                    retry_after: super::state::RETRY_AFTER,
                });
            }
            None => {
                stages.push(Stage {
                    txn,
                    parts: Vec::new(),
                    brought: Vec::new(),
                    bytes: Bytes::ZERO,
                    expires_at,
                });
                stages.len() - 1
            }
        };
        let stage = &mut stages[place];
        stage.expires_at = expires_at;
        stage.parts.retain(|(part, _)| *part != index);
        let kept: HashSet<_> = state.blocks.iter().map(|block| block.instance).collect();
        let dropped: Vec<_> = stage
            .brought
            .extract_if(.., |(part, instance)| *part == index && !kept.contains(instance))
            .map(|(_, i)| i)
            .collect();
        stage.brought.extend(brought.into_iter().map(|instance| (index, instance)));
        stage.parts.push((index, state));
        let own: HashSet<_> = stage.brought.iter().map(|(_, instance)| *instance).collect();
        let blocks = stage.parts.iter().flat_map(|(_, state)| &state.blocks);
        stage.bytes = Bytes(
            blocks.filter(|block| own.contains(&block.instance)).map(|block| u64::from(block.length)).sum(),
        );
        if !dropped.is_empty() {
            out.push(Command::Release(dropped));
        }
        self.set_timer(expires_at, Timer::Stage(key.clone()));
        Ok(Staged { txn, length, expires_at })
    }

    pub(super) fn commit(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        commit: Commit,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        if let Some(answer) = remembered(&manifest, &commit.precondition, commit.asked)? {
            return Ok(Some(answer));
        }
        check(entry, now, &commit.precondition)?;
        let stage =
            entry.work.as_ref().and_then(|work| work.stages.iter().find(|stage| stage.txn == commit.txn));
        let mut next = Manifest::clone(&manifest);
        match stage {
            Some(stage) => {
                wake(&mut next);
                for (index, state) in &stage.parts {
                    // What was staged was laid upon the committed part of then.
                    let own: HashSet<_> = stage.brought.iter().map(|(_, instance)| *instance).collect();
                    let base = &next.parts[*index].blocks;
                    let foreign = state.blocks.iter().filter(|block| !own.contains(&block.instance));
                    if !foreign.into_iter().all(|block| base.contains(block)) {
                        return Err(mismatch(&manifest));
                    }
                    next.parts[*index] = state.clone();
                }
            }
            None if commit.transcript.is_none() => {
                return Err(Refusal::Conflict(
                    "the transaction has nothing staged: it expired, was committed, or never began"
                        .to_owned(),
                ));
            }
            None => {}
        }
        let transcript = self.committed_transcript(&manifest, &mut next, &commit)?;
        let released = self.superseded(&manifest, &mut next);
        self.seal(now, &mut next, commit.precondition, commit.asked, Bytes::ZERO);
        let work = self.entry(key)?.work();
        let taken = work
            .stages
            .iter()
            .position(|stage| stage.txn == commit.txn)
            .map(|place| work.stages.remove(place));
        let brought: Vec<_> =
            taken.map(|stage| stage.brought).unwrap_or_default().into_iter().map(|(_, i)| i).collect();
        let released = released.into_iter().chain(unnamed(&brought, &next)).collect();
        let after = After::Written { length: Bytes::ZERO };
        let change =
            Change { request: Some(id), next: Arc::new(next), transcript, released, undo: brought, after };
        self.prepare(key, change, out);
        Ok(None)
    }

    /// Checks a commit's lengths and turns its tokens into a change of the transcript.
    fn committed_transcript(
        &self,
        manifest: &Manifest,
        next: &mut Manifest,
        commit: &Commit,
    ) -> Result<TranscriptChange, Refusal> {
        let length = commit.length_tokens;
        for (index, part) in next.layout.parts().iter().enumerate() {
            if let Some(have) = next.part_tokens(index)
                && have != length
            {
                return Err(Refusal::Incomplete { part: part.name.to_string(), have, need: length });
            }
            if matches!(part.form, Form::Snapshot { .. })
                && next.parts[index].length == Bytes::ZERO
                && length.0 > 0
            {
                return Err(Refusal::Incomplete {
                    part: part.name.to_string(),
                    have: Tokens::ZERO,
                    need: length,
                });
            }
        }
        next.length_tokens = length;
        let Some(delta) = &commit.transcript else {
            if manifest.transcript_tokens.0 > 0 && length > manifest.transcript_tokens {
                return Err(Refusal::Conflict(
                    "the session has a transcript: commit the tokens of the new state too".to_owned(),
                ));
            }
            return Ok(TranscriptChange::Keep);
        };
        let total = transcript_length(manifest, delta)?;
        // A transcript may run ahead of its state: the token that was sampled last is not state yet.
        if total < length {
            let reason = format!(
                "{} tokens from {} on make {total}, fewer than length_tokens {length}",
                delta.tokens.len(),
                delta.keep_tokens
            );
            return Err(Refusal::InvalidField { field: "tokens".to_owned(), reason });
        }
        record_transcript(next, delta, total);
        Ok(TranscriptChange::Delta(delta.clone()))
    }

    pub(super) fn turn(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        turn: Turn,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        entry.writable(now, Some(turn.lease))?;
        let total = transcript_length(&manifest, &turn.transcript)?;
        let mut next = Manifest::clone(&manifest);
        if turn.transcript.keep_tokens < next.length_tokens {
            cut_to_tokens(&mut next, turn.transcript.keep_tokens);
        }
        record_transcript(&mut next, &turn.transcript, total);
        let released = self.superseded(&manifest, &mut next);
        self.seal(now, &mut next, Precondition::default(), 0, Bytes::ZERO);
        let transcript = TranscriptChange::Delta(turn.transcript);
        let after = After::Written { length: Bytes::ZERO };
        let change =
            Change { request: Some(id), next: Arc::new(next), transcript, released, undo: Vec::new(), after };
        self.prepare(key, change, out);
        Ok(None)
    }

    pub(super) fn abort(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        txn: TxnId,
        out: &mut Vec<Command>,
    ) -> Handled {
        self.live(key)?;
        let entry = self.entry(key)?;
        let stages = &mut entry.work().stages;
        let place = stages.iter().position(|stage| stage.txn == txn);
        let stage = place.map(|place| stages.remove(place));
        entry.settle();
        let Some(stage) = stage else { return Ok(Some(Answer::Done)) };
        out.push(Command::Release(stage.brought.into_iter().map(|(_, instance)| instance).collect()));
        self.reside(now, key, out);
        Ok(Some(Answer::Done))
    }

    /// Gives the next manifest its revision and write id, and holders where it has none.
    pub(super) fn seal(
        &self,
        now: Timestamp,
        next: &mut Manifest,
        precondition: Precondition,
        asked: u64,
        length: Bytes,
    ) {
        next.revision = next.revision.next();
        next.last_used_at = now;
        if next.state == State::Warm && next.holders.is_empty() {
            next.holders = Arc::clone(&self.holders);
        }
        if let Some(id) = precondition.write_id {
            if next.writes.len() >= WRITE_IDS_KEPT {
                next.writes.remove(0);
            }
            let (revision, length_tokens) = (next.revision, next.length_tokens);
            next.writes.push(WriteMemo { id, asked, revision, length_tokens, length });
        }
    }

    /// Drops what fell out of windows, and names what the next manifest no longer names.
    pub(super) fn superseded(&self, manifest: &Manifest, next: &mut Manifest) -> Vec<InstanceId> {
        fall_out_of_window(next);
        let kept: HashSet<_> = next.instances().map(|block| block.instance).collect();
        manifest.instances().map(|block| block.instance).filter(|instance| !kept.contains(instance)).collect()
    }
}

/// Those of `brought` that fell out of a window at once.
fn unnamed(brought: &[InstanceId], next: &Manifest) -> Vec<InstanceId> {
    let named: HashSet<_> = next.instances().map(|block| block.instance).collect();
    brought.iter().copied().filter(|instance| !named.contains(instance)).collect()
}

fn part_index(manifest: &Manifest, name: &str) -> Result<usize, Refusal> {
    manifest.layout.part_index(name).ok_or_else(|| Refusal::UnknownPart(name.to_owned()))
}

pub(super) fn mismatch(manifest: &Manifest) -> Refusal {
    Refusal::RevisionMismatch {
        birth: manifest.birth,
        revision: manifest.revision,
        length_tokens: manifest.length_tokens,
        last_write_id: manifest.writes.last().map(|memo| memo.id),
    }
}

pub(super) fn check(entry: &Entry, now: Timestamp, precondition: &Precondition) -> Result<(), Refusal> {
    let manifest = entry.manifest()?;
    if precondition.etag.is_some_and(|etag| etag != manifest.etag()) {
        return Err(mismatch(manifest));
    }
    entry.writable(now, precondition.lease)
}

/// The first answer to a write that was seen before.
pub(super) fn remembered(
    manifest: &Arc<Manifest>,
    precondition: &Precondition,
    asked: u64,
) -> Result<Option<Answer>, Refusal> {
    let Some(id) = precondition.write_id else { return Ok(None) };
    let Some(memo) = manifest.writes.iter().find(|memo| memo.id == id) else { return Ok(None) };
    if memo.asked != asked {
        return Err(Refusal::Conflict(format!("the write id {id} was used for another write")));
    }
    Ok(Some(Answer::Written(written_before(manifest, memo))))
}

fn written_before(manifest: &Arc<Manifest>, memo: &WriteMemo) -> Written {
    Written {
        birth: manifest.birth,
        generation: manifest.stamp.generation,
        revision: memo.revision,
        length_tokens: memo.length_tokens,
        length: memo.length,
        manifest: Arc::clone(manifest),
    }
}

fn repeat(manifest: &Arc<Manifest>, part: &Part, memo: &WriteMemo) -> WritePlan {
    WritePlan {
        birth: manifest.birth,
        revision: manifest.revision,
        first_block: 0,
        tail: None,
        tail_bytes: 0,
        block_bytes: part.form.block_bytes(),
        part: part.clone(),
        base: Bytes::ZERO,
        planes: None,
        unit: 1,
        exact: None,
        repeated: Some(written_before(manifest, memo)),
    }
}

/// The part as a write meets it: what its transaction staged, else what is committed, else nothing.
fn effective(entry: &Entry, txn: Option<TxnId>, index: usize) -> Result<PartState, Refusal> {
    let staged = txn.and_then(|txn| {
        let stage = entry.work.as_ref()?.stages.iter().find(|stage| stage.txn == txn)?;
        stage.parts.iter().find(|(part, _)| *part == index).map(|(_, state)| state.clone())
    });
    let manifest = entry.manifest()?;
    Ok(match (staged, manifest.state) {
        (Some(state), _) => state,
        (None, State::Cold(_)) => PartState::default(),
        (None, State::Warm) => manifest.parts[index].clone(),
    })
}

fn place(part: &Part, base: &PartState, mode: WriteMode, manifest: &Manifest) -> Result<Placement, Refusal> {
    let form = &part.form;
    let unit = form.planes().map_or(1, crate::session::Planes::token_bytes);
    let offset = match mode {
        WriteMode::Replace => {
            let exact = if let Form::Snapshot { bytes } = form { Some(Bytes(*bytes)) } else { None };
            return Ok(Placement { first_block: 0, tail_bytes: 0, base: Bytes::ZERO, unit, exact });
        }
        WriteMode::Append { offset } => offset,
    };
    if matches!(form, Form::Snapshot { .. }) {
        let reason = "a snapshot part is replaced whole: use PUT".to_owned();
        return Err(Refusal::InvalidField { field: "offset".to_owned(), reason });
    }
    let refuse = || match manifest.state {
        State::Cold(reason) if offset > 0 => Refusal::Cold { reason },
        _ => Refusal::OffsetMismatch {
            offset,
            length_tokens: Tokens(if unit > 1 { base.length.0 / unit } else { manifest.length_tokens.0 }),
            length: base.length,
            revision: manifest.revision,
        },
    };
    let at = offset.checked_mul(unit).ok_or_else(refuse)?;
    let block = form.block_bytes();
    let plane_ordered = form.planes().is_some_and(|planes| planes.order == Order::Plane);
    let aligned = at.is_multiple_of(block);
    if at != base.length.0 && !(plane_ordered && aligned && at < base.length.0) {
        return Err(refuse());
    }
    if part.cold.is_some() && !aligned {
        let reason = "the numbers of a part-full block are rounded already, and would be once more: write from the \
                      block's first token on";
        return Err(Refusal::InvalidField { field: "offset".to_owned(), reason: reason.to_owned() });
    }
    let first_block = u32::try_from(at / block).map_err(|_| refuse())?;
    if first_block < base.first_block {
        return Err(refuse());
    }
    let tail_bytes = u32::try_from(at % block).map_err(|_| refuse())?;
    Ok(Placement { first_block, tail_bytes, base: Bytes(u64::from(first_block) * block), unit, exact: None })
}

fn check_length(form: &Form, placement: &Placement, body: Bytes) -> Result<(), Refusal> {
    let invalid = |reason| Err(Refusal::InvalidField { field: "body".to_owned(), reason });
    if let Some(exact) = placement.exact
        && body != exact
    {
        return invalid(format!("a snapshot of {} bytes was given {} bytes", exact.0, body.0));
    }
    if !body.0.is_multiple_of(placement.unit) {
        return invalid(format!(
            "{} bytes are not a whole number of tokens of {} bytes",
            body.0, placement.unit
        ));
    }
    if (placement.base.0.saturating_add(body.0)) / form.block_bytes() >= u64::from(u32::MAX) {
        return invalid(format!("{} bytes are more blocks than a part can have", body.0));
    }
    Ok(())
}

/// The part's state after a write; everything is checked again, since the plan may be old.
fn lay(part: &Part, base: &PartState, write: &Write, manifest: &Manifest) -> Result<PartState, Refusal> {
    let form = &part.form;
    let placement = place(part, base, write.mode, manifest)?;
    let kept = (placement.first_block - base.first_block.min(placement.first_block)) as usize;
    let replaced = write.mode == WriteMode::Replace;
    let tail =
        (placement.tail_bytes > 0).then(|| base.blocks.get(kept).map(|block| block.instance)).flatten();
    if write.first_block != placement.first_block || write.tail != tail {
        return Err(mismatch(manifest));
    }
    let shapeless = || {
        let reason = "the blocks do not add up to the part".to_owned();
        Refusal::InvalidField { field: "body".to_owned(), reason }
    };
    let added = part.raw_sum(write.blocks.iter().map(|block| block.length)).ok_or_else(shapeless)?;
    check_length(form, &placement, added)?;
    let full = part.stored_block_bytes();
    let shaped = write.blocks.split_last().is_none_or(|(last, rest)| {
        last.length > 0
            && u64::from(last.length) <= full
            && rest.iter().all(|block| u64::from(block.length) == full)
    });
    if !shaped || placement.base + added != write.length {
        return Err(shapeless());
    }
    let mut blocks = if replaced { Vec::new() } else { base.blocks[..kept].to_vec() };
    blocks.extend_from_slice(&write.blocks);
    let first_block = if replaced { 0 } else { base.first_block };
    // What was sent is not what will be read where a cold tier keeps less.
    let digest = write.digest.filter(|_| part.cold.is_none());
    Ok(PartState { blocks, first_block, length: write.length, digest })
}

/// Makes a cold manifest one that can be written from nothing; one without bytes has its holders chosen anew.
fn wake(next: &mut Manifest) {
    if next.stored_bytes() == Bytes::ZERO {
        next.holders = Arc::from([]);
    }
    if let State::Cold(_) = next.state {
        next.state = State::Warm;
        next.length_tokens = Tokens::ZERO;
        for part in &mut next.parts {
            *part = PartState::default();
        }
    }
}

/// The one length that all parts are complete to.
fn common_length(next: &Manifest) -> Result<Tokens, Refusal> {
    let counted =
        || (0..next.parts.len()).filter_map(|index| next.part_tokens(index).map(|tokens| (index, tokens)));
    let Some(need) = counted().map(|(_, tokens)| tokens).max() else { return Ok(next.length_tokens) };
    let name = |index: usize| next.layout.parts()[index].name.to_string();
    if let Some((index, have)) = counted().find(|(_, tokens)| *tokens != need) {
        return Err(Refusal::Incomplete { part: name(index), have, need });
    }
    let unwritten = (0..next.parts.len()).find(|index| {
        matches!(next.layout.parts()[*index].form, Form::Snapshot { .. }) && next.parts[*index].length.0 == 0
    });
    match unwritten {
        Some(index) if need.0 > 0 => Err(Refusal::Incomplete { part: name(index), have: Tokens::ZERO, need }),
        _ => Ok(need),
    }
}

fn transcript_length(manifest: &Manifest, delta: &TranscriptDelta) -> Result<Tokens, Refusal> {
    if delta.keep_tokens > manifest.transcript_tokens {
        let reason =
            format!("the transcript has {} tokens, not {}", manifest.transcript_tokens, delta.keep_tokens);
        return Err(Refusal::InvalidField { field: "tokens".to_owned(), reason });
    }
    if delta.keep_messages > manifest.transcript_messages {
        let reason = format!(
            "the transcript has {} messages, not {}",
            manifest.transcript_messages, delta.keep_messages
        );
        return Err(Refusal::InvalidField { field: "messages".to_owned(), reason });
    }
    Ok(delta.keep_tokens + Tokens::from(delta.tokens.len()))
}

fn record_transcript(next: &mut Manifest, delta: &TranscriptDelta, total: Tokens) {
    next.transcript_tokens = total;
    next.transcript_messages = delta.keep_messages + u32::try_from(delta.messages.len()).unwrap_or(u32::MAX);
    next.transcript_revision = next.revision.next();
}

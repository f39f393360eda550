//! The write-behind: what a turn left in HBM goes to pinned memory and into the session.
//!
//! The transcript is committed before; until this is done too, the session's state is behind its transcript
//! and would be computed again from it. A failed checkpoint is tried a few times, then given up with a word
//! to the operator: nothing acknowledged is lost by that, only time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use keepwarm_core::session::{Form, Manifest};
use keepwarm_core::shard::{Answer, Commit, Precondition, Verb, Write, WriteMode};
use keepwarm_memory::Block;
use keepwarm_types::{Bytes, GpuIndex, LeaseId, Owner, TxnId};
use uuid::Uuid;

use crate::cold;
use crate::error::Error;
use crate::gpu::GpuMsg;
use crate::handle::{Handle, TurnPart};
use crate::pinned::Pool;
use crate::write::block_ref;

/// How often a checkpoint is tried.
const ATTEMPTS: u32 = 3;
/// How long between two tries, times the try.
const BACKOFF: Duration = Duration::from_millis(200);

/// What a turn left to be checkpointed.
pub(crate) struct Checkpoint {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) gpu: GpuIndex,
    pub(crate) parts: Vec<TurnPart>,
    pub(crate) lease: LeaseId,
}

impl Checkpoint {
    fn bytes(&self) -> Bytes {
        self.parts.iter().flat_map(|part| &part.blocks).map(|block| Bytes(block.length() as u64)).sum()
    }

    /// Runs to its end; the result is what the last try gave.
    pub(crate) async fn run(self, handle: &Handle) -> Result<(), Error> {
        let (bytes, started) = (self.bytes(), Instant::now());
        let lag = i64::try_from(bytes.0).unwrap_or(i64::MAX);
        handle.metrics().checkpoint(lag);
        let mut result = Ok(());
        for attempt in 1..=ATTEMPTS {
            result = self.attempt(handle).await;
            match &result {
                Ok(()) => break,
                Err(Error::NoCapacity { .. } | Error::Overloaded { .. }) if attempt < ATTEMPTS => {
                    tokio::time::sleep(BACKOFF * attempt).await;
                }
                Err(_) => break,
            }
        }
        handle.metrics().checkpoint(-lag);
        handle.metrics().checkpoint_took(started.elapsed());
        let (key, birth, gpu) = (self.manifest.key.clone(), self.manifest.birth, self.gpu);
        // The guards first: once it is clean, the session's room may be given to another at once.
        drop(self);
        if let Some(actor) = handle.links().gpu(gpu) {
            let _ = actor.cast(GpuMsg::Clean { key: key.clone(), birth, bytes });
        }
        match &result {
            Ok(()) => handle.note_move(
                &key,
                &format!("hbm:{gpu}"),
                "pinned",
                bytes,
                "checkpoint",
                started.elapsed(),
            ),
            Err(error) => {
                tracing::warn!(%key, %error, "checkpoint given up: the state after the last one will be computed again");
                handle.note_failure(Some(&key), format!("checkpoint given up: {error}"));
            }
        }
        result
    }

    async fn attempt(&self, handle: &Handle) -> Result<(), Error> {
        let _permit = handle.admission().restore().await?;
        let device = handle.device(self.gpu)?;
        let owner = Owner { tenant: self.manifest.key.tenant.clone(), birth: self.manifest.birth };
        let mut copies = Vec::new();
        for part in &self.parts {
            let shape = &self.manifest.layout.parts()[part.part];
            let sizes = part.blocks.iter().map(|block| (cold::room_for(shape, block), 1)).collect();
            let targets = handle.reserve_pinned(&owner, Pool::SpillIn, sizes).await?;
            copies.push(cold::leave(&*device, shape, &part.blocks, targets, "checkpoint").await?);
        }
        self.commit(handle, copies).await
    }

    async fn commit(&self, handle: &Handle, copies: Vec<Vec<Block>>) -> Result<(), Error> {
        let key = &self.manifest.key;
        let precondition = Precondition { lease: Some(self.lease), ..Precondition::default() };
        let txn = (self.manifest.layout.parts().len() > 1).then(|| TxnId(Uuid::new_v4()));
        let mut length_tokens = self.manifest.length_tokens;
        for (part, blocks) in self.parts.iter().zip(copies) {
            let shape = &self.manifest.layout.parts()[part.part];
            let offset = match shape.form.planes() {
                Some(planes) => u64::from(part.first_block) * u64::from(planes.tokens_per_block),
                None => u64::from(part.first_block) * shape.form.block_bytes(),
            };
            if let Some(planes) = shape.form.planes() {
                length_tokens = keepwarm_types::Tokens(part.length.0 / planes.token_bytes());
            }
            let mode = if matches!(shape.form, Form::Snapshot { .. }) {
                WriteMode::Replace
            } else {
                WriteMode::Append { offset }
            };
            let write = Write {
                part: shape.name.to_string(),
                birth: self.manifest.birth,
                tail: None,
                mode,
                precondition,
                txn,
                first_block: part.first_block,
                blocks: blocks.iter().map(block_ref).collect(),
                length: part.length,
                digest: None,
                asked: 0,
            };
            handle.ask(key, Verb::Write(write), blocks, None).await?;
        }
        if let Some(txn) = txn {
            let commit = Commit { txn, length_tokens, transcript: None, precondition, asked: 0 };
            let answered = handle.ask(key, Verb::Commit(commit), Vec::new(), None).await?;
            debug_assert!(matches!(*answered.answer, Answer::Written(_)));
        }
        Ok(())
    }
}

//! A part's committed bytes on their way out: guards of one revision, verified, handed on without a copy.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes as Buffer;
use keepwarm_core::session::{Etag, Manifest, Order, Part, PartState, Planes};
use keepwarm_memory::fp8::Shape;
use keepwarm_memory::{Block, GuardError};
use keepwarm_types::{Bytes, Owner};
use twox_hash::XxHash3_128;

use crate::cold;
use crate::error::Error;
use crate::handle::{Handle, Selection};

/// Pieces at least this long are handed on as they lie; shorter ones are gathered into buffers.
const ZERO_COPY_MIN: usize = 16 << 10;
/// Size of a gathered buffer, and of the pieces that a large block is handed on in.
const PIECE_BYTES: usize = 1 << 20;

/// A part of one committed revision; the bytes are there until it drops.
#[derive(Debug)]
pub struct PartReader {
    manifest: Arc<Manifest>,
    index: usize,
    /// As they are stored.
    blocks: Vec<Block>,
    /// How they become what is read; where absent they are it.
    shape: Option<Shape>,
    owner: Owner,
    handle: Handle,
}

impl PartReader {
    pub(crate) fn new(manifest: Arc<Manifest>, index: usize, blocks: Vec<Block>, handle: Handle) -> Self {
        let owner = Owner { tenant: manifest.key.tenant.clone(), birth: manifest.birth };
        let shape = cold::shape(&manifest.layout.parts()[index]);
        Self { manifest, index, blocks, shape, owner, handle }
    }

    /// The entity tag of what is read.
    #[must_use]
    pub fn etag(&self) -> Etag {
        self.manifest.etag()
    }

    /// The committed manifest.
    #[must_use]
    pub const fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// The part of the layout.
    #[must_use]
    pub fn part(&self) -> &Part {
        &self.manifest.layout.parts()[self.index]
    }

    /// The part's state.
    #[must_use]
    pub fn state(&self) -> &PartState {
        &self.manifest.parts[self.index]
    }

    /// Bytes that can be read; of a window, what exists.
    #[must_use]
    pub fn length(&self) -> Bytes {
        Bytes(self.blocks.iter().map(|block| self.raw_length(block) as u64).sum())
    }

    /// Bytes of a block as it is read.
    fn raw_length(&self, block: &Block) -> usize {
        let raw = |shape: &Shape| Some(shape.raw_bytes(shape.numbers_stored(block.length())?));
        self.shape.as_ref().and_then(raw).unwrap_or_else(|| block.length())
    }

    /// A reader of the blocks as they are stored, whatever that is: for an archive.
    pub(crate) fn into_stored(self) -> Self {
        Self { shape: None, ..self }
    }

    /// XXH3-128 of the whole part, where it is known.
    #[must_use]
    pub fn digest(&self) -> Option<u128> {
        self.state().digest.filter(|_| self.state().first_block == 0).map(|digest| digest.as_u128())
    }

    /// XXH3-128 of the whole part, by one pass over the bytes. Computes on the calling thread.
    ///
    /// # Errors
    /// [`Error::Internal`] for a guard of another owner, which cannot be.
    pub fn compute_digest(&self) -> Result<u128, Error> {
        let mut hasher = XxHash3_128::new();
        for block in &self.blocks {
            let bytes = block.bytes(&self.owner).map_err(internal)?;
            match &self.shape {
                None => hasher.write(bytes),
                Some(shape) => hasher.write(&cold::raw(self.part(), shape, bytes)?),
            }
        }
        Ok(hasher.finish_128())
    }

    /// Guards of the blocks, in order.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The selected bytes, in pieces.
    ///
    /// # Errors
    /// [`Error::Range`] for what the part does not have, [`Error::InvalidField`] for tokens or planes of a
    /// part without them.
    pub fn select(self, selection: Selection) -> Result<Chunks, Error> {
        let mut spans = match (selection.tokens, selection.planes, self.part().form.planes().copied()) {
            (None, None, _) => {
                let all = |(index, block)| (index, 0..self.raw_length(block));
                self.blocks.iter().enumerate().map(all).collect()
            }
            (tokens, planes, Some(shape)) => self.spans(&shape, tokens, planes)?,
            (_, _, None) => {
                let reason = "tokens and planes select from paged and window parts only".to_owned();
                return Err(Error::InvalidField { field: "from_token".to_owned(), reason });
            }
        };
        let total: u64 = spans.iter().map(|(_, span)| span.len() as u64).sum();
        let mut length = total;
        if let Some((from, to)) = selection.bytes {
            if from >= total || to <= from {
                return Err(Error::Range {
                    reason: format!("bytes {from}..{to} of {total}"),
                    length: Bytes(total),
                });
            }
            let to = to.min(total);
            cut(&mut spans, from, to);
            length = to - from;
        }
        let lossy = self.shape.map(|shape| Lossy { part: self.part().clone(), shape, raw: None });
        Ok(Chunks {
            blocks: self.blocks,
            lossy,
            owner: self.owner,
            spans,
            verified: None,
            length,
            total,
            manifest: self.manifest,
            handle: self.handle,
        })
    }

    /// The pieces of `tokens` and `planes`, in the order of the part's bytes.
    fn spans(
        &self,
        shape: &Planes,
        tokens: Option<(u64, Option<u64>)>,
        planes: Option<(u32, u32)>,
    ) -> Result<VecDeque<(usize, Range<usize>)>, Error> {
        let outside = |reason: String| Error::Range { reason, length: self.length() };
        let per_block = u64::from(shape.tokens_per_block);
        let first = u64::from(self.state().first_block) * per_block;
        let end = self.manifest.length_tokens.0;
        let (from, to) = tokens.map_or((first, end), |(from, to)| (from, to.unwrap_or(end)));
        if from < first || to > end || from >= to {
            return Err(outside(format!("tokens {from}..{to} of {first}..{end}")));
        }
        let (low, high) = planes.unwrap_or((0, shape.planes - 1));
        if low > high || high >= shape.planes {
            return Err(outside(format!("planes {low}-{high} of 0-{}", shape.planes - 1)));
        }
        let (token, planes) = (shape.plane_bytes_per_token as usize, shape.planes as usize);
        let (low, high) = (low as usize, high as usize);
        let mut spans: VecDeque<(usize, Range<usize>)> = VecDeque::new();
        let mut push = |block: usize, span: Range<usize>| match spans.back_mut() {
            Some((last, before)) if *last == block && before.end == span.start => before.end = span.end,
            _ => spans.push_back((block, span)),
        };
        for (index, block) in self.blocks.iter().enumerate() {
            let start = first + index as u64 * per_block;
            let valid = self.raw_length(block) / (token * planes);
            let low_token = from.saturating_sub(start).min(valid as u64) as usize;
            let high_token = to.saturating_sub(start).min(valid as u64) as usize;
            match shape.order {
                Order::Plane => {
                    for plane in low..=high {
                        let base = plane * valid;
                        push(index, (base + low_token) * token..(base + high_token) * token);
                    }
                }
                Order::Token => {
                    for at in low_token..high_token {
                        push(index, (at * planes + low) * token..(at * planes + high + 1) * token);
                    }
                }
            }
        }
        spans.retain(|(_, span)| !span.is_empty());
        Ok(spans)
    }
}

/// Keeps bytes `from..to` of the spans' sequence.
fn cut(spans: &mut VecDeque<(usize, Range<usize>)>, from: u64, to: u64) {
    let mut at = 0u64;
    for (_, span) in spans.iter_mut() {
        let end = at + span.len() as u64;
        let (skip, drop) = (from.saturating_sub(at).min(end - at), end.saturating_sub(to).min(end - at));
        at = end;
        let (start, stop) = (span.start + skip as usize, span.end - drop as usize);
        *span = start..stop.max(start);
    }
    spans.retain(|(_, span)| !span.is_empty());
}

/// How stored blocks become what is read, and the last one that did.
#[derive(Debug)]
struct Lossy {
    part: Part,
    shape: Shape,
    raw: Option<(usize, Buffer)>,
}

fn internal(error: GuardError) -> Error {
    Error::Internal(error.to_string())
}

/// Selected bytes, piece by piece; each block is verified when its first piece is asked for.
#[derive(Debug)]
pub struct Chunks {
    blocks: Vec<Block>,
    owner: Owner,
    lossy: Option<Lossy>,
    /// Of the blocks as they are read.
    spans: VecDeque<(usize, Range<usize>)>,
    verified: Option<usize>,
    length: u64,
    total: u64,
    manifest: Arc<Manifest>,
    handle: Handle,
}

impl Chunks {
    /// Bytes that will come.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of the representation that a byte range was taken from.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Verifies the first block now, so that corruption there is an error rather than a broken stream.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn verify_first(&mut self) -> Result<(), Error> {
        match self.spans.front() {
            Some((block, _)) => self.verify(*block),
            None => Ok(()),
        }
    }

    //= GUARANTEES.md#G5
    fn verify(&mut self, index: usize) -> Result<(), Error> {
        if self.verified == Some(index) {
            return Ok(());
        }
        self.blocks[index].verify().map_err(|corrupt| {
            let (key, birth) = (&self.manifest.key, self.manifest.birth);
            self.handle.met_damage("read", key, birth, &self.blocks[index]);
            Error::Corrupt { at: "read", detail: corrupt.to_string() }
        })?;
        self.verified = Some(index);
        Ok(())
    }

    /// Bytes of a block that was verified: as they lie, or of its raw form.
    fn bytes(&mut self, index: usize, span: Range<usize>) -> Result<Buffer, Error> {
        let Some(lossy) = &mut self.lossy else {
            return Ok(Buffer::from_owner(self.blocks[index].view(&self.owner, span).map_err(internal)?));
        };
        let raw = match lossy.raw.take().filter(|(of, _)| *of == index) {
            Some((_, raw)) => raw,
            None => {
                let stored = self.blocks[index].bytes(&self.owner).map_err(internal)?;
                cold::raw(&lossy.part, &lossy.shape, stored)?.into()
            }
        };
        Ok(lossy.raw.insert((index, raw)).1.slice(span))
    }

    fn piece(&mut self) -> Result<Option<Buffer>, Error> {
        let mut gathered = Vec::new();
        while let Some((index, span)) = self.spans.front().cloned() {
            self.verify(index)?;
            if span.len() >= ZERO_COPY_MIN {
                if !gathered.is_empty() {
                    break;
                }
                let end = span.end.min(span.start + PIECE_BYTES);
                match &mut self.spans[0].1 {
                    rest if end < rest.end => rest.start = end,
                    _ => drop(self.spans.pop_front()),
                }
                return self.bytes(index, span.start..end).map(Some);
            }
            match self.lossy {
                None => gathered
                    .extend_from_slice(&self.blocks[index].bytes(&self.owner).map_err(internal)?[span]),
                Some(_) => gathered.extend_from_slice(&self.bytes(index, span)?),
            }
            self.spans.pop_front();
            if gathered.len() >= PIECE_BYTES {
                break;
            }
        }
        Ok(if gathered.is_empty() { None } else { Some(gathered.into()) })
    }
}

impl Iterator for Chunks {
    type Item = Result<Buffer, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.piece().transpose();
        if matches!(piece, Some(Err(_))) {
            self.spans.clear();
        }
        piece
    }
}

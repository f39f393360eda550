//! A part's bytes on their way in: streamed into pinned blocks, hashed as they arrive, taken whole or not.

use keepwarm_core::session::BlockRef;
use keepwarm_core::shard::{Answer, PlanWrite, Verb, Write, WriteMode, WritePlan};
use keepwarm_memory::fp8::Shape;
use keepwarm_memory::{Block, BlockHasher, BlockMut, block_checksum};
use keepwarm_types::{BlockChecksum, Bytes, Owner, SessionKey};
use sha2::{Digest, Sha256};
use twox_hash::{XxHash3_64, XxHash3_128};

use crate::admission::Permit;
use crate::book::Claim;
use crate::cold;
use crate::error::Error;
use crate::handle::{BodyDigest, Handle, WriteDone, WriteRequest};
use crate::pinned::Pool;
use crate::uploads::Upload;

/// Longest body of one write: 16 GiB, a session of a million tokens of a large model in one part.
pub const BODY_BYTES_MAX: Bytes = Bytes(16 << 30);
/// Smallest size class of a part-full block.
const TAIL_CLASS_MIN: u64 = 4096;

/// How a write begins.
#[derive(Debug)]
pub enum WriteStart {
    /// Give the body to this.
    Sink(Box<WriteSink>),
    /// The write was seen before; this was its answer, and no body is needed.
    Repeated(WriteDone),
}

/// Takes a body. Dropping it before [`WriteSink::finish`] leaves the session as it was.
pub struct WriteSink {
    handle: Handle,
    key: SessionKey,
    request: WriteRequest,
    plan: WritePlan,
    owner: Owner,
    permit: Option<Permit>,
    claim: Option<Claim>,
    received: u64,
    ready: Vec<BlockMut>,
    filling: Option<(BlockMut, BlockHasher)>,
    /// How raw bytes become what is stored, and those of a block that is not whole yet; where absent they are stored as they
    /// are.
    lossy: Option<(Shape, Vec<u8>)>,
    merge: Option<Merge>,
    sealed: Vec<Block>,
    digest: Hasher,
    _upload: Upload,
}

impl std::fmt::Debug for WriteSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WriteSink({} {}, {} bytes)", self.key, self.request.part, self.received)
    }
}

/// A plane-ordered tail, and the first piece of the body that continues it plane by plane.
struct Merge {
    tail: Block,
    tail_tokens: usize,
    piece: Vec<u8>,
    piece_tokens: usize,
}

enum Hasher {
    None,
    Xxh3(Box<XxHash3_128>, u128),
    Sha256(Box<Sha256>, [u8; 32]),
}

/// The size to allocate for `length` bytes of a part with blocks of `block`: classes of powers of two below
/// a full block, so that part-full tails of all sessions share few extents.
pub(crate) fn size_class(length: u64, block: u64) -> Bytes {
    if length >= block {
        return Bytes(block);
    }
    Bytes(length.max(TAIL_CLASS_MIN).next_power_of_two().min(block))
}

impl WriteSink {
    pub(crate) async fn open(
        handle: &Handle,
        key: &SessionKey,
        request: WriteRequest,
    ) -> Result<WriteStart, Error> {
        if request.body.is_some_and(|body| body > BODY_BYTES_MAX) {
            return Err(Error::BodyTooLarge { limit: BODY_BYTES_MAX });
        }
        let permit = handle.admit()?;
        let plan = PlanWrite {
            part: request.part.clone(),
            mode: request.mode,
            precondition: request.precondition,
            body: request.body,
            txn: request.txn,
        };
        let upload = handle.inner().uploads.begin(handle.links().count.shard_of(key.id));
        let answered = handle.ask(key, Verb::PlanWrite(plan), Vec::new(), None).await?;
        let Answer::Plan(plan) = *answered.answer else {
            return Err(Error::Internal("not a plan".to_owned()));
        };
        if let Some(written) = plan.repeated {
            let durability = handle.written_durability(&written.manifest);
            return Ok(WriteStart::Repeated(WriteDone::Committed(written, durability)));
        }
        let owner = Owner { tenant: key.tenant.clone(), birth: plan.birth };
        let digest = match request.digest {
            None => Hasher::None,
            Some(BodyDigest::Xxh3(expected)) => Hasher::Xxh3(Box::new(XxHash3_128::new()), expected),
            Some(BodyDigest::Sha256(expected)) => Hasher::Sha256(Box::default(), expected),
        };
        let lossy = cold::shape(&plan.part).map(|shape| (shape, Vec::new()));
        let mut sink = Self {
            handle: handle.clone(),
            key: key.clone(),
            request,
            plan: *plan,
            owner,
            permit: Some(permit),
            claim: handle.inner().book.claim(key),
            received: 0,
            ready: Vec::new(),
            filling: None,
            lossy,
            merge: None,
            sealed: Vec::new(),
            digest,
            _upload: upload,
        };
        sink.begin(answered.blocks).await?;
        Ok(WriteStart::Sink(Box::new(sink)))
    }

    /// Reserves what the body needs, where that is known, and lays the old tail.
    async fn begin(&mut self, tail: Vec<Block>) -> Result<(), Error> {
        let tail = tail.into_iter().next();
        let tail_bytes = u64::from(self.plan.tail_bytes);
        if let Some(body) = self.request.body {
            if let Some(claim) = &mut self.claim {
                claim.grow(body.0)?;
            }
            self.reserve(tail_bytes + body.0).await?;
        }
        let Some(tail) = tail else { return Ok(()) };
        tail.verify().map_err(|corrupt| self.corrupt(&tail, &corrupt))?;
        if let Some(planes) = self.plan.planes {
            let unit = planes.token_bytes();
            let Some(body) = self.request.body else {
                let reason =
                    "the write continues a part-full block plane by plane: send Content-Length".to_owned();
                return Err(Error::InvalidField { field: "body".to_owned(), reason });
            };
            let tail_tokens = (tail_bytes / unit) as usize;
            let piece_tokens = (planes.tokens_per_block as usize - tail_tokens).min((body.0 / unit) as usize);
            let piece = Vec::with_capacity(piece_tokens * unit as usize);
            self.merge = Some(Merge { tail, tail_tokens, piece, piece_tokens });
            return self.merge_piece().await;
        }
        let bytes = tail.bytes(&self.owner).map_err(|error| Error::Internal(error.to_string()))?;
        self.fill(&bytes[..self.plan.tail_bytes as usize]).await
    }

    fn corrupt(&self, tail: &Block, corrupt: &keepwarm_memory::Corrupt) -> Error {
        self.handle.met_damage("append", &self.key, self.owner.birth, tail);
        Error::Corrupt { at: "append", detail: corrupt.to_string() }
    }

    async fn reserve(&mut self, bytes: u64) -> Result<(), Error> {
        let (block, part) = (self.plan.block_bytes, &self.plan.part);
        let (full, rest) = ((bytes / block) as usize, bytes % block);
        let mut sizes = Vec::new();
        if full > 0 {
            sizes.push((Bytes(part.stored_block_bytes()), full));
        }
        if rest > 0 {
            sizes.push((cold::stored_class(part, rest), 1));
        }
        if sizes.is_empty() {
            return Ok(());
        }
        let mut blocks = self.handle.reserve_pinned(&self.owner, Pool::Client, sizes).await?;
        blocks.reverse();
        self.ready = blocks;
        Ok(())
    }

    /// Takes the next bytes of the body: one copy, from the socket's buffer into pinned memory.
    ///
    /// # Errors
    /// [`Error`]; the write is over then, and nothing was applied.
    pub async fn write(&mut self, chunk: &[u8]) -> Result<(), Error> {
        self.count(chunk.len() as u64)?;
        match &mut self.digest {
            Hasher::None => {}
            Hasher::Xxh3(hasher, _) => hasher.write(chunk),
            Hasher::Sha256(hasher, _) => hasher.update(chunk),
        }
        let mut rest = chunk;
        if let (Some(merge), Some(planes)) = (&mut self.merge, self.plan.planes) {
            let wanted = merge.piece_tokens * planes.token_bytes() as usize - merge.piece.len();
            let taken = wanted.min(rest.len());
            merge.piece.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            self.merge_piece().await?;
        }
        self.fill(rest).await
    }

    /// So many raw bytes more have come.
    fn count(&mut self, bytes: u64) -> Result<(), Error> {
        self.received += bytes;
        let limit =
            self.request.body.unwrap_or(BODY_BYTES_MAX).min(self.plan.exact.unwrap_or(BODY_BYTES_MAX));
        if self.received > limit.0 {
            return Err(Error::BodyTooLarge { limit });
        }
        match &mut self.claim {
            Some(claim) if self.received > claim.bytes() => Ok(claim.grow(self.received - claim.bytes())?),
            _ => Ok(()),
        }
    }

    /// Takes a block that is in its stored form already, from an archive: it is kept as it is, since the way through its
    /// numbers might round once more.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`Error::InvalidField`] for a length that no block of the part has.
    pub(crate) async fn write_stored(&mut self, stored: &[u8]) -> Result<(), Error> {
        let Some(raw) = self.plan.part.raw_bytes(stored.len() as u64) else {
            let reason = format!("{} bytes are no block of the part", stored.len());
            return Err(Error::InvalidField { field: "body".to_owned(), reason });
        };
        self.count(raw)?;
        self.place(raw, stored).await
    }

    /// Writes a whole stored block of so many raw bytes, and seals it.
    async fn place(&mut self, raw: u64, stored: &[u8]) -> Result<(), Error> {
        if self.ready.is_empty() {
            self.reserve(raw).await?;
        }
        let block = self.ready.pop();
        let mut block = block.ok_or_else(|| Error::Internal("a reservation gave no block".to_owned()))?;
        block.write(0, stored).map_err(|error| Error::Internal(error.to_string()))?;
        let checksum = block_checksum(block.bytes());
        self.sealed.push(block.seal_hashed(checksum));
        Ok(())
    }

    /// Collects raw bytes until a block is whole, and stores that.
    async fn narrow(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while let Some((_, raw)) = self.lossy.as_mut().filter(|_| !bytes.is_empty()) {
            let full = self.plan.block_bytes as usize;
            let (now, later) = bytes.split_at((full - raw.len()).min(bytes.len()));
            raw.extend_from_slice(now);
            bytes = later;
            if raw.len() == full {
                self.round().await?;
            }
        }
        Ok(())
    }

    /// Stores the block that was collected, whole or the last.
    async fn round(&mut self) -> Result<(), Error> {
        let Some((shape, raw)) = self.lossy.as_mut().filter(|(_, raw)| !raw.is_empty()) else {
            return Ok(());
        };
        let (stored, length) = match cold::stored(&self.plan.part, shape, raw) {
            Ok(stored) => (stored, raw.len() as u64),
            Err(_) => {
                let reason = format!("the body ends with {} bytes that are no whole tokens", raw.len());
                return Err(Error::InvalidField { field: "body".to_owned(), reason });
            }
        };
        raw.clear();
        self.place(length, &stored).await
    }

    /// Once the first piece is whole: tail and piece become one block, plane by plane.
    async fn merge_piece(&mut self) -> Result<(), Error> {
        let Some(planes) = self.plan.planes else { return Ok(()) };
        let whole =
            |merge: &mut Merge| merge.piece.len() == merge.piece_tokens * planes.token_bytes() as usize;
        let Some(merge) = self.merge.take_if(whole) else { return Ok(()) };
        let token = planes.plane_bytes_per_token as usize;
        let (old, new) = (merge.tail_tokens * token, merge.piece_tokens * token);
        let bytes = merge.tail.bytes(&self.owner).map_err(|error| Error::Internal(error.to_string()))?;
        for plane in 0..planes.planes as usize {
            self.fill(&bytes[plane * old..][..old]).await?;
            self.fill(&merge.piece[plane * new..][..new]).await?;
        }
        Ok(())
    }

    /// Appends to the block that is being filled, sealing each that is full.
    async fn fill(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        if self.lossy.is_some() {
            return self.narrow(bytes).await;
        }
        while !bytes.is_empty() {
            if self.filling.is_none() {
                if self.ready.is_empty() {
                    self.reserve(self.plan.block_bytes).await?;
                }
                self.filling = self.ready.pop().map(|block| (block, BlockHasher::default()));
            }
            let Some((block, hasher)) = &mut self.filling else {
                return Err(Error::Internal("a reservation gave no block".to_owned()));
            };
            let room = block.capacity().min(self.plan.block_bytes as usize) - block.written();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            // In steps that stay in the first-level cache between the copy and the hash.
            for step in now.chunks(4 * keepwarm_memory::CHUNK_BYTES) {
                let at = block.written();
                block.write(at, step).map_err(|error| Error::Internal(error.to_string()))?;
                hasher.update(&block.bytes()[at..]);
            }
            bytes = later;
            if block.written() as u64 == self.plan.block_bytes {
                self.seal();
            }
        }
        Ok(())
    }

    fn seal(&mut self) {
        if let Some((block, hasher)) = self.filling.take() {
            self.sealed.push(block.seal_hashed(hasher.finish()));
        }
    }

    /// Ends the body: checks length and digest, then commits or stages.
    ///
    /// Cancel safe up to the send to the shard; after it the write may go through without its caller.
    ///
    /// # Errors
    /// [`Error`]; definite unless it is `outcome_unknown`.
    //= GUARANTEES.md#G2
    pub async fn finish(mut self) -> Result<WriteDone, Error> {
        let short = |expected: Bytes, got| {
            Error::BodyLength(format!("the body ended after {got} of {} bytes", expected.0))
        };
        if let Some(expected) = self.request.body.filter(|body| body.0 != self.received) {
            return Err(short(expected, self.received));
        }
        if let Some(exact) = self.plan.exact.filter(|exact| exact.0 != self.received) {
            let reason = format!("a snapshot of {} bytes was given {} bytes", exact.0, self.received);
            return Err(Error::InvalidField { field: "body".to_owned(), reason });
        }
        let whole_part = self.request.mode == WriteMode::Replace
            || self.plan.base.0 + u64::from(self.plan.tail_bytes) == 0;
        let digest = match std::mem::replace(&mut self.digest, Hasher::None) {
            Hasher::None => None,
            Hasher::Xxh3(hasher, expected) => {
                if hasher.finish_128() != expected {
                    return Err(Error::DigestMismatch { algorithm: "xxh3-128" });
                }
                whole_part.then(|| BlockChecksum::from_u128(expected))
            }
            Hasher::Sha256(hasher, expected) => {
                if hasher.finalize().as_slice() != expected {
                    return Err(Error::DigestMismatch { algorithm: "sha-256" });
                }
                None
            }
        };
        self.round().await?;
        self.seal();
        let blocks: Vec<_> = self.sealed.iter().map(block_ref).collect();
        let write = Write {
            part: self.request.part.clone(),
            birth: self.plan.birth,
            tail: self.plan.tail.map(|tail| tail.instance),
            mode: self.request.mode,
            precondition: self.request.precondition,
            txn: self.request.txn,
            first_block: self.plan.first_block,
            length: Bytes(self.plan.base.0 + u64::from(self.plan.tail_bytes) + self.received),
            digest,
            asked: asked(&self.request, &blocks),
            blocks,
        };
        let sealed = std::mem::take(&mut self.sealed);
        let answered = self.handle.ask(&self.key, Verb::Write(write), sealed, self.permit.take()).await?;
        match *answered.answer {
            Answer::Written(written) => {
                self.handle.metrics().moved("client", "pinned", Bytes(self.received));
                let durability = self.handle.written_durability(&written.manifest);
                Ok(WriteDone::Committed(written, durability))
            }
            Answer::Staged(staged) => Ok(WriteDone::Staged(staged)),
            _ => Err(Error::Internal("not a write's answer".to_owned())),
        }
    }
}

/// A block as a manifest names it.
pub(crate) fn block_ref(block: &Block) -> BlockRef {
    let length = u32::try_from(block.length()).expect("a block has at most 64 MiB");
    BlockRef { instance: block.instance(), checksum: block.checksum(), length }
}

/// What stands for the write's content under its id.
fn asked(request: &WriteRequest, blocks: &[BlockRef]) -> u64 {
    let mut bytes = request.part.clone().into_bytes();
    match request.mode {
        WriteMode::Append { offset } => bytes.extend(offset.to_le_bytes()),
        WriteMode::Replace => bytes.push(0xff),
    }
    for block in blocks {
        bytes.extend(block.checksum.as_u128().to_le_bytes());
        bytes.extend(block.length.to_le_bytes());
    }
    XxHash3_64::oneshot(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_share_few_size_classes() {
        assert_eq!(size_class(1, 1 << 20), Bytes(4096));
        assert_eq!(size_class(5000, 1 << 20), Bytes(8192));
        assert_eq!(size_class(300_000, 368_640), Bytes(368_640));
        assert_eq!(size_class(368_640, 368_640), Bytes(368_640));
        assert_eq!(size_class(10, 100), Bytes(100));
    }
}

//! Archives: a whole session in one self-describing stream.
//!
//! `KWARC1\n`, the header's length (4 bytes, little endian), the header (JSON: layout, lengths, labels,
//! transcript, each block's length and checksum), every block's bytes in order, then XXH3-128 (16 bytes, big
//! endian) over all that came before. Reading checks each block against the header as it arrives.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes as Buffer;
use futures::{Stream, StreamExt};
use keepwarm_core::session::{
    Form, Fp8, Labels, Layout, Message, Number, Order, Part, Planes, Protect, TranscriptDelta,
};
use keepwarm_core::shard::{Commit, Precondition, Refusal, WriteMode};
use keepwarm_memory::BlockHasher;
use keepwarm_types::{Bytes, Millis, SessionId, SessionKey, TenantName, Tokens, TxnId};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;
use uuid::Uuid;

use crate::error::Error;
use crate::handle::{CreateRequest, Handle, Selection, SessionInfo, WriteDone, WriteRequest};
use crate::read::Chunks;
use crate::write::WriteStart;

const MAGIC: &[u8; 7] = b"KWARC1\n";
/// Longest header: the transcript of a session of some million tokens.
const HEADER_BYTES_MAX: usize = 64 << 20;
const TRAILER: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    id: String,
    model: String,
    fingerprint: String,
    layout_hash: String,
    parts: Vec<PartHeader>,
    protect_ms: Option<u64>,
    ttl_ms: Option<u64>,
    labels: Labels,
    revision: u64,
    length_tokens: u64,
    tokens: Vec<u32>,
    messages: Vec<MessageHeader>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageHeader {
    role: String,
    content: String,
    tokens_end: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartHeader {
    name: String,
    /// `paged`, `window`, `snapshot` or `bytes`.
    form: String,
    /// Tokens per block, planes, plane bytes per token, window tokens; or one size.
    numbers: Vec<u64>,
    plane_order: bool,
    /// What the numbers are that cold tiers, and this archive, have as FP8: `f32`, `f16` or `bf16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fp8_from: Option<String>,
    /// Length and checksum of each block.
    blocks: Vec<(u32, String)>,
}

/// An archive on its way out.
pub struct Archive {
    head: Option<Buffer>,
    parts: VecDeque<Chunks>,
    hasher: Option<Box<XxHash3_128>>,
    length: u64,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Archive({} bytes)", self.length)
    }
}

impl Archive {
    /// Bytes of the whole archive.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }
}

impl Iterator for Archive {
    type Item = Result<Buffer, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let hasher = self.hasher.as_mut()?;
        if let Some(head) = self.head.take() {
            hasher.write(&head);
            return Some(Ok(head));
        }
        while let Some(part) = self.parts.front_mut() {
            match part.next() {
                Some(Ok(piece)) => {
                    hasher.write(&piece);
                    return Some(Ok(piece));
                }
                Some(Err(error)) => {
                    self.hasher = None;
                    return Some(Err(error));
                }
                None => drop(self.parts.pop_front()),
            }
        }
        let hasher = self.hasher.take()?;
        Some(Ok(Buffer::copy_from_slice(&hasher.finish_128().to_be_bytes())))
    }
}

fn damaged(what: impl Into<String>) -> Error {
    Error::Archive(what.into())
}

fn part_header(part: &Part, state: &keepwarm_core::session::PartState) -> PartHeader {
    let geometry = |planes: &Planes| {
        vec![planes.tokens_per_block.into(), planes.planes.into(), planes.plane_bytes_per_token.into()]
    };
    let numbers = match &part.form {
        Form::Paged(planes) => geometry(planes),
        Form::Window { planes, window_tokens } => [geometry(planes), vec![(*window_tokens).into()]].concat(),
        Form::Snapshot { bytes } => vec![*bytes],
        Form::Bytes { block_bytes } => vec![*block_bytes],
    };
    PartHeader {
        name: part.name.to_string(),
        form: part.form.word().to_owned(),
        numbers,
        plane_order: part.form.planes().is_some_and(|planes| planes.order == Order::Plane),
        fp8_from: part.cold.map(|Fp8 { from }| from.word().to_owned()),
        blocks: state.blocks.iter().map(|block| (block.length, block.checksum.to_string())).collect(),
    }
}

fn part_from(header: &PartHeader) -> Result<Part, Error> {
    let small = |n: u64| u32::try_from(n).map_err(|_| damaged("a layout's number is too large"));
    let order = if header.plane_order { Order::Plane } else { Order::Token };
    let form = match (header.form.as_str(), header.numbers.as_slice()) {
        ("paged", [a, b, c]) => Form::Paged(Planes {
            tokens_per_block: small(*a)?,
            planes: small(*b)?,
            plane_bytes_per_token: small(*c)?,
            order,
        }),
        ("window", [a, b, c, d]) => {
            let planes = Planes {
                tokens_per_block: small(*a)?,
                planes: small(*b)?,
                plane_bytes_per_token: small(*c)?,
                order,
            };
            Form::Window { planes, window_tokens: small(*d)? }
        }
        ("snapshot", [bytes]) => Form::Snapshot { bytes: *bytes },
        ("bytes", [bytes]) => Form::Bytes { block_bytes: *bytes },
        (form, _) => return Err(damaged(format!("'{form}' is no form of a part"))),
    };
    let name = header.name.parse().map_err(|error| damaged(format!("{error}")))?;
    let number = |word: &String| {
        let number = Number::ALL.into_iter().find(|number| number.word() == word);
        number.map(|from| Fp8 { from }).ok_or_else(|| damaged(format!("'{word}' is no kind of number")))
    };
    let cold = header.fp8_from.as_ref().map(number).transpose()?;
    Ok(Part { name, form, cold })
}

/// Begins an archive of a session's committed revision.
///
/// # Errors
/// [`Error`]; a cold session has no bytes to archive.
pub async fn export(handle: &Handle, key: &SessionKey) -> Result<Archive, Error> {
    let readers = handle.open_read_all(key).await?;
    let (_, transcript) = handle.transcript(key).await?;
    let manifest = readers
        .first()
        .map(|reader| Arc::clone(reader.manifest()))
        .ok_or_else(|| damaged("the session has no parts"))?;
    if manifest.parts.iter().any(|part| part.first_block > 0) {
        return Err(Error::Refused(Refusal::Conflict(
            "a session with a window that has moved cannot be archived".to_owned(),
        )));
    }
    let header = Header {
        id: key.id.to_string(),
        model: manifest.layout.model().to_owned(),
        fingerprint: manifest.layout.fingerprint().to_owned(),
        layout_hash: manifest.layout.hash().to_string(),
        parts: manifest
            .layout
            .parts()
            .iter()
            .zip(&manifest.parts)
            .map(|(part, state)| part_header(part, state))
            .collect(),
        protect_ms: if let Protect::For(duration) = manifest.protect { Some(duration.0) } else { None },
        ttl_ms: manifest.ttl.map(|ttl| ttl.0),
        labels: manifest.labels.clone(),
        revision: manifest.revision.0,
        length_tokens: manifest.length_tokens.0,
        tokens: transcript.tokens.into_iter().take(manifest.transcript_tokens.as_usize()).collect(),
        messages: transcript
            .messages
            .into_iter()
            .map(|message| MessageHeader {
                role: message.role,
                content: message.content,
                tokens_end: message.tokens_end.0,
            })
            .collect(),
    };
    let json = serde_json::to_vec(&header).map_err(|error| Error::Internal(error.to_string()))?;
    let length = u32::try_from(json.len()).ok().filter(|length| *length as usize <= HEADER_BYTES_MAX);
    let length = length.ok_or_else(|| damaged("the transcript is too long for an archive"))?;
    let mut head = Vec::with_capacity(MAGIC.len() + 4 + json.len());
    head.extend(MAGIC);
    head.extend(length.to_le_bytes());
    head.extend(json);
    let parts: VecDeque<_> = readers
        .into_iter()
        .map(|reader| reader.into_stored().select(Selection::default()))
        .collect::<Result<_, _>>()?;
    let bytes: u64 = parts.iter().map(Chunks::length).sum();
    let length = head.len() as u64 + bytes + TRAILER as u64;
    Ok(Archive { head: Some(head.into()), parts, hasher: Some(Box::default()), length })
}

/// Bytes that arrive in pieces, taken in the sizes that are needed.
struct Arriving<S> {
    stream: S,
    rest: Buffer,
    hasher: Box<XxHash3_128>,
}

impl<S: Stream<Item = Result<Buffer, Error>> + Unpin> Arriving<S> {
    /// Nothing may follow an archive.
    async fn ended(&mut self) -> Result<(), Error> {
        while self.rest.is_empty() {
            let Some(next) = self.stream.next().await else { return Ok(()) };
            self.rest = next?;
        }
        Err(damaged(format!("{} bytes or more follow its end", self.rest.len())))
    }

    /// The next bytes, at most `limit`; an error where the archive ends.
    async fn some(&mut self, limit: usize) -> Result<Buffer, Error> {
        while self.rest.is_empty() {
            self.rest = self.stream.next().await.ok_or_else(|| damaged("it ends too early"))??;
        }
        Ok(self.rest.split_to(limit.min(self.rest.len())))
    }

    async fn exactly(&mut self, count: usize, hashed: bool) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(count.min(1 << 20));
        while bytes.len() < count {
            let piece = self.some(count - bytes.len()).await?;
            if hashed {
                self.hasher.write(&piece);
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

/// Takes an archive as a new session of `tenant`, under its own id or another.
///
/// # Errors
/// [`Error::Archive`] or [`Error::Corrupt`] for a damaged archive: no session is left then.
pub async fn import<S>(
    handle: &Handle,
    tenant: &TenantName,
    id: Option<SessionId>,
    stream: S,
) -> Result<SessionInfo, Error>
where
    S: Stream<Item = Result<Buffer, Error>> + Unpin,
{
    let mut arriving = Arriving { stream, rest: Buffer::new(), hasher: Box::default() };
    let head = arriving.exactly(MAGIC.len() + 4, true).await?;
    let (magic, length) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(damaged("it does not begin with KWARC1"));
    }
    let length = u32::from_le_bytes(length.try_into().map_err(|_| damaged("it has no header"))?) as usize;
    if length > HEADER_BYTES_MAX {
        return Err(damaged(format!("its header says {length} bytes; at most {HEADER_BYTES_MAX} are taken")));
    }
    let json = arriving.exactly(length, true).await?;
    let header: Header =
        serde_json::from_slice(&json).map_err(|error| damaged(format!("its header: {error}")))?;
    let parts: Vec<Part> = header.parts.iter().map(part_from).collect::<Result<_, _>>()?;
    let layout =
        Layout::new(&header.model, &header.fingerprint, parts).map_err(|error| damaged(error.to_string()))?;
    if layout.hash().to_string() != header.layout_hash {
        return Err(damaged("its layout does not have its hash"));
    }
    let own: SessionId = header.id.parse().map_err(|error| damaged(format!("{error}")))?;
    let request = CreateRequest {
        id: Some(id.unwrap_or(own)),
        layout: Arc::new(layout),
        protect: header.protect_ms.map_or(Protect::Forever, |ms| Protect::For(Millis(ms))),
        ttl: header.ttl_ms.map(Millis),
        labels: header.labels.clone(),
        near: None,
    };
    let (info, new) = handle.create(tenant, request).await?;
    if !new {
        return Err(Error::Refused(Refusal::Conflict(
            "the session exists already: give another id".to_owned(),
        )));
    }
    let key = info.manifest.key.clone();
    match fill(handle, &key, &info.manifest.layout, &header, &mut arriving).await {
        Ok(()) => handle.get(&key).await,
        Err(error) => {
            handle.abandon(&key).await;
            Err(error)
        }
    }
}

/// Raw bytes of a part's blocks, all but the last of which must be full: a stored one is taken in one piece.
fn raw_length(kind: &Part, part: &PartHeader) -> Result<u64, Error> {
    let (full, last) = (kind.stored_block_bytes(), part.blocks.len().saturating_sub(1));
    let raw = |(at, (length, _)): (usize, &(u32, String))| {
        let length = u64::from(*length);
        let fits = kind.cold.is_none() || length == full || at == last && length > 0 && length < full;
        kind.raw_bytes(length).filter(|_| fits)
    };
    let length = part.blocks.iter().enumerate().map(raw).sum::<Option<u64>>();
    length.ok_or_else(|| damaged(format!("a block of part '{}' has a length that none can have", part.name)))
}

async fn fill<S>(
    handle: &Handle,
    key: &SessionKey,
    layout: &Layout,
    header: &Header,
    arriving: &mut Arriving<S>,
) -> Result<(), Error>
where
    S: Stream<Item = Result<Buffer, Error>> + Unpin,
{
    let txn = TxnId(Uuid::new_v4());
    let parts = header.parts.iter().zip(layout.parts());
    for (part, kind) in parts.filter(|(part, _)| !part.blocks.is_empty()) {
        let length = raw_length(kind, part)?;
        let request = WriteRequest {
            part: part.name.clone(),
            mode: WriteMode::Replace,
            precondition: Precondition::default(),
            txn: Some(txn),
            body: Some(Bytes(length)),
            digest: None,
        };
        let WriteStart::Sink(mut sink) = handle.open_write(key, request).await? else {
            return Err(Error::Internal("a fresh write was seen before".to_owned()));
        };
        for (number, (length, expected)) in part.blocks.iter().enumerate() {
            let mut hasher = BlockHasher::default();
            let mut left = *length as usize;
            let mut stored = Vec::new();
            while left > 0 {
                let piece = arriving.some(left).await?;
                left -= piece.len();
                hasher.update(&piece);
                arriving.hasher.write(&piece);
                match kind.cold {
                    None => sink.write(&piece).await?,
                    Some(_) => stored.extend_from_slice(&piece),
                }
            }
            let found = hasher.finish().to_string();
            if found != *expected {
                handle.metrics().checksum_failed("import");
                let detail = format!(
                    "block {number} of part '{}': expected checksum {expected}, found {found}",
                    part.name
                );
                return Err(Error::Corrupt { at: "import", detail });
            }
            if kind.cold.is_some() {
                sink.write_stored(&stored).await?;
            }
        }
        let WriteDone::Staged(_) = sink.finish().await? else {
            return Err(Error::Internal("a staged write was committed".to_owned()));
        };
    }
    let expected = arriving.hasher.finish_128().to_be_bytes();
    if arriving.exactly(TRAILER, false).await? != expected {
        handle.metrics().checksum_failed("import");
        return Err(Error::Corrupt {
            at: "import",
            detail: "the archive does not have its checksum".to_owned(),
        });
    }
    arriving.ended().await?;
    let messages = header.messages.iter().map(|message| Message {
        role: message.role.clone(),
        content: message.content.clone(),
        tokens_end: Tokens(message.tokens_end),
    });
    let spoken = !header.tokens.is_empty();
    let tokens = header.tokens.clone();
    let delta = TranscriptDelta { tokens, messages: messages.collect(), ..TranscriptDelta::default() };
    let staged = header.parts.iter().any(|part| !part.blocks.is_empty());
    if staged || spoken {
        let commit = Commit {
            txn,
            length_tokens: Tokens(header.length_tokens),
            transcript: spoken.then_some(delta),
            precondition: Precondition::default(),
            asked: 0,
        };
        handle.commit(key, commit).await?;
    }
    Ok(())
}

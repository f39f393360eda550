//! Transcripts on disk: token ids in chunks and messages one by one, so that a turn writes what is new.
//!
//! Keys are the session's, then the birth (8 bytes, big endian), then the chunk's or message's number
//! (4 bytes, big endian).

use keepwarm_core::session::{Message, TranscriptDelta};
use keepwarm_types::{Birth, SessionKey, ShardCount, Tokens};
use redb::{ReadableTable, Table};

use crate::disk::{BadValue, DiskMessage, decode_message, encode_message, key_bytes};
use crate::read::ReadError;

/// Tokens of a chunk: a turn rewrites at most one part-full chunk of 4 KiB.
const CHUNK_TOKENS: usize = 1024;

type Rows<'txn> = Table<'txn, &'static [u8], &'static [u8]>;

/// The tables of one transaction.
pub(crate) struct Pages<'a, 'txn> {
    pub(crate) tokens: &'a mut Rows<'txn>,
    pub(crate) messages: &'a mut Rows<'txn>,
    pub(crate) shards: ShardCount,
}

pub(crate) fn row(key: &SessionKey, shards: ShardCount, birth: Birth, number: u32) -> Vec<u8> {
    let mut bytes = key_bytes(key, shards);
    bytes.extend(birth.get().to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes
}

pub(crate) fn token_bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

pub(crate) fn tokens_from(bytes: &[u8]) -> Result<Vec<u32>, BadValue> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(BadValue("a chunk of tokens is cut short".to_owned()));
    }
    Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

fn chunk_number(tokens: usize) -> u32 {
    u32::try_from(tokens / CHUNK_TOKENS).expect("a transcript has fewer than 2^42 tokens")
}

/// All token ids of a life.
pub(crate) fn read_tokens<T>(
    table: &T,
    key: &SessionKey,
    shards: ShardCount,
    birth: Birth,
) -> Result<Vec<u32>, ReadError>
where
    T: ReadableTable<&'static [u8], &'static [u8]>,
{
    let (first, last) = (row(key, shards, birth, 0), row(key, shards, birth, u32::MAX));
    let mut tokens = Vec::new();
    for entry in table.range(first.as_slice()..=last.as_slice())? {
        tokens.extend(tokens_from(entry?.1.value())?);
    }
    Ok(tokens)
}

/// All messages of a life.
pub(crate) fn read_messages<T>(
    table: &T,
    key: &SessionKey,
    shards: ShardCount,
    birth: Birth,
) -> Result<Vec<Message>, ReadError>
where
    T: ReadableTable<&'static [u8], &'static [u8]>,
{
    let (first, last) = (row(key, shards, birth, 0), row(key, shards, birth, u32::MAX));
    let mut messages = Vec::new();
    for entry in table.range(first.as_slice()..=last.as_slice())? {
        let disk = decode_message(entry?.1.value())?;
        messages.push(Message {
            role: disk.role,
            content: disk.content,
            tokens_end: Tokens(disk.tokens_end),
        });
    }
    Ok(messages)
}

impl Pages<'_, '_> {
    /// Keeps a prefix and writes what follows it.
    pub(crate) fn apply(
        &mut self,
        key: &SessionKey,
        birth: Birth,
        delta: &TranscriptDelta,
    ) -> Result<(), ReadError> {
        self.write_tokens(key, birth, delta.keep_tokens, &delta.tokens)?;
        let (first, last) =
            (row(key, self.shards, birth, delta.keep_messages), row(key, self.shards, birth, u32::MAX));
        self.messages.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
        self.write_messages(key, birth, delta.keep_messages, &delta.messages)
    }

    /// Cuts to `tokens`; messages that end beyond go.
    pub(crate) fn cut(&mut self, key: &SessionKey, birth: Birth, tokens: Tokens) -> Result<(), ReadError> {
        self.write_tokens(key, birth, tokens, &[])?;
        let messages = read_messages(self.messages, key, self.shards, birth)?;
        let kept = messages.iter().take_while(|message| message.tokens_end <= tokens).count();
        let first = row(key, self.shards, birth, u32::try_from(kept).unwrap_or(u32::MAX));
        let last = row(key, self.shards, birth, u32::MAX);
        self.messages.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
        Ok(())
    }

    /// Begins a child's transcript as a prefix of its parent's.
    pub(crate) fn copy(
        &mut self,
        (parent, parent_birth): (&SessionKey, Birth),
        (child, child_birth): (&SessionKey, Birth),
        tokens: Tokens,
        messages: u32,
    ) -> Result<(), ReadError> {
        let mut ids = read_tokens(self.tokens, parent, self.shards, parent_birth)?;
        ids.truncate(tokens.as_usize());
        self.write_tokens(child, child_birth, Tokens::ZERO, &ids)?;
        let kept = read_messages(self.messages, parent, self.shards, parent_birth)?;
        let kept =
            kept.into_iter().take(messages as usize).take_while(|message| message.tokens_end <= tokens);
        self.write_messages(child, child_birth, 0, &kept.collect::<Vec<_>>())
    }

    /// Drops all of a life.
    pub(crate) fn remove(&mut self, key: &SessionKey, birth: Birth) -> Result<(), ReadError> {
        let (first, last) = (row(key, self.shards, birth, 0), row(key, self.shards, birth, u32::MAX));
        self.tokens.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
        self.messages.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
        Ok(())
    }

    fn write_tokens(
        &mut self,
        key: &SessionKey,
        birth: Birth,
        keep: Tokens,
        new: &[u32],
    ) -> Result<(), ReadError> {
        let keep = keep.as_usize();
        let first = chunk_number(keep);
        let head = row(key, self.shards, birth, first);
        let mut tail = match self.tokens.get(head.as_slice())? {
            Some(value) => tokens_from(value.value())?,
            None => Vec::new(),
        };
        tail.truncate(keep % CHUNK_TOKENS);
        let last = row(key, self.shards, birth, u32::MAX);
        self.tokens.retain_in(head.as_slice()..=last.as_slice(), |_, _| false)?;
        tail.extend_from_slice(new);
        for (offset, chunk) in tail.chunks(CHUNK_TOKENS).enumerate() {
            let number = first + u32::try_from(offset).expect("a transcript has fewer than 2^42 tokens");
            self.tokens
                .insert(row(key, self.shards, birth, number).as_slice(), token_bytes(chunk).as_slice())?;
        }
        Ok(())
    }

    fn write_messages(
        &mut self,
        key: &SessionKey,
        birth: Birth,
        first: u32,
        messages: &[Message],
    ) -> Result<(), ReadError> {
        for (number, message) in (first..).zip(messages) {
            let disk = DiskMessage {
                role: message.role.clone(),
                content: message.content.clone(),
                tokens_end: message.tokens_end.0,
            };
            self.messages
                .insert(row(key, self.shards, birth, number).as_slice(), encode_message(&disk).as_slice())?;
        }
        Ok(())
    }
}

//! Transcripts on the wire, and what a record does to one.

use keepwarm_core::session::{Message, TranscriptDelta};
use keepwarm_core::shard::TranscriptChange;
use keepwarm_types::Tokens;
use rkyv::{Archive, Serialize};

use crate::error::DecodeError;
use crate::identity::{WireKey, WireStamp, birth};
use crate::limits::{
    ROLE_BYTES_MAX, TRANSCRIPT_MESSAGES_MAX, TRANSCRIPT_TEXT_MAX, TRANSCRIPT_TOKENS_MAX, TooLong, counter,
    index, within,
};

#[derive(Archive, Serialize)]
pub(crate) struct WireDelta {
    keep_tokens: u64,
    keep_messages: u32,
    tokens: Vec<u32>,
    messages: Vec<WireMessageText>,
}

#[derive(Archive, Serialize)]
struct WireMessageText {
    role: String,
    content: String,
    tokens_end: u64,
}

#[derive(Archive, Serialize)]
pub(crate) enum WireChange {
    Keep,
    Delta(WireDelta),
    CutTokens(u64),
    CopyFrom { parent: WireKey, birth: u64, stamp: WireStamp, tokens: u64, messages: u32 },
}

/// Refuses a transcript with too many messages or too much text; takes roles and contents by length.
fn check_texts(lengths: impl ExactSizeIterator<Item = (usize, usize)>) -> Result<(), TooLong> {
    within("transcript.messages", lengths.len(), TRANSCRIPT_MESSAGES_MAX)?;
    let mut text = 0usize;
    for (role, content) in lengths {
        within("transcript.messages.role", role, ROLE_BYTES_MAX)?;
        text = text.saturating_add(content);
    }
    within("transcript.messages.content", text, TRANSCRIPT_TEXT_MAX)
}

impl WireDelta {
    pub(crate) fn new(delta: &TranscriptDelta) -> Result<Self, TooLong> {
        within("transcript.tokens", delta.tokens.len(), TRANSCRIPT_TOKENS_MAX)?;
        check_texts(delta.messages.iter().map(|message| (message.role.len(), message.content.len())))?;
        let message = |message: &Message| WireMessageText {
            role: message.role.clone(),
            content: message.content.clone(),
            tokens_end: message.tokens_end.0,
        };
        Ok(Self {
            keep_tokens: counter("transcript.keep_tokens", delta.keep_tokens.0)?,
            keep_messages: index("transcript.keep_messages", delta.keep_messages)?,
            tokens: delta.tokens.clone(),
            messages: delta.messages.iter().map(message).collect(),
        })
    }

    /// About how many bytes it takes in an archive.
    pub(crate) fn size_hint(delta: &TranscriptDelta) -> usize {
        let texts = |message: &Message| 32 + message.role.len() + message.content.len();
        64 + 4 * delta.tokens.len() + delta.messages.iter().map(texts).sum::<usize>()
    }
}

impl ArchivedWireDelta {
    pub(crate) fn read(&self) -> Result<TranscriptDelta, DecodeError> {
        within("transcript.tokens", self.tokens.len(), TRANSCRIPT_TOKENS_MAX)?;
        check_texts(self.messages.iter().map(|message| (message.role.len(), message.content.len())))?;
        let message = |message: &ArchivedWireMessageText| -> Result<_, DecodeError> {
            let tokens_end = counter("transcript.messages.tokens_end", message.tokens_end.to_native())?;
            Ok(Message {
                role: message.role.as_str().to_owned(),
                content: message.content.as_str().to_owned(),
                tokens_end: Tokens(tokens_end),
            })
        };
        Ok(TranscriptDelta {
            keep_tokens: Tokens(counter("transcript.keep_tokens", self.keep_tokens.to_native())?),
            keep_messages: index("transcript.keep_messages", self.keep_messages.to_native())?,
            tokens: self.tokens.iter().map(|token| token.to_native()).collect(),
            messages: self.messages.iter().map(message).collect::<Result<_, _>>()?,
        })
    }
}

impl WireChange {
    pub(crate) fn new(change: &TranscriptChange) -> Result<Self, TooLong> {
        Ok(match change {
            TranscriptChange::Keep => Self::Keep,
            TranscriptChange::Delta(delta) => Self::Delta(WireDelta::new(delta)?),
            TranscriptChange::CutTokens(tokens) => {
                Self::CutTokens(counter("transcript.cut_tokens", tokens.0)?)
            }
            TranscriptChange::CopyFrom { parent, birth, stamp, tokens, messages } => Self::CopyFrom {
                parent: parent.into(),
                birth: birth.get(),
                stamp: (*stamp).into(),
                tokens: counter("transcript.copy.tokens", tokens.0)?,
                messages: index("transcript.copy.messages", *messages)?,
            },
        })
    }

    /// About how many bytes it takes in an archive.
    pub(crate) fn size_hint(change: &TranscriptChange) -> usize {
        match change {
            TranscriptChange::Delta(delta) => WireDelta::size_hint(delta),
            _ => 128,
        }
    }
}

impl ArchivedWireChange {
    pub(crate) fn read(&self) -> Result<TranscriptChange, DecodeError> {
        Ok(match self {
            Self::Keep => TranscriptChange::Keep,
            Self::Delta(delta) => TranscriptChange::Delta(delta.read()?),
            Self::CutTokens(tokens) => {
                TranscriptChange::CutTokens(Tokens(counter("transcript.cut_tokens", tokens.to_native())?))
            }
            Self::CopyFrom { parent, birth: number, stamp, tokens, messages } => TranscriptChange::CopyFrom {
                parent: parent.read()?,
                birth: birth("transcript.copy.birth", number.to_native())?,
                stamp: stamp.read()?,
                tokens: Tokens(counter("transcript.copy.tokens", tokens.to_native())?),
                messages: index("transcript.copy.messages", messages.to_native())?,
            },
        })
    }
}

//! The token ids and messages whose state a session holds; small, kept on disk, never in the core.

use keepwarm_types::Tokens;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Transcript length, in tokens, up to and including this message.
    pub tokens_end: Tokens,
}

/// A change of the transcript, persisted together with the manifest that counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TranscriptDelta {
    /// Tokens of the old transcript that stay; what follows them is replaced.
    pub keep_tokens: Tokens,
    /// Messages of the old transcript that stay.
    pub keep_messages: u32,
    /// Token ids from there on.
    pub tokens: Vec<u32>,
    /// Messages from there on.
    pub messages: Vec<Message>,
}

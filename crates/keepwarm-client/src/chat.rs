//! Chat completions: what is asked and what comes back.

use keepwarm_types::Source;
use serde::{Deserialize, Serialize};

use crate::etag::Etag;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl ChatMessage {
    /// A message of `role`.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What to continue, and how.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ChatRequest {
    /// Which model.
    pub model: String,
    /// The whole history; or, with [`ChatCall::if_match`], what follows the stored one.
    pub messages: Vec<ChatMessage>,
    /// Most tokens to answer with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus of the distribution that is sampled from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Makes sampling repeatable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Texts that end the answer, at most four.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
}

/// What tiers colder than a GPU keep of the state of a session that a call makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColdForm {
    /// The bytes as they are.
    Exact,
    /// FP8 E4M3 codes with a scale for each plane of a block: half the bytes of halves, and nearly the same numbers.
    Fp8,
}

impl ColdForm {
    /// The word that the header has.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fp8 => "fp8",
        }
    }
}

/// What binds a call to a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatCall {
    /// The session to continue, created on first use; without one nothing is kept.
    pub session: Option<String>,
    /// The messages follow exactly this revision.
    pub if_match: Option<Etag>,
    /// Sent again with the same key, the same turn comes back; a call that has one can be retried.
    pub idempotency_key: Option<String>,
    /// The cold form of the session, where the call makes it; one that is there already must have the same.
    pub cold: Option<ColdForm>,
}

/// Tokens of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer.
    pub completion_tokens: u64,
    /// Of both.
    pub total_tokens: u64,
    /// More about the prompt's.
    #[serde(default)]
    pub prompt_tokens_details: PromptDetails,
}

/// More about a prompt's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptDetails {
    /// Those that were not computed again.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// What is known before the first token: the answer's headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatHead {
    /// The session used; another than asked for where the history forked.
    pub session: Option<String>,
    /// Where its state was.
    pub source: Option<Source>,
    /// After how many tokens the history left the stored one.
    pub diverged_at: Option<u64>,
}

/// What the last event says beside the OpenAI API's own members.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Extension {
    pub(crate) session: Option<String>,
    pub(crate) etag: Option<String>,
    pub(crate) source: Option<Source>,
    pub(crate) diverged_at: Option<u64>,
    pub(crate) ttft_ms: Option<f64>,
    pub(crate) uncached: bool,
}

/// What is known at the end.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatEnd {
    /// `stop` or `length`.
    pub finish_reason: String,
    /// Tokens.
    pub usage: Usage,
    /// The committed transcript; none without a session.
    pub etag: Option<Etag>,
    /// The session used.
    pub session: Option<String>,
    /// Where its state was.
    pub source: Option<Source>,
    /// The server's own time to first token, in milliseconds.
    pub ttft_ms: Option<f64>,
    /// The turn ran without room in the cache.
    pub uncached: bool,
}

/// A piece of a streamed answer.
#[derive(Debug, Clone, PartialEq)]
pub enum ChatPiece {
    /// More of the text.
    Text(String),
    /// The last piece.
    End(Box<ChatEnd>),
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatAnswer {
    /// The text.
    pub text: String,
    /// The rest.
    pub end: ChatEnd,
}

/// A model that can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// What changes the meaning of its state.
    #[serde(default)]
    pub fingerprint: String,
    /// Longest sequence, in tokens.
    #[serde(default)]
    pub context_length: u64,
    /// Bytes of state per token.
    #[serde(default)]
    pub kv_bytes_per_token: u64,
    /// Whether its weights are random, for want of real ones.
    #[serde(default)]
    pub random_weights: bool,
}

/// One JSON document of an answer, streamed or whole.
#[derive(Debug, Deserialize)]
pub(crate) struct Document {
    #[serde(default)]
    pub(crate) choices: Vec<Choice>,
    pub(crate) usage: Option<Usage>,
    pub(crate) keepwarm: Option<Extension>,
    /// A stream that fails after its head says so here.
    pub(crate) error: Option<ErrorMember>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Choice {
    #[serde(alias = "delta")]
    pub(crate) message: Option<Delta>,
    pub(crate) finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Delta {
    pub(crate) content: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ErrorMember {
    pub(crate) message: String,
}

impl Document {
    /// Takes over what this document says about the end.
    pub(crate) fn tell(&self, end: &mut ChatEnd) {
        if let Some(reason) = self.choices.iter().find_map(|choice| choice.finish_reason.clone()) {
            end.finish_reason = reason;
        }
        if let Some(usage) = self.usage {
            end.usage = usage;
        }
        if let Some(extension) = &self.keepwarm {
            end.etag = extension.etag.as_ref().and_then(|etag| etag.parse().ok());
            end.session.clone_from(&extension.session);
            end.source = extension.source;
            end.ttft_ms = extension.ttft_ms;
            end.uncached = extension.uncached;
        }
    }

    /// The text in this document.
    pub(crate) fn text(&self) -> Option<&str> {
        let content = self.choices.iter().find_map(|choice| choice.message.as_ref()?.content.as_deref());
        content.filter(|text| !text.is_empty())
    }
}

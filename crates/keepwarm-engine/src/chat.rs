//! What is asked of an executor, and what comes back: the boundary between the HTTP API and whatever runs
//! models. Nothing here knows HTTP.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use keepwarm_core::session::Etag;
use keepwarm_types::{SessionId, Source, TenantName, Tokens};
use tokio::sync::mpsc;

/// Events that an answer may be ahead of its reader; a reader that is further behind slows its sequence down.
pub const EVENTS_AHEAD: usize = 64;

/// A model that can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Its name in requests.
    pub name: String,
    /// What changes the meaning of its state.
    pub fingerprint: String,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Bytes of state per token.
    pub kv_bytes_per_token: u64,
    /// Whether its weights are random, for want of real ones.
    pub random: bool,
    /// When it was loaded, in seconds since the Unix epoch.
    pub loaded_at: u64,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, whole; or, with `if_match`, what follows the stored one.
    Messages(Vec<ChatMessage>),
    /// Plain text.
    Text(String),
}

/// The session that a call is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionRef {
    /// Its id; created on first use.
    pub id: SessionId,
    /// The messages follow exactly this revision.
    pub if_match: Option<Etag>,
    /// What cold tiers keep of it. Where this is not said a new session is exact, and one that is there stays what it is.
    pub cold: Option<Cold>,
}

/// What cold tiers keep of a session's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cold {
    /// All of it: what comes back is what went there.
    Exact,
    /// FP8 numbers, about half as many bytes: what comes back is near to what went there.
    Fp8,
}

impl Cold {
    /// The word that the API uses.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fp8 => "fp8",
        }
    }
}

/// A call.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// Who asks.
    pub tenant: TenantName,
    /// The session to continue; without one nothing is kept.
    pub session: Option<SessionRef>,
    /// Which model.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to answer with.
    pub max_tokens: Option<usize>,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus of the distribution that is sampled from.
    pub top_p: f32,
    /// Makes sampling repeatable.
    pub seed: Option<u64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Sent again with the same key, the same turn comes back.
    pub idempotency_key: Option<String>,
}

/// What is known before the first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// The session used; another than asked for where the history forked.
    pub session: Option<SessionId>,
    /// Where its state was.
    pub source: Source,
    /// Where the history left the stored one.
    pub diverged_at: Option<Tokens>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, those that were not computed again.
    pub cached_tokens: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model or a stop text ended it.
    Stop,
    /// `max_tokens` or the context's end did.
    Length,
}

impl FinishReason {
    /// The OpenAI API's word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What is known at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// The committed transcript; none for a call without a session, or one that could not be kept.
    pub etag: Option<Etag>,
    /// From the call's arrival to its first token.
    pub ttft: Duration,
    /// The turn ran without room in the cache.
    pub uncached: bool,
}

/// One event of an answer.
#[derive(Debug, Clone)]
pub enum ChatEvent {
    /// Comes first.
    Started(Started),
    /// More of the answer: whole UTF-8.
    Text(String),
    /// Comes last.
    Finished(Finished),
    /// Comes last instead.
    Failed(ChatError),
}

/// Why a call was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// No such model.
    #[error("there is no model '{name}'; there is: {known}")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The prompt and its answer do not fit the model's context.
    #[error("{tokens} tokens do not fit the model's context of {context}")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the model.
        context: usize,
    },
    /// A field of the call cannot be.
    #[error("{field}: {reason}")]
    InvalidField {
        /// Which.
        field: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// Too many calls wait, for the model or on this branch.
    #[error("too many calls wait: {0}")]
    Overloaded(&'static str),
    /// The session store refused.
    #[error(transparent)]
    Store(#[from] keepwarm_node::Error),
    /// The model failed.
    #[error("the model failed: {0}")]
    Model(String),
}

/// An answer under way; dropping it ends the sequence after its present step.
pub type ChatStream = mpsc::Receiver<ChatEvent>;

/// Whatever runs models.
pub trait ChatBackend: Send + Sync + std::fmt::Debug {
    /// The models that can be asked.
    fn models(&self) -> Vec<ModelInfo>;

    /// Begins an answer.
    fn chat(
        &self,
        request: ChatRequest,
    ) -> Pin<Box<dyn Future<Output = Result<ChatStream, ChatError>> + Send + '_>>;
}

/// A backend without models.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoModels;

impl ChatBackend for NoModels {
    fn models(&self) -> Vec<ModelInfo> {
        Vec::new()
    }

    fn chat(
        &self,
        request: ChatRequest,
    ) -> Pin<Box<dyn Future<Output = Result<ChatStream, ChatError>> + Send + '_>> {
        Box::pin(
            async move { Err(ChatError::UnknownModel { name: request.model, known: "none".to_owned() }) },
        )
    }
}

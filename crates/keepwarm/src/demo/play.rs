//! Playing conversations through the HTTP API, turn by turn.

use std::time::{Duration, Instant};

use keepwarm_client::{
    ChatCall, ChatEnd, ChatMessage, ChatPiece, ChatRequest, ChatStream, Client, ClientError,
};
use keepwarm_types::Source;
use uuid::Uuid;

use super::script::Conversation;
use crate::failure::Failure;

/// Tokens of an answer: enough for a sentence, few enough for three minutes on two cores.
pub(crate) const ANSWER_TOKENS: u32 = 24;

/// How often a turn is asked for: its node dies, the next one gives its session away, and twice that.
const ASKED_MAX: u32 = 5;
/// The pause between: a take-over has ended after four of them.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Whether an answer ended because its session has another owner now, or may have.
fn moves(error: &ClientError) -> bool {
    error.is_unavailable() || matches!(error, ClientError::BrokenOff(_))
}

/// A turn that was played.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub(crate) conversation: usize,
    pub(crate) source: Source,
    /// From sending the request to the first piece of text.
    pub(crate) ttft_ms: f64,
    pub(crate) cached_tokens: u64,
    pub(crate) uncached: bool,
    pub(crate) text: String,
    /// The session's whole transcript after it.
    pub(crate) tokens: Vec<u32>,
}

/// What a call answered, before its transcript is looked at.
pub(crate) struct Spoken {
    pub(crate) text: String,
    pub(crate) ttft_ms: f64,
    pub(crate) end: ChatEnd,
}

/// Conversations under way on a server.
#[derive(Debug, Clone)]
pub(crate) struct Player {
    client: Client,
    model: String,
    script: Vec<Conversation>,
    sessions: Vec<Uuid>,
    histories: Vec<Vec<ChatMessage>>,
}

/// A greedy call.
fn request(model: &str, messages: &[ChatMessage], max_tokens: u32) -> ChatRequest {
    ChatRequest {
        model: model.to_owned(),
        messages: messages.to_vec(),
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ..ChatRequest::default()
    }
}

pub(crate) fn binding(session: Option<Uuid>) -> ChatCall {
    // With a key, a call whose node died before it answered may be sent again.
    ChatCall {
        session: session.map(|id| id.to_string()),
        idempotency_key: session.map(|_| Uuid::new_v4().to_string()),
        ..ChatCall::default()
    }
}

/// Sends a history and takes the answer; `heard` is told of each piece.
pub(crate) async fn speak(
    client: &Client,
    model: &str,
    messages: &[ChatMessage],
    call: &ChatCall,
    max_tokens: u32,
    mut heard: impl FnMut(&str),
) -> Result<Spoken, ClientError> {
    let begun = Instant::now();
    let mut answer = client.chat_stream(&request(model, messages, max_tokens), call).await?;
    let mut spoken = Spoken { text: String::new(), ttft_ms: 0.0, end: ChatEnd::default() };
    while let Some(piece) = answer.next_piece().await? {
        if spoken.ttft_ms == 0.0 {
            spoken.ttft_ms = begun.elapsed().as_secs_f64() * 1000.0;
        }
        match piece {
            ChatPiece::Text(text) => {
                heard(&text);
                spoken.text.push_str(&text);
            }
            ChatPiece::End(end) => spoken.end = *end,
        }
    }
    Ok(spoken)
}

impl Player {
    /// `sessions` are the conversations' ids.
    pub(crate) fn new(client: Client, model: String, script: Vec<Conversation>, sessions: Vec<Uuid>) -> Self {
        let histories = vec![Vec::new(); script.len()];
        Self { client, model, script, sessions, histories }
    }

    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    pub(crate) fn sessions(&self) -> &[Uuid] {
        &self.sessions
    }

    /// What was said so far, by both sides.
    pub(crate) fn history(&self, conversation: usize) -> &[ChatMessage] {
        &self.histories[conversation]
    }

    /// The history together with what the user says next; none when all is said.
    pub(crate) fn upcoming(&self, conversation: usize) -> Option<Vec<ChatMessage>> {
        let said = self.histories[conversation].len() / 2;
        let next = self.script[conversation].messages.get(said)?;
        Some(self.histories[conversation].iter().cloned().chain([ChatMessage::new("user", next)]).collect())
    }

    /// Plays the next turn of a conversation and commits it to the history.
    pub(crate) async fn turn(
        &mut self,
        conversation: usize,
        heard: impl FnMut(&str),
    ) -> Result<Turn, Failure> {
        let messages =
            self.upcoming(conversation).ok_or_else(|| Failure::failed("nothing is left to say"))?;
        self.say(conversation, messages, heard).await
    }

    /// Begins the next turn and leaves it after some pieces of the answer, for the server is about to die.
    pub(crate) async fn begin(&self, conversation: usize, pieces: usize) -> Result<ChatStream, Failure> {
        let messages =
            self.upcoming(conversation).ok_or_else(|| Failure::failed("nothing is left to say"))?;
        let request = request(&self.model, &messages, ANSWER_TOKENS);
        let mut answer =
            self.client.chat_stream(&request, &binding(Some(self.sessions[conversation]))).await?;
        for _ in 0..pieces {
            if answer.next_piece().await?.is_none() {
                break;
            }
        }
        Ok(answer)
    }

    /// Says something that is not in the script.
    pub(crate) async fn add(&mut self, conversation: usize, text: &str) -> Result<Turn, Failure> {
        let history = self.histories[conversation].iter().cloned();
        let messages = history.chain([ChatMessage::new("user", text)]).collect();
        self.say(conversation, messages, |_| ()).await
    }

    async fn say(
        &mut self,
        conversation: usize,
        mut messages: Vec<ChatMessage>,
        mut heard: impl FnMut(&str),
    ) -> Result<Turn, Failure> {
        let session = self.sessions[conversation];
        let call = binding(Some(session));
        let (begun, mut asked) = (Instant::now(), 1);
        // A session may move while it answers: the answer breaks off, nothing is committed, and it is asked for again.
        let spoken = loop {
            let waited_ms = begun.elapsed().as_secs_f64() * 1000.0;
            match speak(&self.client, &self.model, &messages, &call, ANSWER_TOKENS, &mut heard).await {
                Ok(mut spoken) => {
                    spoken.ttft_ms += waited_ms;
                    break spoken;
                }
                Err(error) if asked < ASKED_MAX && moves(&error) => {
                    asked += 1;
                    tokio::time::sleep(ASK_AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let used = spoken.end.session.as_deref();
        if used.is_some_and(|used| used != session.to_string()) {
            let used = used.unwrap_or_default();
            return Err(Failure::failed(format!(
                "session {session} went on as {used}: its history was not recognised"
            )));
        }
        messages.push(ChatMessage::new("assistant", spoken.text.clone()));
        self.histories[conversation] = messages;
        let transcript = self.client.transcript(session).await?;
        Ok(Turn {
            conversation,
            source: spoken.end.source.unwrap_or(Source::None),
            ttft_ms: spoken.ttft_ms,
            cached_tokens: spoken.end.usage.prompt_tokens_details.cached_tokens,
            uncached: spoken.end.uncached,
            text: spoken.text,
            tokens: transcript.tokens,
        })
    }
}

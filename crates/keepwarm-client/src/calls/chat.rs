//! Chat completions, whole and streamed, and the models.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt};
use reqwest::Method;
use reqwest::header::HeaderMap;
use serde::{Deserialize, Serialize};

use crate::chat::{ChatAnswer, ChatCall, ChatEnd, ChatHead, ChatPiece, ChatRequest, Document, Model};
use crate::client::{Call, Client, next_chunk};
use crate::error::ClientError;
use crate::sse::{SseError, SseParser};

#[derive(Serialize)]
struct Body<'r> {
    #[serde(flatten)]
    request: &'r ChatRequest,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

impl Client {
    /// The models that can be asked.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn models(&self) -> Result<Vec<Model>, ClientError> {
        let models: Models = self.call(Method::GET, &["v1", "models"]).answer().await?;
        Ok(models.data)
    }

    /// Continues a conversation and waits for the whole answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn chat(&self, request: &ChatRequest, binding: &ChatCall) -> Result<ChatAnswer, ClientError> {
        let body = Body { request, stream: false, stream_options: None };
        let document: Document = self.chat_call(&body, binding)?.answer().await?;
        let mut end = ChatEnd::default();
        document.tell(&mut end);
        Ok(ChatAnswer { text: document.text().unwrap_or_default().to_owned(), end })
    }

    /// Continues a conversation and gives the answer piece by piece; dropping the stream ends it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn chat_stream(
        &self,
        request: &ChatRequest,
        binding: &ChatCall,
    ) -> Result<ChatStream, ClientError> {
        let options = StreamOptions { include_usage: true };
        let body = Body { request, stream: true, stream_options: Some(options) };
        let response = self.chat_call(&body, binding)?.send().await?;
        Ok(ChatStream {
            head: head(response.headers()),
            url: response.url().to_string(),
            chunks: response.bytes_stream().boxed(),
            parser: SseParser::default(),
            events: VecDeque::new(),
            end: ChatEnd::default(),
            done: false,
        })
    }

    fn chat_call(&self, body: &Body<'_>, binding: &ChatCall) -> Result<Call<'_>, ClientError> {
        let mut call = self.call(Method::POST, &["v1", "chat", "completions"]).json(body)?;
        if let Some(session) = &binding.session {
            call = call.header("x-session-id", session)?;
            if let Ok(id) = session.parse() {
                call = call.about(id);
            }
        }
        if let Some(cold) = binding.cold {
            call = call.header("keepwarm-cold", cold.word())?;
        }
        if let Some(etag) = binding.if_match {
            call = call.header("if-match", &etag.to_string())?;
        }
        if let Some(key) = &binding.idempotency_key {
            call = call.header("idempotency-key", key)?.repeatable();
        }
        Ok(call)
    }
}

fn head(headers: &HeaderMap) -> ChatHead {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    ChatHead {
        session: text("keepwarm-session").map(str::to_owned),
        source: text("keepwarm-source").and_then(|word| {
            keepwarm_types::Source::ALL.iter().copied().find(|source| source.word() == word)
        }),
        diverged_at: text("keepwarm-diverged-at").and_then(|at| at.parse().ok()),
    }
}

/// A streamed answer.
pub struct ChatStream {
    head: ChatHead,
    url: String,
    chunks: BoxStream<'static, reqwest::Result<Bytes>>,
    parser: SseParser,
    events: VecDeque<String>,
    end: ChatEnd,
    done: bool,
}

impl fmt::Debug for ChatStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatStream")
            .field("head", &self.head)
            .field("done", &self.done)
            .finish_non_exhaustive()
    }
}

impl ChatStream {
    /// What was known before the first token.
    #[must_use]
    pub const fn head(&self) -> &ChatHead {
        &self.head
    }

    /// The next piece; [`ChatPiece::End`] once, then none.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::BrokenOff`] where the server ended the answer with an error, or
    /// without a word.
    pub async fn next_piece(&mut self) -> Result<Option<ChatPiece>, ClientError> {
        while !self.done {
            if let Some(event) = self.events.pop_front() {
                if let Some(piece) = self.piece(&event)? {
                    return Ok(Some(piece));
                }
                continue;
            }
            let Some(chunk) = next_chunk(&self.url, &mut self.chunks).await? else {
                self.done = true;
                return Err(ClientError::BrokenOff("the connection ended before the answer did".to_owned()));
            };
            let events = self.parser.push(&chunk).map_err(|error| {
                self.strange(match error {
                    SseError::TooLong => "an event without an end".to_owned(),
                    SseError::NotUtf8 => "an event that is not UTF-8".to_owned(),
                })
            })?;
            self.events.extend(events);
        }
        Ok(None)
    }

    fn piece(&mut self, event: &str) -> Result<Option<ChatPiece>, ClientError> {
        if event == "[DONE]" {
            self.done = true;
            return Ok(Some(ChatPiece::End(Box::new(std::mem::take(&mut self.end)))));
        }
        let document: Document =
            serde_json::from_str(event).map_err(|error| self.strange(error.to_string()))?;
        if let Some(error) = document.error {
            self.done = true;
            return Err(ClientError::BrokenOff(error.message));
        }
        document.tell(&mut self.end);
        Ok(document.text().map(|text| ChatPiece::Text(text.to_owned())))
    }

    fn strange(&self, reason: String) -> ClientError {
        ClientError::Answer { url: self.url.clone(), reason }
    }

    /// The pieces as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<ChatPiece, ClientError>> + Send {
        stream::try_unfold(self, |mut answer| async move {
            Ok(answer.next_piece().await?.map(|piece| (piece, answer)))
        })
    }
}

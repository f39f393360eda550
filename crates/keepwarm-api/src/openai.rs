//! The OpenAI-compatible routes: chat completions, completions, models.

use std::convert::Infallible;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json as Answer;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use keepwarm_engine::chat::{
    ChatEvent, ChatMessage, ChatRequest, ChatStream, Cold, Finished, Prompt, SessionRef, Started,
};
use keepwarm_types::{SessionId, TenantName};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::auth::Caller;
use crate::extract::{Json, header_text, if_match, session_of};
use crate::problem::Problem;
use crate::routes::{ApiState, KEEP_ALIVE};

/// Headers that bind a call to a session, in the order in which they are looked for.
const SESSION_HEADERS: [&str; 3] = ["x-session-id", "x-dynamo-session-id", "x-claude-code-session-id"];
/// Says what cold tiers shall keep of the session that a call makes.
const COLD_HEADER: &str = "keepwarm-cold";
/// Most stop texts, as OpenAI's API has it.
const STOPS_MAX: usize = 4;

/// Text, or a list of text parts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Content {
    /// Plain.
    Text(String),
    /// Parts; only those of type `text` are taken.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ContentPart {
    r#type: String,
    text: Option<String>,
}

/// A message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    role: String,
    content: Content,
    #[serde(default)]
    #[expect(dead_code, reason = "part of the API; the model has no use for it")]
    name: Option<String>,
}

/// One text or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// Options of a streamed answer.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// What both kinds of call share.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChatDto {
    model: String,
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    n: Option<u32>,
    #[expect(dead_code, reason = "taken and ignored, as other servers do")]
    user: Option<String>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    #[expect(dead_code, reason = "taken and ignored, as other servers do")]
    metadata: Option<Value>,
    #[expect(dead_code, reason = "taken and ignored, as other servers do")]
    store: Option<bool>,
}

impl Content {
    fn text(self, at: usize) -> Result<String, Problem> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Parts(parts) => parts
                .into_iter()
                .map(|part| match (part.r#type.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => Err(Problem::field(
                        format!("messages[{at}].content"),
                        format!("parts of type '{kind}' are not taken"),
                    )),
                })
                .collect(),
        }
    }
}

impl ChatDto {
    fn request(self, caller: &Caller, headers: &HeaderMap, chat: bool) -> Result<ChatRequest, Problem> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(Problem::field("n", "only 1 is served"));
        }
        for (name, penalty) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            if penalty.is_some_and(|penalty| penalty != 0.0) {
                return Err(Problem::field(name, "penalties are not served: leave it out or send 0"));
            }
        }
        let within = |name: &str, value: Option<f32>, default: f32, max: f32| match value.unwrap_or(default) {
            value if (0.0..=max).contains(&value) => Ok(value),
            value => Err(Problem::field(name, format!("{value} is out of range: 0 to {max}"))),
        };
        let stop = match self.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text],
            Some(Stop::Many(texts)) => texts,
        };
        if stop.len() > STOPS_MAX || stop.iter().any(String::is_empty) {
            return Err(Problem::field("stop", format!("at most {STOPS_MAX} texts, none of them empty")));
        }
        let prompt = match (chat, self.messages, self.prompt) {
            (true, Some(messages), None) if !messages.is_empty() => Prompt::Messages(messages_of(messages)?),
            (true, _, _) => return Err(Problem::field("messages", "must be a list of at least one message")),
            (false, None, Some(prompt)) => Prompt::Text(prompt),
            (false, _, _) => return Err(Problem::field("prompt", "must be a text")),
        };
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        if max_tokens == Some(0) {
            return Err(Problem::field("max_tokens", "must be at least 1"));
        }
        Ok(ChatRequest {
            tenant: caller.tenant.clone(),
            session: session(headers, &caller.tenant)?,
            model: self.model,
            prompt,
            max_tokens,
            temperature: within("temperature", self.temperature, 1.0, 2.0)?,
            top_p: within("top_p", self.top_p, 1.0, 1.0)?,
            seed: self.seed.map(i64::cast_unsigned),
            stop,
            idempotency_key: header_text(headers, "idempotency-key")?.map(str::to_owned),
        })
    }
}

fn messages_of(messages: Vec<Message>) -> Result<Vec<ChatMessage>, Problem> {
    let message = |(at, message): (usize, Message)| {
        if !matches!(message.role.as_str(), "system" | "developer" | "user" | "assistant" | "tool") {
            return Err(Problem::field(
                format!("messages[{at}].role"),
                format!("'{}' is no role", message.role),
            ));
        }
        Ok(ChatMessage { role: message.role, content: message.content.text(at)? })
    };
    messages.into_iter().enumerate().map(message).collect()
}

/// The id of the session that the headers name.
pub(crate) fn named_session(headers: &HeaderMap, tenant: &TenantName) -> Result<Option<SessionId>, Problem> {
    for name in SESSION_HEADERS {
        if let Some(text) = header_text(headers, name)?.map(str::trim).filter(|text| !text.is_empty()) {
            return session_of(text, tenant).map(Some).map_err(|reason| Problem::field(name, reason));
        }
    }
    Ok(None)
}

/// The session that the headers name, and the revision that the call follows.
fn session(headers: &HeaderMap, tenant: &TenantName) -> Result<Option<SessionRef>, Problem> {
    if let Some(id) = named_session(headers, tenant)? {
        return Ok(Some(SessionRef { id, if_match: if_match(headers)?, cold: cold(headers)? }));
    }
    if headers.contains_key(COLD_HEADER) {
        return Err(Problem::field("Keepwarm-Cold", "needs X-Session-ID: it is said of that session"));
    }
    if headers.contains_key(header::IF_MATCH) {
        return Err(Problem::field("If-Match", "needs X-Session-ID: it names a revision of that session"));
    }
    Ok(None)
}

/// What cold tiers shall keep of the session.
fn cold(headers: &HeaderMap) -> Result<Option<Cold>, Problem> {
    let Some(text) = header_text(headers, COLD_HEADER)? else { return Ok(None) };
    let known = [Cold::Exact, Cold::Fp8].into_iter().find(|cold| cold.word() == text.trim());
    let unknown = || Problem::field("Keepwarm-Cold", format!("'{text}' is not known: say fp8 or exact"));
    known.map(Some).ok_or_else(unknown)
}

/// The models that can be asked.
#[utoipa::path(get, path = "/v1/models", tag = "openai",
    responses((status = 200, description = "As the OpenAI API"), (status = "default", description = "A problem document")))]
pub(crate) async fn models(State(state): State<ApiState>, _: Caller) -> Answer<Value> {
    let models = state.chat.models();
    let model = |model: &keepwarm_engine::chat::ModelInfo| {
        json!({
            "id": model.name, "object": "model", "created": model.loaded_at, "owned_by": "keepwarm",
            "context_length": model.context, "fingerprint": model.fingerprint,
            "kv_bytes_per_token": model.kv_bytes_per_token, "random_weights": model.random,
        })
    };
    Answer(json!({"object": "list", "data": models.iter().map(model).collect::<Vec<_>>()}))
}

/// Continue a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatDto,
    params(("Keepwarm-Cold" = Option<String>, Header, description = "`fp8` on the call that makes the session: cold tiers keep about half the bytes, and what comes back is near to what went there. `exact` is the default; another than the session's is 409")),
    responses((status = 200, description = "As the OpenAI API, streamed or not"), (status = "default", description = "A problem document")))]
pub(crate) async fn chat(
    State(state): State<ApiState>,
    caller: Caller,
    headers: HeaderMap,
    Json(body): Json<ChatDto>,
) -> Result<Response, Problem> {
    answer(&state, &caller, &headers, body, true).await
}

/// Continue a text.
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = ChatDto,
    params(("Keepwarm-Cold" = Option<String>, Header, description = "As for chat completions")),
    responses((status = 200, description = "As the OpenAI API, streamed or not"), (status = "default", description = "A problem document")))]
pub(crate) async fn complete(
    State(state): State<ApiState>,
    caller: Caller,
    headers: HeaderMap,
    Json(body): Json<ChatDto>,
) -> Result<Response, Problem> {
    answer(&state, &caller, &headers, body, false).await
}

async fn answer(
    state: &ApiState,
    caller: &Caller,
    headers: &HeaderMap,
    body: ChatDto,
    chat: bool,
) -> Result<Response, Problem> {
    let (stream, usage) =
        (body.stream, body.stream_options.as_ref().is_some_and(|options| options.include_usage));
    let model = body.model.clone();
    let request = body.request(caller, headers, chat)?;
    let mut events = state.chat.chat(request).await?;
    let started = match events.recv().await {
        Some(ChatEvent::Started(started)) => started,
        Some(ChatEvent::Failed(error)) => return Err(error.into()),
        _ => return Err(Problem::new("internal", "the executor ended without a word")),
    };
    let shape = Shape {
        id: format!("chatcmpl-{}", Uuid::now_v7().simple()),
        model,
        chat,
        created: unix_now(),
        started,
    };
    let mut response =
        if stream { shape.clone().streamed(events, usage) } else { shape.clone().whole(events).await? };
    shape.name(response.headers_mut());
    Ok(response)
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What every piece of one answer carries.
#[derive(Debug, Clone)]
struct Shape {
    id: String,
    model: String,
    chat: bool,
    created: u64,
    started: Started,
}

impl Shape {
    fn name(&self, headers: &mut HeaderMap) {
        let mut put = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        };
        if let Some(session) = self.started.session {
            put("keepwarm-session", session.to_string());
        }
        put("keepwarm-source", self.started.source.word().to_owned());
        if let Some(at) = self.started.diverged_at {
            put("keepwarm-diverged-at", at.to_string());
        }
    }

    fn usage(&self, finished: &Finished) -> Value {
        json!({
            "prompt_tokens": self.started.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
            "total_tokens": self.started.prompt_tokens + finished.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.started.cached_tokens},
        })
    }

    fn keepwarm(&self, finished: &Finished) -> Value {
        json!({
            "session": self.started.session.map(|id| id.to_string()),
            "etag": finished.etag.map(|etag| etag.to_string()),
            "source": self.started.source.word(),
            "diverged_at": self.started.diverged_at.map(|at| at.0),
            "ttft_ms": finished.ttft.as_secs_f64() * 1000.0,
            "uncached": finished.uncached,
        })
    }

    fn envelope(&self, object: &str, choice: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": [choice]})
    }

    async fn whole(self, mut events: ChatStream) -> Result<Response, Problem> {
        let mut text = String::new();
        let finished = loop {
            match events.recv().await {
                Some(ChatEvent::Text(piece)) => text.push_str(&piece),
                Some(ChatEvent::Finished(finished)) => break finished,
                Some(ChatEvent::Failed(error)) => return Err(error.into()),
                Some(ChatEvent::Started(_)) | None => {
                    return Err(Problem::new("internal", "the answer broke off"));
                }
            }
        };
        let reason = finished.reason.word();
        let (object, choice) = if self.chat {
            let message = json!({"role": "assistant", "content": text});
            ("chat.completion", json!({"index": 0, "message": message, "finish_reason": reason}))
        } else {
            ("text_completion", json!({"index": 0, "text": text, "finish_reason": reason}))
        };
        let mut body = self.envelope(object, choice);
        body["usage"] = self.usage(&finished);
        body["keepwarm"] = self.keepwarm(&finished);
        let mut response = Answer(body).into_response();
        if let Some(value) = finished.etag.and_then(|etag| HeaderValue::from_str(&format!("\"{etag}\"")).ok())
        {
            response.headers_mut().insert(header::ETAG, value);
        }
        Ok(response)
    }

    fn piece(&self, text: Option<&str>, reason: Option<&str>) -> Value {
        if self.chat {
            let delta = text.map_or_else(|| json!({}), |text| json!({"content": text}));
            self.envelope(
                "chat.completion.chunk",
                json!({"index": 0, "delta": delta, "finish_reason": reason}),
            )
        } else {
            self.envelope(
                "text_completion",
                json!({"index": 0, "text": text.unwrap_or_default(), "finish_reason": reason}),
            )
        }
    }

    fn streamed(self, events: ChatStream, usage: bool) -> Response {
        let mut first = self.piece(None, None);
        if self.chat {
            first["choices"][0]["delta"] = json!({"role": "assistant", "content": ""});
        }
        let rest =
            ReceiverStream::new(events).flat_map(move |event| futures::stream::iter(self.data(event, usage)));
        let data = futures::stream::iter([first.to_string()]).chain(rest);
        let data = data.map(|text| Ok::<_, Infallible>(Event::default().data(text)));
        Sse::new(data).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
    }

    /// The events of the stream that one event of the answer becomes.
    fn data(&self, event: ChatEvent, usage: bool) -> Vec<String> {
        match event {
            ChatEvent::Started(_) => Vec::new(),
            ChatEvent::Text(text) => vec![self.piece(Some(&text), None).to_string()],
            ChatEvent::Finished(finished) => {
                let mut last = self.piece(None, Some(finished.reason.word()));
                last["keepwarm"] = self.keepwarm(&finished);
                let mut data = vec![last.to_string()];
                if usage {
                    let mut sum = self.piece(None, None);
                    sum["choices"] = json!([]);
                    sum["usage"] = self.usage(&finished);
                    data.push(sum.to_string());
                }
                data.push("[DONE]".to_owned());
                data
            }
            ChatEvent::Failed(error) => {
                let problem = Problem::from(error);
                vec![problem.document(&crate::routes::request_id()).to_string(), "[DONE]".to_owned()]
            }
        }
    }
}

//! Sending requests: address, credential, deadline, and retries where they are safe.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
};
use reqwest::{Method, Response, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::body::PartBody;
use crate::error::{ClientError, Problem};
use crate::routes::Routes;

/// How long a call may take, retries included, where the builder does not say: a cold model may need tens
/// of seconds before its first token.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(120);
/// How long a node may take to begin its answer to a read where another could be asked: longer than a take-over, and
/// than the fetch of a session's bytes from another node commonly takes.
const PATIENCE_DEFAULT: Duration = Duration::from_secs(3);
/// How long a streamed answer may be silent. The server keeps streams alive every 15 s.
const STALL_MAX: Duration = Duration::from_secs(60);
/// Sendings of one call. With pauses of 50, 100, 200 and 400 ms that bridges most of a second, what a
/// change of owner takes; a longer `Retry-After` is honoured up to the deadline.
const ATTEMPTS_MAX: u32 = 5;
/// The first pause between two sendings; doubled each time.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// Longest error document that is read.
const PROBLEM_BYTES_MAX: usize = 64 << 10;
/// Longest JSON answer: a page of 1,000 sessions has about 2 MiB, a transcript of a million tokens 8 MiB.
const JSON_BYTES_MAX: usize = 64 << 20;
/// How long connecting may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a call waits for the shard map that it would be sent by; without it, it goes the old way.
const MAP_MAX: Duration = Duration::from_secs(2);
/// How long one node may take to tell it.
const MAP_TRY: Duration = Duration::from_millis(500);
/// On an answer about a session.
const OWNER: &str = "keepwarm-owner";
/// On one that another node than the asked one gave.
const RELAYED_BY: &str = "keepwarm-relayed-by";

/// A keepwarm cluster, by one of its nodes; cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    routes: Routes,
    token: Option<HeaderValue>,
    deadline: Duration,
    patience: Duration,
    attempts: u32,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("url", &self.url()).finish_non_exhaustive()
    }
}

/// Settings of a [`Client`].
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    url: String,
    seeds: Vec<String>,
    straight: bool,
    token: Option<String>,
    deadline: Duration,
    patience: Duration,
    attempts: u32,
}

impl ClientBuilder {
    /// The tenant's bearer token.
    #[must_use]
    pub fn token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// Another node of the cluster, to be asked where the first is not reached.
    #[must_use]
    pub fn seed(mut self, url: &str) -> Self {
        self.seeds.push(url.to_owned());
        self
    }

    /// Sends every call to the addresses that were given here, whoever owns the session: for a load balancer, or nodes whose
    /// own addresses this machine cannot reach.
    #[must_use]
    pub const fn fixed(mut self) -> Self {
        self.straight = false;
        self
    }

    /// How long a call may take in all; 120 s where this is not called.
    #[must_use]
    pub const fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long a node may take to begin its answer before another one that is known is asked, where asking twice is as
    /// asking once: reads. 3 s where this is not called. A node that is stopped takes connections and answers nothing.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sends every call once.
    #[must_use]
    pub const fn no_retries(mut self) -> Self {
        self.attempts = 1;
        self
    }

    /// The client; nothing is sent yet.
    ///
    /// # Errors
    /// [`ClientError::Usage`] for an address or a token that cannot be.
    pub fn build(self) -> Result<Client, ClientError> {
        let usage = |what: String| ClientError::Usage(what);
        let node = |text: &String| {
            let url: Url = text.parse().map_err(|error| usage(format!("'{text}' is not a URL: {error}")))?;
            if url.scheme() != "http" || url.cannot_be_a_base() {
                return Err(usage(format!("'{text}' is not an http:// URL of a node")));
            }
            Ok(url)
        };
        let seeds = [&self.url].into_iter().chain(&self.seeds).map(node).collect::<Result<Vec<_>, _>>()?;
        let token = self.token.map(|token| {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| usage("the token has characters that a header cannot carry".to_owned()))?;
            value.set_sensitive(true);
            Ok::<_, ClientError>(value)
        });
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true)
            .build()
            .map_err(|cause| ClientError::Transport { url: self.url.clone(), cause })?;
        let inner = Inner {
            http,
            routes: Routes::new(seeds, self.straight),
            token: token.transpose()?,
            deadline: self.deadline,
            patience: self.patience,
            attempts: self.attempts,
        };
        Ok(Client { inner: Arc::new(inner) })
    }
}

/// Whether a call may be sent again when nobody knows whether it was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Safety {
    /// Twice is as once: a read, or a write that carries its id.
    Repeatable,
    /// Only where the server says that it did nothing, or was never reached.
    Once,
}

/// Who can answer a call.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// Every node.
    Any,
    /// Every node, best the owner of that session.
    Session(Uuid),
    /// The node that the client was made for.
    Here,
}

enum Payload {
    None,
    Json(Bytes),
    Body(PartBody),
}

impl Payload {
    fn take(&mut self) -> Option<reqwest::Body> {
        match self {
            Self::None => Some(Bytes::new().into()),
            Self::Json(bytes) => Some(bytes.clone().into()),
            Self::Body(body) => body.take(),
        }
    }

    fn can_send(&self) -> bool {
        match self {
            Self::None | Self::Json(_) => true,
            Self::Body(body) => body.can_send(),
        }
    }
}

/// A call being put together.
pub(crate) struct Call<'c> {
    client: &'c Client,
    method: Method,
    path: Vec<String>,
    query: Vec<(String, String)>,
    target: Target,
    headers: HeaderMap,
    payload: Payload,
    safety: Safety,
    retries: bool,
}

impl Client {
    /// A client with the default settings; `url` as in `http://127.0.0.1:7000`.
    ///
    /// # Errors
    /// As [`ClientBuilder::build`].
    pub fn new(url: &str) -> Result<Self, ClientError> {
        Self::builder(url).build()
    }

    /// Settings to change.
    #[must_use]
    pub fn builder(url: &str) -> ClientBuilder {
        ClientBuilder {
            url: url.to_owned(),
            seeds: Vec::new(),
            straight: true,
            token: None,
            deadline: DEADLINE_DEFAULT,
            patience: PATIENCE_DEFAULT,
            attempts: ATTEMPTS_MAX,
        }
    }

    /// The address of the node that it was made for.
    #[must_use]
    pub fn url(&self) -> &str {
        self.inner.routes.base().as_str().trim_end_matches('/')
    }

    /// A call of `method` on a path; its segments are escaped.
    pub(crate) fn call(&self, method: Method, segments: &[&str]) -> Call<'_> {
        let safety = if method == Method::GET { Safety::Repeatable } else { Safety::Once };
        Call {
            client: self,
            method,
            path: segments.iter().map(|segment| (*segment).to_owned()).collect(),
            query: Vec::new(),
            target: Target::Any,
            headers: HeaderMap::new(),
            payload: Payload::None,
            safety,
            retries: true,
        }
    }
}

impl Call<'_> {
    pub(crate) fn query(mut self, name: &str, value: impl ToString) -> Self {
        self.query.push((name.to_owned(), value.to_string()));
        self
    }

    /// A call about that session: its owner is asked first, where that is known.
    pub(crate) fn about(mut self, session: Uuid) -> Self {
        self.target = Target::Session(session);
        self
    }

    /// A call about the node itself, which no other can answer.
    pub(crate) fn here(mut self) -> Self {
        self.target = Target::Here;
        self
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Result<Self, ClientError> {
        let value = HeaderValue::from_str(value)
            .map_err(|_| ClientError::Usage(format!("{name}: '{value}' cannot be a header's value")))?;
        self.headers.insert(HeaderName::from_static(name), value);
        Ok(self)
    }

    pub(crate) fn json(mut self, body: &impl Serialize) -> Result<Self, ClientError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| ClientError::Usage(format!("the request cannot be written as JSON: {error}")))?;
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.payload = Payload::Json(body.into());
        Ok(self)
    }

    pub(crate) fn body(mut self, kind: &'static str, body: PartBody) -> Self {
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(length) = body.length() {
            self.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        self.payload = Payload::Body(body);
        self
    }

    pub(crate) fn repeatable(mut self) -> Self {
        self.safety = Safety::Repeatable;
        self
    }

    /// Sends it once, whatever comes.
    pub(crate) fn single(mut self) -> Self {
        self.retries = false;
        self
    }

    /// Where it goes at a node.
    fn at(&self, node: &Url) -> Url {
        let mut url = node.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(&self.path);
        }
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        url
    }

    /// Sends it and reads its JSON answer.
    pub(crate) async fn answer<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        let deadline = Instant::now() + self.client.inner.deadline;
        let after = self.client.inner.deadline;
        let response = self.send().await?;
        let url = response.url().to_string();
        let body = within(deadline, after, &url, read(&url, response, JSON_BYTES_MAX)).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Answer { url, reason: error.to_string() })
    }

    /// Sends it, again where that is safe, and returns an answer of success whose body is still to be read.
    pub(crate) async fn send(mut self) -> Result<Response, ClientError> {
        let deadline = Instant::now() + self.client.inner.deadline;
        let routes = &self.client.inner.routes;
        if !matches!(self.target, Target::Here) && routes.is_due() {
            tokio::spawn(look_up(self.client.clone(), deadline));
        }
        let (mut attempt, mut failed) = (1, Vec::new());
        loop {
            let nodes = match self.target {
                Target::Here => vec![routes.base().clone()],
                Target::Any => routes.candidates(None),
                Target::Session(id) => routes.candidates(Some(id)),
            };
            let open: Vec<_> = nodes.iter().filter(|node| !failed.contains(*node)).collect();
            let node = open.first().copied().unwrap_or_else(|| {
                failed.clear();
                &nodes[0]
            });
            let until = if open.len() > 1 && self.may_lose_patience() && self.may_retry(attempt) {
                deadline.min(Instant::now() + self.client.inner.patience)
            } else {
                deadline
            };
            let error = match self.send_once(node, until).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let impatient = matches!(error, ClientError::Deadline { .. }) && Instant::now() < deadline;
            let pause =
                if impatient { Some(Duration::ZERO) } else { self.pause_before_retry(&error, attempt) };
            let Some(pause) = pause else { return Err(error) };
            if Instant::now() + pause >= deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            attempt += 1;
            if matches!(&error, ClientError::Refused(problem) if problem.status == 429) {
                continue;
            }
            failed.push(node.clone());
            routes.failed();
            if !matches!(self.target, Target::Here) && routes.is_due() {
                look_up(self.client.clone(), deadline).await;
            }
        }
    }

    async fn send_once(&mut self, node: &Url, deadline: Instant) -> Result<Response, ClientError> {
        let inner = &self.client.inner;
        let url = self.at(node);
        let body = self
            .payload
            .take()
            .ok_or_else(|| ClientError::Usage("a body that can be read once was sent already".to_owned()))?;
        let mut request = inner.http.request(self.method.clone(), url.clone()).headers(self.headers.clone());
        if !matches!(self.payload, Payload::None) {
            request = request.body(body);
        }
        if let Some(token) = &inner.token {
            request = request.header(AUTHORIZATION, token);
        }
        let url = url.as_str();
        let sent = async {
            let response = request.send().await;
            let response = response.map_err(|cause| ClientError::Transport {
                url: url.to_owned(),
                cause: cause.without_url(),
            })?;
            if response.headers().contains_key(OWNER) {
                inner.routes.answered(response.headers().contains_key(RELAYED_BY));
            }
            if response.status().is_success() {
                return Ok(response);
            }
            Err(refusal(url, response).await)
        };
        within(deadline, inner.deadline, url, sent).await
    }

    /// Whether the call may be given to another node while this one may still be at work on it: it only reads.
    fn may_lose_patience(&self) -> bool {
        self.method == Method::GET
    }

    fn may_retry(&self, attempt: u32) -> bool {
        self.retries && attempt < self.client.inner.attempts && self.payload.can_send()
    }

    /// How long to wait before the call is sent again; none where it must not be.
    fn pause_before_retry(&self, error: &ClientError, attempt: u32) -> Option<Duration> {
        if !self.may_retry(attempt) {
            return None;
        }
        let pause = jittered(PAUSE_FIRST * 2u32.pow(attempt - 1));
        match error {
            // Definite: not applied.
            ClientError::Refused(problem) if matches!(problem.status, 429 | 503) => {
                Some(problem.retry_after.unwrap_or(pause))
            }
            ClientError::Refused(problem) if problem.status == 504 && self.safety == Safety::Repeatable => {
                Some(pause)
            }
            ClientError::Transport { cause, .. }
                if cause.is_connect() || self.safety == Safety::Repeatable =>
            {
                Some(pause)
            }
            _ => None,
        }
    }
}

/// Asks for the shard map. Whatever comes of that, calls go on with what is known.
async fn look_up(client: Client, deadline: Instant) {
    let until = deadline.min(Instant::now() + MAP_MAX);
    for node in client.inner.routes.candidates(None) {
        let until = until.min(Instant::now() + MAP_TRY);
        let mut call = client.call(Method::GET, &["v1", "cluster", "shards"]);
        let Ok(response) = call.send_once(&node, until).await else { continue };
        let url = response.url().to_string();
        let body = within(until, MAP_MAX, &url, read(&url, response, JSON_BYTES_MAX)).await;
        if let Some(map) = body.ok().and_then(|body| serde_json::from_slice(&body).ok()) {
            client.inner.routes.learn(&map);
            return;
        }
    }
}

/// Between half of a pause and all of it, so that clients that failed together do not come again together.
fn jittered(pause: Duration) -> Duration {
    let random = Uuid::new_v4().as_u128() as u32;
    pause.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

async fn within<T>(
    deadline: Instant,
    after: Duration,
    url: &str,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    match tokio::time::timeout_at(deadline.into(), work).await {
        Ok(done) => done,
        Err(_) => Err(ClientError::Deadline { url: url.to_owned(), after }),
    }
}

async fn refusal(url: &str, response: Response) -> ClientError {
    let status = response.status().as_u16();
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let body = read(url, response, PROBLEM_BYTES_MAX).await.unwrap_or_default();
    ClientError::Refused(Box::new(Problem::from_answer(status, &body, seconds.map(Duration::from_secs))))
}

/// All of a body, up to a limit.
pub(crate) async fn read(url: &str, response: Response, limit: usize) -> Result<Bytes, ClientError> {
    let mut chunks = response.bytes_stream();
    let mut all = BytesMut::new();
    while let Some(chunk) = next_chunk(url, &mut chunks).await? {
        if all.len() + chunk.len() > limit {
            let reason = format!("longer than {limit} bytes");
            return Err(ClientError::Answer { url: url.to_owned(), reason });
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all.freeze())
}

/// The next chunk of a body; none at its end.
pub(crate) async fn next_chunk(
    url: &str,
    chunks: &mut (impl futures::Stream<Item = reqwest::Result<Bytes>> + Unpin),
) -> Result<Option<Bytes>, ClientError> {
    match tokio::time::timeout(STALL_MAX, chunks.next()).await {
        Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
        Ok(Some(Err(cause))) => {
            Err(ClientError::Transport { url: url.to_owned(), cause: cause.without_url() })
        }
        Ok(None) => Ok(None),
        Err(_) => Err(ClientError::Stalled { url: url.to_owned(), after: STALL_MAX }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_are_refused_before_anything_is_sent() {
        for bad in ["", "127.0.0.1:7000", "ftp://x", "https://x"] {
            assert!(matches!(Client::new(bad), Err(ClientError::Usage(_))), "{bad}");
        }
        let client = Client::new("http://127.0.0.1:7000/").unwrap();
        assert_eq!(client.url(), "http://127.0.0.1:7000");
        let call = client.call(Method::GET, &["v1", "sessions", "a/b"]).query("label.user", "x&y");
        assert_eq!(
            call.at(client.inner.routes.base()).as_str(),
            "http://127.0.0.1:7000/v1/sessions/a%2Fb?label.user=x%26y"
        );
        assert!(matches!(
            Client::builder("http://x").token(Some("a\nb".to_owned())).build(),
            Err(ClientError::Usage(_))
        ));
    }

    #[test]
    fn pauses_are_between_half_and_all() {
        for _ in 0..100 {
            let pause = jittered(PAUSE_FIRST);
            assert!(pause >= PAUSE_FIRST / 2 && pause <= PAUSE_FIRST, "{pause:?}");
        }
    }
}

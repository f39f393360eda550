//! Any node answers any request: what belongs to another node's session is relayed there, once.
//!
//! The owner gets the client's own HTTP request over the peer link, with the tenant that the first node found, and
//! answers as if it had been asked itself. A request that came by relay is never relayed again. While a shard's owner
//! changes, a request that was not sent yet waits a moment for the next one, and so does one that only reads and has no
//! answer yet. One that was refused because its session's owner changes, before anything was done, goes on at the next one.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use keepwarm_node::{Handle, IncomingRelay, RelayedCaller, Whereabouts};
use keepwarm_types::{NodeName, SessionId};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tower::ServiceExt;

use crate::auth::Caller;
use crate::extract::{JSON_BYTES_MAX, collect, session_of};
use crate::openai::named_session;
use crate::problem::Problem;
use crate::routes::{ApiState, request_id};

/// How long a request waits for its session's next owner: a take-over is a fraction of a second.
const MOVING_WAIT: Duration = Duration::from_millis(1500);
/// How long the node that another one takes for the owner waits until it knows of it: news of the map reach nodes within
/// milliseconds of each other.
const BEHIND_WAIT: Duration = Duration::from_millis(500);
/// How long the owner may take to begin its answer: a write waits for its replicas up to five seconds, a completion
/// for its turn.
const HEAD_WAIT: Duration = Duration::from_secs(120);
/// Relayed requests at work at once.
const RELAYED_MAX: usize = 1024;
/// Bytes of an archive that surely have its id: magic, length, `{"id":"` and a UUID.
const ARCHIVE_HEAD: usize = 11 + 7 + 36;

/// Tells the node that relayed a request that it may go on at the session's next owner; clients never see it.
const MOVING: &str = "keepwarm-moving";

/// Where a request belongs.
enum Target {
    /// To no session, or to this node whatever it is.
    Here,
    /// To a session.
    Session(SessionId),
    /// To any node that owns shards: a session without an id. Best to this one, which is far better off than this node.
    Anywhere(Option<NodeName>),
}

/// A request's body: to be sent once, or kept to be sent again.
enum Payload {
    Once(Body),
    Kept(bytes::Bytes),
}

impl Payload {
    /// Kept, where the request may go on at another owner.
    async fn of(parts: &Parts, body: Body) -> Result<Self, Problem> {
        if goes_on(&parts.method, &parts.uri) {
            return collect(body, JSON_BYTES_MAX).await.map(Self::Kept);
        }
        Ok(Self::Once(body))
    }

    /// What is sent once is empty the second time.
    fn take(&mut self) -> Body {
        match self {
            Self::Once(body) => std::mem::take(body),
            Self::Kept(bytes) => Body::from(bytes.clone()),
        }
    }
}

/// A request on its way to its session's owner.
struct Journey<'s> {
    handle: &'s Handle,
    target: Target,
    payload: Payload,
    /// It has gone on to another owner once.
    went_on: bool,
    deadline: Instant,
}

impl Journey<'_> {
    /// Where it goes now.
    fn place(&self) -> Whereabouts {
        place(self.handle, &self.target)
    }

    /// Whether it goes on after an answer that says so: once, and where the session has another owner in time.
    async fn goes_on(&mut self, from: &Whereabouts, moving: bool) -> bool {
        if self.went_on || !moving || matches!(self.payload, Payload::Once(_)) {
            return false;
        }
        (self.went_on, self.deadline) = (true, Instant::now() + MOVING_WAIT);
        let leaves = until(self.handle, &self.target, |place| place != from);
        tokio::time::timeout_at(self.deadline, leaves).await.is_ok()
    }
}

/// Serves what other nodes relay, until their links end.
pub async fn serve_relayed(mut relays: mpsc::Receiver<IncomingRelay>, router: Router) {
    let limit = Arc::new(Semaphore::new(RELAYED_MAX));
    while let Some(relay) = relays.recv().await {
        let Ok(permit) = Arc::clone(&limit).acquire_owned().await else { return };
        let router = router.clone();
        tokio::spawn(async move {
            let IncomingRelay { caller, from, stream } = relay;
            let service = tower::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                let router = router.clone();
                let extensions = request.extensions_mut();
                extensions.insert(caller.clone());
                extensions.insert(ConnectInfo(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
                router.oneshot(request)
            });
            let service = hyper_util::service::TowerToHyperService::new(service);
            let connection = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, %from, "a relayed request ended early");
            }
            drop(permit);
        });
    }
}

/// Sends a request to its owner, if that is another node.
pub(crate) async fn to_owner(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    if !state.handle.in_cluster() {
        return next.run(request).await;
    }
    let was_relayed = request.extensions().get::<RelayedCaller>().is_some();
    let (mut parts, body) = request.into_parts();
    // Whoever may not ask is told so by the route.
    let caller = match Caller::from_request_parts(&mut parts, &state).await {
        Ok(caller) => caller,
        Err(_) => return next.run(Request::from_parts(parts, body)).await,
    };
    let (target, body) = match target(&parts.method, &parts.uri, &parts.headers, &caller, body).await {
        Ok(found) => found,
        Err(problem) => return problem.into_response(),
    };
    let mut payload = match Payload::of(&parts, body).await {
        Ok(payload) => payload,
        Err(problem) => return problem.into_response(),
    };
    if was_relayed {
        return at_owner(&state.handle, &target, Request::from_parts(parts, payload.take()), next).await;
    }
    let target = match target {
        Target::Anywhere(_) => Target::Anywhere(state.handle.home_for_new().await),
        target => target,
    };
    let deadline = Instant::now() + MOVING_WAIT;
    let mut journey = Journey { handle: &state.handle, target, payload, went_on: false, deadline };
    let relayed = RelayedCaller { tenant: caller.tenant, admin: caller.admin, request_id: request_id() };
    loop {
        let changed = state.handle.map_changes();
        let at = journey.place();
        let reason = match &at {
            Whereabouts::Here => {
                let request = Request::from_parts(parts.clone(), journey.payload.take());
                let response = next.clone().run(request).await;
                if journey.goes_on(&at, is_moving(&response)).await {
                    continue;
                }
                return response;
            }
            Whereabouts::Nobody => "no node owns the session's shard now".to_owned(),
            Whereabouts::At(node) => {
                if matches!(parts.method, Method::GET | Method::HEAD) {
                    // Asked twice it does no harm: what breaks off goes to the next owner.
                    let again = Request::from_parts(parts.clone(), Body::empty());
                    let answer = async {
                        let stream =
                            state.handle.relay(node, &relayed).await.map_err(|error| error.to_string())?;
                        forward(&state.handle, node, stream, again).await
                    };
                    tokio::select! {
                        answer = answer => match answer {
                            Ok(response) => return response,
                            Err(error) => error,
                        },
                        () = until(&state.handle, &journey.target, |place| *place != at) => continue,
                    }
                } else {
                    let opened = tokio::select! {
                        opened = state.handle.relay(node, &relayed) => opened,
                        () = until(&state.handle, &journey.target, |place| *place != at) => continue,
                    };
                    match opened {
                        Ok(stream) => {
                            let request = Request::from_parts(parts.clone(), journey.payload.take());
                            let answer = forward(&state.handle, node, stream, request).await;
                            let response = match answer {
                                Ok(response) => response,
                                Err(error) => {
                                    return Problem::new("outcome_unknown", error).into_response();
                                }
                            };
                            if journey.goes_on(&at, is_moving(&response)).await {
                                continue;
                            }
                            return response;
                        }
                        // Any other node will do.
                        Err(_) if matches!(journey.target, Target::Anywhere(Some(_))) => {
                            journey.target = Target::Anywhere(None);
                            continue;
                        }
                        Err(error) => error.to_string(),
                    }
                }
            }
        };
        // Nothing was sent: the next owner may take it.
        if tokio::time::timeout_at(journey.deadline, changed).await.is_err() {
            return Problem::from(keepwarm_node::Error::Unavailable {
                reason,
                retry_after: keepwarm_types::Millis(300),
            })
            .into_response();
        }
    }
}

/// Runs a request that another node has relayed to the owner, as it took this one for.
async fn at_owner(handle: &Handle, target: &Target, request: Request, next: Next) -> Response {
    let here = until(handle, target, |place| *place == Whereabouts::Here);
    // Who never learns that it is the owner says so as the shard does.
    let _ = tokio::time::timeout(BEHIND_WAIT, here).await;
    let mut response = next.run(request).await;
    if is_moving(&response) {
        response.headers_mut().insert(MOVING, HeaderValue::from_static("1"));
    }
    response
}

/// Whether a request goes on at its session's next owner: one that runs a session, which is what owners change for. Their bodies
/// are documents of [`JSON_BYTES_MAX`] at most.
fn goes_on(method: &Method, uri: &Uri) -> bool {
    let runs = |path: &str| {
        let verb = path.strip_prefix("/v1/sessions/").and_then(|path| path.split_once('/'));
        let turn = matches!(path, "/v1/chat/completions" | "/v1/completions");
        turn || verb.is_some_and(|(_, verb)| matches!(verb, "activate" | "migrate"))
    };
    method == Method::POST && runs(uri.path())
}

/// Marks another node's answer that had [`MOVING`].
#[derive(Debug, Clone, Copy)]
struct Moving;

/// Whether an answer, of this node or of another, says that nothing was done, for the session's owner changes.
fn is_moving(response: &Response) -> bool {
    let extensions = response.extensions();
    extensions.get::<Problem>().is_some_and(Problem::is_moving) || extensions.get::<Moving>().is_some()
}

/// Where a target is now.
fn place(handle: &Handle, target: &Target) -> Whereabouts {
    match target {
        Target::Here => Whereabouts::Here,
        Target::Session(id) => handle.whereabouts(*id),
        Target::Anywhere(Some(home)) => Whereabouts::At(home.clone()),
        Target::Anywhere(None) => handle.anywhere(),
    }
}

/// Waits until a target is at such a place; cancelled, nothing has happened.
async fn until(handle: &Handle, target: &Target, fits: impl Fn(&Whereabouts) -> bool) {
    loop {
        let changed = handle.map_changes();
        if fits(&place(handle, target)) {
            return;
        }
        changed.await;
    }
}

/// Where a request belongs; a body that had to be looked at comes back whole.
async fn target(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    caller: &Caller,
    body: Body,
) -> Result<(Target, Body), Problem> {
    let path = uri.path();
    if matches!(path, "/v1/chat/completions" | "/v1/completions") {
        let target = named_session(headers, &caller.tenant)?.map_or(Target::Anywhere(None), Target::Session);
        return Ok((target, body));
    }
    let Some(rest) = path.strip_prefix("/v1/sessions") else { return Ok((Target::Here, body)) };
    match rest.trim_start_matches('/').split('/').next().unwrap_or_default() {
        "" if method == Method::POST => {
            let bytes = collect(body, JSON_BYTES_MAX).await?;
            Ok((created(&bytes), Body::from(bytes)))
        }
        "" => Ok((Target::Here, body)),
        "import" => imported(uri, body).await,
        text => {
            let text = percent_decoded(text);
            // A wrong id is the route's to refuse.
            let target = session_of(&text, &caller.tenant).map_or(Target::Here, Target::Session);
            Ok((target, body))
        }
    }
}

/// A session to make: where its id lies, near another, or anywhere. What is no JSON is the route's to refuse.
fn created(bytes: &[u8]) -> Target {
    let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let id = |name: &str| value.get(name)?.as_str()?.parse().ok();
    id("id").or_else(|| id("near")).map_or(Target::Anywhere(None), Target::Session)
}

/// An archive: where the wanted id lies, or its own.
async fn imported(uri: &Uri, body: Body) -> Result<(Target, Body), Problem> {
    let wanted =
        uri.query().into_iter().flat_map(|query| query.split('&')).find_map(|pair| pair.strip_prefix("id="));
    if let Some(id) = wanted {
        return Ok((id.parse().map_or(Target::Here, Target::Session), body));
    }
    let mut stream = body.into_data_stream();
    let mut head = Vec::new();
    while head.len() < ARCHIVE_HEAD {
        match stream.next().await {
            Some(Ok(chunk)) => head.extend_from_slice(&chunk),
            Some(Err(error)) => {
                return Err(Problem::new("malformed_request", format!("the body broke off: {error}")));
            }
            None => break,
        }
    }
    let id = head.get(11..ARCHIVE_HEAD).and_then(|head| head.strip_prefix(br#"{"id":""#));
    let id: Option<SessionId> = id.and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
    let whole = futures::stream::once(async move { Ok(bytes::Bytes::from(head)) }).chain(stream);
    Ok((id.map_or(Target::Here, Target::Session), Body::from_stream(whole)))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let pair = || -> Option<u8> {
            let hex: String = rest.clone().take(2).map(char::from).collect();
            u8::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == 2)
        };
        match (byte, pair()) {
            (b'%', Some(decoded)) => {
                bytes.push(decoded);
                let _ = (rest.next(), rest.next());
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends the request and gives the owner's answer. From the first byte on the outcome of a change is what the owner
/// says, or unknown; the error says what broke.
//= GUARANTEES.md#G3
async fn forward(
    handle: &Handle,
    node: &NodeName,
    stream: keepwarm_node::RelayStream,
    mut request: Request,
) -> Result<Response, String> {
    let broke = |error: &dyn std::fmt::Display| {
        tracing::debug!(%node, %error, "a relayed request broke off");
        format!("node '{node}', which owns the session, went away")
    };
    if let Some(path) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = Uri::from(path);
    }
    let headers = request.headers_mut();
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::CONNECTION);
    headers.insert(header::HOST, HeaderValue::from_static("keepwarm"));
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = match handshake {
        Ok(opened) => opened,
        Err(error) => return Err(broke(&error)),
    };
    let driven = tokio::spawn(connection);
    let answer = tokio::time::timeout(HEAD_WAIT, sender.send_request(request)).await;
    let response = match answer {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return Err(broke(&error)),
        Err(_) => {
            driven.abort();
            return Err(broke(&format!("no answer within {} s", HEAD_WAIT.as_secs())));
        }
    };
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(header::CONNECTION);
    parts.headers.remove(header::TRANSFER_ENCODING);
    if parts.headers.remove(MOVING).is_some() {
        parts.extensions.insert(Moving);
    }
    if let Ok(value) = HeaderValue::from_str(node.as_str()) {
        parts.headers.insert("keepwarm-owner", value);
    }
    if let Ok(value) = HeaderValue::from_str(handle.name().as_str()) {
        parts.headers.insert("keepwarm-relayed-by", value);
    }
    handle.metrics().relayed();
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// Asks another node in a client's name; the answer's JSON, if it gave one.
pub(crate) async fn ask(
    state: &ApiState,
    node: &NodeName,
    caller: &Caller,
    method: Method,
    path: &str,
) -> Result<serde_json::Value, Problem> {
    let relayed =
        RelayedCaller { tenant: caller.tenant.clone(), admin: caller.admin, request_id: request_id() };
    let stream = state.handle.relay(node, &relayed).await?;
    let request = Request::builder().method(method).uri(path).body(Body::empty());
    let request = request.map_err(|error| Problem::new("internal", error.to_string()))?;
    let response = forward(&state.handle, node, stream, request).await;
    let response = response.map_err(|error| Problem::new("unavailable", error))?;
    let status = response.status();
    let bytes = collect(response.into_body(), JSON_BYTES_MAX).await?;
    let value: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| Problem::new("unavailable", format!("node '{node}' answered no JSON: {error}")))?;
    if status.is_success() {
        return Ok(value);
    }
    let detail = value.get("detail").and_then(|detail| detail.as_str()).unwrap_or("no reason given");
    Err(Problem::new("unavailable", format!("node '{node}' answered {status}: {detail}")))
}

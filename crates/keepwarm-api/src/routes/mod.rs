//! The routes: one table, from which the router and the OpenAPI document are made.

pub(crate) mod admin;
pub(crate) mod parts;
pub(crate) mod running;
pub(crate) mod sessions;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use futures::FutureExt;
use keepwarm_engine::chat::ChatBackend;
use keepwarm_node::Handle;
use tracing::Instrument;
use uuid::Uuid;

use crate::auth::Credentials;
use crate::openai;
use crate::openapi;
use crate::problem::Problem;

/// What every handler has.
#[derive(Debug, Clone)]
pub struct ApiState {
    /// The node.
    pub handle: Handle,
    /// What runs models.
    pub chat: Arc<dyn ChatBackend>,
    /// Who may ask.
    pub credentials: Arc<Credentials>,
}

tokio::task_local! {
    static REQUEST_ID: String;
}

/// The id of the request at work; a new one outside of any.
pub(crate) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_else(|_| Uuid::now_v7().to_string())
}

/// The routes that need no tenant: `/healthz`, `/readyz`, `/metrics`, `/openapi.json`, and all others.
pub fn router(state: ApiState) -> Router {
    let session = "/v1/sessions/{id}";
    let on = |verb: &str| format!("{session}/{verb}");
    Router::new()
        .route("/v1/sessions", post(sessions::create).get(sessions::list))
        .route("/v1/sessions/import", post(sessions::import))
        .route(session, get(sessions::show).delete(sessions::delete))
        .route(&on("parts/{part}"), patch(parts::append).put(parts::replace).get(parts::read))
        .route(&on("commit"), post(parts::commit))
        .route(&on("transcript"), get(sessions::transcript))
        .route(&on("match"), post(sessions::matching))
        .route(&on("checkpoint"), post(running::checkpoint))
        .route(&on("activate"), post(running::activate))
        .route(&on("renew"), post(running::renew))
        .route(&on("release"), post(running::release))
        .route(&on("prefetch"), post(running::prefetch))
        .route(&on("demote"), post(running::demote))
        .route(&on("truncate"), post(sessions::truncate))
        .route(&on("fork"), post(sessions::fork))
        .route(&on("migrate"), post(running::migrate))
        .route(&on("explain"), get(sessions::explain))
        .route(&on("export"), get(sessions::export))
        .route("/v1/tenants/{name}/purge", post(admin::purge))
        .route("/v1/cluster", get(admin::cluster))
        .route("/v1/cluster/shards", get(admin::shards))
        .route("/v1/gpus", get(admin::gpus))
        .route("/v1/nodes/{node}", get(admin::node))
        .route("/v1/events", get(admin::events))
        .route("/v1/models", get(openai::models))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::complete))
        .route("/healthz", get(admin::healthz))
        .route("/readyz", get(admin::readyz))
        .route("/metrics", get(admin::metrics))
        .route("/openapi.json", get(openapi::serve_document))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_route)
        // Bodies are bounded where they are read: JSON by its limit, parts by theirs.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(state.clone(), crate::relay::to_owner))
        .layer(middleware::from_fn_with_state(state.clone(), around))
        .layer(middleware::from_fn(crate::linger::linger))
        .with_state(state)
}

async fn unknown_route(request: Request) -> Problem {
    Problem::new("unknown_route", format!("there is no {}: see /openapi.json", request.uri().path()))
}

async fn method_not_allowed(method: Method, request: Request) -> Problem {
    Problem::new("method_not_allowed", format!("{} does not take {method}", request.uri().path()))
}

/// Around every request: an id, a span, a caught panic, a counted refusal.
async fn around(
    axum::extract::State(state): axum::extract::State<ApiState>,
    request: Request,
    next: Next,
) -> Response {
    let relayed = request.extensions().get::<keepwarm_node::RelayedCaller>();
    let id = relayed.map_or_else(|| Uuid::now_v7().to_string(), |relayed| relayed.request_id.clone());
    let span = tracing::debug_span!("request", %id, method = %request.method(), path = request.uri().path());
    let handled = REQUEST_ID.scope(id.clone(), async move {
        match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(_) => {
                tracing::error!("a handler panicked");
                Problem::new("internal", "an internal error; the log has more under this request_id")
                    .into_response()
            }
        }
    });
    let mut response = handled.instrument(span).await;
    if let Some(problem) = response.extensions().get::<Problem>() {
        state.handle.metrics().reject(problem.code());
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Names the node that owns what was answered.
pub(crate) fn owned(state: &ApiState, mut response: Response) -> Response {
    if let Ok(value) = HeaderValue::from_str(state.handle.name().as_str()) {
        response.headers_mut().insert("keepwarm-owner", value);
    }
    response
}

/// How long a server-sent stream may be silent before a comment keeps it alive.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(15);

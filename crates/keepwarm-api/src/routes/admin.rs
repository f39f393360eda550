//! What operators and probes ask.

use std::convert::Infallible;

use axum::Json as Answer;
use axum::extract::{Path, RawQuery, State};
use axum::http::{Extensions, HeaderValue, Method, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use keepwarm_core::registry::NodeStatus;
use keepwarm_node::RelayedCaller;
use keepwarm_types::TenantName;
use serde_json::{Value, json};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use super::{ApiState, KEEP_ALIVE};
use crate::auth::Caller;
use crate::dto::cluster;
use crate::dto::session::receipt;
use crate::problem::Problem;
use crate::serve::Stopping;

/// End each of a tenant's sessions.
#[utoipa::path(post, path = "/v1/tenants/{name}/purge", tag = "admin", params(("name" = String, Path)),
    responses((status = 200, description = "A receipt for each"), (status = "default", description = "A problem document")))]
pub(crate) async fn purge(
    State(state): State<ApiState>,
    caller: Caller,
    Path(name): Path<String>,
    extensions: Extensions,
) -> Result<Response, Problem> {
    caller.require_admin()?;
    let tenant: TenantName = name.parse().map_err(|error| Problem::field("name", error))?;
    let receipts = state.handle.purge(&tenant).await?;
    let mut receipts: Vec<_> = receipts.iter().map(|ended| json!(receipt(ended))).collect();
    if extensions.get::<RelayedCaller>().is_none() {
        // Each node ends the sessions that it owns.
        for node in state.handle.others() {
            let path = format!("/v1/tenants/{tenant}/purge");
            let theirs = crate::relay::ask(&state, &node, &caller, Method::POST, &path).await?;
            receipts.extend(theirs["receipts"].as_array().cloned().unwrap_or_default());
        }
    }
    Ok(Answer(json!({"receipts": receipts})).into_response())
}

/// The cluster, as this node sees it.
#[utoipa::path(get, path = "/v1/cluster", tag = "admin",
    responses((status = 200, description = "Nodes, shards, spec, leader"), (status = "default", description = "A problem document")))]
pub(crate) async fn cluster(
    State(state): State<ApiState>,
    caller: Caller,
    extensions: Extensions,
) -> Result<Answer<Value>, Problem> {
    let info = state.handle.cluster().await?;
    let relayed = extensions.get::<RelayedCaller>().is_some();
    let others = info.others.iter().map(|other| {
        let (state, caller) = (&state, &caller);
        async move {
            let name = &other.registration.node;
            if relayed || other.status == NodeStatus::Down {
                return (cluster::known(other), 0);
            }
            let path = format!("/v1/nodes/{name}");
            match crate::relay::ask(state, name, caller, Method::GET, &path).await {
                Ok(mut node) => {
                    node["status"] = cluster::status(other.status).into();
                    let short = node["under_replicated_sessions"].as_u64().unwrap_or(0);
                    (node, short)
                }
                Err(error) => {
                    let mut node = cluster::known(other);
                    node["reason"] = error.detail().into();
                    (node, 0)
                }
            }
        }
    });
    let others = futures::future::join_all(others).await;
    let short: u64 = others.iter().map(|(_, short)| short).sum();
    let mut nodes: Vec<_> = others.into_iter().map(|(node, _)| node).collect();
    nodes.push(cluster::node(&info.here));
    nodes.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    let mut document = cluster::cluster(&info, &nodes);
    document["under_replicated_sessions"] = (info.under_replicated_sessions + short).into();
    Ok(Answer(document))
}

/// The shard map.
#[utoipa::path(get, path = "/v1/cluster/shards", tag = "admin",
    responses((status = 200, description = "Each shard with its replicas, and where the nodes that are not down answer"), (status = "default", description = "A problem document")))]
pub(crate) async fn shards(State(state): State<ApiState>, _: Caller) -> Answer<Value> {
    let shards = state.handle.shards().await;
    Answer(json!({
        "shards": shards.iter().map(cluster::shard).collect::<Vec<_>>(),
        "nodes": state.handle.addresses(),
    }))
}

/// This node's GPUs.
#[utoipa::path(get, path = "/v1/gpus", tag = "admin",
    responses((status = 200, description = "Arena, scratch of its streams, contexts, leases, state"), (status = "default", description = "A problem document")))]
pub(crate) async fn gpus(State(state): State<ApiState>, _: Caller) -> Answer<Value> {
    Answer(json!({"gpus": state.handle.gpus().iter().map(cluster::gpu).collect::<Vec<_>>()}))
}

/// A node, and whether it is safe to stop.
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "admin", params(("node" = String, Path)),
    responses((status = 200, description = "The node"), (status = "default", description = "A problem document")))]
pub(crate) async fn node(
    State(state): State<ApiState>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Value>, Problem> {
    if name != state.handle.name().as_str() {
        let unknown = || keepwarm_node::Error::UnknownNode(name.clone());
        let node = name.parse().map_err(|_| unknown())?;
        if !state.handle.config().nodes.iter().any(|known| known.name == node) {
            return Err(unknown().into());
        }
        return crate::relay::ask(&state, &node, &caller, Method::GET, &format!("/v1/nodes/{node}"))
            .await
            .map(Answer);
    }
    let mut node = cluster::node(&state.handle.node().await?);
    node["under_replicated_sessions"] = state.handle.cluster().await?.under_replicated_sessions.into();
    Ok(Answer(node))
}

/// Moves, placements and failures as they happen.
#[utoipa::path(get, path = "/v1/events", tag = "admin",
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream"),
        (status = "default", description = "A problem document")))]
pub(crate) async fn events(
    State(state): State<ApiState>,
    caller: Caller,
    extensions: Extensions,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    // It has no end of its own: a server that stops need not wait for it.
    let stopping = extensions.get::<Stopping>().cloned();
    let stopping = async move {
        match stopping {
            Some(stopping) => stopping.begun().await,
            None => futures::future::pending().await,
        }
    };
    let seen = BroadcastStream::new(state.handle.events()).filter_map(move |event| {
        let event = match event {
            Ok(event) => {
                // What names no session is the operator's; what names one is its tenant's.
                let whose = event.session.as_ref().map(|key| &key.tenant);
                let may = caller.admin || whose == Some(&caller.tenant);
                may.then(|| Event::default().event(event.kind).data(cluster::event(&event).to_string()))
            }
            Err(BroadcastStreamRecvError::Lagged(missed)) => {
                Some(Event::default().event("lagged").data(json!({"missed": missed}).to_string()))
            }
        };
        futures::future::ready(event.map(Ok))
    });
    Sse::new(seen.take_until(stopping)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

/// The process is alive.
#[utoipa::path(get, path = "/healthz", tag = "probes", responses((status = 200, description = "ok")))]
pub(crate) async fn healthz() -> &'static str {
    "ok\n"
}

/// The node serves; with `?full`, every copy is in place too.
#[utoipa::path(get, path = "/readyz", tag = "probes", params(("full" = Option<bool>, Query)),
    responses((status = 200, description = "ready"), (status = 503, description = "The reasons why not")))]
pub(crate) async fn readyz(State(state): State<ApiState>, RawQuery(query): RawQuery) -> Response {
    let full = query.is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("full")));
    match state.handle.ready(full).await {
        Ok(()) => Answer(json!({"ready": true})).into_response(),
        Err(reasons) => {
            let mut response =
                (StatusCode::SERVICE_UNAVAILABLE, Answer(json!({"ready": false, "reasons": reasons})))
                    .into_response();
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            response
        }
    }
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "probes",
    responses((status = 200, description = "OpenMetrics text", content_type = "application/openmetrics-text")))]
pub(crate) async fn metrics(State(state): State<ApiState>) -> Response {
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], state.handle.metrics().encode()).into_response()
}

//! Sessions at work, and the moves between tiers.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use keepwarm_node::ActivateRequest;
use keepwarm_types::{GpuIndex, LeaseId, Millis, NodeName};
use serde_json::json;

use super::{ApiState, owned};
use crate::dto::request::{ActivateDto, MigrateDto, ReleaseDto, RenewDto, TierDto};
use crate::dto::session::{VerdictDto, activation, checkpoint as checkpoint_dto};
use crate::dto::time::rfc3339;
use crate::extract::{Json, Session};
use crate::problem::Problem;

fn node_name(text: Option<String>) -> Result<Option<NodeName>, Problem> {
    text.map(|text| text.parse().map_err(|error| Problem::field("node", error))).transpose()
}

/// Wait until what is committed has all promised copies.
#[utoipa::path(post, path = "/v1/sessions/{id}/checkpoint", tag = "running", params(("id" = String, Path)),
    responses((status = 200, description = "outcome, revision, holders, checksum"), (status = "default", description = "A problem document")))]
pub(crate) async fn checkpoint(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let info = state.handle.checkpoint(&session.key).await?;
    Ok(owned(&state, Answer(checkpoint_dto(&info)).into_response()))
}

/// Bring a session to a GPU and lease it.
#[utoipa::path(post, path = "/v1/sessions/{id}/activate", tag = "running", params(("id" = String, Path)), request_body = ActivateDto,
    responses((status = 200, description = "outcome, lease, home, source, bytes_moved, duration_ms"),
        (status = "default", description = "A problem document")))]
pub(crate) async fn activate(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<ActivateDto>,
) -> Result<Response, Problem> {
    let request = ActivateRequest {
        node: node_name(body.node)?,
        gpu: body.gpu.map(GpuIndex),
        ttl: body.ttl_ms.map(Millis),
        only_here: false,
    };
    let activated = state.handle.activate(&session.key, request).await?;
    Ok(owned(&state, Answer(activation(&activated)).into_response()))
}

/// Make a lease last longer.
#[utoipa::path(post, path = "/v1/sessions/{id}/renew", tag = "running", params(("id" = String, Path)), request_body = RenewDto,
    responses((status = 200, description = "outcome, lease"), (status = "default", description = "A problem document")))]
pub(crate) async fn renew(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<RenewDto>,
) -> Result<Response, Problem> {
    let (verdict, grant) =
        state.handle.renew(&session.key, LeaseId(body.lease), body.ttl_ms.map(Millis)).await?;
    let lease = json!({"id": grant.lease.id.to_string(), "epoch": grant.lease.epoch.0, "expires_at": rfc3339(grant.lease.expires_at)});
    let answer = json!({"outcome": verdict.outcome.word(), "reason": verdict.reason, "lease": lease});
    Ok(owned(&state, Answer(answer).into_response()))
}

/// Give a lease back.
#[utoipa::path(post, path = "/v1/sessions/{id}/release", tag = "running", params(("id" = String, Path)), request_body = ReleaseDto,
    responses((status = 200, body = VerdictDto), (status = "default", description = "A problem document")))]
pub(crate) async fn release(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<ReleaseDto>,
) -> Result<Response, Problem> {
    let verdict = state.handle.release(&session.key, LeaseId(body.lease)).await?;
    Ok(owned(&state, Answer(VerdictDto::from(verdict)).into_response()))
}

/// Bring bytes to a warmer tier ahead of use.
#[utoipa::path(post, path = "/v1/sessions/{id}/prefetch", tag = "running", params(("id" = String, Path)), request_body = TierDto,
    responses((status = 200, body = VerdictDto), (status = "default", description = "A problem document")))]
pub(crate) async fn prefetch(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<TierDto>,
) -> Result<Response, Problem> {
    let verdict = state.handle.prefetch(&session.key, body.tier).await?;
    Ok(owned(&state, Answer(VerdictDto::from(verdict)).into_response()))
}

/// Send bytes to a colder tier.
#[utoipa::path(post, path = "/v1/sessions/{id}/demote", tag = "running", params(("id" = String, Path)), request_body = TierDto,
    responses((status = 200, body = VerdictDto), (status = "default", description = "A problem document")))]
pub(crate) async fn demote(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<TierDto>,
) -> Result<Response, Problem> {
    let verdict = state.handle.demote(&session.key, body.tier).await?;
    Ok(owned(&state, Answer(VerdictDto::from(verdict)).into_response()))
}

/// Move a session's home.
#[utoipa::path(post, path = "/v1/sessions/{id}/migrate", tag = "running", params(("id" = String, Path)), request_body = MigrateDto,
    responses((status = 200, body = VerdictDto), (status = "default", description = "A problem document")))]
pub(crate) async fn migrate(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<MigrateDto>,
) -> Result<Response, Problem> {
    let verdict = state.handle.migrate(&session.key, node_name(body.node)?, body.gpu.map(GpuIndex)).await?;
    Ok(owned(&state, Answer(VerdictDto::from(verdict)).into_response()))
}

//! Sessions at rest.

use std::collections::BTreeMap;

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::TryStreamExt;
use keepwarm_core::session::Etag;
use keepwarm_core::shard::Cut;
use keepwarm_node::{CreateRequest, ForkRequest, RelayedCaller, SessionInfo, archive};
use keepwarm_types::{Bytes, SessionId, Tokens};
use serde_json::{Value, json};

use super::{ApiState, owned};
use crate::auth::Caller;
use crate::dto::request::{CreateDto, ForkDto, ImportQuery, MatchDto, TruncateDto, labels};
use crate::dto::session::{PageDto, SessionDto, explanation, receipt, transcript as transcript_dto};
use crate::extract::{Json, Query, Session, precondition};
use crate::problem::Problem;

/// Sessions on a page, where the query does not say.
const LIMIT_DEFAULT: usize = 100;
/// Sessions on a page at most.
const LIMIT_MAX: usize = 1000;

pub(crate) fn etag(headers: &mut HeaderMap, etag: Etag) {
    if let Ok(value) = HeaderValue::from_str(&format!("\"{etag}\"")) {
        headers.insert(header::ETAG, value);
    }
}

fn shown(state: &ApiState, status: StatusCode, info: SessionInfo, outcome: Option<Value>) -> Response {
    let (tag, id) = (info.manifest.etag(), info.manifest.key.id);
    let mut body = serde_json::to_value(SessionDto::from(info)).unwrap_or_default();
    if let (Value::Object(body), Some(Value::Object(outcome))) = (&mut body, outcome) {
        body.extend(outcome);
    }
    let mut response = (status, Answer(body)).into_response();
    etag(response.headers_mut(), tag);
    if status == StatusCode::CREATED
        && let Ok(location) = HeaderValue::from_str(&format!("/v1/sessions/{id}"))
    {
        response.headers_mut().insert(header::LOCATION, location);
    }
    owned(state, response)
}

fn session_id(field: &str, text: Option<String>) -> Result<Option<SessionId>, Problem> {
    text.map(|text| text.parse().map_err(|error| Problem::field(field, error))).transpose()
}

/// Make a session, or confirm the same one.
#[utoipa::path(post, path = "/v1/sessions", tag = "sessions", request_body = CreateDto,
    responses((status = 201, description = "Made", body = SessionDto), (status = 200, description = "It was there, the same", body = SessionDto),
        (status = "default", description = "A problem document")))]
pub(crate) async fn create(
    State(state): State<ApiState>,
    caller: Caller,
    Json(body): Json<CreateDto>,
) -> Result<Response, Problem> {
    let (protect, ttl) = (body.protect()?, body.ttl()?);
    let request = CreateRequest {
        id: session_id("id", body.id)?,
        layout: body.layout.layout()?,
        protect,
        ttl,
        labels: labels(body.labels),
        near: session_id("near", body.near)?,
    };
    let (info, new) = state.handle.create(&caller.tenant, request).await?;
    Ok(shown(&state, if new { StatusCode::CREATED } else { StatusCode::OK }, info, None))
}

/// List sessions by id.
#[utoipa::path(get, path = "/v1/sessions", tag = "sessions",
    params(("cursor" = Option<String>, Query, description = "next_cursor of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 1000; 100 where absent"),
        ("label.NAME" = Option<String>, Query, description = "Only sessions with this label")),
    responses((status = 200, body = PageDto), (status = "default", description = "A problem document")))]
pub(crate) async fn list(
    State(state): State<ApiState>,
    caller: Caller,
    RawQuery(query): RawQuery,
    extensions: Extensions,
) -> Result<Response, Problem> {
    let (mut after, mut limit, mut wanted) = (None, LIMIT_DEFAULT, BTreeMap::new());
    utf8(query.as_deref().unwrap_or_default())?;
    let uri = format!("/?{}", query.clone().unwrap_or_default())
        .parse()
        .map_err(|_| Problem::field("query", "is not a query string"))?;
    let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri);
    for (name, value) in pairs.map_err(|error| Problem::field("query", error))?.0 {
        match name.as_str() {
            "cursor" => after = session_id("cursor", Some(value))?,
            "limit" => match value.parse() {
                Ok(number) if (1..=LIMIT_MAX).contains(&number) => limit = number,
                _ => {
                    return Err(Problem::field(
                        "limit",
                        format!("'{value}' is out of range: 1 to {LIMIT_MAX}"),
                    ));
                }
            },
            _ => match name.strip_prefix("label.") {
                Some(label) if !label.is_empty() => drop(wanted.insert(label.to_owned(), value)),
                _ => return Err(Problem::field(name, "unknown; known: cursor, limit, label.NAME")),
            },
        }
    }
    let page = state.handle.list(&caller.tenant, after, limit, &labels(wanted)).await?;
    let page = serde_json::to_value(PageDto::from(page)).unwrap_or_default();
    if extensions.get::<RelayedCaller>().is_some() || !state.handle.in_cluster() {
        return Ok(Answer(page).into_response());
    }
    let path = format!("/v1/sessions?{}", query.as_deref().unwrap_or_default());
    Ok(Answer(of_all_nodes(&state, &caller, &path, limit, page).await).into_response())
}

/// Refuses a query whose unescaped bytes are no UTF-8: read leniently, it would look for another label.
fn utf8(query: &str) -> Result<(), Problem> {
    for pair in query.split('&') {
        if percent_decode(pair).is_none() {
            let name = pair.split('=').next().unwrap_or_default();
            return Err(Problem::field(name, "is not UTF-8: percent-escape the bytes of a UTF-8 text"));
        }
    }
    Ok(())
}

/// The text that a percent-escaped one stands for, if it is UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let escaped = behind.get(..2).filter(|_| *first == b'%');
        let escaped = escaped.and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// Puts the pages of all nodes together; shards of a node that does not answer are named as incomplete.
async fn of_all_nodes(state: &ApiState, caller: &Caller, path: &str, limit: usize, own: Value) -> Value {
    let nodes = state.handle.others();
    let asked = nodes.iter().map(|node| crate::relay::ask(state, node, caller, Method::GET, path));
    let answers = futures::future::join_all(asked).await;
    let (mut sessions, mut incomplete, mut more) = (Vec::new(), Vec::new(), false);
    let mut take = |page: &Value| {
        sessions.extend(page["sessions"].as_array().cloned().unwrap_or_default());
        incomplete.extend(page["incomplete"].as_array().cloned().unwrap_or_default());
        more |= !page["next_cursor"].is_null();
    };
    take(&own);
    let mut silent = Vec::new();
    for (node, answer) in nodes.iter().zip(answers) {
        match answer {
            Ok(page) => take(&page),
            Err(error) => {
                tracing::debug!(%node, why = error.detail(), "a node's sessions are not listed");
                silent.extend(state.handle.shards_of(node).into_iter().map(|shard| Value::from(shard.0)));
            }
        }
    }
    incomplete.extend(silent);
    let id = |session: &Value| session["id"].as_str().unwrap_or_default().to_owned();
    sessions.sort_by_key(id);
    more |= sessions.len() > limit;
    sessions.truncate(limit);
    let cursor = sessions.last().filter(|_| more).map(id);
    json!({"sessions": sessions, "next_cursor": cursor, "incomplete": incomplete})
}

/// Show a session.
#[utoipa::path(get, path = "/v1/sessions/{id}", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, body = SessionDto), (status = "default", description = "A problem document")))]
pub(crate) async fn show(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let info = state.handle.get(&session.key).await?;
    Ok(shown(&state, StatusCode::OK, info, None))
}

/// End a session.
#[utoipa::path(delete, path = "/v1/sessions/{id}", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, description = "What was given back"), (status = "default", description = "A problem document")))]
pub(crate) async fn delete(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let ended = state.handle.delete(&session.key).await?;
    Ok(owned(&state, Answer(receipt(&ended)).into_response()))
}

/// The token ids and messages, warm or cold.
#[utoipa::path(get, path = "/v1/sessions/{id}/transcript", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, description = "tokens, messages, length_tokens"), (status = "default", description = "A problem document")))]
pub(crate) async fn transcript(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let (info, transcript) = state.handle.transcript(&session.key).await?;
    let mut response = Answer(transcript_dto(&transcript)).into_response();
    etag(response.headers_mut(), info.manifest.etag());
    Ok(owned(&state, response))
}

/// How many leading tokens the session has.
#[utoipa::path(post, path = "/v1/sessions/{id}/match", tag = "sessions", params(("id" = String, Path)), request_body = MatchDto,
    responses((status = 200, description = "matched_tokens"), (status = "default", description = "A problem document")))]
pub(crate) async fn matching(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<MatchDto>,
) -> Result<Response, Problem> {
    let (_, transcript) = state.handle.transcript(&session.key).await?;
    let matched =
        transcript.tokens.iter().zip(&body.tokens).take_while(|(ours, theirs)| ours == theirs).count();
    Ok(Answer(json!({"matched_tokens": matched})).into_response())
}

/// Cut a session short.
#[utoipa::path(post, path = "/v1/sessions/{id}/truncate", tag = "sessions", params(("id" = String, Path)), request_body = TruncateDto,
    responses((status = 200, description = "The session, with outcome and reason"), (status = "default", description = "A problem document")))]
pub(crate) async fn truncate(
    State(state): State<ApiState>,
    session: Session,
    headers: HeaderMap,
    Json(body): Json<TruncateDto>,
) -> Result<Response, Problem> {
    let cut = match (body.length_tokens, body.length_bytes) {
        (Some(tokens), None) => Cut::Tokens(Tokens(tokens)),
        (None, Some(bytes)) => Cut::Bytes(Bytes(bytes)),
        _ => return Err(Problem::field("length_tokens", "give either length_tokens or length_bytes")),
    };
    let (verdict, info) = state.handle.truncate(&session.key, cut, precondition(&headers)?).await?;
    let outcome = json!({"outcome": verdict.outcome.word(), "reason": verdict.reason});
    Ok(shown(&state, StatusCode::OK, info, Some(outcome)))
}

/// Begin another session as a prefix of this one.
#[utoipa::path(post, path = "/v1/sessions/{id}/fork", tag = "sessions", params(("id" = String, Path)), request_body = ForkDto,
    responses((status = 201, description = "The child, with outcome and reason"), (status = "default", description = "A problem document")))]
pub(crate) async fn fork(
    State(state): State<ApiState>,
    session: Session,
    Json(body): Json<ForkDto>,
) -> Result<Response, Problem> {
    session_id("near", body.near)?;
    let request = ForkRequest {
        id: session_id("id", body.id)?,
        length: body.length_tokens.map(Tokens),
        labels: body.labels.map(labels),
        ..ForkRequest::default()
    };
    let (verdict, info) = state.handle.fork(&session.key, request).await?;
    let outcome = json!({"outcome": verdict.outcome.word(), "reason": verdict.reason});
    Ok(shown(&state, StatusCode::CREATED, info, Some(outcome)))
}

/// Where a session's bytes are and how they came there.
#[utoipa::path(get, path = "/v1/sessions/{id}/explain", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, description = "residency, moves, hits, misses"), (status = "default", description = "A problem document")))]
pub(crate) async fn explain(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let explained = state.handle.explain(&session.key).await?;
    Ok(owned(&state, Answer(explanation(explained, state.handle.name().as_str())).into_response()))
}

/// A self-describing archive of the whole session.
#[utoipa::path(get, path = "/v1/sessions/{id}/export", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, description = "The archive", content_type = "application/vnd.keepwarm.archive"),
        (status = "default", description = "A problem document")))]
pub(crate) async fn export(State(state): State<ApiState>, session: Session) -> Result<Response, Problem> {
    let archive = archive::export(&state.handle, &session.key).await?;
    let length = archive.length();
    let body = Body::from_stream(futures::stream::iter(archive));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/vnd.keepwarm.archive"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    Ok(owned(&state, response))
}

/// Take an archive as a new session.
#[utoipa::path(post, path = "/v1/sessions/import", tag = "sessions", params(ImportQuery),
    responses((status = 201, body = SessionDto), (status = "default", description = "A problem document")))]
pub(crate) async fn import(
    State(state): State<ApiState>,
    caller: Caller,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Result<Response, Problem> {
    let id = session_id("id", query.id)?;
    let stream = body
        .into_data_stream()
        .map_err(|error| keepwarm_node::Error::BodyLength(format!("the body broke off: {error}")));
    let info = archive::import(&state.handle, &caller.tenant, id, stream).await?;
    Ok(shown(&state, StatusCode::CREATED, info, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_that_is_no_utf8_is_refused_by_its_name() {
        for good in
            ["", "limit=3&label.user=42", "label.user=%C3%A4+%41", "label.user=100%", "label.user=%zz"]
        {
            assert!(utf8(good).is_ok(), "{good}");
        }
        let refused = utf8("limit=3&label.user=%ff").unwrap_err();
        assert_eq!(refused.code(), "invalid_field");
        assert!(utf8("label.user=%C3").is_err());
    }
}

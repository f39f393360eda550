//! Bytes in and out.

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use keepwarm_core::session::{Etag, TranscriptDelta};
use keepwarm_core::shard::{Commit, WriteMode};
use keepwarm_node::{Selection, WriteDone, WriteRequest, WriteStart};
use keepwarm_types::{Bytes, Revision, Tokens, TxnId};

use super::sessions::etag;
use super::{ApiState, owned};
use crate::dto::request::{CommitDto, PatchQuery, PutQuery, ReadQuery, messages};
use crate::dto::session::WrittenDto;
use crate::extract::{
    Json, Query, Session, byte_range, digest_value, header_text, precondition, repr_digest,
};
use crate::problem::Problem;
use crate::serve::SLOW_READER;

/// Continue a part, or stage its continuation.
#[utoipa::path(patch, path = "/v1/sessions/{id}/parts/{part}", tag = "parts",
    params(("id" = String, Path), ("part" = String, Path), PatchQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = WrittenDto), (status = "default", description = "A problem document")))]
pub(crate) async fn append(
    State(state): State<ApiState>,
    session: Session,
    Query(query): Query<PatchQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let mode = WriteMode::Append { offset: query.offset };
    write(&state, session, mode, query.txn.map(TxnId), &headers, body).await
}

/// Replace a part, or stage its replacement.
#[utoipa::path(put, path = "/v1/sessions/{id}/parts/{part}", tag = "parts",
    params(("id" = String, Path), ("part" = String, Path), PutQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = WrittenDto), (status = "default", description = "A problem document")))]
pub(crate) async fn replace(
    State(state): State<ApiState>,
    session: Session,
    Query(query): Query<PutQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    write(&state, session, WriteMode::Replace, query.txn.map(TxnId), &headers, body).await
}

async fn write(
    state: &ApiState,
    session: Session,
    mode: WriteMode,
    txn: Option<TxnId>,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if let Some(kind) = header_text(headers, "content-type")?
        && !kind.eq_ignore_ascii_case("application/octet-stream")
    {
        return Err(Problem::new(
            "unsupported_media_type",
            format!("'{kind}' is not application/octet-stream"),
        ));
    }
    let length = header_text(headers, "content-length")?.and_then(|text| text.parse().ok());
    let request = WriteRequest {
        part: session.part,
        mode,
        precondition: precondition(headers)?,
        txn,
        body: length.map(Bytes),
        digest: repr_digest(headers)?,
    };
    let done = match state.handle.open_write(&session.key, request).await? {
        WriteStart::Repeated(done) => done,
        WriteStart::Sink(mut sink) => {
            let mut chunks = body.into_data_stream();
            loop {
                match tokio::time::timeout(SLOW_READER, chunks.next()).await {
                    Ok(Some(Ok(chunk))) => sink.write(&chunk).await?,
                    Ok(Some(Err(error))) => {
                        return Err(Problem::new(
                            "malformed_request",
                            format!("the body broke off: {error}"),
                        ));
                    }
                    Ok(None) => break,
                    Err(_) => {
                        return Err(Problem::new("malformed_request", "the body did not go on in time"));
                    }
                }
            }
            sink.finish().await?
        }
    };
    Ok(written(state, done))
}

fn written(state: &ApiState, done: WriteDone) -> Response {
    let tag = match &done {
        WriteDone::Committed(written, _) => Some(Etag { birth: written.birth, revision: written.revision }),
        WriteDone::Staged(_) => None,
    };
    let mut response = Answer(WrittenDto::from(done)).into_response();
    if let Some(tag) = tag {
        etag(response.headers_mut(), tag);
    }
    owned(state, response)
}

/// Turn a transaction's staged parts into one revision.
#[utoipa::path(post, path = "/v1/sessions/{id}/commit", tag = "parts", params(("id" = String, Path)), request_body = CommitDto,
    responses((status = 200, body = WrittenDto), (status = "default", description = "A problem document")))]
pub(crate) async fn commit(
    State(state): State<ApiState>,
    session: Session,
    headers: HeaderMap,
    Json(body): Json<CommitDto>,
) -> Result<Response, Problem> {
    let mut demands = precondition(&headers)?;
    let length_tokens = Tokens(body.length_tokens);
    let asked = asked(&body);
    let mut transcript = None;
    if body.if_revision.is_some() || body.tokens.is_some() || body.messages.is_some() {
        let now = state.handle.get(&session.key).await?.manifest;
        if let Some(revision) = body.if_revision {
            demands.etag = Some(Etag { birth: now.birth, revision: Revision(revision) });
        }
        if body.tokens.is_some() || body.messages.is_some() {
            let keep_tokens = now.length_tokens.min(now.transcript_tokens);
            let tokens = body.tokens.unwrap_or_default();
            let end = Tokens(keep_tokens.0 + tokens.len() as u64);
            transcript = Some(TranscriptDelta {
                keep_tokens,
                keep_messages: now.transcript_messages,
                tokens,
                messages: messages(body.messages.unwrap_or_default(), end),
            });
        }
    }
    let commit = Commit { txn: TxnId(body.txn), length_tokens, transcript, precondition: demands, asked };
    let done = state.handle.commit(&session.key, commit).await?;
    Ok(written(&state, done))
}

/// What stands for the commit's content under its write id.
fn asked(body: &CommitDto) -> u64 {
    use std::hash::Hasher;
    let mut hasher = twox_hash::XxHash3_64::new();
    hasher.write(body.txn.as_bytes());
    hasher.write(&body.length_tokens.to_le_bytes());
    for token in body.tokens.iter().flatten() {
        hasher.write(&token.to_le_bytes());
    }
    hasher.finish()
}

/// Read a part's committed bytes, all of one revision.
#[utoipa::path(get, path = "/v1/sessions/{id}/parts/{part}", tag = "parts",
    params(("id" = String, Path), ("part" = String, Path), ReadQuery),
    responses((status = 200, description = "The bytes", content_type = "application/octet-stream"), (status = 206, description = "A range"),
        (status = "default", description = "A problem document")))]
pub(crate) async fn read(
    State(state): State<ApiState>,
    session: Session,
    Query(query): Query<ReadQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let planes = query.planes()?;
    let reader = state.handle.open_read(&session.key, &session.part).await?;
    let tokens = match (query.from_token, query.to_token) {
        (None, None) => None,
        (from, to) => Some((from.unwrap_or(0), to)),
    };
    let whole = tokens.is_none() && planes.is_none();
    let (tag, digest) = (reader.etag(), reader.digest().filter(|_| whole));
    let range = if whole { byte_range(&headers, reader.length().0)? } else { None };
    let mut chunks = reader.select(Selection { bytes: range, tokens, planes })?;
    chunks.verify_first()?;
    let (length, total) = (chunks.length(), chunks.total());
    let mut response = Body::from_stream(futures::stream::iter(chunks)).into_response();
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    out.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    out.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    etag(out, tag);
    if let Some(value) = digest.and_then(|digest| HeaderValue::from_str(&digest_value(digest)).ok()) {
        out.insert("repr-digest", value);
    }
    if let Some((first, end)) = range {
        if let Ok(value) = HeaderValue::from_str(&format!("bytes {first}-{}/{total}", end - 1)) {
            out.insert(header::CONTENT_RANGE, value);
        }
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(owned(&state, response))
}

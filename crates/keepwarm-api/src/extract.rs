//! Reading requests: bodies, ids, headers, each with an error that names what is wrong.

use std::str::FromStr;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Limited};
use keepwarm_core::session::Etag;
use keepwarm_core::shard::Precondition;
use keepwarm_node::BodyDigest;
use keepwarm_types::{SessionId, SessionKey, TenantName};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::auth::Caller;
use crate::problem::Problem;
use crate::routes::ApiState;

/// Longest JSON body: a conversation of some 2 million characters.
pub(crate) const JSON_BYTES_MAX: usize = 8 << 20;

/// A JSON body; unknown fields and wrong types are named.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<ApiState> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &ApiState) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let kind = parts
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("application/json");
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") && !kind.ends_with("+json") {
            return Err(Problem::new("unsupported_media_type", format!("'{kind}' is not application/json")));
        }
        let bytes = collect(body, JSON_BYTES_MAX).await?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        parse_json(text).map(Self)
    }
}

/// All of a body, up to a limit.
pub(crate) async fn collect(body: Body, limit: usize) -> Result<bytes::Bytes, Problem> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            let detail = format!("the body has more than {limit} bytes");
            Err(Problem::new("body_too_large", detail).with("limit_bytes", limit))
        }
        Err(error) => Err(Problem::new("malformed_request", format!("the body broke off: {error}"))),
    }
}

pub(crate) fn parse_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let inner = error.inner();
        if inner.is_data() {
            let path = error.path().to_string();
            let unknown = inner.to_string();
            let named = unknown.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
            let field = match (path.as_str(), named) {
                (".", Some(name)) => name.to_owned(),
                (".", None) => "body".to_owned(),
                (path, _) => path.to_owned(),
            };
            Problem::field(field, inner)
        } else {
            Problem::new("malformed_request", format!("the body is not JSON: {inner}"))
        }
    })?;
    reader
        .end()
        .map_err(|error| Problem::new("malformed_request", format!("the body is not JSON: {error}")))?;
    Ok(value)
}

/// The session that a path names, of the tenant that asks.
pub(crate) struct Session {
    pub(crate) key: SessionKey,
    /// The part, where the path names one.
    pub(crate) part: String,
}

impl FromRequestParts<ApiState> for Session {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, Problem> {
        let caller = Caller::from_request_parts(parts, state).await?;
        let Path(names): Path<Vec<(String, String)>> = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::new("malformed_request", error.to_string()))?;
        let named = |wanted: &str| {
            names.iter().find(|(name, _)| name == wanted).map_or("", |(_, value)| value.as_str())
        };
        let id = session_of(named("id"), &caller.tenant).map_err(|reason| Problem::field("id", reason))?;
        let key = SessionKey::new(caller.tenant, id);
        Ok(Self { key, part: named("part").to_owned() })
    }
}

/// Longest name of a session that is no UUID.
const SESSION_NAME_MAX: usize = 256;

/// The session that a text names: a UUID is its id, any other name becomes a UUIDv5 in the tenant's name space.
pub(crate) fn session_of(text: &str, tenant: &TenantName) -> Result<SessionId, String> {
    if text.len() > SESSION_NAME_MAX {
        return Err(format!("has more than {SESSION_NAME_MAX} bytes"));
    }
    match SessionId::from_str(text) {
        Ok(id) => Ok(id),
        // Rather a slip in a UUID than a name.
        Err(error) if text.len() >= 32 && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-') => {
            Err(error.to_string())
        }
        Err(_) => {
            let space = Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("keepwarm://tenant/{tenant}").as_bytes());
            Ok(SessionId::new(Uuid::new_v5(&space, text.as_bytes())).expect("version 5 is a session id's"))
        }
    }
}

/// Query parameters; unknown and wrong ones are named.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<ApiState> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &ApiState) -> Result<Self, Problem> {
        axum::extract::Query::try_from_uri(&parts.uri).map(|axum::extract::Query(query)| Self(query)).map_err(
            |error| {
                let text =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                let named =
                    text.split('`').nth(1).or_else(|| text.split(':').next()).unwrap_or("query").to_owned();
                let reason = text.strip_prefix(&format!("{named}: ")).unwrap_or(&text);
                Problem::field(&named, reason)
            },
        )
    }
}

pub(crate) fn header_text<'h>(headers: &'h HeaderMap, name: &str) -> Result<Option<&'h str>, Problem> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    value.to_str().map(Some).map_err(|_| Problem::field(name, "is not plain text"))
}

fn parsed<T: FromStr<Err: std::fmt::Display>>(headers: &HeaderMap, name: &str) -> Result<Option<T>, Problem> {
    header_text(headers, name)?
        .map(|text| text.trim().parse().map_err(|error| Problem::field(name, error)))
        .transpose()
}

/// `If-Match`: one entity tag, in quotes.
pub(crate) fn if_match(headers: &HeaderMap) -> Result<Option<Etag>, Problem> {
    let Some(text) = header_text(headers, "if-match")? else { return Ok(None) };
    let text = text.trim();
    let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let inner = inner
        .ok_or_else(|| Problem::field("If-Match", "must be one entity tag in quotes: \"BIRTH-REVISION\""))?;
    inner.parse().map(Some).map_err(|error| Problem::field("If-Match", error))
}

/// `If-Match`, `Keepwarm-Lease`, `Keepwarm-Write-Id`.
pub(crate) fn precondition(headers: &HeaderMap) -> Result<Precondition, Problem> {
    Ok(Precondition {
        etag: if_match(headers)?,
        lease: parsed(headers, "keepwarm-lease")?,
        write_id: parsed(headers, "keepwarm-write-id")?,
    })
}

/// `Repr-Digest` (RFC 9530): `xxh3-128=:BASE64:` or `sha-256=:BASE64:`.
pub(crate) fn repr_digest(headers: &HeaderMap) -> Result<Option<BodyDigest>, Problem> {
    let Some(text) = header_text(headers, "repr-digest")? else { return Ok(None) };
    let wrong = |reason: &str| Problem::field("Repr-Digest", reason);
    let (algorithm, rest) = text
        .split(',')
        .next()
        .unwrap_or_default()
        .trim()
        .split_once('=')
        .ok_or_else(|| wrong("has no '='"))?;
    let inner = rest
        .strip_prefix(':')
        .and_then(|rest| rest.strip_suffix(':'))
        .ok_or_else(|| wrong("must be :BASE64:"))?;
    let bytes = STANDARD.decode(inner).map_err(|error| Problem::field("Repr-Digest", error))?;
    match algorithm {
        "xxh3-128" => bytes.try_into().map(|bytes| Some(BodyDigest::Xxh3(u128::from_be_bytes(bytes)))),
        "sha-256" => bytes.try_into().map(|bytes| Some(BodyDigest::Sha256(bytes))),
        other => {
            return Err(Problem::field(
                "Repr-Digest",
                format!("'{other}' is not known: use xxh3-128 or sha-256"),
            ));
        }
    }
    .map_err(|_| wrong("has the wrong number of bytes for its algorithm"))
}

/// The value of a `Repr-Digest` header.
pub(crate) fn digest_value(digest: u128) -> String {
    format!("xxh3-128=:{}:", STANDARD.encode(digest.to_be_bytes()))
}

/// One `Range` of bytes, as (first, end): a suffix counts from `total`.
pub(crate) fn byte_range(headers: &HeaderMap, total: u64) -> Result<Option<(u64, u64)>, Problem> {
    let Some(text) = header_text(headers, "range")? else { return Ok(None) };
    let not = || {
        Problem::new("range_not_satisfiable", format!("'{text}' is no range of {total} bytes"))
            .with("length_bytes", total)
    };
    // Other units and several ranges may be ignored (RFC 9110, 14.2); a broken one is an error here.
    let Some(range) = text.strip_prefix("bytes=") else { return Ok(None) };
    if range.contains(',') {
        return Err(Problem::field("Range", "one range at a time"));
    }
    let (first, last) = range.split_once('-').ok_or_else(not)?;
    let number = |text: &str| text.trim().parse::<u64>().map_err(|_| not());
    let (first, end) = match (first.is_empty(), last.is_empty()) {
        (false, false) => (number(first)?, number(last)?.saturating_add(1).min(total)),
        (false, true) => (number(first)?, total),
        (true, false) => (total.saturating_sub(number(last)?), total),
        (true, true) => return Err(not()),
    };
    if first >= end { Err(not()) } else { Ok(Some((first, end))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn ranges_follow_the_rfc() {
        let range = |text| byte_range(&headers("range", text), 100);
        assert_eq!(range("bytes=0-9").unwrap(), Some((0, 10)));
        assert_eq!(range("bytes=90-").unwrap(), Some((90, 100)));
        assert_eq!(range("bytes=-5").unwrap(), Some((95, 100)));
        assert_eq!(range("bytes=50-1000").unwrap(), Some((50, 100)));
        assert_eq!(range("lines=1-2").unwrap(), None);
        for wrong in ["bytes=100-", "bytes=9-3", "bytes=-", "bytes=a-b", "bytes=-0"] {
            assert_eq!(range(wrong).unwrap_err().code(), "range_not_satisfiable", "{wrong}");
        }
    }

    #[test]
    fn digests_and_tags_are_read_or_named() {
        let value = digest_value(7);
        assert_eq!(repr_digest(&headers("repr-digest", &value)).unwrap(), Some(BodyDigest::Xxh3(7)));
        for wrong in ["md5=:AAAA:", "xxh3-128=AAAA", "xxh3-128=:AAAA:", "sha-256=:!:"] {
            assert_eq!(
                repr_digest(&headers("repr-digest", wrong)).unwrap_err().code(),
                "invalid_field",
                "{wrong}"
            );
        }
        assert!(if_match(&headers("if-match", "abc")).is_err());
        assert_eq!(if_match(&headers("if-match", "\"0123456789-7\"")).unwrap().unwrap().revision.0, 7);
    }
}

//! Every error as `application/problem+json` (RFC 9457), in one place.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keepwarm_core::shard::Refusal;
use keepwarm_engine::chat::ChatError;
use keepwarm_node::Error;
use serde_json::{Map, Value, json};

use crate::dto::time::rfc3339;

/// Every code with its status, as the contract lists them.
pub const CODES: &[(&str, u16)] = &[
    ("malformed_request", 400),
    ("unauthenticated", 401),
    ("forbidden", 403),
    ("unknown_session", 404),
    ("unknown_part", 404),
    ("unwritten_part", 404),
    ("unknown_route", 404),
    ("unknown_model", 404),
    ("unknown_node", 404),
    ("method_not_allowed", 405),
    ("unsupported_media_type", 415),
    ("offset_mismatch", 409),
    ("incomplete", 409),
    ("layout_mismatch", 409),
    ("leased", 409),
    ("lease_expired", 409),
    ("conflict", 409),
    ("expired", 410),
    ("deleted", 410),
    ("cold", 410),
    ("lost", 410),
    ("revision_mismatch", 412),
    ("body_too_large", 413),
    ("range_not_satisfiable", 416),
    ("invalid_field", 422),
    ("digest_mismatch", 422),
    ("overloaded", 429),
    ("quota_exceeded", 429),
    ("corrupt", 500),
    ("internal", 500),
    ("unavailable", 503),
    ("draining", 503),
    ("outcome_unknown", 504),
    ("no_capacity", 507),
];

/// When to come again, where nothing better is known.
const RETRY_DEFAULT_S: u64 = 1;

/// An error answer.
#[derive(Debug, Clone)]
pub struct Problem {
    code: &'static str,
    detail: String,
    extra: Map<String, Value>,
    retry_after_s: Option<u64>,
    moving: bool,
}

impl Problem {
    /// An error of a code of [`CODES`].
    ///
    /// # Panics
    /// For a code that the contract does not list: a bug that a test finds.
    #[must_use]
    pub fn new(code: &'static str, detail: impl Into<String>) -> Self {
        assert!(CODES.iter().any(|(known, _)| *known == code), "'{code}' is not in the contract");
        Self { code, detail: detail.into(), extra: Map::new(), retry_after_s: None, moving: false }
    }

    /// A field of the request that cannot be.
    #[must_use]
    pub fn field(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        let field = field.into();
        Self::new("invalid_field", format!("{field}: {reason}")).with("field", field)
    }

    /// The same, with one more member.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.extra.insert(name.to_owned(), value.into());
        self
    }

    /// The code.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        self.code
    }

    /// Whether nothing was done because the session's owner changes: the next one may do it.
    pub(crate) const fn is_moving(&self) -> bool {
        self.moving
    }

    /// What it says.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The status that goes with the code.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        let status = CODES.iter().find(|(code, _)| *code == self.code).map_or(500, |(_, status)| *status);
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The document; `request_id` is added by the layer that knows it.
    #[must_use]
    pub fn document(&self, request_id: &str) -> Value {
        let status = self.status();
        let mut members = self.extra.clone();
        let fixed = json!({
            "type": format!("urn:keepwarm:problem:{}", self.code),
            "title": status.canonical_reason().unwrap_or("Error"),
            "status": status.as_u16(),
            "code": self.code,
            "detail": self.detail,
            "request_id": request_id,
            // What OpenAI's clients show.
            "error": {"message": self.detail, "type": self.code, "code": self.code, "param": null},
        });
        if let Value::Object(fixed) = fixed {
            members.extend(fixed);
        }
        Value::Object(members)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let request_id = crate::routes::request_id();
        let body = self.document(&request_id).to_string();
        let mut response = (self.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let retry = matches!(self.status().as_u16(), 429 | 503 | 507);
        if let Some(seconds) = self.retry_after_s.or(retry.then_some(RETRY_DEFAULT_S)) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.code == "unauthenticated" {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let detail = refusal.to_string();
        match refusal {
            Refusal::UnknownSession => Self::new("unknown_session", detail),
            Refusal::UnknownPart(_) => Self::new("unknown_part", detail),
            Refusal::UnwrittenPart(_) => Self::new("unwritten_part", detail),
            Refusal::Expired { birth } => Self::new("expired", detail).with("birth", birth.to_string()),
            Refusal::Deleted { birth } => Self::new("deleted", detail).with("birth", birth.to_string()),
            Refusal::Cold { reason } => Self::new("cold", detail).with("cold_reason", reason.word()),
            Refusal::OffsetMismatch { length_tokens, length, revision, .. } => {
                Self::new("offset_mismatch", detail)
                    .with("length_tokens", length_tokens.0)
                    .with("length_bytes", length.0)
                    .with("revision", revision.0)
            }
            Refusal::Incomplete { part, have, need } => Self::new("incomplete", detail)
                .with("part", part)
                .with("from_token", have.0)
                .with("to_token", need.0),
            Refusal::LayoutMismatch => Self::new("layout_mismatch", detail),
            Refusal::Leased { expires_at } => {
                Self::new("leased", detail).with("expires_at", rfc3339(expires_at))
            }
            Refusal::LeaseExpired => Self::new("lease_expired", detail),
            Refusal::Conflict(_) => Self::new("conflict", detail),
            Refusal::RevisionMismatch { birth, revision, length_tokens, last_write_id } => {
                Self::new("revision_mismatch", detail)
                    .with("birth", birth.to_string())
                    .with("revision", revision.0)
                    .with("length_tokens", length_tokens.0)
                    .with("last_write_id", last_write_id.map(|id| id.to_string()))
            }
            Refusal::InvalidField { field, reason } => Self::field(field, reason),
            Refusal::Overloaded { .. } => Self::new("overloaded", detail),
            Refusal::QuotaExceeded { .. } => Self::new("quota_exceeded", detail),
            Refusal::Moving(_) => Self { moving: true, ..Self::new("unavailable", detail) },
            Refusal::Lost { .. } => Self::new("lost", detail),
            Refusal::Unavailable(_) => Self::new("unavailable", detail),
            Refusal::OutcomeUnknown => Self::new("outcome_unknown", detail),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let (detail, retry) = (error.to_string(), error.retry_after());
        let problem = match error {
            Error::Refused(refusal) => refusal.into(),
            Error::NoCapacity { tier, wanted, .. } => {
                Self::new("no_capacity", detail).with("tier", tier.word()).with("wanted_bytes", wanted.0)
            }
            Error::Corrupt { at, .. } => Self::new("corrupt", detail).with("where", at),
            Error::BodyTooLarge { limit } => Self::new("body_too_large", detail).with("limit_bytes", limit.0),
            Error::BodyLength(_) => Self::new("malformed_request", detail),
            Error::DigestMismatch { algorithm } => {
                Self::new("digest_mismatch", detail).with("algorithm", algorithm)
            }
            Error::Range { length, .. } => {
                Self::new("range_not_satisfiable", detail).with("length_bytes", length.0)
            }
            Error::Overloaded { .. } => Self::new("overloaded", detail),
            Error::Unavailable { .. } => Self::new("unavailable", detail),
            Error::Draining => Self::new("draining", detail),
            Error::UnknownNode(_) => Self::new("unknown_node", detail),
            Error::InvalidField { field, reason } => Self::field(field, reason),
            Error::Archive(_) => Self::field("body", detail),
            Error::Internal(_) => {
                tracing::error!(error = %detail, "internal error");
                Self::new("internal", "an internal error; the log has more under this request_id")
            }
        };
        Self {
            retry_after_s: retry.map(keepwarm_types::Millis::secs_up).map(|s| s.max(RETRY_DEFAULT_S)),
            ..problem
        }
    }
}

impl From<ChatError> for Problem {
    fn from(error: ChatError) -> Self {
        let detail = error.to_string();
        match error {
            ChatError::UnknownModel { .. } => Self::new("unknown_model", detail),
            ChatError::TooLong { .. } => Self::field("messages", detail),
            ChatError::InvalidField { field, reason } => Self::field(field, reason),
            ChatError::Overloaded(_) => Self::new("overloaded", detail),
            ChatError::Store(error) => error.into(),
            ChatError::Model(_) => {
                tracing::error!(error = %detail, "the model failed");
                Self::new("internal", detail)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_types::{Bytes, Millis, Tier};

    use super::*;

    #[test]
    fn retries_carry_a_time_and_documents_their_code() {
        let error = Error::NoCapacity {
            tier: Tier::Pinned,
            wanted: Bytes(5),
            reason: "all is protected".to_owned(),
            retry_after: Millis(4001),
        };
        let response = Problem::from(error.clone()).into_response();
        assert_eq!(response.status(), 507);
        assert_eq!(response.headers()[header::RETRY_AFTER], "5");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        let document = Problem::from(error).document("r1");
        assert_eq!(
            (document["code"].as_str(), document["request_id"].as_str()),
            (Some("no_capacity"), Some("r1"))
        );
        assert_eq!(document["wanted_bytes"], 5);
        assert!(
            Problem::from(Refusal::LayoutMismatch)
                .into_response()
                .headers()
                .get(header::RETRY_AFTER)
                .is_none()
        );
    }

    #[test]
    fn an_internal_error_tells_clients_nothing_of_itself() {
        let document = Problem::from(Error::Internal("secret path".to_owned())).document("r2");
        assert!(!document.to_string().contains("secret"));
    }
}

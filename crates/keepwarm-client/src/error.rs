//! What can go wrong with a call, and what that says about the server's state.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

/// An error answer: `application/problem+json` (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// HTTP status.
    pub status: u16,
    /// Stable code: `cold`, `leased`, `no_capacity`, ….
    pub code: String,
    /// In a sentence.
    pub detail: String,
    /// The request's id, as the server's log has it.
    pub request_id: String,
    /// Members that go with the code: `length_tokens`, `expires_at`, `field`, ….
    pub members: Map<String, Value>,
    /// When to come again, where the server said so.
    pub retry_after: Option<Duration>,
}

impl Problem {
    /// A member as a number.
    #[must_use]
    pub fn number(&self, member: &str) -> Option<u64> {
        self.members.get(member).and_then(Value::as_u64)
    }

    /// A member as text.
    #[must_use]
    pub fn text(&self, member: &str) -> Option<&str> {
        self.members.get(member).and_then(Value::as_str)
    }

    /// From an answer whose body may be anything: a proxy's page becomes a problem without a code of ours.
    pub(crate) fn from_answer(status: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
        let mut members: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
        let mut text = |name: &str| match members.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let code = text("code").unwrap_or_else(|| "not_keepwarm".to_owned());
        let detail = text("detail").unwrap_or_else(|| excerpt(body));
        let request_id = text("request_id").unwrap_or_default();
        Self { status, code, detail, request_id, members, retry_after }
    }
}

/// Most characters of a foreign answer that an error repeats.
const EXCERPT_CHARS: usize = 200;

fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(EXCERPT_CHARS).collect()
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.status, self.code, self.detail)?;
        if !self.request_id.is_empty() {
            write!(f, " (request {})", self.request_id)?;
        }
        Ok(())
    }
}

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused. All codes but `outcome_unknown` are definite: nothing was applied.
    #[error("{0}")]
    Refused(Box<Problem>),
    /// The server could not be reached, or the connection broke.
    #[error("{url}: {}", chain(.cause))]
    Transport {
        /// What was asked.
        url: String,
        /// What broke.
        cause: reqwest::Error,
    },
    /// The deadline passed before there was an answer; a write may have been applied.
    #[error("{url}: no answer within {}s", .after.as_secs_f32())]
    Deadline {
        /// What was asked.
        url: String,
        /// How long was waited.
        after: Duration,
    },
    /// Nothing more of a streamed answer came.
    #[error("{url}: the answer stalled for {}s", .after.as_secs())]
    Stalled {
        /// What was asked.
        url: String,
        /// How long was waited.
        after: Duration,
    },
    /// The bytes that arrived do not have the digest that the server announced.
    #[error("{url}: the bytes have digest {found:032x}, the server announced {announced:032x}")]
    Digest {
        /// What was asked.
        url: String,
        /// XXH3-128 as announced.
        announced: u128,
        /// XXH3-128 of what arrived.
        found: u128,
    },
    /// The answer is not what the contract says.
    #[error("{url}: not an answer that this client knows: {reason}")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Some shards did not answer a listing.
    #[error("{} shards did not answer: the list is incomplete", .0.len())]
    Incomplete(Vec<u32>),
    /// The streamed answer of a model ended with an error.
    #[error("the answer broke off: {0}")]
    BrokenOff(String),
    /// The call cannot be made so.
    #[error("{0}")]
    Usage(String),
}

fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

impl ClientError {
    /// The server's problem document, where it sent one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) => Some(problem),
            _ => None,
        }
    }

    /// The stable code of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.problem().map(|problem| problem.code.as_str())
    }

    /// Whether the server is not there or does not serve at present.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Refused(problem) => matches!(problem.status, 502..=504),
            Self::Transport { .. } | Self::Deadline { .. } | Self::Stalled { .. } => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_keep_their_members() {
        let body = br#"{"type":"x","title":"Conflict","status":409,"code":"offset_mismatch","detail":"no",
                        "request_id":"r1","length_tokens":64}"#;
        let problem = Problem::from_answer(409, body, None);
        assert_eq!((problem.code.as_str(), problem.number("length_tokens")), ("offset_mismatch", Some(64)));
        assert_eq!(problem.to_string(), "409 offset_mismatch: no (request r1)");
    }

    #[test]
    fn a_page_of_a_proxy_is_repeated_in_short() {
        let page = format!("<html>\n{}", "bad gateway ".repeat(100));
        let problem = Problem::from_answer(502, page.as_bytes(), None);
        assert_eq!((problem.status, problem.code.as_str()), (502, "not_keepwarm"));
        assert_eq!(problem.detail.chars().count(), EXCERPT_CHARS);
        assert!(ClientError::Refused(Box::new(problem)).is_unavailable());
    }
}

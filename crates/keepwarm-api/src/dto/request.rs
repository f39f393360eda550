//! Request bodies and query parameters.

use std::collections::BTreeMap;

use keepwarm_core::session::{Labels, Message, PROTECT_DEFAULT, Protect};
use keepwarm_types::{Millis, Tier, Tokens};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::layout::LayoutDto;
use crate::problem::Problem;

/// Longest protection or TTL: ten years.
const SECONDS_MAX: f64 = 315_360_000.0;

/// Seconds, or "forever".
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum ProtectDto {
    /// This long after the last use.
    Seconds(f64),
    /// `forever`, under the tenant's quota.
    Word(String),
}

/// A session to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateDto {
    pub(crate) layout: LayoutDto,
    /// A UUID of version 4, 5 or 7; minted by the server where absent.
    pub(crate) id: Option<String>,
    /// Seconds after the last use, or "forever"; 900 where absent.
    protect_s: Option<ProtectDto>,
    /// Seconds after the last use; for ever where absent.
    ttl_s: Option<f64>,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    /// A session whose home the new one should share.
    pub(crate) near: Option<String>,
}

pub(crate) fn seconds(field: &str, seconds: f64) -> Result<Millis, Problem> {
    if seconds.is_finite() && (0.0..=SECONDS_MAX).contains(&seconds) {
        Ok(Millis((seconds * 1000.0).round() as u64))
    } else {
        Err(Problem::field(field, format!("{seconds} is out of range: 0 to {SECONDS_MAX} seconds")))
    }
}

impl CreateDto {
    pub(crate) fn protect(&self) -> Result<Protect, Problem> {
        match &self.protect_s {
            None => Ok(Protect::For(PROTECT_DEFAULT)),
            Some(ProtectDto::Seconds(value)) => seconds("protect_s", *value).map(Protect::For),
            Some(ProtectDto::Word(word)) if word == "forever" => Ok(Protect::Forever),
            Some(ProtectDto::Word(word)) => {
                Err(Problem::field("protect_s", format!("'{word}' is neither a number nor \"forever\"")))
            }
        }
    }

    pub(crate) fn ttl(&self) -> Result<Option<Millis>, Problem> {
        match self.ttl_s {
            None => Ok(None),
            Some(value) if value > 0.0 => seconds("ttl_s", value).map(Some),
            Some(value) => Err(Problem::field("ttl_s", format!("{value} must be more than 0"))),
        }
    }
}

pub(crate) fn labels(labels: BTreeMap<String, String>) -> Labels {
    labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect()
}

/// Where a body goes.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PatchQuery {
    /// In tokens for paged and window parts, in bytes for `bytes` parts.
    pub(crate) offset: u64,
    /// Stage the bytes for this transaction.
    pub(crate) txn: Option<Uuid>,
}

/// A replacement's transaction.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PutQuery {
    /// Stage the bytes for this transaction.
    pub(crate) txn: Option<Uuid>,
}

/// What to read of a part.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReadQuery {
    /// First token.
    pub(crate) from_token: Option<u64>,
    /// One past the last token.
    pub(crate) to_token: Option<u64>,
    /// First and last plane, as `a-b`.
    pub(crate) planes: Option<String>,
}

impl ReadQuery {
    pub(crate) fn planes(&self) -> Result<Option<(u32, u32)>, Problem> {
        let Some(text) = &self.planes else { return Ok(None) };
        let wrong = || Problem::field("planes", format!("'{text}' is not a range a-b"));
        let (low, high) = text.split_once('-').ok_or_else(wrong)?;
        Ok(Some((low.parse().map_err(|_| wrong())?, high.parse().map_err(|_| wrong())?)))
    }
}

/// A message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MessageDto {
    role: String,
    content: String,
}

/// Turns a transaction's staged parts into one revision.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommitDto {
    pub(crate) txn: Uuid,
    /// The session's length after it.
    pub(crate) length_tokens: u64,
    /// Token ids from the old length on.
    pub(crate) tokens: Option<Vec<u32>>,
    /// Messages from there on.
    pub(crate) messages: Option<Vec<MessageDto>>,
    /// The revision that the session must have.
    pub(crate) if_revision: Option<u64>,
}

pub(crate) fn messages(messages: Vec<MessageDto>, tokens_end: Tokens) -> Vec<Message> {
    messages
        .into_iter()
        .map(|message| Message { role: message.role, content: message.content, tokens_end })
        .collect()
}

/// Tokens to compare with the transcript.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MatchDto {
    pub(crate) tokens: Vec<u32>,
}

/// Where and how long to run.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ActivateDto {
    pub(crate) node: Option<String>,
    pub(crate) gpu: Option<u16>,
    /// 30,000 where absent; clipped to 100 to 600,000.
    pub(crate) ttl_ms: Option<u64>,
}

/// A lease and its new time.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RenewDto {
    pub(crate) lease: Uuid,
    pub(crate) ttl_ms: Option<u64>,
}

/// A lease.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReleaseDto {
    pub(crate) lease: Uuid,
}

/// A tier: `hbm`, `pinned` or `peer`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TierDto {
    #[schema(value_type = String)]
    pub(crate) tier: Tier,
}

/// Where to cut: tokens or bytes.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TruncateDto {
    pub(crate) length_tokens: Option<u64>,
    pub(crate) length_bytes: Option<u64>,
}

/// A fork.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForkDto {
    /// Must lie in the parent's shard; minted by the server where absent.
    pub(crate) id: Option<String>,
    pub(crate) length_tokens: Option<u64>,
    pub(crate) labels: Option<BTreeMap<String, String>>,
    /// Taken for symmetry with create: a fork always begins at its parent's home.
    pub(crate) near: Option<String>,
}

/// Where to move a session's home.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateDto {
    pub(crate) node: Option<String>,
    pub(crate) gpu: Option<u16>,
}

/// A new id for an imported session.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImportQuery {
    /// Another id than the archive's.
    pub(crate) id: Option<String>,
}

//! Sessions and what comes of them, over HTTP.

use std::collections::BTreeMap;

use keepwarm_core::session::{Protect, State};
use keepwarm_node::{
    Activation, CheckpointInfo, Explanation, Receipt, SessionInfo, SessionPage, TranscriptInfo, Verdict,
    WriteDone,
};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::layout::LayoutDto;
use super::time::rfc3339;

/// A part's committed length.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PartLength {
    length_bytes: u64,
    blocks: usize,
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SessionDto {
    pub(crate) id: String,
    birth: String,
    layout: LayoutDto,
    layout_hash: String,
    /// Whether cold tiers keep a part of it as narrower numbers: what comes back from them is near to what went there.
    lossy: bool,
    /// Seconds, or "forever".
    protect_s: Value,
    ttl_s: Option<f64>,
    labels: BTreeMap<String, String>,
    /// `warm` or `cold`.
    state: &'static str,
    /// Why it is cold.
    #[serde(skip_serializing_if = "Option::is_none")]
    cold_reason: Option<&'static str>,
    generation: u64,
    revision: u64,
    length_tokens: u64,
    /// Can be ahead of `length_tokens` while a checkpoint is under way.
    transcript_tokens: u64,
    parts: BTreeMap<String, PartLength>,
    parent: Option<Value>,
    branches: Vec<String>,
    /// Bytes in `hbm`, `pinned`, `peer`.
    tiers: BTreeMap<&'static str, u64>,
    owner: String,
    home: Option<Value>,
    holders: Vec<String>,
    /// `full` or `degraded`.
    durability: &'static str,
    lease: Option<Value>,
    last_write_id: Option<String>,
    created_at: String,
    last_used_at: String,
}

impl From<SessionInfo> for SessionDto {
    fn from(info: SessionInfo) -> Self {
        let m = &info.manifest;
        let length = |state: &keepwarm_core::session::PartState| PartLength {
            length_bytes: state.length.0,
            blocks: state.blocks.len(),
        };
        let parts =
            m.layout.parts().iter().zip(&m.parts).map(|(part, state)| (part.name.to_string(), length(state)));
        let (state, cold_reason) = match m.state {
            State::Warm => ("warm", None),
            State::Cold(reason) => ("cold", Some(reason.word())),
        };
        let tiers = [("hbm", info.tiers.hbm), ("pinned", info.tiers.pinned), ("peer", info.tiers.peer)];
        Self {
            id: m.key.id.to_string(),
            birth: m.birth.to_string(),
            layout: LayoutDto::of(&m.layout),
            layout_hash: m.layout.hash().to_string(),
            lossy: m.layout.is_lossy(),
            protect_s: match m.protect {
                Protect::For(duration) => json!(duration.0 as f64 / 1000.0),
                Protect::Forever => json!("forever"),
            },
            ttl_s: m.ttl.map(|ttl| ttl.0 as f64 / 1000.0),
            labels: m.labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            state,
            cold_reason,
            generation: m.stamp.generation.0,
            revision: m.revision.0,
            length_tokens: m.length_tokens.0,
            transcript_tokens: m.transcript_tokens.0,
            parts: parts.collect(),
            parent: m.parent.as_ref().map(|parent| {
                json!({"id": parent.id.to_string(), "birth": parent.birth.to_string(), "revision": parent.revision.0,
                       "length_tokens": parent.length.0})
            }),
            branches: m.branches.iter().map(ToString::to_string).collect(),
            tiers: tiers.into_iter().map(|(tier, bytes)| (tier, bytes.0)).collect(),
            owner: info.owner.to_string(),
            home: info.home.map(|home| json!({"node": home.node.to_string(), "gpus": [home.gpu.0]})),
            holders: m.holders.iter().map(|holder| holder.node.to_string()).collect(),
            durability: info.durability.word(),
            lease: info.lease.map(|lease| json!({"id": lease.id.to_string(), "expires_at": rfc3339(lease.expires_at)})),
            last_write_id: m.writes.last().map(|memo| memo.id.to_string()),
            created_at: rfc3339(m.created_at),
            last_used_at: rfc3339(info.last_used_at),
        }
    }
}

/// A page of sessions.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PageDto {
    sessions: Vec<SessionDto>,
    /// Give it as `cursor` for the next page.
    next_cursor: Option<String>,
    /// Shards that did not answer.
    incomplete: Vec<u32>,
}

impl From<SessionPage> for PageDto {
    fn from(page: SessionPage) -> Self {
        Self {
            sessions: page.sessions.into_iter().map(Into::into).collect(),
            next_cursor: page.next.map(|id| id.to_string()),
            incomplete: page.incomplete.into_iter().map(|shard| shard.0).collect(),
        }
    }
}

/// A committed or staged write.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum WrittenDto {
    /// A revision was made.
    Committed {
        revision: u64,
        generation: u64,
        birth: String,
        length_tokens: u64,
        length_bytes: u64,
        holders: Vec<String>,
        durability: &'static str,
    },
    /// Waits for its commit.
    Staged { staged: bool, txn: String, length_bytes: u64, expires_at: String },
}

impl From<WriteDone> for WrittenDto {
    fn from(done: WriteDone) -> Self {
        match done {
            WriteDone::Committed(written, durability) => Self::Committed {
                revision: written.revision.0,
                generation: written.generation.0,
                birth: written.birth.to_string(),
                length_tokens: written.length_tokens.0,
                length_bytes: written.length.0,
                holders: written.manifest.holders.iter().map(|holder| holder.node.to_string()).collect(),
                durability: durability.word(),
            },
            WriteDone::Staged(staged) => Self::Staged {
                staged: true,
                txn: staged.txn.to_string(),
                length_bytes: staged.length.0,
                expires_at: rfc3339(staged.expires_at),
            },
        }
    }
}

/// What became of a verb.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VerdictDto {
    /// `accepted`, `clipped`, `deferred`, `rejected` or `missing`.
    outcome: &'static str,
    /// Why; empty where there is nothing to explain.
    reason: String,
}

impl From<Verdict> for VerdictDto {
    fn from(verdict: Verdict) -> Self {
        Self { outcome: verdict.outcome.word(), reason: verdict.reason }
    }
}

pub(crate) fn activation(activation: &Activation) -> Value {
    json!({
        "outcome": activation.verdict.outcome.word(),
        "reason": activation.verdict.reason,
        "lease": {
            "id": activation.lease.id.to_string(),
            "epoch": activation.lease.epoch.0,
            "expires_at": rfc3339(activation.lease.expires_at),
        },
        "home": {"node": activation.home.node.to_string(), "gpus": [activation.home.gpu.0]},
        "source": activation.source.word(),
        "bytes_moved": activation.bytes_moved.0,
        "duration_ms": activation.duration.as_secs_f64() * 1000.0,
        "revision": activation.manifest.revision.0,
    })
}

pub(crate) fn checkpoint(info: &CheckpointInfo) -> Value {
    json!({
        "outcome": info.verdict.outcome.word(),
        "reason": info.verdict.reason,
        "revision": info.manifest.revision.0,
        "generation": info.manifest.stamp.generation.0,
        "holders": info.manifest.holders.iter().map(|holder| holder.node.to_string()).collect::<Vec<_>>(),
        "checksum": format!("{:032x}", info.checksum),
    })
}

pub(crate) fn transcript(transcript: &TranscriptInfo) -> Value {
    let messages =
        transcript.messages.iter().map(|message| json!({"role": message.role, "content": message.content}));
    json!({
        "tokens": transcript.tokens,
        "messages": messages.collect::<Vec<_>>(),
        "length_tokens": transcript.tokens.len(),
    })
}

pub(crate) fn receipt(receipt: &Receipt) -> Value {
    let freed = receipt.freed.iter().map(|freed| {
        json!({"node": freed.node.to_string(), "tier": freed.tier.word(), "bytes": freed.bytes.0, "scrubbed": freed.scrubbed})
    });
    json!({
        "id": receipt.id.to_string(),
        "birth": receipt.birth.to_string(),
        "revision": receipt.revision.0,
        "freed": freed.collect::<Vec<_>>(),
        "pending": receipt.pending.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

pub(crate) fn explanation(explained: Explanation, node: &str) -> Value {
    let gpus = explained
        .gpus
        .iter()
        .map(|(gpu, bytes)| json!({"node": node, "tier": format!("hbm:{gpu}"), "bytes": bytes.0}));
    let pinned = json!({"node": node, "tier": "pinned", "bytes": explained.session.tiers.pinned.0});
    let moves = explained.moves.iter().map(|moved| {
        json!({"at": rfc3339(moved.at), "from": moved.from, "to": moved.to, "bytes": moved.bytes.0, "why": moved.why})
    });
    let hits: BTreeMap<_, _> = explained.hits.iter().map(|(source, count)| (source.word(), *count)).collect();
    let misses: BTreeMap<_, _> = explained.misses.iter().copied().collect();
    json!({
        "residency": gpus.chain([pinned]).collect::<Vec<_>>(),
        "moves": moves.collect::<Vec<_>>(),
        "hits": hits,
        "misses": misses,
        "session": SessionDto::from(explained.session),
    })
}

//! Sessions and their layouts, as the API shows them.

use std::collections::BTreeMap;

use keepwarm_types::{Birth, ColdReason, Durability, Revision};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::etag::Etag;
use crate::verbs::Lease;

/// What a session's bytes are; immutable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The model's name.
    pub model: String,
    /// Whatever changes the bytes' meaning: weights, adapter, rope, dtype, the engine's order.
    pub fingerprint: String,
    /// At least one.
    pub parts: Vec<PartLayout>,
}

/// One kind of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartLayout {
    /// Unique within the layout.
    pub name: String,
    /// How its bytes lie.
    #[serde(flatten)]
    pub form: Form,
    /// What cold tiers keep of a paged part in plane order, if not its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold: Option<Cold>,
}

/// What cold tiers keep of a part's numbers: about half the bytes of halves, and near to what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "dtype", rename_all = "lowercase")]
pub enum Cold {
    /// FP8 E4M3, with a scale for each plane of a block.
    Fp8 {
        /// What the numbers are where they are warm.
        from: Number,
    },
}

/// A number, in little-endian bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Number {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

/// How a paged part's bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Tokens one after another.
    Token,
    /// Blocks one after another, each plane by plane, the last with just its valid tokens.
    Plane,
}

/// How a part's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "lowercase")]
pub enum Form {
    /// KV pages of tokens 0..length.
    Paged {
        /// Tokens in a full block.
        tokens_per_block: u32,
        /// Layers x K/V x head groups.
        planes: u32,
        /// Bytes of a token in a plane.
        plane_bytes_per_token: u32,
        /// Tokens or planes first.
        order: Order,
    },
    /// The same, of which only the last tokens need exist.
    Window {
        /// Tokens in a full block.
        tokens_per_block: u32,
        /// Layers x K/V x head groups.
        planes: u32,
        /// Bytes of a token in a plane.
        plane_bytes_per_token: u32,
        /// Tokens or planes first.
        order: Order,
        /// How many of the last tokens must exist.
        window_tokens: u32,
    },
    /// A fixed number of bytes, replaced whole.
    Snapshot {
        /// Exactly this many.
        bytes: u64,
    },
    /// An untyped string by offset.
    Bytes {
        /// Bytes in a full block; 1 MiB where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        block_bytes: Option<u64>,
    },
}

/// How long after its last use a session's bytes are never dropped to make room.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Protect {
    /// Seconds.
    Seconds(f64),
    /// Always, under the tenant's quota.
    Forever,
}

const FOREVER: &str = "forever";

impl Serialize for Protect {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Seconds(seconds) => serializer.serialize_f64(*seconds),
            Self::Forever => serializer.serialize_str(FOREVER),
        }
    }
}

impl<'de> Deserialize<'de> for Protect {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Word(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(seconds) => Ok(Self::Seconds(seconds)),
            Either::Word(word) if word == FOREVER => Ok(Self::Forever),
            Either::Word(word) => {
                Err(D::Error::custom(format!("'{word}' is neither seconds nor \"{FOREVER}\"")))
            }
        }
    }
}

/// A session to make.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NewSession {
    /// Its id: always minted on this side, so that a lost answer can be asked for again.
    pub id: Uuid,
    /// What its bytes are.
    pub layout: Layout,
    /// The server's default (900 s) where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protect_s: Option<Protect>,
    /// Seconds after the last use until it expires; never where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<f64>,
    /// Names and values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// A session whose home the new one should share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub near: Option<Uuid>,
}

impl NewSession {
    /// A session with a new id (UUIDv7) and the server's defaults.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self { id: Uuid::now_v7(), layout, protect_s: None, ttl_s: None, labels: BTreeMap::new(), near: None }
    }
}

/// A part's committed length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartState {
    /// In bytes.
    pub length_bytes: u64,
    /// In blocks.
    pub blocks: u64,
}

/// Bytes of a session per tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierBytes {
    /// In GPUs' memory.
    #[serde(default)]
    pub hbm: u64,
    /// In page-locked memory of the owner.
    #[serde(default)]
    pub pinned: u64,
    /// On other nodes.
    #[serde(default)]
    pub peer: u64,
}

/// Where a session runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// Which node.
    pub node: String,
    /// Which of its GPUs.
    pub gpus: Vec<u16>,
}

/// A lease, as others may see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseInfo {
    /// Its id.
    pub id: Uuid,
    /// RFC 3339.
    pub expires_at: String,
}

impl From<&Lease> for LeaseInfo {
    fn from(lease: &Lease) -> Self {
        Self { id: lease.id, expires_at: lease.expires_at.clone() }
    }
}

/// Whether a session has bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In some tier.
    Warm,
    /// Only its manifest and transcript exist.
    Cold,
}

/// A session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Its id.
    pub id: Uuid,
    /// Which life of the id.
    pub birth: String,
    /// What its bytes are.
    pub layout: Layout,
    /// BLAKE3 of the layout.
    pub layout_hash: String,
    /// Whether what comes back from cold tiers is only near to what went there.
    #[serde(default)]
    pub lossy: bool,
    /// Protection after the last use.
    pub protect_s: Protect,
    /// Seconds after the last use until it expires.
    pub ttl_s: Option<f64>,
    /// Names and values.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Warm or cold.
    pub state: State,
    /// Why it is cold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_reason: Option<ColdReason>,
    /// Of its shard.
    pub generation: u64,
    /// Of this life.
    pub revision: u64,
    /// Tokens whose state it holds.
    pub length_tokens: u64,
    /// Tokens of its transcript: ahead of `length_tokens` while a checkpoint is under way.
    #[serde(default)]
    pub transcript_tokens: u64,
    /// Lengths by part.
    #[serde(default)]
    pub parts: BTreeMap<String, PartState>,
    /// What it was forked from.
    #[serde(default)]
    pub parent: Option<serde_json::Value>,
    /// Forks that its conversation made.
    #[serde(default)]
    pub branches: Vec<String>,
    /// Bytes per tier.
    #[serde(default)]
    pub tiers: TierBytes,
    /// The node that owns it.
    pub owner: String,
    /// Where it runs or last ran.
    pub home: Option<Home>,
    /// Nodes with all its bytes.
    #[serde(default)]
    pub holders: Vec<String>,
    /// Whether it has all promised copies.
    pub durability: Durability,
    /// The lease in force.
    pub lease: Option<LeaseInfo>,
    /// The last write that carried an id.
    pub last_write_id: Option<Uuid>,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub last_used_at: String,
}

impl Session {
    /// What `If-Match` takes to demand exactly this revision; none where the birth is of no known form.
    #[must_use]
    pub fn etag(&self) -> Option<Etag> {
        let birth: Birth = self.birth.parse().ok()?;
        Some(Etag { birth, revision: Revision(self.revision) })
    }
}

/// A page of a listing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionPage {
    /// In the order of their ids.
    pub sessions: Vec<Session>,
    /// Where the next page begins; none at the end.
    pub next_cursor: Option<String>,
    /// Shards that did not answer.
    #[serde(default)]
    pub incomplete: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_go_over_the_wire_as_the_contract_says() {
        let text = r#"{"model":"m","fingerprint":"f","parts":[
            {"name":"kv","form":"paged","tokens_per_block":16,"planes":60,"plane_bytes_per_token":384,"order":"plane"},
            {"name":"w","form":"window","tokens_per_block":8,"planes":2,"plane_bytes_per_token":4,"order":"token",
             "window_tokens":99},
            {"name":"s","form":"snapshot","bytes":5},{"name":"b","form":"bytes"},
            {"name":"c","form":"paged","tokens_per_block":16,"planes":60,"plane_bytes_per_token":384,"order":"plane",
             "cold":{"dtype":"fp8","from":"f16"}}]}"#;
        let layout: Layout = serde_json::from_str(text).unwrap();
        assert_eq!(layout.parts[3].form, Form::Bytes { block_bytes: None });
        assert_eq!(layout.parts[4].cold, Some(Cold::Fp8 { from: Number::F16 }));
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&layout).unwrap(), value);
    }

    #[test]
    fn protection_is_seconds_or_forever() {
        for (protect, text) in [(Protect::Seconds(1.5), "1.5"), (Protect::Forever, "\"forever\"")] {
            assert_eq!(serde_json::to_string(&protect).unwrap(), text);
            assert_eq!(serde_json::from_str::<Protect>(text).unwrap(), protect);
        }
        assert!(serde_json::from_str::<Protect>("\"never\"").is_err());
    }
}

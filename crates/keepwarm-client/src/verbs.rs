//! What the verbs on a session take and answer.

use std::collections::BTreeMap;

use keepwarm_types::{Durability, Outcome, Source, Tier};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::session::{Home, Session};

/// What became of a write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Written {
    /// A revision was made, on these copies.
    Committed {
        /// The new revision.
        revision: u64,
        /// Of the shard.
        generation: u64,
        /// Of the session.
        birth: String,
        /// The session's length.
        length_tokens: u64,
        /// The part's length.
        length_bytes: u64,
        /// Who has the bytes.
        holders: Vec<String>,
        /// Whether those are as many as promised.
        durability: Durability,
    },
    /// The bytes wait for their commit.
    Staged {
        /// Always true.
        staged: bool,
        /// The transaction.
        txn: Uuid,
        /// The part's length with them.
        length_bytes: u64,
        /// RFC 3339.
        expires_at: String,
    },
}

impl Written {
    /// The revision that was made; none for staged bytes.
    #[must_use]
    pub const fn revision(&self) -> Option<u64> {
        match self {
            Self::Committed { revision, .. } => Some(*revision),
            Self::Staged { .. } => None,
        }
    }
}

/// A message as a transcript keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Makes one revision of a transaction's staged parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Commit {
    /// The transaction.
    pub txn: Uuid,
    /// The session's length after it.
    pub length_tokens: u64,
    /// Token ids from the old length on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<u32>>,
    /// Messages from there on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<StoredMessage>>,
    /// The revision that the session must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub if_revision: Option<u64>,
}

/// Token ids and messages of a session; kept warm or cold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transcript {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Messages.
    pub messages: Vec<StoredMessage>,
    /// Number of tokens.
    pub length_tokens: u64,
}

/// How much of a token sequence a session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// So many of the leading tokens.
    pub matched_tokens: u64,
}

/// A verb's outcome and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What became of it.
    pub outcome: Outcome,
    /// Why; empty where there is nothing to explain.
    #[serde(default)]
    pub reason: String,
}

/// A checkpoint's receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// What became of it.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The revision that the copies are of.
    pub revision: u64,
    /// Of the shard.
    pub generation: u64,
    /// Who has them.
    pub holders: Vec<String>,
    /// One digest over the checksums of all blocks.
    pub checksum: String,
}

/// The right to run and write a session for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Named in writes by `Keepwarm-Lease`.
    pub id: Uuid,
    /// +1 for each lease of the session.
    #[serde(default)]
    pub epoch: u64,
    /// RFC 3339.
    pub expires_at: String,
}

/// Where a session shall run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// Any node where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Where it is warm or room is, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<u16>,
}

/// A session ready to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Activation {
    /// Accepted, or clipped (the lease is shorter than asked).
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The write lease.
    pub lease: Lease,
    /// Where it runs.
    pub home: Home,
    /// Where its bytes were; `hbm` with bytes moved: on another GPU of the node.
    pub source: Source,
    /// Bytes that were moved into the GPU's memory.
    pub bytes_moved: u64,
    /// How long that took.
    pub duration_ms: f64,
}

/// Where to cut a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Length {
    /// After so many tokens.
    #[serde(rename = "length_tokens")]
    Tokens(u64),
    /// After so many bytes of its one `bytes` part.
    #[serde(rename = "length_bytes")]
    Bytes(u64),
}

/// A fork to make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fork {
    /// The child's id; minted on this side, in its parent's shard, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// How much of the parent; all where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length_tokens: Option<u64>,
    /// The parent's where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
}

/// One move of a session's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// RFC 3339.
    pub at: String,
    /// `hbm:0`, `pinned`, `client`, `prefill`, ….
    pub from: String,
    /// The same, or `none` for a drop.
    pub to: String,
    /// How many bytes.
    pub bytes: u64,
    /// Why.
    pub why: String,
}

/// Bytes of a session in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residency {
    /// On which node.
    pub node: String,
    /// `hbm:N` or `pinned`.
    pub tier: String,
    /// How many bytes.
    pub bytes: u64,
}

/// Where a session's bytes are and how they came there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The session.
    pub session: Session,
    /// Bytes by place.
    pub residency: Vec<Residency>,
    /// The last moves, oldest first; at most 32.
    pub moves: Vec<Move>,
    /// Activations that found bytes, by where.
    #[serde(default)]
    pub hits: BTreeMap<String, u64>,
    /// Activations that found none, by why.
    #[serde(default)]
    pub misses: BTreeMap<String, u64>,
}

/// Memory that a delete gave back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freed {
    /// On which node.
    pub node: String,
    /// In which tier.
    pub tier: Tier,
    /// How many bytes; what another session or a reader still holds is not counted.
    pub bytes: u64,
    /// Whether they are zeroed already; if not, they are before any other tenant's use.
    pub scrubbed: bool,
}

/// A delete's receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The session.
    pub id: Uuid,
    /// Which life.
    pub birth: String,
    /// Its last revision.
    pub revision: u64,
    /// What was given back.
    pub freed: Vec<Freed>,
    /// Nodes that still have to.
    pub pending: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_and_staged_writes_are_told_apart() {
        let committed = r#"{"revision":3,"generation":1,"birth":"0000000007","length_tokens":0,"length_bytes":9,
                            "holders":["n1"],"durability":"full"}"#;
        assert_eq!(serde_json::from_str::<Written>(committed).unwrap().revision(), Some(3));
        let staged = r#"{"staged":true,"txn":"0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041","length_bytes":9,
                         "expires_at":"2026-01-01T00:00:00Z"}"#;
        assert!(matches!(
            serde_json::from_str::<Written>(staged).unwrap(),
            Written::Staged { length_bytes: 9, .. }
        ));
    }

    #[test]
    fn a_cut_names_its_unit() {
        assert_eq!(serde_json::to_string(&Length::Tokens(5)).unwrap(), r#"{"length_tokens":5}"#);
        assert_eq!(serde_json::to_string(&Length::Bytes(6)).unwrap(), r#"{"length_bytes":6}"#);
    }
}

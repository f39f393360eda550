//! Bytes and back: what goes over peer links and into the log, apart from the domain's own types.
//!
//! rkyv archives, validated before they are read; conversions are explicit, and check what an archive cannot
//! (names, versions, known numbers). No hash containers, no shared pointers.
//!
//! - `domain`: entries, responses, deltas.
//! - `raft`: votes, log entries, memberships, snapshots.

pub(crate) mod domain;
pub(crate) mod raft;

use keepwarm_types::NodeName;
use rkyv::util::AlignedVec;

/// Bytes are not what this version of keepwarm writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadBytes(pub(crate) String);

pub(crate) fn bad(what: impl Into<String>) -> BadBytes {
    BadBytes(what.into())
}

pub(crate) fn name(text: &str) -> Result<NodeName, BadBytes> {
    text.parse().map_err(|error| bad(format!("a node's name: {error}")))
}

/// The bytes, aligned as an archive must be.
pub(crate) fn aligned(bytes: &[u8]) -> AlignedVec {
    let mut aligned = AlignedVec::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    aligned
}

/// `encode`, and `decode` where it is asked for, of one archived type.
macro_rules! archive {
    ($encode:ident, $raw:ty) => {
        pub(crate) fn $encode(value: &$raw) -> Vec<u8> {
            rkyv::to_bytes::<rkyv::rancor::Error>(value)
                .expect("plain values of bounded size always archive")
                .into_vec()
        }
    };
    ($encode:ident, $decode:ident, $raw:ty) => {
        $crate::codec::archive!($encode, $raw);
        pub(crate) fn $decode(bytes: &[u8]) -> Result<$raw, $crate::codec::BadBytes> {
            rkyv::from_bytes::<$raw, rkyv::rancor::Error>(&$crate::codec::aligned(bytes))
                .map_err(|error| $crate::codec::bad(error.to_string()))
        }
    };
}
pub(crate) use archive;

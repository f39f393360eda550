//! How much of anything a frame may hold.
//!
//! Both sides keep the same limits on how many of a thing there are and how long it is: what is encoded is never
//! refused for that. How far a counter has counted is looked at by the reader.

use keepwarm_core::registry::REPLICAS_MAX;
use keepwarm_core::session::{LABEL_BYTES_MAX, LABELS_MAX, PARTS_MAX};
use keepwarm_core::shard::BRANCHES_MAX;

/// Most bytes in an envelope's payload: 16 MiB of blocks, 16 MiB of token ids, 24 MiB of text, and room for the rest.
pub const ENVELOPE_BYTES_MAX: usize = 64 << 20;
/// Most bytes in any other payload of this crate but the registry's: 16,384 blocks of 32 bytes, and as much again.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Most blocks that one manifest names, over all parts: a million tokens in blocks of 16 for each of 8 ranks.
/// At 32 bytes a block that is 16 MiB.
pub const MANIFEST_BLOCKS_MAX: usize = 1 << 19;
/// Most token ids in one change of a transcript, or in a transcript sent whole: 4 bytes each, 16 MiB.
pub const TRANSCRIPT_TOKENS_MAX: usize = 1 << 22;
/// Most messages in one change of a transcript: 24 bytes each beside their text, 1.5 MiB.
pub const TRANSCRIPT_MESSAGES_MAX: usize = 1 << 16;
/// Most bytes of text in one change of a transcript: three of the largest request bodies (8 MiB).
pub const TRANSCRIPT_TEXT_MAX: usize = 24 << 20;
/// Longest role of a message, in bytes; the longest in use, `assistant`, has nine.
pub const ROLE_BYTES_MAX: usize = 64;
/// Most keys or heads in one message: four times the 256 that one comparison has, so that a later version may send more.
pub const KEYS_MAX: usize = 1024;
/// Most holders of a session: both sets of a change under way, with their learners.
pub const HOLDERS_MAX: usize = 2 * (REPLICAS_MAX + 1);
/// Most branches: those that are kept, and one more on its way out.
pub const WIRE_BRANCHES_MAX: usize = BRANCHES_MAX + 1;
/// Longest name of a tenant, node or part, in bytes: what the names' own rule says.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest model name or fingerprint, in bytes: what a layout's own rule says.
pub const LAYOUT_TEXT_MAX: usize = 256;
/// No counter of revisions, generations, tokens or bytes reaches this far, and two of them can be added.
pub const COUNT_MAX: u64 = u64::MAX / 2;
/// The same for counters of 32 bits: messages and block numbers.
pub const INDEX_MAX: u32 = u32::MAX / 2;
/// A shard's number is below this.
pub const SHARDS_MAX: u32 = 1 << 16;

/// Bytes that one block takes in an archive.
const BLOCK_BYTES: usize = 32;
/// Bytes that one message takes in an archive, beside its text.
const MESSAGE_BYTES: usize = 24;
/// Bytes of layout, labels, heads and holders, with more than 64 for the fixed part of each.
const REST: usize = PARTS_MAX * (2 * NAME_BYTES_MAX + 128)
    + LABELS_MAX * (2 * LABEL_BYTES_MAX + 64)
    + 2 * KEYS_MAX * (NAME_BYTES_MAX + 64)
    + (HOLDERS_MAX + 2 * REPLICAS_MAX) * (NAME_BYTES_MAX + 64)
    + 2 * LAYOUT_TEXT_MAX
    + 4096;

const _: () = assert!(
    MANIFEST_BLOCKS_MAX * BLOCK_BYTES
        + TRANSCRIPT_TOKENS_MAX * 4
        + TRANSCRIPT_TEXT_MAX
        + TRANSCRIPT_MESSAGES_MAX * (MESSAGE_BYTES + ROLE_BYTES_MAX)
        + REST
        <= ENVELOPE_BYTES_MAX
);

/// More of something than may be in a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {count} are more than the {limit} that a frame may hold")]
pub struct TooLong {
    /// Which field, e.g. `manifest.labels`.
    pub what: &'static str,
    /// How many, or how large.
    pub count: u64,
    /// How many may be.
    pub limit: u64,
}

/// Refuses more than `limit` of `what`.
pub(crate) fn within(what: &'static str, count: usize, limit: usize) -> Result<(), TooLong> {
    if count > limit {
        return Err(TooLong { what, count: count as u64, limit: limit as u64 });
    }
    Ok(())
}

/// The same for a counter.
pub(crate) fn counter(what: &'static str, count: u64) -> Result<u64, TooLong> {
    if count > COUNT_MAX {
        return Err(TooLong { what, count, limit: COUNT_MAX });
    }
    Ok(count)
}

/// The same for a counter of 32 bits.
pub(crate) fn index(what: &'static str, count: u32) -> Result<u32, TooLong> {
    if count > INDEX_MAX {
        return Err(TooLong { what, count: count.into(), limit: INDEX_MAX.into() });
    }
    Ok(count)
}

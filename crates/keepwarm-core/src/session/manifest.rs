//! The session's truth: length, revision, the block instances of each part, holders, parent.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, Generation, GpuIndex, InstanceId, Millis, NodeName,
    PlacementSeq, Revision, SessionId, SessionKey, Timestamp, Tokens, WriteId,
};

use super::layout::{Layout, Part};
use crate::registry::Member;

/// How many of its last write ids a session remembers.
pub const WRITE_IDS_KEPT: usize = 4;
/// Protection of bytes after the last use, when the client does not say.
pub const PROTECT_DEFAULT: Millis = Millis::from_secs(900);
/// Most labels of a session.
pub const LABELS_MAX: usize = 16;
/// Longest label name or value, in bytes.
pub const LABEL_BYTES_MAX: usize = 128;

/// Free-form names and values by which sessions are listed.
pub type Labels = BTreeMap<Box<str>, Box<str>>;

/// A block instance as a manifest names it. 32 bytes, within the budget of 40 a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef {
    /// Which instance.
    pub instance: InstanceId,
    /// Checksum over its `length` bytes.
    pub checksum: BlockChecksum,
    /// Valid bytes as cold tiers keep them; a full block has the part's [`Part::stored_block_bytes`].
    ///
    /// [`Part::stored_block_bytes`]: super::Part::stored_block_bytes
    pub length: u32,
}

const _: () = assert!(size_of::<BlockRef>() <= 40);

/// The committed bytes of one part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartState {
    /// The instances in order. Empty while cold.
    pub blocks: Vec<BlockRef>,
    /// Blocks below this index are outside a `window` part's window and gone; `blocks[0]` is block number `first_block`.
    pub first_block: u32,
    /// Raw bytes of the part from its very beginning, those below `first_block` included. Kept while cold.
    pub length: Bytes,
    /// XXH3-128 over all the part's bytes, where a whole write made it known. Never of a part whose cold form is another.
    pub digest: Option<BlockChecksum>,
}

/// How long a session's bytes are safe from eviction after the last use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// This long.
    For(Millis),
    /// Always, under the tenant's quota.
    Forever,
}

impl Protect {
    /// Until when, counted from the last use.
    #[must_use]
    pub fn until(self, last_used: Timestamp) -> Timestamp {
        match self {
            Self::For(duration) => last_used + duration,
            Self::Forever => Timestamp::NEVER,
        }
    }
}

/// Whether the session's bytes exist in some tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// They do.
    Warm,
    /// Only manifest and transcript do.
    Cold(ColdReason),
}

/// Where a session runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// The node.
    pub node: NodeName,
    /// The GPU there.
    pub gpu: GpuIndex,
}

/// What a session was forked from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The parent's id, in the same tenant.
    pub id: SessionId,
    /// Which life of it.
    pub birth: Birth,
    /// The revision that was forked.
    pub revision: Revision,
    /// How many of its tokens the child began with.
    pub length: Tokens,
}

/// A write that the session remembers, with the revision it made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteMemo {
    /// The client's id for it.
    pub id: WriteId,
    /// A digest over what was asked, so that an id sent with other content is a conflict.
    pub asked: u64,
    /// The revision that the write made.
    pub revision: Revision,
    /// The session's length after it.
    pub length_tokens: Tokens,
    /// The written part's length after it, or zero for a commit of several.
    pub length: Bytes,
}

/// Names one change of one session: no two different contents ever have the same.
///
/// A generation has one primary, in one process, which counts its changes: whoever has the same stamp has the same
/// content, and need not compare it. (Viewstamps of Oki and Liskov, PODC 1988, are the same idea.)
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// The shard's generation when it was made.
    pub generation: Generation,
    /// +1 for each change that the primary of that generation made.
    pub sequence: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.sequence)
    }
}

/// The session's truth, as every replica keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Tenant and id.
    pub key: SessionKey,
    /// Which life of the id.
    pub birth: Birth,
    /// What its bytes are; shared by all sessions of the layout.
    pub layout: Arc<Layout>,
    /// How long bytes are safe after the last use.
    pub protect: Protect,
    /// How long the session lives after the last use; forever where absent.
    pub ttl: Option<Millis>,
    /// Names and values for listing.
    pub labels: Labels,
    /// Names this state of the session among all that ever were: see [`Stamp`].
    pub stamp: Stamp,
    /// +1 for each committed write.
    pub revision: Revision,
    /// +1 for each committed change of holders.
    pub placement_seq: PlacementSeq,
    /// Complete length of all parts.
    pub length_tokens: Tokens,
    /// One per part of the layout, in its order.
    pub parts: Box<[PartState]>,
    /// Tokens in the transcript; can be ahead of `length_tokens` while a checkpoint is under way.
    pub transcript_tokens: Tokens,
    /// Messages in the transcript.
    pub transcript_messages: u32,
    /// The revision that last changed the transcript.
    pub transcript_revision: Revision,
    /// What it was forked from.
    pub parent: Option<Box<Parent>>,
    /// Forks that a leaving history made, oldest first.
    pub branches: Vec<SessionId>,
    /// Warm, or cold and why.
    pub state: State,
    /// Processes that have all bytes of this revision, verified. One that was started again has none.
    pub holders: Arc<[Member]>,
    /// The last writes that carried an id, oldest first.
    pub writes: Vec<WriteMemo>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last read, written or run.
    pub last_used_at: Timestamp,
}

impl Manifest {
    /// The entity tag: birth and revision.
    #[must_use]
    pub const fn etag(&self) -> Etag {
        Etag { birth: self.birth, revision: self.revision }
    }

    /// Bytes that the manifest names now, over all parts, as cold tiers keep them.
    #[must_use]
    pub fn stored_bytes(&self) -> Bytes {
        Bytes(self.instances().map(|block| u64::from(block.length)).sum())
    }

    /// Bytes that all it names takes on a GPU.
    #[must_use]
    pub fn raw_bytes(&self) -> Bytes {
        let raw = |(part, state): (&Part, &PartState)| {
            part.raw_sum(state.blocks.iter().map(|block| block.length)).unwrap_or(state.length)
        };
        self.layout.parts().iter().zip(&self.parts).map(raw).sum()
    }

    /// Its bytes are gone, for this reason; lengths stay.
    pub fn go_cold(&mut self, reason: ColdReason) {
        self.state = State::Cold(reason);
        self.holders = Arc::from([]);
        for part in &mut self.parts {
            part.blocks = Vec::new();
            part.first_block = 0;
        }
    }

    /// A holder has let its bytes go; without another one they are gone.
    pub fn leave(&mut self, member: &Member) {
        self.holders = self.holders.iter().filter(|holder| *holder != member).cloned().collect();
        if self.holders.is_empty() && self.state == State::Warm && self.stored_bytes() > Bytes::ZERO {
            self.go_cold(ColdReason::HoldersLost);
        }
    }

    /// Every block instance that the manifest names.
    pub fn instances(&self) -> impl Iterator<Item = &BlockRef> {
        self.parts.iter().flat_map(|part| part.blocks.iter())
    }

    /// Tokens of the part at `index`, where it counts tokens.
    #[must_use]
    pub fn part_tokens(&self, index: usize) -> Option<Tokens> {
        let planes = self.layout.parts()[index].form.planes()?;
        Some(Tokens(self.parts[index].length.0 / planes.token_bytes()))
    }

    /// When the session expires if last used then.
    #[must_use]
    pub fn expires_at(&self, last_used: Timestamp) -> Timestamp {
        self.ttl.map_or(Timestamp::NEVER, |ttl| last_used + ttl)
    }
}

/// Birth and revision: `k7f2q9zzzz-7`, in quotes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Etag {
    /// Which life.
    pub birth: Birth,
    /// Which revision of it.
    pub revision: Revision,
}

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.birth, self.revision)
    }
}

/// The text is not an entity tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an entity tag of the form BIRTH-REVISION")]
pub struct ParseEtagError(String);

impl FromStr for Etag {
    type Err = ParseEtagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseEtagError(text.to_owned());
        let (birth, revision) = text.split_once('-').ok_or_else(error)?;
        Ok(Self {
            birth: birth.parse().map_err(|_| error())?,
            revision: Revision(revision.parse().map_err(|_| error())?),
        })
    }
}

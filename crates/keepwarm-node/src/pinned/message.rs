//! What the pinned actor can be told.

use keepwarm_core::shard::Residence;
use keepwarm_memory::BlockMut;
use keepwarm_types::{Bytes, Owner, SessionKey, Timestamp};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::handle::PinnedInfo;

/// For whom room is wanted; a later pool may use what is kept from an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pool {
    /// A client's write.
    Client,
    /// A session's bytes from another node, for a request that waits for them.
    Restore,
    /// A checkpoint from HBM.
    SpillIn,
    /// Another node's bytes, of which this one is to keep a copy: it has them at once or not at all.
    ReplicaIn,
    /// Bytes that another holder has no room for: at once, below the low watermark, and nobody leaves for them.
    Spare,
}

/// Blocks that somebody wants.
pub(crate) struct Reserve {
    pub(crate) owner: Owner,
    pub(crate) pool: Pool,
    /// Size and number of the blocks.
    pub(crate) sizes: Vec<(Bytes, usize)>,
    pub(crate) deadline: Timestamp,
    pub(crate) reply: oneshot::Sender<Result<Vec<BlockMut>, Error>>,
}

/// Everything the pinned actor can be told.
pub(crate) enum PinnedMsg {
    /// Somebody wants blocks.
    Reserve(Reserve),
    /// A shard's news of a session.
    Reside(Residence),
    /// A shard will not let this session go now.
    EvictRefused(SessionKey),
    /// Time passed; memory may have come back.
    Tick,
    /// Figures, please.
    Info(oneshot::Sender<PinnedInfo>),
}

//! Wire types as version 1 has them, where a later version has others.

use rkyv::{Archive, Serialize};

use crate::blocks::{Direction, Unread};
use crate::identity::WireKey;
use crate::session::WireBlock;

#[derive(Archive, Serialize)]
pub(crate) struct WireBlocksHeader {
    pub(crate) shard: u32,
    pub(crate) generation: u64,
    pub(crate) key: WireKey,
    pub(crate) birth: u64,
    pub(crate) blocks: Vec<WireBlock>,
    pub(crate) pull: bool,
}

/// What version 1 says of a direction; none where it has no word for it.
pub(crate) const fn pull(direction: Direction) -> Option<bool> {
    match direction {
        Direction::Push => Some(false),
        Direction::Pull => Some(true),
        Direction::Spare => None,
    }
}

impl ArchivedWireBlocksHeader {
    /// A sender of version 1 that pushes wants room made: it knows no other push.
    pub(crate) fn unread(&self) -> Unread<'_> {
        Unread {
            shard: self.shard.to_native(),
            generation: self.generation.to_native(),
            key: &self.key,
            birth: self.birth.to_native(),
            blocks: &self.blocks,
            direction: if self.pull { Direction::Pull } else { Direction::Push },
        }
    }
}

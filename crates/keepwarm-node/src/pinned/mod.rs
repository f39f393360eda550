//! The pinned actor: this node's page-locked memory and who may stay in it.
//!
//! - **Owns** the pinned arena and its residency: sizes, uses and protection of the sessions whose bytes the
//!   shard actors hold. It never holds a guard itself: memory comes back when the last guard drops.
//! - **Takes** requests for blocks, residency news from shards, refused evictions, ticks.
//! - **Sends** eviction proposals to shards: a session leaves only once its shard has committed that.
//! - **Supervised** by the node actor. A panic ends the node: without it nothing could be written.
//!
//! Requests for room are answered at once where the arena has it; else they wait, bounded in number and in
//! time, for evictions. A part of the arena is kept for checkpoints, so that clients cannot starve them.

mod actor;
mod message;

pub(crate) use actor::{PinnedActor, PinnedArgs, ROOM_WAIT};
pub(crate) use message::{PinnedMsg, Pool, Reserve};

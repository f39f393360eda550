//! The gpu actor: one GPU's memory, the sessions resident in it, the leases running there.
//!
//! - **Owns** the device with its arena, a guard of each resident block instance, the tier's residency.
//! - **Takes** loads with guards of their pinned sources, requests for working blocks, the blocks of ended
//!   turns, word of checkpoints, invalidations, other GPUs' wishes for blocks that are here, ticks.
//! - **Sends** nothing but answers; copies run on the device's streams, or a link's, and report back here. The task of a
//!   load asks other GPUs' actors for what they have of it.
//! - **Supervised** by the node actor. A panic costs the resident copies: everything committed is in pinned
//!   memory, what a turn had not checkpointed yet is computed again from its transcript. A new actor starts
//!   on the same device, unless it panics again and again; then the GPU is fenced and the node goes on.
//!
//! What is here is a cache: it is used only if its instances are those that the committed manifest names.

mod actor;
mod board;
mod message;
mod near;
mod ways;

pub(crate) use actor::{COPY_DEADLINE, GpuActor, GpuArgs};
pub(crate) use board::Board;
pub(crate) use message::{GpuMsg, Kept, Loaded};
pub(crate) use near::Near;
pub(crate) use ways::Ways;

//! The gpu actor: one GPU's memory, the sessions resident in it, the leases running there.
//!
//! - **Owns** the device with its arena, a guard of each resident block instance, the tier's residency.
//! - **Takes** loads with guards of their pinned sources, requests for working blocks, the blocks of ended
//!   turns, word of checkpoints, invalidations, ticks.
//! - **Sends** nothing but answers; copies run on the device's streams and report back here.
//! - **Supervised** by the node actor. A panic costs the resident copies: everything committed is in pinned
//!   memory, what a turn had not checkpointed yet is computed again from its transcript. A new actor starts
//!   on the same device, unless it panics again and again; then the GPU is fenced and the node goes on.
//!
//! What is here is a cache: it is used only if its instances are those that the committed manifest names.

mod actor;
mod board;
mod message;

pub(crate) use actor::{COPY_DEADLINE, GpuActor, GpuArgs};
pub(crate) use board::Board;
pub(crate) use message::{GpuMsg, Kept, Loaded};

//! The router actor: which GPU a session runs on, and what was seen of its moves.
//!
//! - **Owns** the homes it has seen and the last moves of sessions, both bounded LRUs. They are hints: losing
//!   them costs a restore on another GPU, never data.
//! - **Takes** placement questions, moves to remember, ends of sessions.
//! - **Sends** nothing on its own.
//! - **Supervised** by the node actor. A panic ends the node: nothing could be placed any more.

mod actor;
mod message;

pub(crate) use actor::{RouterActor, RouterArgs, gpu_index};
pub(crate) use message::RouterMsg;

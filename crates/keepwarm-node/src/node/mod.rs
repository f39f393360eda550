//! The node actor, and starting and stopping a node.
//!
//! - **Owns** the other actors' lives: start-up order (devices, pinned arena, catalog, shards, router, GPUs),
//!   restarts, shutdown order.
//! - **Takes** supervision events and the order to stop.
//! - A shard or gpu actor that panics is started again; one that keeps panicking is left down (a GPU is
//!   fenced). A panic of pinned or router ends the node: [`Node::failed`] resolves.

mod actor;
mod hardware;
mod start;

pub use hardware::{WORKSPACE_MAX, cuda_selector};
pub use start::{Node, ShutdownReport, StartError};

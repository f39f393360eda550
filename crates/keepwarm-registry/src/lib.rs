//! Consensus for the core's registry: who is there, and who owns which shard.
//!
//! The state machine is the core's and pure; this crate lets a few voters agree upon its entries (openraft), keeps
//! their log in the catalog's folder, and lets every other node follow. It owns when a failure is declared and when
//! the plan is carried out; it decides neither, and never sees a session or a socket: requests travel over a
//! [`RegistryLink`].
//!
//! - `settings`: what a node is told at start. `handle`: starting, and what a node may ask.
//! - `membership`: founding, joining, replacing a disk. `lead`: what the leader does. `follow`: nodes without a vote.
//! - `propose`, `serve`, `network`, `link`, `wire`, `codec`: ways to and from other nodes.
//! - `log_store`, `machine`, `raft_types`: openraft's view of us.

mod codec;
mod follow;
mod handle;
mod lead;
mod link;
mod log_store;
mod machine;
mod membership;
mod network;
mod propose;
mod raft_types;
mod serve;
mod settings;
mod shared;
mod wire;

pub use handle::{RegisterError, RegistryHandle, RegistryNode, StartError};
pub use link::{MESSAGE_BYTES_MAX, RegistryLink, RegistryLinkError};
pub use machine::snapshot_bytes;
pub use propose::ProposeError;
pub use settings::{Bootstrap, Settings, SettingsError, Timers, VOTERS};
pub use shared::Standing;

#[cfg(test)]
mod tests;

//! One replica of one shard: primary-backup replication with its configuration in the registry.
//!
//! [`Replica`] takes a [`ReplicaEvent`] with the present time and answers with [`ReplicaCommand`]s. It runs the verbs
//! ([`Shard`](crate::shard::Shard)) while it is primary and keeps copies of every session while it is not. The
//! protocol is that of PacificA (Lin et al., Microsoft Research 2008), per session instead of per log:
//!
//! - **Bytes first.** A change's new block instances go to the other holders; a failure so far is definite.
//! - **Then the change** goes to every replica at once and to the own catalog; it is committed when all have it.
//!   From the first send on its outcome is committed or unknown.
//! - **A stamp names a change** ([`Stamp`](crate::session::Stamp)): whoever has the same stamp has the same content.
//! - **Take-over**: the new primary's own copies win. Before the first answer about a session, the heads of all
//!   replicas are compared with its own, and what differs is replaced; a sweep does the rest. A learner is filled
//!   by the same sweep.
//! - **Answers that changed nothing** wait for a round in which every replica confirms the generation, begun after
//!   the request came.
//!
//! Whatever is sent is sent again until it is answered or its receiver leaves the set; messages may be lost, doubled
//! and reordered. Clocks decide when to send again and whom to tell "unknown", never what is true.
//!
//! - `message`: what replicas say to each other. `event`: events and commands.
//! - `state`: the role, and how a new set changes it. `follower`: copies, and what a primary may do to them.
//! - `office`: what a primary keeps. `change`: a change's way. `sweep`: comparing and installing.
//! - `confirm`: rounds. `heal`: who holds bytes, and who should. `room`: who holds them instead, where room is short.
//! - `saving`: what is on its way to the own catalog. `silent`: who keeps the others waiting.
//! - `leaving`: who goes, and when. `ceding`: who is primary instead, because a session shall run there.

mod ceding;
mod change;
mod confirm;
mod damage;
mod event;
mod follower;
mod heal;
mod leaving;
mod message;
mod office;
mod room;
mod saving;
mod silent;
mod state;
mod sweep;

pub use event::{CopyFailed, CopyId, ReplicaCommand, ReplicaEvent, ReplicaSettings};
pub use message::{Compare, Content, Envelope, Install, Message, Prepare, Span};
pub use state::{RESEND, Replica, Role};

#[cfg(test)]
mod tests;

//! The registry's state machine: nodes, shards, the spec's version.
//!
//! [`Registry`] applies [`Entry`]s in the order that a consensus group (or, in a cluster of one, the process
//! itself) agreed upon, and knows nothing of that group: the same entries give the same state everywhere.
//! It decides who may own a shard; it never sees a session.
//!
//! A set names its replicas by node. Each node counts in its present incarnation alone, because the entry that
//! registers a new one takes the old one out of every set (or, where it was the last, puts the new one in its
//! place): [`Registry::set`] therefore gives members with incarnations without storing them per shard.
//!
//! - `entry`: what can be agreed upon, and what each answers.
//! - `state`: nodes and sets, and how an entry changes them.
//! - `copyset`: which groups of nodes may hold a shard (Cidon et al., USENIX ATC 2013), across zones.
//! - `plan`: what the leader proposes next: first sets, learners, promotions of balance, drains.

mod copyset;
mod entry;
mod plan;
mod state;

pub use copyset::copysets;
pub use entry::{Applied, Change, Entry, Refused, Registration, Response};
pub use plan::{LEARNERS_MAX, plan};
pub use state::{Member, NodeState, NodeStatus, REPLICAS_MAX, Registry, RegistrySettings, ReplicaSet};

#[cfg(test)]
mod tests;

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
//! - `sets`: the table of shards, in pages that clones share.
//! - `delta`: what has changed since a version, for followers and snapshots.
//! - `detector`: whose process has failed, from what several report.
//! - `copyset`: which groups of nodes may hold a shard (Cidon et al., USENIX ATC 2013), across zones.
//! - `pace`: who takes changes much more slowly than the others.
//! - `plan`: what the leader proposes next: first sets, learners, promotions of balance, drains.

mod copyset;
mod delta;
mod detector;
mod entry;
mod pace;
mod plan;
mod sets;
mod state;

pub use copyset::copysets;
pub use delta::{Delta, DeltaError, SetState};
pub use detector::{
    CEDED_MAX, Conditions, Detector, DetectorEvent, DetectorSettings, Finding, Fitness, HealthReport, Unheard,
};
pub use entry::{Applied, Change, Entry, Refused, Registration, Response};
pub use pace::Pace;
pub use plan::{ASSIGN_MAX, LEARNERS_MAX, leavers, plan, plan_under};
pub use sets::REPLICAS_MAX;
pub use state::{Member, NodeState, NodeStatus, Registry, RegistrySettings, ReplicaSet};

#[cfg(test)]
mod tests;

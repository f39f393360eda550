//! The shard actor: the sessions of one shard, and the guards of their committed and staged bytes.
//!
//! - **Owns** the core's [`Shard`](keepwarm_core::shard::Shard) and, for each block instance that a manifest
//!   or a stage of this shard names, one guard with a count of the names. A reference never crosses shards,
//!   so dropping the last name here gives the memory back, once the last reader is done.
//! - **Takes** requests with their guards, the catalog's word that records are safe, eviction proposals
//!   from the pinned actor, ticks.
//! - **Sends** residency news to the pinned actor and invalidations to the GPU actors, records to the catalog.
//! - **Supervised** by the node actor. A panic loses this shard's guards: its sessions come back cold from the
//!   catalog in a new actor, requests in flight answer `outcome_unknown`, other shards are not touched.

mod actor;
mod message;

pub(crate) use actor::{ShardActor, ShardArgs};
pub(crate) use message::{Answered, Ask, ShardMsg};

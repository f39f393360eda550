//! The shard actor: this node's replica of one shard, and the guards of its sessions' bytes.
//!
//! - **Owns** the core's [`Replica`](keepwarm_core::replica::Replica) and, for each block instance that it names,
//!   one guard with a count of the names. A reference never crosses shards, so dropping the last name here gives
//!   the memory back, once the last reader is done.
//! - **Takes** requests with their guards, what other replicas say, bytes that came from them, new sets, the
//!   catalog's word that records are safe, eviction proposals from the pinned actor, ticks.
//! - **Sends** residency news to the pinned actor and invalidations to the GPU actors, records to the catalog,
//!   messages and bytes to other nodes' replicas, proposals to the registry.
//! - **Supervised** by the node actor. A panic loses this shard's guards: its sessions come back cold from the
//!   catalog in a new actor, requests in flight answer `outcome_unknown`, other shards are not touched. In a cluster
//!   the node ends instead: a replica that lost its bytes may not count as the holder that it was.

mod actor;
mod guards;
mod message;
mod peers;

pub(crate) use actor::{ShardActor, ShardArgs};
pub(crate) use message::{Answered, Ask, ShardFigures, ShardMsg};

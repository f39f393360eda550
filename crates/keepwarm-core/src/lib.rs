//! The brain: every decision of keepwarm, as event in and commands out, without IO.
//!
//! - [`session`]: what a session is: layout, manifest, transcript, lease.
//! - [`shard`]: the sessions of one shard: every verb, staged and committed writes, expiry, eviction.
//! - [`replica`]: one replica of a shard: replication, take-over, confirmed reads.
//! - [`residency`]: one tier's memory: LRU, watermarks, protection, shares; for gpu and pinned alike.
//! - [`placement`]: which shard a new session is minted into and which GPU it runs on.
//! - [`registry`]: the state machine of nodes, shards and the spec that a consensus group drives.
//!
//! Architecture invariant: nothing here awaits, spawns, reads a clock or rolls dice. Time and
//! randomness arrive inside events; effects leave as commands; the same events give the same commands.

pub mod placement;
pub mod registry;
pub mod replica;
pub mod residency;
pub mod session;
pub mod shard;

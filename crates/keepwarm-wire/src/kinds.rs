//! The kinds of frames, all in one place: a number is given once and never to anything else.
//!
//! The first byte says who the frame is for: `0x01` replicas of a shard, `0x02` movers of bytes, `0x03` the node.
//! Kinds below `0x0100` belong to the link itself.

/// The first words on a connection: [`crate::Hello`].
pub const HELLO: u16 = 0x0001;
/// What they are answered: [`crate::HelloAnswer`].
pub const HELLO_ANSWER: u16 = 0x0002;
/// An envelope between replicas of a shard: [`crate::envelope`].
pub const ENVELOPE: u16 = 0x0101;
/// The first frame of a stream of block bytes: [`crate::blocks::BlocksHeader`].
pub const BLOCKS_HEADER: u16 = 0x0201;
/// The last frame of a stream of block bytes: [`crate::blocks::BlocksAnswer`].
pub const BLOCKS_ANSWER: u16 = 0x0202;
/// The first frame of a stream that carries a relayed HTTP request: [`crate::control::RelayHeader`].
pub const RELAY_HEADER: u16 = 0x0301;
/// A message of the registry's consensus group: [`crate::control::RegistryFrame`].
pub const REGISTRY: u16 = 0x0302;
/// How is a node? And its answer: [`crate::control::LoadAnswer`]. From version 2 on.
pub const LOAD: u16 = 0x0303;

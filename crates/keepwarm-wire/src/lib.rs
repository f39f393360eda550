//! What peers send each other: frames, and what is in them.
//!
//! - [`envelope`]: messages between replicas of a shard; says how versions of a payload live beside each other.
//! - [`blocks`]: the first and the last frame of a stream of block bytes.
//! - [`control`]: what nodes ask of each other beside that: relayed requests, the registry's messages.
//! - [`kinds`]: the number of each kind of frame.
//! - [`limits`]: how much of anything a frame may hold.
//! - `version`: which versions a node speaks, and the one that both ends of a link speak. `v1`: what version 1 said
//!   in another way.
//!
//! Nothing here does IO.

mod archive;
pub mod blocks;
pub mod control;
pub mod envelope;
mod error;
mod frame;
mod hello;
mod identity;
pub mod kinds;
mod layout;
pub mod limits;
mod record;
mod session;
mod transcript;
mod v1;
mod version;

pub use error::{DecodeError, EncodeError};
pub use frame::{FRAME_BYTES_MAX, Frame, FrameError, FrameHeader, HEADER_BYTES, decode_header, encode_frame};
pub use hello::{Hello, HelloAnswer, HelloError};
pub use layout::{LAYOUTS_MAX, LayoutCache};
pub use limits::TooLong;
pub use version::{NoCommonVersion, VERSION, VERSION_OLDEST, Version, Versions};

//! The two ends of a stream of block bytes: what will come, and what became of it.
//!
//! The side that opens the stream sends a [`BlocksHeader`]. Then the bytes of its blocks follow, one after another
//! and without any framing (the header says how long each is): from the opener for [`Direction::Push`] and
//! [`Direction::Spare`], from the other side for [`Direction::Pull`]. Whoever took the bytes checks each block against its checksum and ends with a
//! [`BlocksAnswer`]; a puller that could not be served gets one instead of the first byte.

use keepwarm_core::session::{BLOCK_BYTES_MAX, BlockRef};
use keepwarm_types::{Birth, Generation, InstanceId, SessionKey, ShardId};
use rkyv::{Archive, Serialize};

use crate::archive::{Opened, seal};
use crate::error::{DecodeError, EncodeError, field};
use crate::frame::Frame;
use crate::identity::{ArchivedWireKey, WireKey, birth, shard};
use crate::kinds;
use crate::limits::{CONTROL_BYTES_MAX, counter, within};
use crate::session::{ArchivedWireBlock, WireBlock};
use crate::v1;
use crate::version::Version;

/// Most blocks in one stream: a header of 32 bytes each is half a MiB. At 360 KiB a block (16 tokens of a model of
/// 60 planes) that is 5.6 GiB; a session that has more is sent in several streams.
pub const BLOCKS_MAX: usize = 16_384;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From whoever opened the stream.
    Push,
    /// To whoever opened the stream.
    Pull,
    /// From whoever opened the stream, into room that the receiver has to spare: it takes the bytes at once and without
    /// letting anything else go, or has no room. Since version 2.
    Spare,
}

/// The first version with [`Direction::Spare`].
const SPARE_SINCE: u16 = 2;

/// What a stream is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlocksHeader {
    /// Which shard.
    pub shard: ShardId,
    /// The shard's generation, as the opener knows it.
    pub generation: Generation,
    /// Whose bytes.
    pub key: SessionKey,
    /// Which life of the session.
    pub birth: Birth,
    /// Which blocks, in the order of their bytes. The instances are those of the side that sends the bytes.
    pub blocks: Vec<BlockRef>,
    /// Which way they go.
    pub direction: Direction,
}

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlocksAnswer {
    /// All blocks are there, verified.
    Taken,
    /// There is no room for them.
    NoRoom,
    /// The session, that life of it, or a block is not there (any more), or the generation is not the present one.
    Gone,
    /// The bytes of this block do not have its checksum.
    Damaged(InstanceId),
}

#[derive(Archive, Serialize)]
struct WireBlocksHeader {
    shard: u32,
    generation: u64,
    key: WireKey,
    birth: u64,
    blocks: Vec<WireBlock>,
    way: WireWay,
}

/// A [`Direction`], in one byte.
#[derive(Archive, Serialize)]
enum WireWay {
    Push,
    Pull,
    Spare,
}

/// A header's archive in any version: its values have not been looked at.
pub(crate) struct Unread<'a> {
    pub(crate) shard: u32,
    pub(crate) generation: u64,
    pub(crate) key: &'a ArchivedWireKey,
    pub(crate) birth: u64,
    pub(crate) blocks: &'a [ArchivedWireBlock],
    pub(crate) direction: Direction,
}

#[derive(Archive, Serialize)]
enum WireBlocksAnswer {
    Taken,
    NoRoom,
    Gone,
    Damaged { instance: u64 },
}

impl From<Direction> for WireWay {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Push => Self::Push,
            Direction::Pull => Self::Pull,
            Direction::Spare => Self::Spare,
        }
    }
}

impl ArchivedWireBlocksHeader {
    fn unread(&self) -> Unread<'_> {
        Unread {
            shard: self.shard.to_native(),
            generation: self.generation.to_native(),
            key: &self.key,
            birth: self.birth.to_native(),
            blocks: &self.blocks,
            direction: match self.way {
                ArchivedWireWay::Push => Direction::Push,
                ArchivedWireWay::Pull => Direction::Pull,
                ArchivedWireWay::Spare => Direction::Spare,
            },
        }
    }
}

impl Unread<'_> {
    fn read(self) -> Result<BlocksHeader, DecodeError> {
        within("blocks", self.blocks.len(), BLOCKS_MAX)?;
        let blocks: Vec<BlockRef> = self
            .blocks
            .iter()
            .map(|block| block.read("blocks.length", BLOCK_BYTES_MAX))
            .collect::<Result<_, _>>()?;
        if blocks.iter().any(|block| block.length == 0) {
            return Err(field("blocks.length", "a block without bytes"));
        }
        Ok(BlocksHeader {
            shard: shard(self.shard)?,
            generation: Generation(counter("blocks.generation", self.generation)?),
            key: self.key.read()?,
            birth: birth("blocks.birth", self.birth)?,
            blocks,
            direction: self.direction,
        })
    }
}

impl BlocksHeader {
    /// Makes a frame of it, in the version that its reader speaks.
    ///
    /// # Errors
    /// [`EncodeError`] where there are more than [`BLOCKS_MAX`] blocks, or that version has no such direction.
    pub fn encode(&self, version: Version) -> Result<Frame, EncodeError> {
        const WHAT: &str = "blocks header";
        within("blocks", self.blocks.len(), BLOCKS_MAX)?;
        let (shard, generation, birth) = (self.shard.0, self.generation.0, self.birth.get());
        let (key, blocks) = ((&self.key).into(), self.blocks.iter().map(WireBlock::from).collect());
        let size_hint = 256 + 32 * self.blocks.len();
        if version.number() < SPARE_SINCE {
            let pull = v1::pull(self.direction).ok_or(EncodeError::Unsayable {
                what: "a push into room to spare",
                version,
                since: SPARE_SINCE,
            })?;
            let wire = v1::WireBlocksHeader { shard, generation, key, birth, blocks, pull };
            return seal(version, kinds::BLOCKS_HEADER, WHAT, &wire, size_hint, CONTROL_BYTES_MAX);
        }
        let wire = WireBlocksHeader { shard, generation, key, birth, blocks, way: self.direction.into() };
        seal(version, kinds::BLOCKS_HEADER, WHAT, &wire, size_hint, CONTROL_BYTES_MAX)
    }

    /// Reads it from a frame, in any version that this node reads; never panics.
    ///
    /// # Errors
    /// [`DecodeError`] where the frame is of another kind or version, or damaged, or a block is empty or larger than
    /// any layout allows.
    pub fn decode(frame: &Frame) -> Result<Self, DecodeError> {
        let opened = Opened::new(frame, kinds::BLOCKS_HEADER, "blocks header", CONTROL_BYTES_MAX)?;
        match opened.version.number() {
            1 => opened.root::<v1::ArchivedWireBlocksHeader>()?.unread().read(),
            _ => opened.root::<ArchivedWireBlocksHeader>()?.unread().read(),
        }
    }

    /// Bytes that follow: at most [`BLOCKS_MAX`] times 4 GiB, so that they always add up.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| u64::from(block.length)).sum()
    }
}

impl BlocksAnswer {
    /// Makes a frame of it, in the version that its reader speaks.
    ///
    /// # Errors
    /// None: it always fits, and all versions have it. The type is that of every other encoder.
    pub fn encode(&self, version: Version) -> Result<Frame, EncodeError> {
        let wire = match self {
            Self::Taken => WireBlocksAnswer::Taken,
            Self::NoRoom => WireBlocksAnswer::NoRoom,
            Self::Gone => WireBlocksAnswer::Gone,
            Self::Damaged(instance) => WireBlocksAnswer::Damaged { instance: instance.0 },
        };
        seal(version, kinds::BLOCKS_ANSWER, "blocks answer", &wire, 16, CONTROL_BYTES_MAX)
    }

    /// Reads it from a frame; never panics.
    ///
    /// # Errors
    /// [`DecodeError`] where the frame is of another kind or version, or damaged.
    pub fn decode(frame: &Frame) -> Result<Self, DecodeError> {
        let opened = Opened::new(frame, kinds::BLOCKS_ANSWER, "blocks answer", CONTROL_BYTES_MAX)?;
        Ok(match opened.root::<ArchivedWireBlocksAnswer>()? {
            ArchivedWireBlocksAnswer::Taken => Self::Taken,
            ArchivedWireBlocksAnswer::NoRoom => Self::NoRoom,
            ArchivedWireBlocksAnswer::Gone => Self::Gone,
            ArchivedWireBlocksAnswer::Damaged { instance } => Self::Damaged(InstanceId(instance.to_native())),
        })
    }
}

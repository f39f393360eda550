//! Bytes of blocks between the pinned arenas of two nodes, verified where they arrive.
//!
//! A stream carries one batch: a header that names the blocks, then their bytes one after another. They go straight
//! into pinned blocks and are hashed as they come; what does not have its checksum is refused as a whole. A session that is
//! too large for one batch goes in several, one after another.

use std::time::Duration;

use bytes::Bytes as Buffer;
use keepwarm_core::registry::Member;
use keepwarm_core::replica::CopyFailed;
use keepwarm_core::session::BlockRef;
use keepwarm_memory::{Block, BlockHasher, BlockMut, CHUNK_BYTES};
use keepwarm_transport::{ByteStream, Class, LinkError};
use keepwarm_types::{Birth, Bytes, Generation, InstanceId, Owner, SessionKey, ShardCount, Tier};
use keepwarm_wire::blocks::{BLOCKS_MAX, BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::{EncodeError, Frame, Version};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Cluster;
use crate::copy::first_damaged;
use crate::error::Error;
use crate::handle::Handle;
use crate::pinned::Pool;
use crate::shard::ShardMsg;
use crate::write::size_class;

/// How long one batch may take.
const BATCH_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes of one batch, but for a block that alone has more: 17 s on a tenth of a 10 Gbit/s link.
const BATCH_BYTES_MAX: u64 = 2 << 30;
/// Bytes read from a stream at once.
const READ_BYTES: usize = 256 << 10;

fn unreachable_by(error: &LinkError) -> CopyFailed {
    tracing::debug!(%error, "blocks did not get through");
    CopyFailed::Unreachable
}

/// A batch that cannot be asked for, or not of a peer of this version: it is as if there were no room for it.
fn unsent(error: &EncodeError) -> CopyFailed {
    tracing::debug!(%error, "a batch of blocks was not sent");
    CopyFailed::NoRoom
}

/// Whose blocks go between two nodes, and how.
#[derive(Debug, Clone)]
pub(crate) struct Whose {
    /// Of the set in which they go.
    pub(crate) generation: Generation,
    /// The session.
    pub(crate) key: SessionKey,
    /// Which life of it.
    pub(crate) birth: Birth,
    /// Whether whoever takes them has to have room to spare.
    pub(crate) spare: bool,
}

impl Whose {
    fn owner(&self) -> Owner {
        Owner { tenant: self.key.tenant.clone(), birth: self.birth }
    }

    fn header(&self, shards: ShardCount, blocks: Vec<BlockRef>, direction: Direction) -> BlocksHeader {
        let (shard, key) = (shards.shard_of(self.key.id), self.key.clone());
        BlocksHeader { shard, generation: self.generation, key, birth: self.birth, blocks, direction }
    }
}

impl Cluster {
    /// Copies blocks to a holder; done once it has verified and kept them.
    ///
    /// Dropping the future resets the stream; the holder then keeps nothing of its batch.
    pub(crate) async fn push(
        &self,
        to: &Member,
        whose: &Whose,
        blocks: Vec<Block>,
    ) -> Result<(), CopyFailed> {
        for batch in batches(blocks, |block| block.length() as u64, BLOCKS_MAX, BATCH_BYTES_MAX) {
            self.push_batch(to, whose, batch).await?;
        }
        Ok(())
    }

    async fn push_batch(&self, to: &Member, whose: &Whose, blocks: Vec<Block>) -> Result<(), CopyFailed> {
        let (way, class) = if whose.spare {
            (Direction::Spare, Class::Rebalance)
        } else {
            (Direction::Push, Class::Checkpoint)
        };
        let refs = blocks.iter().map(crate::write::block_ref).collect();
        let header = whose.header(self.count, refs, way);
        let handle = self.node();
        let work = async {
            let version = self.transport.version(&to.node).ok_or(CopyFailed::Unreachable)?;
            let header = header.encode(version).map_err(|error| unsent(&error))?;
            let opened = self.transport.open(&to.node, class, header).await;
            let mut stream = opened.map_err(|error| unreachable_by(&error))?;
            let sent = send_blocks(&mut stream, &whose.owner(), &blocks).await;
            // A holder that refuses answers before it has read all.
            let answer = read_answer(&mut stream).await;
            match answer {
                Ok(BlocksAnswer::Damaged(_)) => Err(whose_damage(handle.as_ref(), &blocks).await),
                Ok(answer) => taken(&answer),
                Err(error) => {
                    sent.map_err(|error| unreachable_by(&error))?;
                    Err(unreachable_by(&error))
                }
            }
        };
        let done = timeout(BATCH_DEADLINE, work).await.unwrap_or(Err(CopyFailed::Unreachable));
        if done.is_ok()
            && let Some(handle) = &handle
        {
            let bytes: u64 = blocks.iter().map(|block| block.length() as u64).sum();
            handle.metrics().moved("pinned", "peer", Bytes(bytes));
        }
        done
    }

    /// Fetches blocks from a holder into pinned memory, verified.
    pub(crate) async fn pull(
        &self,
        from: &Member,
        whose: &Whose,
        blocks: Vec<BlockRef>,
    ) -> Result<Vec<Block>, CopyFailed> {
        let mut pulled = Vec::with_capacity(blocks.len());
        for batch in batches(blocks, |block| u64::from(block.length), BLOCKS_MAX, BATCH_BYTES_MAX) {
            pulled.extend(self.pull_batch(from, whose, batch).await?);
        }
        Ok(pulled)
    }

    async fn pull_batch(
        &self,
        from: &Member,
        whose: &Whose,
        blocks: Vec<BlockRef>,
    ) -> Result<Vec<Block>, CopyFailed> {
        let (pool, class) =
            if whose.spare { (Pool::Spare, Class::Rebalance) } else { (Pool::Restore, Class::Restore) };
        let Some(handle) = self.node() else { return Err(CopyFailed::Unreachable) };
        let work = async {
            let room = handle.reserve_pinned(&whose.owner(), pool, sizes(&blocks)).await;
            let room = room.map_err(|error| no_room(&error))?;
            let header = whose.header(self.count, blocks.clone(), Direction::Pull);
            let version = self.transport.version(&from.node).ok_or(CopyFailed::Unreachable)?;
            let header = header.encode(version).map_err(|error| unsent(&error))?;
            let opened = self.transport.open(&from.node, class, header).await;
            let mut stream = opened.map_err(|error| unreachable_by(&error))?;
            stream.finish();
            taken(&read_answer(&mut stream).await.map_err(|error| unreachable_by(&error))?)?;
            match receive(&mut stream, &blocks, room).await {
                Ok(received) => Ok(received),
                Err(Received::Damaged(_, detail)) => {
                    handle.metrics().checksum_failed("peer");
                    tracing::error!(key = %whose.key, %detail, "bytes from another node are damaged");
                    Err(CopyFailed::Gone)
                }
                Err(Received::Broken(error)) => Err(unreachable_by(&error)),
            }
        };
        let pulled = timeout(BATCH_DEADLINE, work).await.unwrap_or(Err(CopyFailed::Unreachable))?;
        handle.metrics().moved("peer", "pinned", pulled.iter().map(|b| Bytes(b.length() as u64)).sum());
        Ok(pulled)
    }
}

/// Cuts blocks into batches, in their order, each of so many and so many bytes at most; a block that alone has more is a
/// batch by itself. Without blocks there is one empty batch, which still asks the other node.
fn batches<T>(blocks: Vec<T>, length: impl Fn(&T) -> u64, most: usize, bytes_most: u64) -> Vec<Vec<T>> {
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for block in blocks {
        let more = length(&block);
        if !batch.is_empty() && (batch.len() == most || bytes + more > bytes_most) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += more;
        batch.push(block);
    }
    batches.push(batch);
    batches
}

/// Serves another node's batch.
pub(super) async fn serve(handle: Handle, header: BlocksHeader, mut stream: ByteStream) {
    let served = timeout(BATCH_DEADLINE, async {
        match header.direction {
            Direction::Push => take(&handle, header, Pool::ReplicaIn, &mut stream).await,
            Direction::Spare => take(&handle, header, Pool::Spare, &mut stream).await,
            Direction::Pull => lend(&handle, header, &mut stream).await,
        }
    });
    match served.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a batch of blocks broke off"),
        Err(_) => tracing::debug!("a batch of blocks took too long"),
    }
}

async fn take(
    handle: &Handle,
    header: BlocksHeader,
    pool: Pool,
    stream: &mut ByteStream,
) -> Result<(), LinkError> {
    let owner = Owner { tenant: header.key.tenant.clone(), birth: header.birth };
    let answer = match handle.reserve_pinned(&owner, pool, sizes(&header.blocks)).await {
        Err(error) => {
            no_room(&error);
            BlocksAnswer::NoRoom
        }
        Ok(room) => match receive(stream, &header.blocks, room).await {
            Ok(blocks) => keep(handle, &header, blocks).await,
            Err(Received::Damaged(instance, detail)) => {
                handle.metrics().checksum_failed("peer");
                tracing::error!(key = %header.key, %detail, "bytes from another node are damaged");
                BlocksAnswer::Damaged(instance)
            }
            Err(Received::Broken(error)) => return Err(error),
        },
    };
    let answer = encoded(&answer, stream.version())?;
    stream.write_frame(&answer).await?;
    stream.finish();
    Ok(())
}

/// Gives blocks to their shard; they count once it has them.
async fn keep(handle: &Handle, header: &BlocksHeader, blocks: Vec<Block>) -> BlocksAnswer {
    let (kept, told) = oneshot::channel();
    let Ok(shard) = handle.links().shard(&header.key) else { return BlocksAnswer::Gone };
    if shard.cast(ShardMsg::Arrived(header.key.clone(), blocks, kept)).is_err() || told.await.is_err() {
        return BlocksAnswer::Gone;
    }
    BlocksAnswer::Taken
}

async fn lend(handle: &Handle, header: BlocksHeader, stream: &mut ByteStream) -> Result<(), LinkError> {
    let (reply, lent) = oneshot::channel();
    let asked = handle
        .links()
        .shard(&header.key)
        .is_ok_and(|shard| shard.cast(ShardMsg::Lend(header.blocks, header.birth, reply)).is_ok());
    let guards = if asked { lent.await.ok().flatten() } else { None };
    let Some(guards) = guards else {
        stream.write_frame(&encoded(&BlocksAnswer::Gone, stream.version())?).await?;
        stream.finish();
        return Ok(());
    };
    stream.write_frame(&encoded(&BlocksAnswer::Taken, stream.version())?).await?;
    let owner = Owner { tenant: header.key.tenant.clone(), birth: header.birth };
    send_blocks(stream, &owner, &guards).await
}

async fn send_blocks(stream: &mut ByteStream, owner: &Owner, blocks: &[Block]) -> Result<(), LinkError> {
    for block in blocks {
        let Ok(view) = block.view(owner, 0..block.length()) else {
            stream.reset();
            return Err(LinkError::Closed("a block belongs to another owner".to_owned()));
        };
        stream.write_chunk(Buffer::from_owner(view)).await?;
    }
    stream.finish();
    Ok(())
}

enum Received {
    Damaged(InstanceId, String),
    Broken(LinkError),
}

/// Reads the blocks' bytes into their room, hashing them on the way.
//= GUARANTEES.md#G5
async fn receive(
    stream: &mut ByteStream,
    refs: &[BlockRef],
    room: Vec<BlockMut>,
) -> Result<Vec<Block>, Received> {
    let mut blocks = Vec::with_capacity(refs.len());
    let mut rest = Buffer::new();
    for (wanted, mut block) in refs.iter().zip(room) {
        let mut hasher = BlockHasher::default();
        while block.written() < wanted.length as usize {
            if rest.is_empty() {
                let chunk = stream.read_chunk(READ_BYTES).await.map_err(Received::Broken)?;
                rest = chunk
                    .ok_or_else(|| Received::Broken(LinkError::Closed("the batch ended early".to_owned())))?;
            }
            let taken = rest.split_to(rest.len().min(wanted.length as usize - block.written()));
            // In steps that stay in the first-level cache between the copy and the hash.
            for step in taken.chunks(4 * CHUNK_BYTES) {
                let at = block.written();
                block
                    .write(at, step)
                    .map_err(|error| Received::Damaged(wanted.instance, error.to_string()))?;
                hasher.update(&block.bytes()[at..]);
            }
        }
        let sealed = block.seal_received(wanted.instance, wanted.checksum, hasher.finish());
        blocks.push(sealed.map_err(|(_, corrupt)| Received::Damaged(wanted.instance, corrupt.to_string()))?);
    }
    Ok(blocks)
}

fn encoded(answer: &BlocksAnswer, version: Version) -> Result<Frame, LinkError> {
    answer.encode(version).map_err(|error| LinkError::Closed(error.to_string()))
}

async fn read_answer(stream: &mut ByteStream) -> Result<BlocksAnswer, LinkError> {
    let frame = stream.read_frame().await?;
    BlocksAnswer::decode(&frame).map_err(|error| LinkError::Closed(error.to_string()))
}

const fn taken(answer: &BlocksAnswer) -> Result<(), CopyFailed> {
    match answer {
        BlocksAnswer::Taken => Ok(()),
        BlocksAnswer::NoRoom => Err(CopyFailed::NoRoom),
        BlocksAnswer::Gone | BlocksAnswer::Damaged(_) => Err(CopyFailed::Gone),
    }
}

/// After bytes arrived damaged, which a link of TLS does not do: whether they lie here like that.
async fn whose_damage(handle: Option<&Handle>, blocks: &[Block]) -> CopyFailed {
    if first_damaged(blocks.to_vec()).await.is_none() {
        return CopyFailed::Unreachable;
    }
    if let Some(handle) = handle {
        handle.metrics().checksum_failed("push");
    }
    CopyFailed::Damaged
}

fn no_room(error: &Error) -> CopyFailed {
    debug_assert!(!matches!(error, Error::NoCapacity { tier: Tier::Hbm, .. }), "pinned memory was asked");
    tracing::debug!(%error, "no room for another node's blocks");
    CopyFailed::NoRoom
}

/// Sizes to reserve, in the blocks' order.
fn sizes(blocks: &[BlockRef]) -> Vec<(Bytes, usize)> {
    blocks.iter().map(|block| (size_class(block.length.into(), u64::MAX), 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_order_count_and_bytes() {
        let cut = |lengths: &[u64]| batches(lengths.to_vec(), |length| *length, 3, 10);
        assert_eq!(cut(&[]), [Vec::<u64>::new()]);
        assert_eq!(cut(&[1, 2, 3, 4]), [vec![1, 2, 3], vec![4]]);
        assert_eq!(cut(&[5, 5, 1]), [vec![5, 5], vec![1]]);
        assert_eq!(cut(&[4, 50, 4, 4]), [vec![4], vec![50], vec![4, 4]]);
    }
}

//! Guards of blocks: the only way to a byte of state.
//!
//! A [`BlockMut`] is unique and mutable; sealing turns it into a [`Block`], which is immutable and shared by
//! cloning. The memory goes back to its arena when the last guard drops, so it is never reused under a
//! reader or a running copy: whoever needs it holds a guard.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keepwarm_types::{Birth, BlockChecksum, Bytes, Incarnation, InstanceId, Owner, TenantName};

use crate::arena::BLOCK_ALIGN;
use crate::arena::Shared;
use crate::arena::Slot;
use crate::checksum::{Corrupt, block_checksum};

/// Instances of this process so far.
static INSTANCES: AtomicU64 = AtomicU64::new(1);
/// Bits of an instance's number below the incarnation of the node that made it: 2^40 blocks a start, 2^24 starts of
/// all of a cluster's nodes together.
const INSTANCE_BITS: u32 = 40;

/// Makes the numbers of this process's instances differ from those of every other process of the cluster: their
/// high bits are the node's incarnation, which no other node ever has. To be called before the first block is sealed.
pub fn number_instances_for(incarnation: Incarnation) {
    INSTANCES.fetch_max(incarnation.0 << INSTANCE_BITS, Ordering::Relaxed);
}

/// The number of an instance that no other block has.
pub(crate) fn next_instance() -> InstanceId {
    InstanceId(INSTANCES.fetch_add(1, Ordering::Relaxed))
}

/// Why a guard did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuardError {
    /// The bytes are another tenant's, or of another life.
    #[error("the block belongs to another owner")]
    WrongOwner,
    /// The bytes lie in a device's memory.
    #[error("the block lies in a device's memory, which the host cannot touch: copy it to the host first")]
    OnDevice,
    /// The bytes asked for were never written, or lie outside the block.
    #[error("bytes {start}..{end} are outside the {limit} that may be touched")]
    Bounds {
        /// First byte.
        start: usize,
        /// One past the last.
        end: usize,
        /// What may be touched.
        limit: usize,
    },
}

/// A block's memory; gives it back when dropped.
struct Memory {
    arena: Arc<Shared>,
    slot: Slot,
    offset: u64,
    capacity: usize,
    tenant: TenantName,
    /// Whether nothing of another tenant is left in the slot. A block that was not written to its end, or whose
    /// size is below its slot's, leaves what was there before.
    alone: bool,
    /// A bug that a test planted: the slot was given back before its last guard dropped.
    #[cfg(test)]
    given_back: bool,
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[cfg(test)]
        if self.given_back {
            return;
        }
        self.arena.release(self.slot, self.tenant.clone(), self.alone);
    }
}

/// A block's place in memory, for the devices that move its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where it begins.
    pub(crate) address: u64,
    /// Where the memory begins that was reserved with it: what lies in one reservation may be moved by one call.
    pub(crate) region: u64,
    /// The device context that it lies in; none for memory of the host.
    pub(crate) context: Option<usize>,
}

impl Memory {
    fn place(&self) -> Place {
        let region = &self.arena.region;
        Place { address: region.address() + self.offset, region: region.address(), context: region.context() }
    }
}

/// Bytes of the slot that a block of this capacity has.
const fn slot_bytes(capacity: usize) -> usize {
    capacity.next_multiple_of(BLOCK_ALIGN as usize)
}

/// A block that one holder may write.
pub struct BlockMut {
    memory: Memory,
    birth: Birth,
    /// Bytes from the start that this owner wrote, or that are known to be zero.
    written: usize,
}

impl fmt::Debug for BlockMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "BlockMut({}@{}, {}/{})",
            self.memory.arena.name, self.memory.offset, self.written, self.memory.capacity
        )
    }
}

impl BlockMut {
    pub(crate) fn new(
        arena: Arc<Shared>,
        slot: Slot,
        offset: u64,
        capacity: usize,
        owner: Owner,
        scrub: bool,
    ) -> Self {
        let memory = Memory {
            arena,
            slot,
            offset,
            capacity,
            tenant: owner.tenant,
            alone: !scrub,
            #[cfg(test)]
            given_back: false,
        };
        Self { memory, birth: owner.birth, written: 0 }
    }

    /// Bytes that fit.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.memory.capacity
    }

    /// Bytes from the start that were written.
    #[must_use]
    pub const fn written(&self) -> usize {
        self.written
    }

    /// Whether it lies in memory that the host can touch.
    #[must_use]
    pub fn is_on_host(&self) -> bool {
        self.memory.place().context.is_none()
    }

    /// What was written.
    ///
    /// # Panics
    /// If the block is not [on the host](Self::is_on_host).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this guard is the range's only one, and `&self` rules out its own writers.
        unsafe { self.memory.arena.region.slice(self.memory.offset, self.written) }
    }

    /// All of the block, to write in place; what another tenant left is zeroed first, and all of it counts
    /// as written from now on.
    ///
    /// # Panics
    /// If the block is not [on the host](Self::is_on_host).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let (offset, capacity) = (self.memory.offset, self.memory.capacity);
        // SAFETY: this guard is the only one of its slot, which has the capacity rounded up to the alignment, and
        // `&mut self` rules out any other use of it.
        let all = unsafe { self.memory.arena.region.slice_mut(offset, slot_bytes(capacity)) };
        if !self.memory.alone {
            all[self.written..].fill(0);
            self.memory.alone = true;
        }
        self.written = capacity;
        &mut all[..capacity]
    }

    /// Writes `data` at `at`, which must not leave a gap behind what was written.
    ///
    /// # Errors
    /// [`GuardError::Bounds`], [`GuardError::OnDevice`]; nothing was written then.
    pub fn write(&mut self, at: usize, data: &[u8]) -> Result<(), GuardError> {
        if !self.is_on_host() {
            return Err(GuardError::OnDevice);
        }
        let end = at.saturating_add(data.len());
        if at > self.written || end > self.memory.capacity {
            return Err(GuardError::Bounds { start: at, end, limit: self.memory.capacity });
        }
        let offset = self.memory.offset + at as u64;
        // SAFETY: this guard is the range's only one, and `&mut self` rules out any other use of it.
        unsafe { self.memory.arena.region.slice_mut(offset, data.len()) }.copy_from_slice(data);
        self.reaches(end);
        Ok(())
    }

    /// The bytes up to `end` were written.
    pub(crate) fn reaches(&mut self, end: usize) {
        self.written = self.written.max(end);
        self.memory.alone |= self.written == slot_bytes(self.memory.capacity);
    }

    /// Seals the first `length` bytes as a new instance.
    ///
    /// # Errors
    /// The guard comes back if `length` is more than was written, or the block not [on the host](Self::is_on_host).
    pub fn seal(self, length: usize) -> Result<Block, (Self, GuardError)> {
        if !self.is_on_host() {
            return Err((self, GuardError::OnDevice));
        }
        if length > self.written {
            let error = GuardError::Bounds { start: 0, end: length, limit: self.written };
            return Err((self, error));
        }
        let checksum = block_checksum(&self.bytes()[..length]);
        Ok(self.into_block(length, next_instance(), checksum))
    }

    /// Seals all that was written as a new instance whose checksum was computed while the bytes arrived.
    #[must_use]
    pub fn seal_hashed(self, checksum: BlockChecksum) -> Block {
        let length = self.written;
        self.into_block(length, next_instance(), checksum)
    }

    /// Seals all that was written as the same instance that another node has; its bytes were hashed as they came.
    ///
    /// # Errors
    /// The guard comes back where the bytes are not those: [`Corrupt`] has both checksums.
    //= GUARANTEES.md#G5
    pub fn seal_received(
        self,
        instance: InstanceId,
        expected: BlockChecksum,
        found: BlockChecksum,
    ) -> Result<Block, (Self, Corrupt)> {
        if found != expected {
            return Err((self, Corrupt { instance, expected, found }));
        }
        let length = self.written;
        Ok(self.into_block(length, instance, expected))
    }

    /// Seals all that was written as a copy of `original`; the caller has verified its checksum.
    pub(crate) fn seal_copy(self, original: &Block) -> Block {
        let length = self.written;
        let mut block = self.into_block(length, original.instance(), original.checksum());
        block.birth = original.birth;
        block
    }

    /// Seals the first `length` bytes as another form of `original`: the same instance, with bytes and a checksum of its own.
    pub(crate) fn seal_form(self, original: &Block, length: usize, checksum: BlockChecksum) -> Block {
        let mut block = self.into_block(length, original.instance(), checksum);
        block.birth = original.birth;
        block
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        self.memory.place()
    }

    /// What another tenant may have left behind the written bytes: where it begins in the block, and how long it is.
    #[cfg(feature = "cuda")]
    pub(crate) fn left_over(&self) -> Option<Range<usize>> {
        let all = slot_bytes(self.memory.capacity);
        (!self.memory.alone).then_some(self.written..all)
    }

    /// All of the block was written, or zeroed where another tenant had it before.
    #[cfg(feature = "cuda")]
    pub(crate) fn filled(&mut self) {
        self.memory.alone = true;
        self.written = self.memory.capacity;
    }

    /// A bug that a test plants: the slot goes to whoever asks next, while this guard still names it.
    #[cfg(all(test, feature = "cuda"))]
    pub(crate) fn give_back_early(&mut self) {
        let memory = &mut self.memory;
        memory.arena.release(memory.slot, memory.tenant.clone(), memory.alone);
        memory.given_back = true;
    }

    /// The name of its arena.
    pub(crate) fn arena(&self) -> &str {
        &self.memory.arena.name
    }

    /// Whose block it will be, in whatever life.
    pub(crate) const fn tenant(&self) -> &TenantName {
        &self.memory.tenant
    }

    /// Whose block it will be.
    pub(crate) fn owner(&self) -> Owner {
        Owner { tenant: self.memory.tenant.clone(), birth: self.birth }
    }

    /// Seals the first `length` bytes, which were written and have this checksum.
    pub(crate) fn into_block(self, length: usize, instance: InstanceId, checksum: BlockChecksum) -> Block {
        Block {
            sealed: Arc::new(Sealed { memory: self.memory, length, instance, checksum }),
            birth: self.birth,
        }
    }
}

struct Sealed {
    memory: Memory,
    length: usize,
    instance: InstanceId,
    checksum: BlockChecksum,
}

/// A block that many may read and none may write; clones share the memory.
#[derive(Clone)]
pub struct Block {
    sealed: Arc<Sealed>,
    birth: Birth,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sealed = &self.sealed;
        write!(
            f,
            "Block({}@{}, instance {}, {} bytes)",
            sealed.memory.arena.name, sealed.memory.offset, sealed.instance.0, sealed.length
        )
    }
}

impl Block {
    /// Which instance.
    #[must_use]
    pub fn instance(&self) -> InstanceId {
        self.sealed.instance
    }

    /// The checksum that its bytes must have.
    #[must_use]
    pub fn checksum(&self) -> BlockChecksum {
        self.sealed.checksum
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.sealed.length
    }

    /// Bytes that were asked for when it was allocated: what a copy should ask for too.
    #[must_use]
    pub fn capacity(&self) -> Bytes {
        Bytes(self.sealed.memory.capacity as u64)
    }

    /// The name of its arena.
    #[must_use]
    pub fn arena(&self) -> &str {
        &self.sealed.memory.arena.name
    }

    /// Whose bytes these are, as this guard was made for.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner { tenant: self.sealed.memory.tenant.clone(), birth: self.birth }
    }

    /// Whose bytes these are, in whatever life.
    pub(crate) fn tenant(&self) -> &TenantName {
        &self.sealed.memory.tenant
    }

    /// A guard of the same bytes for another life of the same tenant: a fork.
    #[must_use]
    pub fn share(&self, birth: Birth) -> Self {
        Self { sealed: Arc::clone(&self.sealed), birth }
    }

    /// Whether no other guard has the block: its memory goes back to the arena with this one. True stays true;
    /// false may be over at once.
    #[must_use]
    pub fn is_last(&self) -> bool {
        Arc::strong_count(&self.sealed) == 1
    }

    /// Whether it lies in memory that the host can touch.
    #[must_use]
    pub fn is_on_host(&self) -> bool {
        self.place().context.is_none()
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        self.sealed.memory.place()
    }

    /// The bytes.
    ///
    /// # Errors
    /// [`GuardError::WrongOwner`] unless tenant and birth are the guard's, [`GuardError::OnDevice`] where the host
    /// cannot touch them.
    //= GUARANTEES.md#G4
    pub fn bytes(&self, owner: &Owner) -> Result<&[u8], GuardError> {
        if owner.birth != self.birth || owner.tenant != self.sealed.memory.tenant {
            return Err(GuardError::WrongOwner);
        }
        if !self.is_on_host() {
            return Err(GuardError::OnDevice);
        }
        Ok(self.raw())
    }

    /// A part of the bytes that keeps the guard, to be handed to a socket without a copy.
    ///
    /// # Errors
    /// [`GuardError`] for another owner or a range outside the block.
    pub fn view(&self, owner: &Owner, range: Range<usize>) -> Result<BlockView, GuardError> {
        let limit = self.bytes(owner)?.len();
        if range.start > range.end || range.end > limit {
            return Err(GuardError::Bounds { start: range.start, end: range.end, limit });
        }
        Ok(BlockView { block: self.clone(), range })
    }

    /// Reads all bytes and compares their checksum.
    ///
    /// # Errors
    /// [`Corrupt`] with both checksums.
    ///
    /// # Panics
    /// If the block is not [on the host](Self::is_on_host): a device verifies what it moves.
    pub fn verify(&self) -> Result<(), Corrupt> {
        let (expected, found) = (self.checksum(), block_checksum(self.raw()));
        if expected == found { Ok(()) } else { Err(Corrupt { instance: self.instance(), expected, found }) }
    }

    pub(crate) fn raw(&self) -> &[u8] {
        let sealed = &self.sealed;
        // SAFETY: sealed memory is never written again (but by `flip_bit`, whose purpose is to break it), and
        // the guard keeps it from being given to anyone else.
        unsafe { sealed.memory.arena.region.slice(sealed.memory.offset, sealed.length) }
    }

    pub(crate) fn flip_bit(&self, bit: u64) {
        let byte = usize::try_from(bit / 8).expect("keepwarm runs on 64-bit targets");
        assert!(
            byte < self.sealed.length,
            "bit {bit} lies outside the block of {} bytes",
            self.sealed.length
        );
        // SAFETY: in bounds; a racing reader may see either value, which is what failing memory does.
        unsafe {
            self.sealed.memory.arena.region.slice_mut(self.sealed.memory.offset + byte as u64, 1)[0] ^=
                1 << (bit % 8)
        };
    }
}

/// A range of a block's bytes that keeps them alive.
#[derive(Debug, Clone)]
pub struct BlockView {
    block: Block,
    range: Range<usize>,
}

impl AsRef<[u8]> for BlockView {
    fn as_ref(&self) -> &[u8] {
        &self.block.raw()[self.range.clone()]
    }
}

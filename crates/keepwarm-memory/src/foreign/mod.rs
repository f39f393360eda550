//! Memory that another process brings: opened, gathered from, scattered into, and kept mapped until that process has
//! closed it or is gone and nothing of ours touches it any more.
//!
//! ```text
//! open ─► closing ─► quarantined ─► gone
//! ```
//!
//! A region takes operations while it is open. Then it is *closing* while operations are outstanding, *quarantined* while
//! its process lives and has not said that it closed it, and *gone* once its mapping was dropped. A mapping is its region's
//! alone, and is never used for something else. There is no way in the other direction: an arena of ours is not handed out.
//!
//! The bytes are the other process's, which may change them at any time: no reference to them is ever made, they are
//! copied first and looked at afterwards.
#![allow(unsafe_code)]

mod peer;
mod shared;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::channel::oneshot;
use keepwarm_types::Bytes;

use peer::Watch;
pub use peer::{PEERS_MAX, Peer};
pub(crate) use shared::SharedMapping;

use crate::checksum::{BlockHasher, CHUNK_BYTES};
#[cfg(feature = "cuda")]
use crate::guard::Place;

/// The longest region: more than a machine's engine has memory for.
pub const REGION_BYTES_MAX: Bytes = Bytes(1 << 40);
/// Regions of one process, those in quarantine among them: one for each of K and V of 512 layers.
pub const REGIONS_MAX: usize = 1024;
/// Bytes that are copied out of a region before they are hashed: they stay in the first-level cache.
const BOUNCE_BYTES: usize = CHUNK_BYTES;

/// What a process brings.
#[derive(Debug)]
pub enum Brought {
    /// A file of shared memory: `memfd_create(2)` with `MFD_ALLOW_SEALING`, opened to read and write, all of its pages
    /// there (`fallocate(2)`), and sealed with `F_SEAL_SHRINK` (`fcntl(2)`).
    SharedMemory {
        /// The file; closed once it is mapped.
        fd: std::os::fd::OwnedFd,
        /// How much of it, from its start.
        bytes: Bytes,
    },
    /// Memory of a GPU: what `cuIpcGetMemHandle` (CUDA Driver API, "Memory Management") gave for the start of an allocation.
    CudaIpc {
        /// The handle's 64 bytes.
        handle: [u8; 64],
        /// The UUID of the GPU that the memory lies on, as `nvidia-smi -L` prints it.
        device: String,
        /// How much of it, from its start.
        bytes: Bytes,
    },
}

/// Why a region could not be opened, or its process not be watched. Nothing is mapped then.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The process is gone.
    #[error("the process that brought the region is gone")]
    PeerGone,
    /// The process has said that it closed all.
    #[error("the process has closed its regions: it must connect again to bring others")]
    PeerClosed,
    /// As many processes are watched as may be.
    #[error("{PEERS_MAX} processes bring regions already: let one of them end or close first")]
    Peers,
    /// The process has as many regions as it may have.
    #[error(
        "the process has {REGIONS_MAX} regions already, closed ones that it has not given up among them: close some"
    )]
    Regions,
    /// The length makes no region.
    #[error("a region of {0} cannot be opened: between 1 byte and {REGION_BYTES_MAX} can")]
    Size(Bytes),
    /// There is less than what was said.
    #[error("the region is said to have {} bytes and has {}: bring its true length, or a longer one", .asked.0, .found.0)]
    Short {
        /// What was said.
        asked: Bytes,
        /// What there is.
        found: Bytes,
    },
    /// The descriptor is not shared memory.
    #[error(
        "the descriptor is {0}: bring shared memory of memfd_create, without MFD_HUGETLB, opened to read and write"
    )]
    NotShared(&'static str),
    /// It could become shorter, and then reading it would end this process.
    #[error(
        "the shared memory may shrink: make it with memfd_create(MFD_ALLOW_SEALING) and seal it with fcntl(F_ADD_SEALS, F_SEAL_SHRINK)"
    )]
    Unsealed,
    /// Pages of it are not there yet, and would count as this process's.
    #[error("only {} of the {} bytes of shared memory are there: fallocate all of it first", .there.0, .size.0)]
    Sparse {
        /// What is there.
        there: Bytes,
        /// Its length.
        size: Bytes,
    },
    /// The device has no such memory.
    #[error("{0} is no CUDA device and opens no CUDA handle: bring shared memory")]
    NotCuda(String),
    /// The memory lies on another GPU.
    #[error("the memory lies on GPU {brought}, this device is GPU {own}: bring it to that GPU's device")]
    OtherDevice {
        /// Where it lies.
        brought: String,
        /// Where it was brought to.
        own: String,
    },
    /// The driver does not open the handle.
    #[error(
        "the CUDA handle does not open: {0}; it is stale (its memory was freed, or its process is gone), of another GPU, or no \
         handle of cuIpcGetMemHandle: export the memory again"
    )]
    Handle(String),
    /// The device serves nothing more.
    #[error("the device is fenced: {0}")]
    Fenced(String),
    /// The driver refused something else.
    #[error("the driver refused the region: {0}")]
    Driver(String),
    /// The system refused something.
    #[error("{what}: {cause}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        cause: std::io::Error,
    },
}

/// Whether a region takes operations, and what it still waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionState {
    /// It does.
    Open,
    /// Nothing new; operations are outstanding.
    Closing,
    /// Nothing new and nothing outstanding; the mapping stays: its process lives and has not closed it, the mapping is about to
    /// be dropped, or it cannot be, since the device hangs or failed.
    Quarantined,
    /// The mapping was dropped.
    Gone,
}

impl fmt::Display for RegionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Closing => "closing",
            Self::Quarantined => "quarantined",
            Self::Gone => "gone",
        })
    }
}

/// What became of an attempt to give a mapping back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmapped {
    /// It is gone.
    Done,
    /// Not now: the device hangs.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only drivers hang"))]
    Later,
    /// It stays for as long as this process lives: the driver failed.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only drivers fail"))]
    Never,
}

/// Memory of another process, mapped. Dropping it leaves it mapped unless it was unmapped before.
pub(crate) trait Mapping: Send + fmt::Debug {
    /// Where it begins here.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// The device context that it lies in; none where the host can touch it.
    fn context(&self) -> Option<usize>;

    /// Drops it; called until it answers that it is done, or never will be.
    fn unmap(&mut self) -> Unmapped;
}

#[derive(Debug)]
struct Held {
    /// Nothing new is issued.
    closed: bool,
    /// Its process has closed it, or is gone.
    given_up: bool,
    /// Operations that name it and may still run.
    outstanding: usize,
    gone: bool,
    /// None while it is being unmapped, and afterwards.
    mapping: Option<Box<dyn Mapping>>,
    tell: Option<oneshot::Sender<()>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    address: u64,
    bytes: u64,
    context: Option<usize>,
    /// The device that opened it.
    device: u64,
    peer: Arc<Watch>,
    held: Mutex<Held>,
    told: futures::future::Shared<oneshot::Receiver<()>>,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> RegionState {
        let held = self.held();
        match *held {
            Held { gone: true, .. } => RegionState::Gone,
            Held { closed: false, .. } => RegionState::Open,
            Held { outstanding: 1.., .. } => RegionState::Closing,
            _ => RegionState::Quarantined,
        }
    }

    /// Nothing new is issued; `given_up`: and its process is through with it.
    fn close(&self, given_up: bool) {
        let mut held = self.held();
        held.closed = true;
        held.given_up |= given_up;
        drop(held);
        self.peer.wake();
    }

    /// Its process is through with it, as the thread that watches has seen.
    fn give_up(&self) {
        let mut held = self.held();
        (held.closed, held.given_up) = (true, true);
    }

    /// Drops the mapping where nobody needs it any more; none while somebody does.
    fn sweep(&self) -> Option<Unmapped> {
        let mut mapping = {
            let mut held = self.held();
            if !held.given_up || held.outstanding > 0 {
                return None;
            }
            held.mapping.take()?
        };
        // Not under the lock: the driver's calls for it may wait. What is given up takes no operations.
        let unmapped = mapping.unmap();
        let mut held = self.held();
        if unmapped != Unmapped::Done {
            held.mapping = Some(mapping);
            return Some(unmapped);
        }
        held.gone = true;
        let tell = held.tell.take();
        drop(held);
        // Where nobody waits there is nobody to tell.
        let _ = tell.map(|tell| tell.send(()));
        Some(unmapped)
    }
}

/// Memory of another process, opened by a device. Clones are of the same region; when the last one drops, that
/// [closes](Self::close) it.
///
/// Operations that were issued hold the mapping by themselves, so neither a drop nor a cancelled
/// [`Transfer`](crate::Transfer) takes memory away under a running copy.
#[derive(Debug, Clone)]
pub struct ForeignRegion(Arc<Ours>);

#[derive(Debug)]
struct Ours(Arc<Shared>);

impl Drop for Ours {
    fn drop(&mut self) {
        self.0.close(false);
    }
}

impl ForeignRegion {
    /// A region over a mapping that `map` makes, if its process may bring one more.
    pub(crate) fn open(
        peer: &Peer,
        device: u64,
        bytes: Bytes,
        map: impl FnOnce() -> Result<Box<dyn Mapping>, RegionError>,
    ) -> Result<Self, RegionError> {
        if bytes.0 == 0 || bytes > REGION_BYTES_MAX {
            return Err(RegionError::Size(bytes));
        }
        peer.watch()
            .admit(|| {
                let mapping = map()?;
                let (tell, told) = oneshot::channel();
                let (address, bytes, context) = (mapping.address(), mapping.bytes(), mapping.context());
                let (closed, given_up, outstanding, gone) = (false, false, 0, false);
                let (mapping, tell) = (Some(mapping), Some(tell));
                let held = Held { closed, given_up, outstanding, gone, mapping, tell };
                let (peer, held, told) = (Arc::clone(peer.watch()), Mutex::new(held), told.shared());
                Ok(Arc::new(Shared { address, bytes, context, device, peer, held, told }))
            })
            .map(|shared| Self(Arc::new(Ours(shared))))
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes(self.0.0.bytes)
    }

    /// Whether it takes operations.
    #[must_use]
    pub fn state(&self) -> RegionState {
        self.0.0.state()
    }

    /// From now on nothing new is issued. The mapping stays until its process has given it up as well.
    pub fn close(&self) {
        self.0.0.close(false);
    }

    /// Its process has said that it closed the region: nothing new is issued, and the mapping is dropped as soon as no
    /// operation is outstanding. The process may free the memory once [`gone`](Self::gone) has resolved, not before: CUDA leaves
    /// undefined what happens to memory that is freed while another process has it open (`cuIpcCloseMemHandle`).
    pub fn closed_by_peer(&self) {
        self.0.0.close(true);
    }

    /// Resolves once the mapping was dropped; on a device that hangs or failed that may be never. Cancel safe.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        self.0.0.told.clone().map(drop)
    }

    /// Whether this device opened it.
    pub(crate) fn is_of(&self, device: u64) -> bool {
        self.0.0.device == device
    }

    /// Keeps the mapping for an operation; `seen` is the process that was last found alive for the same submission.
    pub(crate) fn lease(&self, seen: &mut Seen) -> Result<Lease, RegionState> {
        let shared = &self.0.0;
        // The thread that watches may not have run yet.
        if !seen.is_alive(&shared.peer) {
            shared.close(true);
        }
        let mut held = shared.held();
        if held.closed {
            drop(held);
            return Err(shared.state());
        }
        held.outstanding += 1;
        drop(held);
        Ok(Lease(Arc::clone(shared)))
    }
}

/// Whom a batch has found alive: the system is asked once for planes of one process, not for each.
#[derive(Debug, Default)]
pub(crate) struct Seen(Option<Arc<Watch>>);

impl Seen {
    fn is_alive(&mut self, peer: &Arc<Watch>) -> bool {
        if self.0.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, peer)) {
            return true;
        }
        let alive = peer.is_alive();
        self.0 = alive.then(|| Arc::clone(peer));
        alive
    }
}

/// An operation's hold on a region: while it lives the memory stays mapped.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Shared>);

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.0.held();
        held.outstanding -= 1;
        let over = held.outstanding == 0 && held.given_up;
        drop(held);
        if over {
            // Not here: the driver's calls for it may wait for the device.
            self.0.peer.wake();
        }
    }
}

impl Lease {
    /// Whether its process runs; `seen` is the process that was last found alive for the same batch.
    pub(crate) fn is_alive(&self, seen: &mut Seen) -> bool {
        seen.is_alive(&self.0.peer)
    }

    /// Where the region begins here, among all that are mapped.
    pub(crate) fn begins(&self) -> u64 {
        self.0.address
    }

    /// Where it lies, for the devices that move its bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn place(&self) -> Place {
        Place { address: self.0.address, region: self.0.address, context: self.0.context }
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let shared = &self.0;
        assert!(shared.context.is_none(), "the host reached for a device's memory");
        let end = (offset as u64).checked_add(length as u64).expect("bounds were checked");
        assert!(end <= shared.bytes, "{offset}..{end} lies outside the region of {} bytes", shared.bytes);
        (shared.address + offset as u64) as *mut u8
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If they lie outside, or not on the host.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: in bounds, and mapped while this lives; `to` is ours. Its process may write there meanwhile: then the copy
        // is a mixture, which is as good a list of bytes as any other.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// Hashes bytes as they are read now.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub(crate) fn hash(&self, offset: usize, length: usize, hasher: &mut BlockHasher) {
        let from = self.at(offset, length);
        // SAFETY: in bounds, and mapped while this lives.
        unsafe { hash_foreign(from, length, hasher) };
    }
}

/// Hashes bytes that another process may change meanwhile.
///
/// # Safety
/// The bytes are mapped while it runs.
pub(crate) unsafe fn hash_foreign(from: *const u8, length: usize, hasher: &mut BlockHasher) {
    let mut bounce = [0; BOUNCE_BYTES];
    for at in (0..length).step_by(BOUNCE_BYTES) {
        let bytes = BOUNCE_BYTES.min(length - at);
        // SAFETY: mapped by the caller's word; the bounce is ours and no reference to the other bytes is made.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), bounce.as_mut_ptr(), bytes) };
        hasher.update(&bounce[..bytes]);
    }
}

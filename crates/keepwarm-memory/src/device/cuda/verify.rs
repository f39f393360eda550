//! Checksums of runs of bytes, wherever they lie: the host's are hashed in place, a device's are read back first.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;

use keepwarm_types::BlockChecksum;

use super::context::{Context, HostMemory, Stream};
use super::driver::CudaError;
use super::moves::{Rows, Run};
use super::poll::{Passed, Poller};
use crate::checksum::BlockHasher;
use crate::guard::Place;

/// Bytes that are read back at a time: the second-level cache of a core still has them when they are hashed.
const PIECE_BYTES: usize = 1 << 20;
/// Threads that hash one batch: one core hashes more slowly than a link delivers.
const HASHERS_MAX: usize = 4;
/// Less than this is hashed by one thread: starting another takes some tens of microseconds.
const SHARE_BYTES_MIN: usize = 2 << 20;

/// Why a checksum could not be had.
#[derive(Debug)]
pub(super) enum Unread {
    /// The device failed.
    Failed(CudaError),
    /// It hangs, and may still write where it was to read to.
    Hangs,
}

impl From<CudaError> for Unread {
    fn from(error: CudaError) -> Self {
        Self::Failed(error)
    }
}

/// Reads a device's bytes back on a stream of its own.
#[derive(Debug)]
pub(super) struct Verifier {
    stream: Stream,
    staging: HostMemory,
    poller: Poller,
}

impl Verifier {
    pub(super) fn new(context: &Arc<Context>, poller: &Poller) -> Result<Self, CudaError> {
        context.enter()?;
        let staging = HostMemory::reserve(context, PIECE_BYTES as u64)?;
        Ok(Self { stream: Stream::create(context)?, staging, poller: poller.clone() })
    }

    /// The checksum of each run. All that wrote to them has passed, and their guards are held.
    pub(super) fn checksums(&self, runs: &[Run]) -> Result<Vec<BlockChecksum>, Unread> {
        let on_host = |run: &&Run| run.iter().all(|rows| rows.place.context.is_none());
        let mut of_host = hash_all(&runs.iter().filter(on_host).collect::<Vec<_>>()).into_iter();
        let one = |run: &Run| match on_host(&run) {
            true => Ok(of_host.next().expect("each run of the host was hashed")),
            false => self.read(run),
        };
        runs.iter().map(one).collect()
    }

    fn read(&self, run: &Run) -> Result<BlockChecksum, Unread> {
        let mut hasher = BlockHasher::default();
        for rows in run {
            if rows.place.context.is_none() {
                hash(rows, &mut hasher);
                continue;
            }
            // Whole rows, as many as fit, or a row in parts.
            let per_piece = (PIECE_BYTES / rows.bytes.max(1)).max(1);
            for first in (0..rows.rows).step_by(per_piece) {
                let count = per_piece.min(rows.rows - first);
                for at in (0..rows.bytes).step_by(PIECE_BYTES) {
                    let bytes = PIECE_BYTES.min(rows.bytes - at);
                    let address = rows.place.address + (first * rows.pitch + at) as u64;
                    let from = (Place { address, ..rows.place }, rows.pitch);
                    self.stream.copy_rows((self.staging.place(), bytes), from, bytes, count)?;
                    self.pass()?;
                    // SAFETY: the copy has passed, and the next begins after this.
                    hasher.update(unsafe { self.staging.head(bytes * count) });
                }
            }
        }
        Ok(hasher.finish())
    }

    fn pass(&self) -> Result<(), Unread> {
        match self.poller.watch(self.stream.record()?).recv() {
            Ok(Passed::Done) => Ok(()),
            Ok(Passed::Failed(error)) => Err(error.into()),
            Ok(Passed::Late) | Err(_) => Err(Unread::Hangs),
        }
    }

    /// Turns a bit of the first byte of a run, as failing memory would.
    pub(super) fn flip(&self, run: &Run) -> Result<(), Unread> {
        let Some(rows) = run.iter().find(|rows| rows.total() > 0) else { return Ok(()) };
        if rows.place.context.is_none() {
            // SAFETY: the flight holds the only guard of these bytes, and what wrote to them has passed.
            unsafe { *(rows.place.address as *mut u8) ^= 1 };
            return Ok(());
        }
        self.stream.copy(self.staging.place(), rows.place, 1)?;
        self.pass()?;
        // SAFETY: the copy has passed.
        let byte = unsafe { self.staging.head(1) }[0];
        self.stream.fill(rows.place, byte ^ 1, 1)?;
        self.pass()
    }
}

/// Hashes bytes of the host.
fn hash(rows: &Rows, hasher: &mut BlockHasher) {
    for row in 0..rows.rows {
        let address = rows.place.address as usize + row * rows.pitch;
        // SAFETY: the host's memory, inside a block whose guard the flight holds; what wrote to it has passed.
        hasher.update(unsafe { std::slice::from_raw_parts(address as *const u8, rows.bytes) });
    }
}

/// The checksums of runs on the host, hashed by some threads where there is enough.
fn hash_all(runs: &[&Run]) -> Vec<BlockChecksum> {
    let one = |run: &Run| {
        let mut hasher = BlockHasher::default();
        run.iter().for_each(|rows| hash(rows, &mut hasher));
        hasher.finish()
    };
    let bytes: usize = runs.iter().flat_map(|run| run.iter()).map(Rows::total).sum();
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (bytes / SHARE_BYTES_MIN).min(HASHERS_MAX).min(cores).min(runs.len());
    if threads < 2 {
        return runs.iter().map(|run| one(run)).collect();
    }
    let left = Mutex::new(runs.iter().enumerate());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut found = Vec::new();
        while let Some((at, run)) = next() {
            found.push((at, one(run)));
        }
        found
    };
    let mut found = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut found = work();
        found.extend(others.into_iter().flat_map(|other| other.join().expect("hashing does not panic")));
        found
    });
    found.sort_unstable_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, checksum)| checksum).collect()
}

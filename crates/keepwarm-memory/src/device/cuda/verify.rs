//! Checksums of runs of bytes, wherever they lie: the host's are hashed in place, a device's by its kernels where it has
//! them, and what is left is read back first.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;

use keepwarm_types::BlockChecksum;

use super::context::{Context, HostMemory, Mark, Stream};
use super::driver::CudaError;
use super::kernels::{self, Kernels, Table};
use super::moves::{Rows, Run};
use super::poll::{Passed, Poller};
use super::scratch::{Scratch, Shown};
use crate::checksum::BlockHasher;
use crate::foreign::hash_foreign;
use crate::guard::Place;
use crate::region::Foreign;

/// Bytes that are read back at a time: the second-level cache of a core still has them when they are hashed.
const PIECE_BYTES: usize = 1 << 20;
/// Threads that hash one batch: one core hashes more slowly than a link delivers.
const HASHERS_MAX: usize = 4;
/// Less than this is hashed by one thread: starting another takes some tens of microseconds.
const SHARE_BYTES_MIN: usize = 2 << 20;
/// Runs that a device hashes at a time, and their rows.
const RUNS_MAX: usize = 1024;
const ROWS_MAX: usize = 4096;
/// Words of their chunks: one for each 4 KiB of 512 MiB.
const WORDS_MAX: u64 = 131_072;
/// Words that there is room for from the start: the chunks of a batch of 64 MiB. In tests less, so that there is more to grow.
const WORDS_FIRST: u64 = if cfg!(test) { 1024 } else { 16_384 };
/// Bytes of a word.
const WORD_BYTES: u64 = 8;
/// A checksum.
const SUM_BYTES: usize = 16;

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

/// Who hashes a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hand {
    Host,
    Device,
    ReadBack,
}

/// Has a device's bytes hashed, or reads them back, on a stream of its own.
#[derive(Debug)]
pub(super) struct Verifier {
    stream: Arc<Stream>,
    staging: HostMemory,
    poller: Poller,
    /// Where the device hashes.
    desk: Option<Mutex<Desk>>,
}

/// What a device needs to hash: tables that it reads, its own room for chunks' words, and where it writes checksums. The tables
/// and the checksums are page-locked memory of the host, which writes and reads them without a copy of its own for each.
#[derive(Debug)]
struct Desk {
    kernels: Arc<Kernels>,
    runs: Table<kernels::Run>,
    rows: Table<kernels::Rows>,
    words: Scratch,
    /// Words that it asks for at most; fewer than at first where the device had no more.
    words_max: u64,
    sums: HostMemory,
    context: usize,
}

impl Desk {
    fn new(
        context: &Arc<Context>,
        kernels: &Arc<Kernels>,
        stream: &Arc<Stream>,
        shown: &Arc<Shown>,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            kernels: Arc::clone(kernels),
            runs: Table::reserve(context, RUNS_MAX)?,
            rows: Table::reserve(context, ROWS_MAX)?,
            words: Scratch::reserve(context, stream, WORD_BYTES * WORDS_FIRST, shown)?,
            words_max: WORDS_MAX,
            sums: HostMemory::reserve(context, (RUNS_MAX * SUM_BYTES) as u64)?,
            context: context.number(),
        })
    }

    fn chunks(run: &Run) -> u64 {
        kernels::Run::chunks_of(run.iter().map(Rows::total).sum::<usize>() as u64)
    }

    /// Words that there is room for.
    const fn room(&self) -> u64 {
        self.words.bytes() / WORD_BYTES
    }

    /// Makes room for these runs at once, or for as many as may be. Where the device has no more memory it works with what
    /// it has: in more launches, and a run that is too long for it is read back.
    fn widen(&mut self, runs: &[Run]) -> Result<(), CudaError> {
        let own = |run: &&Run| run.iter().all(|rows| rows.place.context == Some(self.context));
        let wanted: u64 = runs.iter().filter(own).map(Self::chunks).sum();
        let wanted = wanted.next_power_of_two().min(self.words_max);
        match self.words.grow(WORD_BYTES * wanted) {
            Err(error @ CudaError::Scratch { .. }) => {
                tracing::warn!(%error, "checksums will be slower: what there is must do");
                self.words_max = self.room();
                Ok(())
            }
            answer => answer,
        }
    }

    /// Whether the device can hash this run: all of it lies in its own memory, and there is room.
    fn takes(&self, run: &Run) -> bool {
        run.len() <= ROWS_MAX
            && Self::chunks(run) <= self.room()
            && run.iter().all(|rows| rows.place.context == Some(self.context))
    }

    /// How many of these runs, from the first on, there is room for at a time.
    fn fitting(&self, runs: &[&Run]) -> usize {
        let (mut rows, mut words) = (0, 0);
        let fits = |run: &&&Run| {
            (rows, words) = (rows + run.len(), words + Self::chunks(run));
            rows <= ROWS_MAX && words <= self.room()
        };
        runs.iter().take(RUNS_MAX).take_while(fits).count()
    }

    /// Has them hashed. All that was launched before has passed.
    fn launch(&mut self, runs: &[&Run], stream: &Stream) -> Result<(), CudaError> {
        let (mut of_runs, mut of_rows, mut words) = (Vec::new(), Vec::new(), 0);
        for (number, run) in runs.iter().enumerate() {
            of_runs.push(kernels::Run {
                rows: self.rows.address(of_rows.len()),
                bytes: run.iter().map(Rows::total).sum::<usize>() as u64,
                chunks: self.words.address() + WORD_BYTES * words,
                checksum: self.sums.address() + (number * SUM_BYTES) as u64,
            });
            words += Self::chunks(run);
            let part = |rows: &Rows| kernels::Rows {
                at: rows.place.address,
                pitch: rows.pitch as u64,
                bytes: rows.bytes as u64,
                rows: rows.rows as u64,
            };
            of_rows.extend(run.iter().map(part));
        }
        // SAFETY: nothing that reads the tables is still to run.
        unsafe {
            self.runs.set(&of_runs);
            self.rows.set(&of_rows);
        }
        self.kernels.checksums(stream, &self.runs)
    }

    /// The checksums of the last launch, which has passed.
    fn sums(&self, count: usize) -> impl Iterator<Item = BlockChecksum> {
        // SAFETY: the kernels that write there have passed.
        let sums = unsafe { self.sums.head(count * SUM_BYTES) };
        let one = |sum: &[u8]| u128::from_le_bytes(sum.try_into().expect("pieces of that length"));
        sums.chunks_exact(SUM_BYTES).map(move |sum| BlockChecksum::from_u128(one(sum)))
    }
}

impl Verifier {
    pub(super) fn new(
        context: &Arc<Context>,
        poller: &Poller,
        kernels: Option<&Arc<Kernels>>,
        shown: &Arc<Shown>,
    ) -> Result<Self, CudaError> {
        context.enter()?;
        let staging = HostMemory::reserve(context, PIECE_BYTES as u64)?;
        let stream = Arc::new(Stream::create(context)?);
        let desk = kernels.map(|kernels| Desk::new(context, kernels, &stream, shown).map(Mutex::new));
        Ok(Self { stream, staging, poller: poller.clone(), desk: desk.transpose()? })
    }

    /// The checksum of each run. All that wrote to them has passed, and their guards are held.
    pub(super) fn checksums(&self, runs: &[Run]) -> Result<Vec<BlockChecksum>, Unread> {
        let mut desk = self.desk.as_ref().map(|desk| desk.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(desk) = desk.as_mut() {
            desk.widen(runs)?;
        }
        let hand = |run: &&Run| match desk.as_ref() {
            _ if run.iter().all(|rows| rows.place.context.is_none()) => Hand::Host,
            Some(desk) if desk.takes(run) => Hand::Device,
            _ => Hand::ReadBack,
        };
        let hands: Vec<_> = runs.iter().map(|run| hand(&run)).collect();
        let of = |hand| runs.iter().zip(&hands).filter(move |(_, is)| **is == hand).map(|(run, _)| run);
        let of_device: Vec<_> = of(Hand::Device).collect();
        let mut of_host = hash_all(&of(Hand::Host).collect::<Vec<_>>()).into_iter();
        let mut of_device = match desk.as_mut() {
            Some(desk) => self.hash_there(desk, &of_device)?,
            None => Vec::new(),
        }
        .into_iter();
        let one = |(run, hand): (&Run, &Hand)| match hand {
            Hand::Host => Ok(of_host.next().expect("each run of the host was hashed")),
            Hand::Device => Ok(of_device.next().expect("each run of the device was hashed")),
            Hand::ReadBack => self.read(run),
        };
        runs.iter().zip(&hands).map(one).collect()
    }

    /// Has the device hash runs, as many at a time as there is room for.
    fn hash_there(&self, desk: &mut Desk, mut runs: &[&Run]) -> Result<Vec<BlockChecksum>, Unread> {
        let mut found = Vec::with_capacity(runs.len());
        while !runs.is_empty() {
            let (now, later) = runs.split_at(desk.fitting(runs));
            self.pass(desk.launch(now, &self.stream))?;
            found.extend(desk.sums(now.len()));
            runs = later;
        }
        Ok(found)
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
                    self.pass(self.stream.copy_rows((self.staging.place(), bytes), from, bytes, count))?;
                    // SAFETY: the copy has passed, and the next begins after this.
                    hasher.update(unsafe { self.staging.head(bytes * count) });
                }
            }
        }
        Ok(hasher.finish())
    }

    /// Waits for what was put on the stream. Where putting it there failed, a part of it may run and read what is verified.
    fn pass(&self, put: Result<(), CudaError>) -> Result<(), Unread> {
        let (mark, failed) = match put.and_then(|()| self.stream.record()) {
            Ok(mark) => (mark, None),
            // Nothing more is put in before this has passed.
            Err(error) => (Mark::End(Arc::clone(&self.stream)), Some(error)),
        };
        match (self.poller.watch(mark).recv(), failed) {
            (Ok(Passed::Late) | Err(_), _) => Err(Unread::Hangs),
            (Ok(_), Some(error)) | (Ok(Passed::Failed(error)), None) => Err(error.into()),
            (Ok(Passed::Done), None) => Ok(()),
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
        self.pass(self.stream.copy(self.staging.place(), rows.place, 1))?;
        // SAFETY: the copy has passed.
        let byte = unsafe { self.staging.head(1) }[0];
        self.pass(self.stream.fill(rows.place, byte ^ 1, 1))
    }
}

/// Hashes bytes of the host.
fn hash(rows: &Rows, hasher: &mut BlockHasher) {
    for row in 0..rows.rows {
        let address = rows.place.address as usize + row * rows.pitch;
        if rows.foreign {
            // SAFETY: the host's memory, inside a region that the flight keeps mapped.
            unsafe { hash_foreign(address as *const u8, rows.bytes, hasher) };
            continue;
        }
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

//! A process that brings regions, and the thread that watches it: it drops mappings once the process has closed them or is
//! gone, so that nobody else waits for the driver's calls for that.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{REGIONS_MAX, RegionError, Shared, Unmapped};

/// Processes that bring regions at a time: a thread each, eight for each of a machine's GPUs.
pub const PEERS_MAX: usize = 64;
/// How often a mapping that a hanging device keeps is tried again.
const STUCK_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Processes that are watched.
static PEERS: AtomicUsize = AtomicUsize::new(0);

/// A process that brings memory regions; watched until all of its regions are gone. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peer(Arc<Last>);

/// Tells the thread when the last handle has dropped.
#[derive(Debug)]
struct Last(Arc<Watch>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.list().left = true;
        self.0.wake();
    }
}

#[derive(Debug, Default)]
struct List {
    /// The process is gone.
    gone: bool,
    /// It has said that it closed all.
    closed: bool,
    /// Nobody can bring more.
    left: bool,
    /// Regions that are being opened.
    opening: usize,
    /// Regions whose mapping is not dropped.
    regions: Vec<Arc<Shared>>,
}

#[derive(Debug)]
pub(super) struct Watch {
    process: OwnedFd,
    wake: OwnedFd,
    list: Mutex<List>,
}

impl Peer {
    /// Watches the process of that number (`pidfd_open(2)`). A number can be used again: take it from a socket's
    /// credentials, or take [the descriptor](Self::from_pidfd) from there.
    ///
    /// # Errors
    /// [`RegionError::PeerGone`], [`RegionError::Peers`], [`RegionError::System`].
    pub fn watch_process(process: u32) -> Result<Self, RegionError> {
        let number = i32::try_from(process).ok().and_then(Pid::from_raw).ok_or(RegionError::PeerGone)?;
        let process = pidfd_open(number, PidfdFlags::empty()).map_err(|error| match error {
            Errno::SRCH => RegionError::PeerGone,
            error => RegionError::System { what: "pidfd_open of the process", cause: error.into() },
        })?;
        Self::from_pidfd(process)
    }

    /// Watches the process of a descriptor that names one for good (`SO_PEERPIDFD` of its socket).
    ///
    /// # Errors
    /// [`RegionError::PeerGone`], [`RegionError::Peers`], [`RegionError::System`].
    pub fn from_pidfd(process: OwnedFd) -> Result<Self, RegionError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| RegionError::System { what: "eventfd", cause: error.into() })?;
        let watch = Arc::new(Watch { process, wake, list: Mutex::default() });
        if !watch.is_alive() {
            return Err(RegionError::PeerGone);
        }
        let more = |count: usize| (count < PEERS_MAX).then_some(count + 1);
        PEERS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).map_err(|_| RegionError::Peers)?;
        let (counted, watching) = (Counted, Arc::clone(&watch));
        thread::Builder::new()
            .name("regions".to_owned())
            .spawn(move || {
                watching.run();
                drop(counted);
            })
            .map_err(|cause| RegionError::System { what: "a thread for the process", cause })?;
        Ok(Self(Arc::new(Last(watch))))
    }

    /// Whether the process runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.0.is_alive()
    }

    /// The process has said that it closed all of its regions; it can bring no more by this.
    pub fn closed(&self) {
        self.0.0.list().closed = true;
        self.0.0.wake();
    }

    pub(super) fn watch(&self) -> &Arc<Watch> {
        &self.0.0
    }
}

/// One of [`PEERS_MAX`].
struct Counted;

impl Drop for Counted {
    fn drop(&mut self) {
        PEERS.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Watch {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread look.
    pub(super) fn wake(&self) {
        // A count that is full has the thread look as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Whether the process runs: its descriptor can be read once it has ended (`pidfd_open(2)`).
    pub(super) fn is_alive(&self) -> bool {
        let mut ends = [PollFd::new(&self.process, PollFlags::IN)];
        !matches!(poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
    }

    /// Takes up one more region, if the process may bring one.
    pub(super) fn admit(
        &self,
        open: impl FnOnce() -> Result<Arc<Shared>, RegionError>,
    ) -> Result<Arc<Shared>, RegionError> {
        {
            let mut list = self.list();
            if list.gone || !self.is_alive() {
                return Err(RegionError::PeerGone);
            }
            if list.closed {
                return Err(RegionError::PeerClosed);
            }
            if list.regions.len() + list.opening >= REGIONS_MAX {
                return Err(RegionError::Regions);
            }
            list.opening += 1;
        }
        // Not under the lock: the driver's calls for it may wait.
        let opened = open();
        let mut list = self.list();
        list.opening -= 1;
        list.regions.extend(opened.as_ref().ok().cloned());
        drop(list);
        // What ended meanwhile ends this region too.
        self.wake();
        opened
    }

    /// Until nothing is left to watch for.
    fn run(&self) {
        let mut stuck = false;
        loop {
            match self.wait(stuck) {
                Ok(true) => self.list().gone = true,
                Ok(false) => {}
                Err(error) => {
                    // Nobody would see the end of the process: what it brought stays mapped, and takes no more.
                    tracing::warn!(%error, "a process that brings memory regions cannot be watched");
                    self.list().closed = true;
                    let regions = std::mem::take(&mut self.list().regions);
                    regions.iter().for_each(|region| region.close(false));
                    return;
                }
            }
            stuck = false;
            let (over, regions) = {
                let list = self.list();
                (list.gone || list.closed, list.regions.clone())
            };
            let mut dropped = Vec::new();
            for region in regions {
                if over {
                    region.give_up();
                }
                match region.sweep() {
                    Some(Unmapped::Done | Unmapped::Never) => dropped.push(region),
                    Some(Unmapped::Later) => stuck = true,
                    None => {}
                }
            }
            let mut list = self.list();
            list.regions.retain(|region| !dropped.iter().any(|gone| Arc::ptr_eq(gone, region)));
            if list.regions.is_empty() && list.opening == 0 && (list.gone || list.closed || list.left) {
                return;
            }
        }
    }

    /// Waits until there is something to do; tells whether the process is gone.
    fn wait(&self, stuck: bool) -> Result<bool, Errno> {
        // A process that has ended would be told again and again.
        let gone = self.list().gone;
        let mut ends = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if !gone {
            ends.push(PollFd::new(&self.process, PollFlags::IN));
        }
        match poll(&mut ends, stuck.then_some(&STUCK_PAUSE)) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(gone),
            Err(error) => return Err(error),
        }
        let ended = ends.get(1).is_some_and(|end| !end.revents().is_empty());
        // Looked at after this, so that what is told meanwhile wakes it again.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        Ok(gone || ended)
    }
}

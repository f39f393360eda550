//! One thread per device that asks which events have passed: no other thread waits in the driver.
//!
//! Every event has a deadline. When it is over the device is fenced, whoever waits is told, and the event is
//! asked for on: until it passes, a copy may still touch the memory that its flight holds.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

use super::context::{Context, Mark};
use super::driver::CudaError;
use crate::device::health::Health;

/// Events that wait to be taken up: one for each batch in flight and each piece that is read back, twice over.
const EVENTS_MAX: usize = 64;
/// How long the thread asks without a pause after something passed: a small copy takes some ten microseconds.
const EAGER: Duration = Duration::from_micros(200);
/// Its pause afterwards: a hundredth of what a batch of 64 MiB takes on a fast link.
const PAUSE: Duration = Duration::from_micros(20);

/// What became of an event.
#[derive(Debug)]
pub(super) enum Passed {
    /// All that was before it in its stream has run.
    Done,
    /// The device failed: nothing that was before it can be trusted.
    Failed(CudaError),
    /// Its deadline is over; another word follows when it passes after all.
    Late,
}

struct Watch {
    mark: Mark,
    deadline: Instant,
    late: bool,
    tell: Sender<Passed>,
}

/// Sends events to the thread; the thread ends with the last of these.
#[derive(Debug, Clone)]
pub(super) struct Poller {
    watches: Sender<Watch>,
    patience: Duration,
}

impl Poller {
    /// Starts the thread; an event that has not passed after `patience` fences the device.
    pub(super) fn start(
        name: &str,
        context: &Arc<Context>,
        health: &Arc<Health>,
        patience: Duration,
    ) -> Result<Self, CudaError> {
        let (watches, receive) = bounded(EVENTS_MAX);
        let (context, health) = (Arc::clone(context), Arc::clone(health));
        thread::Builder::new()
            .name(format!("{name}-events"))
            .spawn(move || run(&receive, &context, &health, patience))
            .map_err(CudaError::System)?;
        Ok(Self { watches, patience })
    }

    /// Tells of the event, by its deadline at the latest.
    pub(super) fn watch(&self, mark: Mark) -> Receiver<Passed> {
        // Room for both words, so that the thread never waits for who asked.
        let (tell, told) = bounded(2);
        let watch = Watch { mark, deadline: Instant::now() + self.patience, late: false, tell };
        // Where the thread is gone the sender drops, and that is told by the channel.
        drop(self.watches.send(watch));
        told
    }
}

fn run(watches: &Receiver<Watch>, context: &Context, health: &Health, patience: Duration) {
    if let Err(error) = context.enter() {
        health.fence(&format!("its events cannot be asked for: {error}"));
        return;
    }
    let mut waiting: Vec<Watch> = Vec::new();
    let mut active = Instant::now();
    loop {
        let next = match waiting.is_empty() {
            true => watches.recv().map_err(|_| TryRecvError::Disconnected),
            false if active.elapsed() < EAGER => watches.try_recv(),
            false => watches.recv_timeout(PAUSE).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            }),
        };
        match next {
            Ok(watch) => {
                active = Instant::now();
                waiting.push(watch);
            }
            Err(TryRecvError::Disconnected) if waiting.is_empty() => return,
            // Nothing more comes, but what is out still has to pass.
            Err(TryRecvError::Disconnected) => thread::sleep(PAUSE),
            Err(TryRecvError::Empty) => {}
        }
        let before = waiting.len();
        waiting.retain_mut(|watch| !settled(watch, context, health, patience));
        if waiting.len() < before {
            active = Instant::now();
        }
    }
}

/// Whether the last word on it was told.
fn settled(watch: &mut Watch, context: &Context, health: &Health, patience: Duration) -> bool {
    let last = match watch.mark.passed() {
        Ok(true) => Passed::Done,
        Ok(false) => {
            if !watch.late && Instant::now() >= watch.deadline {
                watch.late = true;
                context.hangs();
                health.fence(&format!("it hangs: an event has not passed within {patience:?}"));
                drop(watch.tell.send(Passed::Late));
            }
            return false;
        }
        Err(error) => {
            health.fence(&error.to_string());
            Passed::Failed(error)
        }
    };
    if watch.late {
        context.moves_again();
    }
    drop(watch.tell.send(last));
    true
}

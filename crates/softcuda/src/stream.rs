//! A stream: a FIFO, a thread that works through it, and a count that others wait for. Knows how to order work,
//! not what the work is.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::context::Context;
use crate::error::{Answer, Code};
use crate::locks::{lock, wait, wait_a_while};
use crate::operation::Operation;
use crate::report;

/// Operations that wait in one stream; a call that would add one more blocks until there is room, as a GPU's does.
pub(crate) const QUEUE_MAX: usize = 1 << 16;
/// How often a waiting worker looks whether its stream was given up meanwhile.
const GIVEN_UP_CHECK: Duration = Duration::from_millis(20);

/// How far a stream has come.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    done: Mutex<u64>,
    changed: Condvar,
}

/// A point in a stream: done once its first `count` operations are.
#[derive(Debug, Clone)]
pub(crate) struct Marker {
    pub(crate) progress: Arc<Progress>,
    pub(crate) count: u64,
}

impl Marker {
    pub(crate) fn is_done(&self) -> bool {
        *lock(&self.progress.done) >= self.count
    }

    pub(crate) fn wait(&self) {
        let mut done = lock(&self.progress.done);
        while *done < self.count {
            done = wait(&self.progress.changed, done);
        }
    }

    fn wait_unless(&self, given_up: &AtomicBool) {
        let mut done = lock(&self.progress.done);
        while *done < self.count && !given_up.load(Ordering::Acquire) {
            done = wait_a_while(&self.progress.changed, done, GIVEN_UP_CHECK);
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    operations: VecDeque<Operation>,
    issued: u64,
    closed: bool,
}

/// A stream of a context.
#[derive(Debug)]
pub(crate) struct Stream {
    /// A small number for people: traces and reports name it.
    pub(crate) number: u32,
    pub(crate) device: usize,
    /// Whether it takes part in the legacy stream's implicit order.
    pub(crate) blocking: bool,
    pub(crate) priority: i32,
    /// Its place in vector clocks.
    pub(crate) agent: usize,
    queue: Mutex<Queue>,
    changed: Condvar,
    progress: Arc<Progress>,
    given_up: AtomicBool,
}

impl Stream {
    /// Starts a stream's thread.
    pub(crate) fn start(
        context: &Arc<Context>,
        number: u32,
        agent: usize,
        blocking: bool,
        priority: i32,
    ) -> Answer<Arc<Self>> {
        let stream = Arc::new(Self {
            number,
            device: context.device,
            blocking,
            priority,
            agent,
            queue: Mutex::default(),
            changed: Condvar::new(),
            progress: Arc::default(),
            given_up: AtomicBool::new(false),
        });
        let (worker, context) = (Arc::clone(&stream), Arc::clone(context));
        std::thread::Builder::new()
            .name(format!("softcuda-{number}"))
            .spawn(move || worker.work(&context))
            .map_err(|_| Code::OPERATING_SYSTEM)?;
        Ok(stream)
    }

    /// Blocks while the queue is full. Apart from `push`, so that nobody waits with the order of all streams locked;
    /// threads that find the same room overfill it by one operation each.
    pub(crate) fn wait_for_room(&self) {
        let mut queue = lock(&self.queue);
        while queue.operations.len() >= QUEUE_MAX && !queue.closed {
            queue = wait(&self.changed, queue);
        }
    }

    /// Appends an operation and tells its place.
    pub(crate) fn push(&self, operation: Operation) -> Marker {
        let mut queue = lock(&self.queue);
        queue.issued += 1;
        queue.operations.push_back(operation);
        let marker = Marker { progress: Arc::clone(&self.progress), count: queue.issued };
        drop(queue);
        self.changed.notify_all();
        marker
    }

    /// Everything that was pushed so far.
    pub(crate) fn all(&self) -> Marker {
        Marker { progress: Arc::clone(&self.progress), count: lock(&self.queue).issued }
    }

    /// Ends the thread once the queue is empty.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Ends the thread without doing what is queued.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
        self.close();
    }

    /// Sleeps, unless the stream is given up meanwhile.
    pub(crate) fn pause(&self, time: Duration) {
        let deadline = Instant::now() + time;
        while !self.given_up.load(Ordering::Acquire) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(GIVEN_UP_CHECK));
        }
    }

    /// Set when the stream is given up: what runs should end.
    pub(crate) fn given_up(&self) -> &AtomicBool {
        &self.given_up
    }

    fn next(&self) -> Option<Operation> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(operation) = queue.operations.pop_front() {
                drop(queue);
                self.changed.notify_all();
                return Some(operation);
            }
            if queue.closed {
                return None;
            }
            queue = wait(&self.changed, queue);
        }
    }

    fn work(&self, context: &Arc<Context>) {
        while let Some(operation) = self.next() {
            for marker in &operation.after {
                marker.wait_unless(&self.given_up);
            }
            context.gate.pass(&self.given_up);
            if !self.given_up.load(Ordering::Acquire) {
                // A thread that ended would leave everybody waiting.
                if catch_unwind(AssertUnwindSafe(|| operation.run(context, self))).is_err() {
                    report::say(&format!(
                        "an operation of stream {} panicked: this is a defect of softcuda",
                        self.number
                    ));
                    context.set_sticky(Code::UNKNOWN);
                }
            }
            *lock(&self.progress.done) += 1;
            self.progress.changed.notify_all();
        }
    }
}

/// Where a hung device holds its streams.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn set(&self, shut: bool) {
        *lock(&self.shut) = shut;
        self.changed.notify_all();
    }

    fn pass(&self, given_up: &AtomicBool) {
        let mut shut = lock(&self.shut);
        while *shut && !given_up.load(Ordering::Acquire) {
            shut = wait_a_while(&self.changed, shut, GIVEN_UP_CHECK);
        }
    }
}

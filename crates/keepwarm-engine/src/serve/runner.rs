//! The sequence batcher: a thread that steps a model.
//!
//! Each step takes one token of every decoding sequence and a bounded chunk of those that still prefill.
//! A sequence whose reader is behind goes on, its text gathered; one whose reader has gone ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use keepwarm_config::BatchConfig;
use keepwarm_node::Metrics;
use tokio::sync::{mpsc, oneshot};

use super::kv::State;
use crate::chat::{ChatEvent, FinishReason};
use crate::model::{Model, Sampler, Step};
use crate::text::{StopMatcher, TextStream};

/// New tokens of all prefilling sequences in one step: long enough for the matrix products, short enough
/// that those who decode wait some tenths of a second at most.
const PREFILL_TOKENS: usize = 128;
/// Sequences that wait for the thread; more are refused before they hold memory.
pub(super) const QUEUE_MAX: usize = 64;

/// A sequence to run.
pub(super) struct Job {
    pub(super) state: State,
    /// The whole prompt, what is cached included.
    pub(super) tokens: Vec<u32>,
    /// How many of its tokens have their state already; less than all.
    pub(super) cached: usize,
    pub(super) max_new: usize,
    pub(super) sampler: Sampler,
    pub(super) stop: StopMatcher,
    pub(super) arrived: Instant,
    pub(super) events: mpsc::Sender<ChatEvent>,
    pub(super) done: oneshot::Sender<Outcome>,
}

/// A sequence that has ended.
pub(super) struct Outcome {
    pub(super) state: State,
    /// Prompt and answer; a token that ended it is not among them.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose state was computed.
    pub(super) fed: usize,
    pub(super) completion_tokens: usize,
    /// The whole answer.
    pub(super) text: String,
    /// Its end, where the reader was behind.
    pub(super) unsent: String,
    pub(super) reason: FinishReason,
    pub(super) ttft: Duration,
    /// The reader has gone.
    pub(super) abandoned: bool,
    pub(super) failed: Option<String>,
}

struct Sequence {
    job: Job,
    fed: usize,
    prompt: usize,
    stream: TextStream,
    text: String,
    unsent: String,
    ttft: Option<Duration>,
    end: Option<FinishReason>,
    abandoned: bool,
    failed: Option<String>,
}

/// A model's thread.
#[derive(Debug)]
pub(super) struct Runner {
    queue: SyncSender<Job>,
    active: Arc<AtomicUsize>,
}

impl Runner {
    pub(super) fn start(
        name: &str,
        model: Arc<Model>,
        batch: BatchConfig,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel(QUEUE_MAX);
        let active = Arc::new(AtomicUsize::new(0));
        let (counted, name) = (Arc::clone(&active), name.to_owned());
        std::thread::Builder::new().name(format!("model-{name}")).spawn(move || {
            Batcher { name, model, batch, metrics, active: counted, sequences: Vec::new() }.run(&jobs)
        })?;
        Ok(Self { queue, active })
    }

    /// Hands a sequence to the thread; it comes back where the queue is full or the thread has ended.
    pub(super) fn submit(&self, job: Job) -> Result<(), Box<Job>> {
        self.queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => Box::new(job),
        })
    }

    /// Sequences at work.
    pub(super) fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }
}

struct Batcher {
    name: String,
    model: Arc<Model>,
    batch: BatchConfig,
    metrics: Arc<Metrics>,
    active: Arc<AtomicUsize>,
    sequences: Vec<Sequence>,
}

impl Batcher {
    fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            if self.sequences.is_empty() {
                let Ok(job) = jobs.recv() else { return };
                self.take(job);
                let deadline = Instant::now() + self.batch.delay;
                while self.sequences.len() < self.batch.max as usize {
                    match jobs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                        Ok(job) => self.take(job),
                        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                    }
                }
            }
            while self.sequences.len() < self.batch.max as usize {
                match jobs.try_recv() {
                    Ok(job) => self.take(job),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            self.active.store(self.sequences.len(), Ordering::Relaxed);
            self.step();
            self.end();
        }
    }

    fn take(&mut self, job: Job) {
        self.sequences.push(Sequence {
            fed: job.cached,
            prompt: job.tokens.len(),
            job,
            stream: TextStream::default(),
            text: String::new(),
            unsent: String::new(),
            ttft: None,
            end: None,
            abandoned: false,
            failed: None,
        });
    }

    fn step(&mut self) {
        let mut budget = PREFILL_TOKENS;
        let mut steps = Vec::with_capacity(self.sequences.len());
        let mut stepped = Vec::with_capacity(self.sequences.len());
        for (at, sequence) in self.sequences.iter_mut().enumerate() {
            let job = &mut sequence.job;
            let left = job.tokens.len() - sequence.fed;
            let take = if left == 1 { 1 } else { left.min(budget) };
            if take == 0 {
                continue;
            }
            if left > 1 {
                budget -= take;
            }
            let tokens = &job.tokens[sequence.fed..sequence.fed + take];
            steps.push(Step { tokens, position: sequence.fed, kv: job.state.cache(), logits: take == left });
            stepped.push((at, take));
        }
        self.metrics.batch(&self.name, steps.len());
        let result = self.model.step(&mut steps);
        drop(steps);
        match result {
            Ok(logits) => {
                for ((at, take), logits) in stepped.into_iter().zip(logits) {
                    let sequence = &mut self.sequences[at];
                    sequence.fed += take;
                    if let Some(logits) = logits {
                        sequence.next(&self.model, &logits);
                    }
                }
            }
            Err(error) => {
                tracing::error!(model = self.name, %error, "a step failed");
                for (at, _) in stepped {
                    self.sequences[at].failed = Some(error.to_string());
                }
            }
        }
    }

    /// Lets go of the sequences that have ended.
    fn end(&mut self) {
        for sequence in &mut self.sequences {
            sequence.abandoned |= sequence.job.events.is_closed();
        }
        let ended = |sequence: &mut Sequence| {
            sequence.end.is_some() || sequence.abandoned || sequence.failed.is_some()
        };
        for sequence in self.sequences.extract_if(.., ended) {
            sequence.finish();
        }
        self.active.store(self.sequences.len(), Ordering::Relaxed);
    }
}

impl Sequence {
    /// Chooses the next token from the last one's logits.
    fn next(&mut self, model: &Model, logits: &[f32]) {
        let token = self.job.sampler.choose(logits, self.job.tokens.len());
        self.ttft.get_or_insert_with(|| self.job.arrived.elapsed());
        if model.tokenizer().ends(token) {
            self.end = Some(FinishReason::Stop);
            return;
        }
        self.job.tokens.push(token);
        let text = self.stream.push(model.tokenizer(), token);
        let (sure, stopped) = self.job.stop.push(&text);
        self.say(&sure);
        if stopped {
            self.end = Some(FinishReason::Stop);
        } else if self.job.tokens.len() - self.prompt >= self.job.max_new {
            self.end = Some(FinishReason::Length);
        }
    }

    /// Sends text, gathered while the reader is behind.
    fn say(&mut self, text: &str) {
        self.text.push_str(text);
        self.unsent.push_str(text);
        if !self.unsent.is_empty()
            && let Ok(permit) = self.job.events.try_reserve()
        {
            permit.send(ChatEvent::Text(std::mem::take(&mut self.unsent)));
        }
    }

    fn finish(mut self) {
        if self.end == Some(FinishReason::Length) || self.end == Some(FinishReason::Stop) {
            let rest = self.stream.finish();
            let (sure, stopped) = self.job.stop.push(&rest);
            let held = if stopped { String::new() } else { self.job.stop.finish() };
            self.say(&(sure + &held));
        }
        let tokens = self.job.tokens;
        let outcome = Outcome {
            state: self.job.state,
            completion_tokens: tokens.len() - self.prompt,
            tokens,
            fed: self.fed,
            text: self.text,
            unsent: self.unsent,
            reason: self.end.unwrap_or(FinishReason::Stop),
            ttft: self.ttft.unwrap_or_else(|| self.job.arrived.elapsed()),
            abandoned: self.abandoned,
            failed: self.failed,
        };
        let _ = self.job.done.send(outcome);
    }
}

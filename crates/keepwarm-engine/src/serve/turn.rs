//! A turn from the call to its commit.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use keepwarm_config::ModelConfig;
use keepwarm_core::session::{
    Etag, Form, Fp8, Layout, LayoutError, Message, Number, Order, Part, Planes, TranscriptDelta,
};
use keepwarm_memory::Block;
use keepwarm_node::{ActivateRequest, ContextInfo, Error, Handle, TurnPart, TurnRequest};
use keepwarm_types::{Bytes, GpuIndex, LeaseId, Millis, Owner, SessionKey, Source, Tier, Tokens};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::branch::{Gates, Pass};
use super::kv::{GpuKv, State, shape};
use super::plan::Plan;
use super::replay::{Call, Claim, Replay, Replays};
use super::runner::{Job, Outcome, QUEUE_MAX, Runner};
use crate::chat::{
    ChatBackend, ChatError, ChatEvent, ChatRequest, ChatStream, EVENTS_AHEAD, Finished, ModelInfo, Started,
};
use crate::model::{HeapKv, LoadError, Model, Sampler, Sampling};
use crate::text::StopMatcher;

/// Tokens of an answer, where the call does not say.
const MAX_TOKENS_DEFAULT: usize = 512;
/// The lease of a turn: longer than any answer takes.
const TURN_LEASE: Millis = Millis(600_000);

/// Why a service did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A model could not be loaded.
    #[error("model '{name}': {cause}")]
    Load {
        /// Which.
        name: String,
        /// Why.
        cause: LoadError,
    },
    /// A source that this version does not know.
    #[error("model '{name}': source '{source_text}' is neither gguf:PATH nor tiny:SEED")]
    Source {
        /// Which.
        name: String,
        /// What was given.
        source_text: String,
    },
    /// Its state makes no layout.
    #[error("model '{name}': {cause}")]
    Layout {
        /// Which.
        name: String,
        /// Why.
        cause: LayoutError,
    },
    /// A thread could not be started.
    #[error("model '{name}': {cause}")]
    Thread {
        /// Which.
        name: String,
        /// Why.
        cause: std::io::Error,
    },
}

#[derive(Debug)]
pub(super) struct Served {
    info: ModelInfo,
    pub(super) model: Arc<Model>,
    pub(super) layout: Arc<Layout>,
    /// The same model's state, kept as FP8 in cold tiers; none where its blocks are too small for that.
    pub(super) lossy: Option<Arc<Layout>>,
    runner: Runner,
    /// A slot in the batch, taken before memory is.
    slots: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) handle: Handle,
    models: Vec<Served>,
    gates: Arc<Gates>,
    replays: Arc<Replays>,
}

/// The built-in engine: models over a node's sessions.
#[derive(Debug, Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

/// A session at work.
struct Held {
    lease: LeaseId,
    gpu: GpuIndex,
    plan: Plan,
    /// HBM that the turn needs, and whether it was short here.
    needed: Bytes,
    short: bool,
    _pass: Pass,
}

/// Whether it is HBM that is short: another node may have it.
const fn lacks_hbm(error: &Error) -> bool {
    matches!(error, Error::NoCapacity { tier: Tier::Hbm, .. })
}

fn load(config: &ModelConfig) -> Result<Model, ServiceError> {
    let name = config.name.clone();
    match config.source.split_once(':') {
        Some(("gguf", path)) => {
            Model::load(Path::new(path)).map_err(|cause| ServiceError::Load { name, cause })
        }
        Some(("tiny", seed)) if seed.parse::<u64>().is_ok() => {
            Ok(Model::tiny(seed.parse().unwrap_or_default()))
        }
        _ => Err(ServiceError::Source { name, source_text: config.source.clone() }),
    }
}

fn layout_of(name: &str, model: &Model) -> Result<Arc<Layout>, LayoutError> {
    let g = model.geometry();
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let planes = Planes {
        tokens_per_block: small(g.tokens_per_block),
        planes: small(g.planes()),
        plane_bytes_per_token: small(g.plane_bytes_per_token()),
        order: Order::Plane,
    };
    let part = Part { name: "kv".parse()?, form: Form::Paged(planes), cold: None };
    Layout::new(name, model.fingerprint(), vec![part]).map(Arc::new)
}

impl Service {
    /// Loads the models of a configuration and starts their threads. Blocks while it reads files.
    ///
    /// # Errors
    /// [`ServiceError`] naming the model.
    pub fn start(handle: &Handle, models: &[ModelConfig]) -> Result<Self, ServiceError> {
        let serve = |config: &ModelConfig| {
            let name = config.name.clone();
            let model = Arc::new(load(config)?);
            let layout = layout_of(&name, &model)
                .map_err(|cause| ServiceError::Layout { name: name.clone(), cause })?;
            let lossy = layout.with_cold(Some(Fp8 { from: Number::F16 })).ok().map(Arc::new);
            let metrics = Arc::clone(handle.metrics());
            let runner = Runner::start(&name, Arc::clone(&model), config.batch, metrics);
            let runner = runner.map_err(|cause| ServiceError::Thread { name: name.clone(), cause })?;
            let info = ModelInfo {
                name,
                fingerprint: model.fingerprint().to_owned(),
                context: model.geometry().context,
                kv_bytes_per_token: model.geometry().kv_bytes_per_token() as u64,
                random: model.is_random(),
                loaded_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            };
            let slots = Arc::new(Semaphore::new(config.batch.max as usize));
            Ok(Served {
                info,
                model,
                layout,
                lossy,
                runner,
                slots,
                waiting: Arc::new(Semaphore::new(QUEUE_MAX)),
            })
        };
        let models = models.iter().map(serve).collect::<Result<_, _>>()?;
        let inner = Inner { handle: handle.clone(), models, gates: Arc::default(), replays: Arc::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    async fn begin(&self, request: ChatRequest) -> Result<ChatStream, ChatError> {
        let arrived = Instant::now();
        let inner = &self.inner;
        let known =
            || inner.models.iter().map(|served| served.info.name.as_str()).collect::<Vec<_>>().join(", ");
        let unknown = || ChatError::UnknownModel { name: request.model.clone(), known: known() };
        let at =
            inner.models.iter().position(|served| served.info.name == request.model).ok_or_else(unknown)?;
        let claim = match inner.replays.enter(&request).await? {
            Call::First(claim) => claim,
            Call::Again(replay) => return Ok(again(*replay)),
        };
        let served = &inner.models[at];
        let waiting = Arc::clone(&served.waiting)
            .try_acquire_owned()
            .map_err(|_| ChatError::Overloaded("for the model"))?;
        inner.report(served);
        let (held, tokens) = match request.session {
            None => (None, inner.plain(served, &request.prompt)?),
            Some(session) => {
                let key = SessionKey::new(request.tenant.clone(), session.id);
                let pass = inner.gates.enter(&key).await?;
                let plan = inner.plan(served, &key, &request.prompt, &session).await?;
                let tokens = plan.tokens.clone();
                (Some((plan, pass)), tokens)
            }
        };
        let context = served.info.context;
        if tokens.len() >= context {
            if let Some((plan, _)) = &held {
                inner.take_back(&plan.key, plan.diverged_at).await;
            }
            return Err(ChatError::TooLong { tokens: tokens.len(), context });
        }
        let max_new = request.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT).min(context - tokens.len());
        let slot = Arc::clone(&served.slots)
            .acquire_owned()
            .await
            .map_err(|_| ChatError::Overloaded("for the model"))?;
        drop(waiting);
        let prompt_tokens = tokens.len();
        let (state, cached, source, held) = match held {
            None => (
                State::Heap(HeapKv::new(served.model.geometry(), tokens.len() + max_new)),
                0,
                Source::None,
                None,
            ),
            Some((plan, pass)) => inner.hold(served, plan, pass, max_new).await?,
        };
        let started = Started {
            session: held.as_ref().map(|held| held.plan.key.id),
            source,
            diverged_at: held.as_ref().and_then(|held| held.plan.diverged_at),
            prompt_tokens,
            cached_tokens: cached,
        };
        inner.handle.metrics().prefill_avoided(cached as u64);
        let (events, receive) = mpsc::channel(EVENTS_AHEAD);
        let (done, outcome) = oneshot::channel();
        let _ = events.try_send(ChatEvent::Started(started));
        let sampling = Sampling {
            temperature: request.temperature,
            top_p: request.top_p,
            seed: request.seed.unwrap_or_else(seed),
        };
        let job = Job {
            state,
            tokens,
            cached,
            max_new,
            sampler: Sampler::new(sampling),
            stop: StopMatcher::new(request.stop.clone()),
            arrived,
            events: events.clone(),
            done,
        };
        if served.runner.submit(job).is_err() {
            inner.let_go(held).await;
            return Err(ChatError::Overloaded("for the model"));
        }
        let service = self.clone();
        tokio::spawn(async move { service.end(at, claim, started, held, outcome, events, slot).await });
        Ok(receive)
    }

    /// Waits for the sequence and commits its turn.
    async fn end(
        self,
        at: usize,
        claim: Option<Claim>,
        started: Started,
        held: Option<Held>,
        outcome: oneshot::Receiver<Outcome>,
        events: mpsc::Sender<ChatEvent>,
        slot: OwnedSemaphorePermit,
    ) {
        let inner = &self.inner;
        let Ok(mut outcome) = outcome.await else {
            inner.let_go(held).await;
            let _ = events.send(ChatEvent::Failed(ChatError::Model("its thread has ended".to_owned()))).await;
            return;
        };
        drop(slot);
        let served = &inner.models[at];
        inner.report(served);
        inner.handle.metrics().ttft(started.source, outcome.ttft);
        if let Some(reason) = outcome.failed {
            inner.let_go(held).await;
            let _ = events.send(ChatEvent::Failed(ChatError::Model(reason))).await;
            return;
        }
        if outcome.abandoned {
            inner.let_go(held).await;
            return;
        }
        let uncached = held.is_some() && matches!(outcome.state, State::Heap(_));
        let finished = Finished {
            reason: outcome.reason,
            completion_tokens: outcome.completion_tokens,
            etag: None,
            ttft: outcome.ttft,
            uncached,
        };
        let (text, unsent) = (outcome.text.clone(), std::mem::take(&mut outcome.unsent));
        let committed = match held {
            Some(held) => inner.commit(served, held, outcome, claim.is_some()).await.map(Some),
            None => Ok(None),
        };
        if let (Ok(etag), Some(claim)) = (&committed, claim) {
            claim.keep(started, text, Finished { etag: *etag, ..finished });
        }
        // A reader that is behind gets the rest too; one that goes away ends these waits.
        if !unsent.is_empty() {
            let _ = events.send(ChatEvent::Text(unsent)).await;
        }
        let last = match committed {
            Ok(etag) => ChatEvent::Finished(Finished { etag, ..finished }),
            Err(error) => ChatEvent::Failed(error.into()),
        };
        let _ = events.send(last).await;
    }
}

/// An answer that was given before, as events.
fn again(replay: Replay) -> ChatStream {
    // All three fit, so that none is refused.
    let (send, receive) = mpsc::channel(3);
    for event in [
        ChatEvent::Started(replay.started),
        ChatEvent::Text(replay.text),
        ChatEvent::Finished(replay.finished),
    ] {
        let _ = send.try_send(event);
    }
    receive
}

fn seed() -> u64 {
    uuid::Uuid::new_v4().as_u128() as u64
}

impl Inner {
    /// Activates the session and gives the sequence its state: in the GPU's blocks, or on the heap where
    /// there is no room.
    async fn hold(
        &self,
        served: &Served,
        plan: Plan,
        pass: Pass,
        max_new: usize,
    ) -> Result<(State, usize, Source, Option<Held>), ChatError> {
        let g = served.model.geometry();
        let heap = || State::Heap(HeapKv::new(g, plan.tokens.len() + max_new));
        // A completion never fails for lack of room: it runs here, and the next one where room is.
        let request =
            ActivateRequest { ttl: Some(TURN_LEASE), only_here: true, ..ActivateRequest::default() };
        let blocks = (plan.tokens.len() + max_new).div_ceil(g.tokens_per_block) + 1;
        let needed = Bytes((blocks * g.block_bytes()) as u64);
        let mut activated = self.handle.activate(&plan.key, request.clone()).await;
        if matches!(activated, Err(Error::Corrupt { .. })) {
            // Damage on the way does not come twice; a session whose own bytes were damaged has gone cold, and
            // its transcript makes them anew.
            activated = self.handle.activate(&plan.key, request).await;
        }
        let (lease, gpu, manifest, blocks, source) = match activated {
            Ok(activation) => {
                let blocks = activation.blocks.into_iter().next().unwrap_or_default();
                (activation.lease.id, activation.home.gpu, activation.manifest, blocks, activation.source)
            }
            Err(error @ (Error::NoCapacity { .. } | Error::Unavailable { .. } | Error::Corrupt { .. })) => {
                let (grant, home) = self.handle.lease(&plan.key, TURN_LEASE).await?;
                let (lease, gpu, short) = (grant.lease.id, home.gpu, lacks_hbm(&error));
                let held = Held { lease, gpu, plan, needed, short, _pass: pass };
                let state = State::Heap(HeapKv::new(g, held.plan.tokens.len() + max_new));
                return Ok((state, 0, Source::None, Some(held)));
            }
            Err(error) => return Err(error.into()),
        };
        let committed = if source == Source::None { 0 } else { manifest.length_tokens.as_usize() };
        let cached = committed.min(plan.keep_tokens).min(plan.tokens.len() - 1);
        let owner = Owner { tenant: plan.key.tenant.clone(), birth: manifest.birth };
        let state = self.working(served, &owner, gpu, &blocks, cached, plan.tokens.len() + max_new).await;
        let mut short = false;
        let (state, cached, source) = match state {
            Ok(Some(state)) => (state, cached, if cached == 0 { Source::None } else { source }),
            Ok(None) => (heap(), 0, Source::None),
            Err(error) => {
                tracing::info!(%error, "a turn runs uncached");
                short = lacks_hbm(&error);
                (heap(), 0, Source::None)
            }
        };
        Ok((state, cached, source, Some(Held { lease, gpu, plan, needed, short, _pass: pass })))
    }

    /// Working blocks behind what is cached; none where the blocks do not have that.
    async fn working(
        &self,
        served: &Served,
        owner: &Owner,
        gpu: GpuIndex,
        blocks: &[Block],
        cached: usize,
        tokens: usize,
    ) -> Result<Option<State>, Error> {
        let g = served.model.geometry();
        let count = tokens.div_ceil(g.tokens_per_block) - cached / g.tokens_per_block + 1;
        let blocks = self.handle.on_cpu(owner, gpu, blocks).await?;
        let working = self.handle.scratch(owner, gpu, Bytes(g.block_bytes() as u64), count).await?;
        Ok(GpuKv::new(shape(g), owner.clone(), &blocks, cached, working).map(State::Gpu))
    }

    /// Gives back what a turn held that will not be committed.
    async fn let_go(&self, held: Option<Held>) {
        if let Some(held) = held {
            // A lease that ended meanwhile is given back already.
            let _ = self.handle.release(&held.plan.key, held.lease).await;
            self.take_back(&held.plan.key, held.plan.diverged_at).await;
        }
    }

    /// Ends the fork that a turn was to go on in, if there is one: without the turn it is a copy of nothing new.
    async fn take_back(&self, key: &SessionKey, diverged_at: Option<Tokens>) {
        if diverged_at.is_some()
            && let Err(error) = self.handle.delete(key).await
        {
            tracing::warn!(%key, %error, "the fork of a turn that was given up stays");
        }
    }

    /// Commits a turn: the transcript now, the state behind it. Where room was short the session goes to a node that has it;
    /// not if this answer is `kept`, for it is here that whoever asks again finds it.
    async fn commit(&self, served: &Served, held: Held, outcome: Outcome, kept: bool) -> Result<Etag, Error> {
        let Held { lease, gpu, plan, needed, mut short, _pass } = held;
        let total = Tokens(outcome.tokens.len() as u64);
        let mut messages = plan.messages;
        if plan.conversation {
            messages.push(Message { role: "assistant".to_owned(), content: outcome.text, tokens_end: total });
        }
        let parts = match outcome.state {
            State::Heap(_) => Vec::new(),
            State::Gpu(kv) => {
                let first = kv.first_own();
                let owner = kv.owner().clone();
                let blocks = kv.seal(outcome.fed).map_err(Error::Internal)?;
                let length = Bytes((outcome.fed * served.model.geometry().kv_bytes_per_token()) as u64);
                let first_block = u32::try_from(first).unwrap_or(u32::MAX);
                match self.handle.on_gpu(&owner, gpu, blocks).await {
                    Ok(blocks) => vec![TurnPart { part: 0, first_block, blocks, length }],
                    Err(error) => {
                        // The transcript is what counts: the next turn computes the state again.
                        tracing::warn!(key = %plan.key, %error, "a turn's state did not reach its GPU");
                        short |= lacks_hbm(&error);
                        Vec::new()
                    }
                }
            }
        };
        let transcript = TranscriptDelta {
            keep_tokens: Tokens(plan.keep_tokens as u64),
            keep_messages: u32::try_from(plan.keep_messages).unwrap_or(u32::MAX),
            tokens: outcome.tokens[plan.keep_tokens..].to_vec(),
            messages,
        };
        let turn = self.handle.turn(&plan.key, TurnRequest { lease, gpu, transcript, parts }).await;
        match turn {
            Ok(done) => {
                if short && !kept {
                    let (handle, key) = (self.handle.clone(), plan.key);
                    tokio::spawn(async move {
                        handle.make_way(&key, needed).await;
                        drop(_pass);
                    });
                }
                Ok(done.etag)
            }
            Err(error) => {
                let _ = self.handle.release(&plan.key, lease).await;
                Err(error)
            }
        }
    }

    /// Tells the node what runs.
    fn report(&self, served: &Served) {
        let busy = u32::from(served.runner.active() > 0);
        let info = ContextInfo { model: served.info.name.clone(), busy, idle: 1 - busy, bytes: Bytes::ZERO };
        if !self.handle.gpus().is_empty() {
            self.handle.report_contexts(GpuIndex(0), info);
        }
        let waiting = QUEUE_MAX - served.waiting.available_permits();
        self.handle.metrics().set_queue_depth(&served.info.name, i64::try_from(waiting).unwrap_or(i64::MAX));
    }
}

impl ChatBackend for Service {
    fn models(&self) -> Vec<ModelInfo> {
        self.inner.models.iter().map(|served| served.info.clone()).collect()
    }

    fn chat(
        &self,
        request: ChatRequest,
    ) -> Pin<Box<dyn Future<Output = Result<ChatStream, ChatError>> + Send + '_>> {
        Box::pin(self.begin(request))
    }
}

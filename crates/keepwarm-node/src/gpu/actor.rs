//! The shell around one GPU.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::residency::{EvictReason, Residency, ResidencyCommand, ResidencyEvent, Resident};
use keepwarm_core::session::Manifest;
use keepwarm_memory::{Block, BlockMut, Device, DeviceError, DeviceState};
use keepwarm_types::{Birth, Bytes, InstanceId, Millis, SessionKey, Source, Tier, Timestamp};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use super::board::Board;
use super::message::{GpuMsg, Kept, Loaded};
use super::near::{Fetched, Near, lend};
use crate::admission::Permit;
use crate::clock::now;
use crate::cold::{self, Incoming};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::room::{Room, Want};

/// The watchdog of a copy: a 64 MiB session takes milliseconds, so a device that needs this long hangs.
pub(crate) const COPY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a load waits for room.
pub(super) const ROOM_WAIT: Millis = Millis(5000);

pub(crate) struct GpuActor;

pub(crate) struct GpuArgs {
    pub(crate) board: Arc<Board>,
    pub(crate) residency: Residency,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) near: Near,
}

/// A session that is resident here.
struct Warm {
    birth: Birth,
    parts: Vec<Vec<InstanceId>>,
    /// Of all its blocks, those that others share too.
    bytes: Bytes,
    leased_until: Timestamp,
    /// Checkpoints under way.
    checkpoints: u32,
    dirty: Bytes,
}

impl Warm {
    /// Whether it may leave.
    fn is_idle(&self, at: Timestamp) -> bool {
        self.leased_until <= at && self.checkpoints == 0
    }
}

pub(crate) struct GpuState {
    board: Arc<Board>,
    device: Arc<dyn Device>,
    room: Room,
    metrics: Arc<Metrics>,
    near: Arc<Near>,
    sessions: HashMap<SessionKey, Warm>,
    /// Resident instances, and how many sessions have each. These are their raw form: of a part with a cold form, pinned memory
    /// has another of the same instance, with a length and a checksum of its own.
    instances: HashMap<InstanceId, (Block, u32)>,
}

impl Actor for GpuActor {
    type Msg = GpuMsg;
    type State = GpuState;
    type Arguments = GpuArgs;

    async fn pre_start(&self, _: ActorRef<GpuMsg>, args: GpuArgs) -> Result<GpuState, ActorProcessingErr> {
        let device = Arc::clone(args.board.device());
        let room = Room::new(device.arena().clone(), args.residency, Tier::Hbm);
        let (sessions, instances) = (HashMap::new(), HashMap::new());
        let near = Arc::new(args.near);
        Ok(GpuState { board: args.board, device, room, metrics: args.metrics, near, sessions, instances })
    }

    async fn handle(
        &self,
        myself: ActorRef<GpuMsg>,
        message: GpuMsg,
        state: &mut GpuState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GpuMsg::Load { manifest, sources, leased_until, permit, reply } => {
                state.load(&myself, manifest, sources, leased_until, permit, reply);
            }
            GpuMsg::Arrived { manifest, copies, leased_until, permit, reply } => {
                let loaded = copies.and_then(|copies| state.arrived(&manifest, copies, leased_until));
                drop(permit);
                let _ = reply.send(loaded);
            }
            GpuMsg::Scratch { owner, sizes, deadline, reply } => match state.serving() {
                Ok(()) => {
                    let want = Want { owner, sizes, kept: Bytes::ZERO, deadline, reply };
                    let evictions = state.room.want(now(), want);
                    state.evict(evictions);
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                }
            },
            GpuMsg::Keep { key, birth, parts } => state.keep(key, birth, parts),
            GpuMsg::Clean { key, birth, bytes } => state.clean(&key, birth, bytes),
            GpuMsg::Leased { key, until } => {
                if let Some(warm) = state.sessions.get_mut(&key) {
                    warm.leased_until = until;
                    state.resident(&key, false);
                }
            }
            GpuMsg::Drop { key, birth, reply } => {
                let same = state.sessions.get(&key).is_some_and(|warm| warm.birth == birth);
                let bytes = if same { state.remove(&key) } else { Bytes::ZERO };
                if let Some(reply) = reply {
                    let _ = reply.send(bytes);
                }
            }
            GpuMsg::Demote { key, reply } => {
                let free = |warm: &Warm| warm.is_idle(now());
                let gone = state.sessions.get(&key).is_some_and(free).then(|| state.remove(&key));
                let _ = reply.send(gone);
            }
            GpuMsg::Guards { key, reply } => {
                let _ = reply.send(state.blocks(&key).cloned().collect());
            }
            GpuMsg::Lend { owner, instances, reply } => {
                let serves = state.serving().is_ok();
                let _ =
                    reply.send(if serves { lend(&state.instances, &owner, &instances) } else { Vec::new() });
            }
            GpuMsg::Resident { keys, reply } => {
                let _ = reply.send(keys.iter().map(|key| state.bytes(key)).collect());
            }
            GpuMsg::Tick => state.tick(),
            GpuMsg::Panic => panic!("a panic was asked for"),
        }
        state.publish();
        Ok(())
    }
}

impl GpuState {
    fn publish(&self) {
        let at = now();
        let leases = self.sessions.values().filter(|warm| warm.leased_until > at).count();
        let dirty = self.sessions.values().map(|warm| warm.dirty).sum();
        let evictable = self.sessions.values().filter(|warm| warm.is_idle(at)).map(|warm| warm.bytes).sum();
        self.board.publish(leases, self.room.residency.waiting(), self.sessions.len(), dirty, evictable);
    }

    fn serving(&self) -> Result<(), Error> {
        match self.device.state() {
            DeviceState::Up => Ok(()),
            DeviceState::Fenced(reason) => Err(fenced(self.device.name(), &reason)),
        }
    }

    fn bytes(&self, key: &SessionKey) -> Bytes {
        self.sessions.get(key).map_or(Bytes::ZERO, |warm| warm.bytes)
    }

    fn blocks(&self, key: &SessionKey) -> impl Iterator<Item = &Block> {
        let instances = self.sessions.get(key).into_iter().flat_map(|warm| warm.parts.iter().flatten());
        instances.filter_map(|instance| self.instances.get(instance)).map(|(block, _)| block)
    }

    fn load(
        &mut self,
        myself: &ActorRef<GpuMsg>,
        manifest: Arc<Manifest>,
        sources: Vec<Block>,
        leased_until: Timestamp,
        permit: Permit,
        reply: oneshot::Sender<Result<Loaded, Error>>,
    ) {
        if let Err(error) = self.serving() {
            let _ = reply.send(Err(error));
            return;
        }
        let missing: Vec<_> =
            sources.into_iter().filter(|source| !self.instances.contains_key(&source.instance())).collect();
        if missing.is_empty() {
            let _ = reply.send(self.arrived(&manifest, Fetched::default(), leased_until));
            return;
        }
        // What is already here must not leave while the rest comes.
        if let Some(warm) = self.sessions.get_mut(&manifest.key) {
            warm.leased_until = warm.leased_until.max(now() + Millis(COPY_DEADLINE.as_millis() as u64));
            self.resident(&manifest.key.clone(), true);
        }
        let (near, myself) = (Arc::clone(&self.near), myself.clone());
        tokio::spawn(async move {
            let copies = near.fetch(&myself, &manifest, missing).await;
            // If the actor has ended, the reply port drops and the caller learns it.
            let _ = myself.cast(GpuMsg::Arrived { manifest, copies, leased_until, permit, reply });
        });
    }

    /// Installs what arrived and gives guards of the whole session.
    fn arrived(
        &mut self,
        manifest: &Manifest,
        fetched: Fetched,
        leased_until: Timestamp,
    ) -> Result<Loaded, Error> {
        self.serving()?;
        let (moved, near) = (fetched.bytes(), fetched.near);
        let mut fresh: HashMap<InstanceId, Block> =
            fetched.copies.into_iter().map(|copy| (copy.instance(), copy)).collect();
        let parts: Vec<Vec<InstanceId>> = manifest
            .parts
            .iter()
            .map(|part| part.blocks.iter().map(|block| block.instance).collect())
            .collect();
        for instance in parts.iter().flatten() {
            if !self.instances.contains_key(instance) {
                let lost = || {
                    Error::Internal(format!(
                        "instance {} left {} during a load",
                        instance.0,
                        self.device.name()
                    ))
                };
                let block = fresh.remove(instance).ok_or_else(lost)?;
                self.instances.insert(*instance, (block, 0));
            }
        }
        let guard = |instance: &InstanceId| self.instances[instance].0.share(manifest.birth);
        let blocks: Vec<Vec<Block>> = parts.iter().map(|part| part.iter().map(guard).collect()).collect();
        self.install(manifest.key.clone(), manifest.birth, parts, leased_until, None);
        let from_pinned = moved > near.iter().map(|(_, bytes)| *bytes).sum();
        let source = if from_pinned { Source::Pinned } else { Source::Hbm };
        Ok(Loaded { blocks, source, moved, near })
    }

    /// Makes `parts` what the session has here; with `fresh` bytes whose checkpoint begins.
    fn install(
        &mut self,
        key: SessionKey,
        birth: Birth,
        parts: Vec<Vec<InstanceId>>,
        leased_until: Timestamp,
        fresh: Option<Bytes>,
    ) {
        for instance in parts.iter().flatten() {
            if let Some((_, count)) = self.instances.get_mut(instance) {
                *count += 1;
            }
        }
        let (mut checkpoints, mut dirty) = match self.sessions.remove(&key) {
            Some(old) => {
                let same = old.birth == birth;
                self.unname(&old.parts);
                if same { (old.checkpoints, old.dirty) } else { (0, Bytes::ZERO) }
            }
            None => (0, Bytes::ZERO),
        };
        if let Some(fresh) = fresh {
            checkpoints += 1;
            dirty += fresh;
        }
        let of_parts = parts.iter().flatten().filter_map(|instance| self.instances.get(instance));
        let bytes = of_parts.map(|(block, _)| Bytes(block.length() as u64)).sum();
        self.sessions.insert(key.clone(), Warm { birth, parts, bytes, leased_until, checkpoints, dirty });
        self.resident(&key, true);
    }

    /// What a turn left. Its lease is over here: until its checkpoint ends it stays for that.
    fn keep(&mut self, key: SessionKey, birth: Birth, kept: Vec<Kept>) {
        let mut parts = match self.sessions.get(&key) {
            Some(warm) if warm.birth == birth => warm.parts.clone(),
            _ => Vec::new(),
        };
        // A turn that began on blocks which have left in the meantime is not resident as a whole: keep none.
        if kept.iter().any(|kept| parts.get(kept.part).map_or(0, Vec::len) < kept.first_block as usize) {
            return;
        }
        let mut dirty = Bytes::ZERO;
        for Kept { part, first_block, blocks } in kept {
            if parts.len() <= part {
                parts.resize(part + 1, Vec::new());
            }
            parts[part].truncate(first_block as usize);
            for block in blocks {
                dirty += Bytes(block.length() as u64);
                parts[part].push(block.instance());
                self.instances.entry(block.instance()).or_insert((block, 0));
            }
        }
        self.install(key, birth, parts, now(), Some(dirty));
    }

    fn clean(&mut self, key: &SessionKey, birth: Birth, bytes: Bytes) {
        let Some(warm) = self.sessions.get_mut(key).filter(|warm| warm.birth == birth) else { return };
        warm.checkpoints = warm.checkpoints.saturating_sub(1);
        warm.dirty = if warm.checkpoints == 0 { Bytes::ZERO } else { warm.dirty.saturating_sub(bytes) };
        self.resident(&key.clone(), false);
    }

    /// Tells the residency what the session is now.
    fn resident(&mut self, key: &SessionKey, used: bool) {
        let Some(warm) = self.sessions.get(key) else { return };
        let at = now();
        // While a checkpoint runs, the session counts as leased: its blocks are being read.
        let leased = !warm.is_idle(at);
        let resident = Resident {
            birth: warm.birth,
            bytes: warm.bytes,
            dirty: warm.checkpoints > 0,
            leased,
            protected_until: at,
            expires_at: Timestamp::NEVER,
        };
        let evictions = self.room.on(at, ResidencyEvent::Put { key: key.clone(), resident, used });
        self.evict(evictions);
    }

    /// Carries out evictions: what is here is clean, so its memory is given back at once.
    fn evict(&mut self, mut evictions: Vec<ResidencyCommand>) {
        while let Some(command) = evictions.pop() {
            let ResidencyCommand::Evict { key, why, .. } = command else { continue };
            let busy = self.sessions.get(&key).is_none_or(|warm| !warm.is_idle(now()));
            if busy {
                evictions.extend(self.room.on(now(), ResidencyEvent::Refused(key)));
                continue;
            }
            self.metrics.evicted(Tier::Hbm, why);
            tracing::debug!(%key, gpu = self.device.name(), why = EvictReason::word(why), "evicted from HBM");
            if let Some(warm) = self.sessions.remove(&key) {
                self.unname(&warm.parts);
            }
            evictions.extend(self.room.on(now(), ResidencyEvent::Gone(key)));
        }
    }

    fn remove(&mut self, key: &SessionKey) -> Bytes {
        let bytes = self.bytes(key);
        if let Some(warm) = self.sessions.remove(key) {
            self.unname(&warm.parts);
        }
        let evictions = self.room.on(now(), ResidencyEvent::Gone(key.clone()));
        self.evict(evictions);
        bytes
    }

    fn unname(&mut self, parts: &[Vec<InstanceId>]) {
        for instance in parts.iter().flatten() {
            if let Some((_, count)) = self.instances.get_mut(instance) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.instances.remove(instance);
                }
            }
        }
    }

    fn tick(&mut self) {
        if self.serving().is_err() {
            // Nothing that a fenced device holds is used again.
            self.sessions.clear();
            self.instances.clear();
            self.near.close();
        }
        let at = now();
        let ended = |(key, warm): (&SessionKey, &Warm)| {
            let counted = self.room.residency.get(key).is_some_and(|resident| resident.leased);
            (counted && warm.is_idle(at)).then(|| key.clone())
        };
        let ended: Vec<_> = self.sessions.iter().filter_map(ended).collect();
        for key in ended {
            self.resident(&key, false);
        }
        let evictions = self.room.tick(at);
        self.evict(evictions);
    }
}

fn fenced(name: &str, reason: &str) -> Error {
    Error::Unavailable { reason: format!("{name} is fenced: {reason}"), retry_after: Millis(1000) }
}

/// How many blocks of which size, in their order.
pub(super) fn sizes(wanted: impl IntoIterator<Item = Bytes>) -> Vec<(Bytes, usize)> {
    let mut sizes: Vec<(Bytes, usize)> = Vec::new();
    for size in wanted {
        match sizes.last_mut() {
            Some((last, count)) if *last == size => *count += 1,
            _ => sizes.push((size, 1)),
        }
    }
    sizes
}

pub(super) async fn copy_in(
    device: &dyn Device,
    sources: Vec<Incoming>,
    targets: Vec<BlockMut>,
) -> Result<Vec<Block>, Error> {
    cold::enter(device, sources.into_iter().zip(targets), "restore").await
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Corrupt(corrupt) => Self::Corrupt { at: "copy", detail: corrupt.to_string() },
            DeviceError::Fenced(reason) => fenced("the GPU", &reason),
            DeviceError::Busy => {
                Self::Overloaded { what: "the GPU's copy stream is full", retry_after: Millis(500) }
            }
            DeviceError::Gone(_) => {
                Self::Unavailable { reason: error.to_string(), retry_after: Millis(1000) }
            }
            DeviceError::NoScratch(bytes) => Self::NoCapacity {
                tier: Tier::Hbm,
                wanted: Bytes(bytes as u64),
                reason: "the GPU has no scratch memory left to convert in".to_owned(),
                retry_after: Millis(500),
            },
            DeviceError::Unsupported(_) => {
                Self::Unavailable { reason: error.to_string(), retry_after: Millis(60_000) }
            }
            DeviceError::Size { .. } | DeviceError::Shape(_) | DeviceError::WrongOwner => {
                Self::Internal(error.to_string())
            }
        }
    }
}

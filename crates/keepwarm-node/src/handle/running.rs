//! Sessions at work: activate, lease, turn, and the moves between tiers.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use keepwarm_core::session::{Home, LEASE_TTL_DEFAULT, Manifest, State};
use keepwarm_core::shard::{Answer, LeaseGrant, Refusal, Turn, Verb};
use keepwarm_memory::{Block, BlockMut, Direction, Job};
use keepwarm_types::{
    Bytes, GpuIndex, LeaseId, Millis, NodeName, Outcome, Owner, SessionKey, Source, Tier, Timestamp,
};
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::cede::needs_of;
use super::damage::NotLoaded;
use super::inner::{Handle, no_gpu, restarting, send};
use super::request::{ActivateRequest, TurnRequest};
use super::sessions::verdict;
use super::view::{Activation, CheckpointInfo, TurnDone, Verdict};
use crate::checkpoint::Checkpoint;
use crate::clock::now;
use crate::copy;
use crate::error::Error;
use crate::gpu::{GpuMsg, Kept, Loaded};
use crate::router::RouterMsg;

/// How long a request waits for its session's write-behind.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(30);
/// How long working blocks are waited for.
const SCRATCH_WAIT: Millis = Millis(2000);

fn odd(what: &'static str) -> Error {
    Error::Internal(format!("the shard answered something else than {what}"))
}

impl Handle {
    /// Brings a session to a GPU and leases it.
    ///
    /// Where another node is asked for, or has the room that this one has not, the session's shard goes there, and the answer is
    /// [`Refusal::Moving`]: to be asked once more, at its new owner.
    ///
    /// # Errors
    /// [`Error`]; no lease is held then.
    pub async fn activate(&self, key: &SessionKey, request: ActivateRequest) -> Result<Activation, Error> {
        let done = match self.activate_once(key, &request, false).await {
            Err(NotLoaded { replaced: true, .. }) => self.activate_once(key, &request, true).await,
            done => done,
        };
        let anywhere = request.node.is_none() && request.gpu.is_none() && !request.only_here;
        match done.map_err(Error::from) {
            Err(refused @ Error::NoCapacity { tier: Tier::Hbm, .. }) if anywhere => {
                Err(self.without_room(key, refused).await)
            }
            done => done,
        }
    }

    /// `replaced`: whether this node's copy has just been replaced by another holder's.
    async fn activate_once(
        &self,
        key: &SessionKey,
        request: &ActivateRequest,
        replaced: bool,
    ) -> Result<Activation, NotLoaded> {
        let permit = self.admit()?;
        let started = Instant::now();
        self.settled(key).await?;
        let before = self.get(key).await?;
        let here = !replaced && before.manifest.holders.contains(&self.inner().member());
        let home = self.place(key, request.node.clone(), request.gpu, &before.manifest).await?;
        let lease = LeaseId(Uuid::new_v4());
        let ttl = request.ttl.unwrap_or(LEASE_TTL_DEFAULT);
        let verb = Verb::Activate { lease, ttl, home: home.clone() };
        let answered = self.ask(key, verb, Vec::new(), Some(permit)).await?;
        let Answer::Lease(grant) = *answered.answer else { return Err(odd("a lease").into()) };
        let loaded = self.load(&grant.manifest, home.gpu, answered.blocks, grant.lease.expires_at).await;
        match loaded {
            Ok(mut loaded) => {
                let took = started.elapsed();
                if !here && loaded.source == Source::Pinned {
                    loaded.source = Source::Peer;
                }
                self.found(&grant.manifest, &home, &loaded, took);
                Ok(activation(*grant, home, loaded, took))
            }
            Err(error) => {
                let _ = self.ask(key, Verb::Release { lease }, Vec::new(), None).await;
                Err(error)
            }
        }
    }

    /// Leases a session without bringing it anywhere: for a turn that runs uncached.
    ///
    /// # Errors
    /// [`Error`]; no lease is held then.
    pub async fn lease(&self, key: &SessionKey, ttl: Millis) -> Result<(LeaseGrant, Home), Error> {
        let permit = self.admit()?;
        let home = Home { node: self.name().clone(), gpu: GpuIndex(0) };
        let verb = Verb::Activate { lease: LeaseId(Uuid::new_v4()), ttl, home: home.clone() };
        let answered = self.ask(key, verb, Vec::new(), Some(permit)).await?;
        let Answer::Lease(grant) = *answered.answer else { return Err(odd("a lease")) };
        Ok((*grant, home))
    }

    /// Where the session shall run.
    async fn place(
        &self,
        key: &SessionKey,
        node: Option<NodeName>,
        wish: Option<GpuIndex>,
        manifest: &Manifest,
    ) -> Result<Home, Error> {
        let needs = needs_of(manifest);
        if let Some(node) = node.filter(|node| node != self.name()) {
            return Err(self.hand_to(key, node, wish, needs).await);
        }
        let gpus = self.inner().boards.len();
        if let Some(wish) = wish.filter(|wish| usize::from(wish.0) >= gpus) {
            return Err(no_gpu(wish, gpus));
        }
        let (reply, choice) = oneshot::channel();
        let place = RouterMsg::Place { key: key.clone(), wish, near: None, needs, reply };
        send(self.links().router()?, place, "the router")?;
        match choice.await.map_err(|_| restarting("the router"))? {
            Some(gpu) => Ok(Home { node: self.name().clone(), gpu }),
            None => {
                let loads = self.inner().boards.iter().map(|board| board.load());
                let loads: Vec<_> = loads.filter(|gpu| gpu.healthy).collect();
                let serves = !loads.is_empty();
                let without = |reason| Error::NoCapacity {
                    tier: Tier::Hbm,
                    wanted: needs.bytes,
                    reason,
                    retry_after: Millis(60_000),
                };
                let able = loads.iter().filter(|gpu| gpu.quantises || !needs.kernels);
                Err(match (able.map(|gpu| gpu.capacity).max(), wish) {
                    (Some(largest), None) => without(match needs.kernels {
                        true => {
                            format!("this node's largest GPU with kernels for its cold form has {largest}")
                        }
                        false => format!("the largest GPU of this node has {largest}"),
                    }),
                    (None, None) if serves => {
                        without("no GPU of this node takes the kernels of its cold form".to_owned())
                    }
                    _ => Error::Unavailable {
                        reason: "no GPU that could run it serves".to_owned(),
                        retry_after: Millis(1000),
                    },
                })
            }
        }
    }

    /// Brings a manifest's blocks to a GPU.
    async fn load(
        &self,
        manifest: &Arc<Manifest>,
        gpu: GpuIndex,
        sources: Vec<Block>,
        leased_until: Timestamp,
    ) -> Result<Loaded, NotLoaded> {
        if sources.is_empty() {
            return Ok(Loaded {
                blocks: vec![Vec::new(); manifest.parts.len()],
                source: Source::None,
                moved: Bytes::ZERO,
                near: Vec::new(),
            });
        }
        let permit = self.admission().restore().await?;
        let actor = self.links().gpu(gpu).ok_or_else(|| no_gpu(gpu, self.inner().boards.len()))?;
        let (reply, loaded) = oneshot::channel();
        let manifest = Arc::clone(manifest);
        let load = GpuMsg::Load {
            manifest: Arc::clone(&manifest),
            sources: sources.clone(),
            leased_until,
            permit,
            reply,
        };
        send(&actor, load, "the GPU's actor")?;
        match loaded.await.map_err(|_| restarting("the GPU's actor"))? {
            Err(error @ Error::Corrupt { .. }) => {
                self.metrics().checksum_failed("restore");
                let replaced = self.condemn(&manifest.key, manifest.birth, sources).await;
                Err(NotLoaded { error, replaced })
            }
            done => Ok(done?),
        }
    }

    /// Remembers what an activation found.
    fn found(&self, manifest: &Manifest, home: &Home, loaded: &Loaded, took: Duration) {
        let why = match (loaded.source, manifest.state) {
            (Source::None, State::Cold(reason)) => reason.word(),
            (Source::None, State::Warm) => "empty",
            _ => "resident",
        };
        let result = if loaded.source == Source::None { "miss" } else { "hit" };
        self.metrics().lookup(result, why);
        if loaded.source != Source::None {
            self.metrics().restored(loaded.source, took);
        }
        self.note_loaded(&manifest.key, home.gpu, loaded, "activate", took);
        if let Ok(router) = self.links().router() {
            let _ = router.cast(RouterMsg::Homed(manifest.key.clone(), home.gpu));
            let _ = router.cast(RouterMsg::Found(manifest.key.clone(), loaded.source, why));
        }
    }

    /// Makes a lease last longer; gives the time it ends.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn renew(
        &self,
        key: &SessionKey,
        lease: LeaseId,
        ttl: Option<Millis>,
    ) -> Result<(Verdict, LeaseGrant), Error> {
        let permit = self.admit()?;
        let verb = Verb::Renew { lease, ttl: ttl.unwrap_or(LEASE_TTL_DEFAULT) };
        let answered = self.ask(key, verb, Vec::new(), Some(permit)).await?;
        let Answer::Lease(grant) = *answered.answer else { return Err(odd("a lease")) };
        self.tell_gpus(key, grant.lease.expires_at);
        let outcome = if grant.clipped { Outcome::Clipped } else { Outcome::Accepted };
        Ok((
            verdict(outcome, if grant.clipped { "the lease's time was clipped to the limits" } else { "" }),
            *grant,
        ))
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn release(&self, key: &SessionKey, lease: LeaseId) -> Result<Verdict, Error> {
        let permit = self.admit()?;
        self.ask(key, Verb::Release { lease }, Vec::new(), Some(permit)).await?;
        self.tell_gpus(key, now());
        Ok(verdict(Outcome::Accepted, ""))
    }

    fn tell_gpus(&self, key: &SessionKey, until: Timestamp) {
        for gpu in self.links().gpus() {
            let _ = gpu.cast(GpuMsg::Leased { key: key.clone(), until });
        }
    }

    /// Blocks that the host can read, of blocks on a GPU: these themselves on a host device, else copies in the region
    /// that engines on the CPU work in.
    ///
    /// # Errors
    /// [`Error::NoCapacity`] where the region is full or there is none, [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn on_cpu(&self, owner: &Owner, gpu: GpuIndex, blocks: &[Block]) -> Result<Vec<Block>, Error> {
        if blocks.iter().all(Block::is_on_host) {
            return Ok(blocks.to_vec());
        }
        let mut jobs = Vec::with_capacity(blocks.len());
        for source in blocks.iter().cloned() {
            let target = self.workspace(owner, gpu, source.capacity(), 1)?.pop();
            jobs.extend(target.map(|target| Job { source, target }));
        }
        copy::run(&*self.device(gpu)?, Direction::Out, jobs, "engine").await
    }

    /// Blocks on a GPU, of blocks that [`Handle::scratch`] gave and the holder of a lease sealed: these themselves on a
    /// host device, else copies.
    ///
    /// # Errors
    /// [`Error::NoCapacity`] where no room came within two seconds, [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn on_gpu(
        &self,
        owner: &Owner,
        gpu: GpuIndex,
        blocks: Vec<Block>,
    ) -> Result<Vec<Block>, Error> {
        let device = self.device(gpu)?;
        let Some(size) = blocks.iter().map(Block::capacity).max().filter(|_| !device.arena().is_on_host())
        else {
            return Ok(blocks);
        };
        let targets = self.hbm(owner, gpu, size, blocks.len()).await?;
        let jobs = blocks.into_iter().zip(targets).map(|(source, target)| Job { source, target }).collect();
        copy::run(&*device, Direction::In, jobs, "engine").await
    }

    /// Mutable blocks for the holder of a lease, to write its model's state into on the CPU: HBM on a host device, else
    /// memory of the host whose blocks go [to the GPU](Handle::on_gpu) once they are sealed.
    ///
    /// # Errors
    /// [`Error::NoCapacity`] where no room came within two seconds.
    pub async fn scratch(
        &self,
        owner: &Owner,
        gpu: GpuIndex,
        size: Bytes,
        count: usize,
    ) -> Result<Vec<BlockMut>, Error> {
        if self.device(gpu)?.arena().is_on_host() {
            return self.hbm(owner, gpu, size, count).await;
        }
        self.workspace(owner, gpu, size, count)
    }

    /// Room in the region that engines on the CPU work in. It is not waited for: who has it is another turn, which may
    /// be a long one.
    fn workspace(
        &self,
        owner: &Owner,
        gpu: GpuIndex,
        size: Bytes,
        count: usize,
    ) -> Result<Vec<BlockMut>, Error> {
        let board = self.inner().boards.get(usize::from(gpu.0));
        let full = |reason: String| Error::NoCapacity {
            tier: Tier::Pinned,
            wanted: Bytes(size.0.saturating_mul(count as u64)),
            reason,
            retry_after: SCRATCH_WAIT,
        };
        match board.and_then(|board| board.workspace()) {
            Some(arena) => arena.allocate(owner, size, count).map_err(|error| full(error.to_string())),
            None => Err(full(format!("no engine's region was reserved for GPU {gpu}"))),
        }
    }

    /// Mutable blocks in a GPU's own memory.
    async fn hbm(
        &self,
        owner: &Owner,
        gpu: GpuIndex,
        size: Bytes,
        count: usize,
    ) -> Result<Vec<BlockMut>, Error> {
        let actor = self.links().gpu(gpu).ok_or_else(|| no_gpu(gpu, self.inner().boards.len()))?;
        let (reply, blocks) = oneshot::channel();
        let scratch = GpuMsg::Scratch {
            owner: owner.clone(),
            sizes: vec![(size, count)],
            deadline: now() + SCRATCH_WAIT,
            reply,
        };
        send(&actor, scratch, "the GPU's actor")?;
        blocks.await.map_err(|_| restarting("the GPU's actor"))?
    }

    /// Commits a turn's transcript; its state follows by checkpoint, which gives the lease back at its end.
    ///
    /// Not cancel safe in one respect: once the transcript is on its way it may be committed.
    ///
    /// # Errors
    /// [`Error`]; the lease is still held then.
    pub async fn turn(&self, key: &SessionKey, request: TurnRequest) -> Result<TurnDone, Error> {
        let permit = self.admit()?;
        let turn = Turn { lease: request.lease, transcript: request.transcript };
        let answered = self.ask(key, Verb::Turn(turn), Vec::new(), Some(permit)).await?;
        let Answer::Written(written) = *answered.answer else { return Err(odd("a commit")) };
        let manifest = written.manifest;
        let done = TurnDone { etag: manifest.etag(), length: manifest.transcript_tokens };
        if let Some(gpu) = self.links().gpu(request.gpu).filter(|_| !request.parts.is_empty()) {
            let kept = request.parts.iter().map(|part| Kept {
                part: part.part,
                first_block: part.first_block,
                blocks: part.blocks.clone(),
            });
            let (birth, parts) = (manifest.birth, kept.collect());
            let _ = gpu.cast(GpuMsg::Keep { key: key.clone(), birth, parts });
        }
        let checkpoint =
            Checkpoint { manifest, gpu: request.gpu, parts: request.parts, lease: request.lease };
        self.write_behind(key.clone(), checkpoint);
        Ok(done)
    }

    /// Runs a checkpoint in the background and gives its lease back.
    fn write_behind(&self, key: SessionKey, checkpoint: Checkpoint) {
        let (done, running) = watch::channel(false);
        self.inner().checkpoints.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), running);
        let handle = self.clone();
        tokio::spawn(async move {
            let lease = checkpoint.lease;
            if !checkpoint.parts.is_empty() {
                // What went wrong was told where it happened.
                let _ = checkpoint.run(&handle).await;
            }
            // The GPUs first: whoever leases the session next tells them his own time.
            handle.tell_gpus(&key, now());
            // A lease that has ended by itself needs no release.
            let _ = handle.ask(&key, Verb::Release { lease }, Vec::new(), None).await;
            handle.inner().checkpoints.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            done.send_replace(true);
        });
    }

    /// Waits until the session has no write-behind under way.
    ///
    /// # Errors
    /// [`Error::Unavailable`] after half a minute.
    pub async fn settled(&self, key: &SessionKey) -> Result<(), Error> {
        let running =
            self.inner().checkpoints.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
        let Some(mut running) = running else { return Ok(()) };
        match tokio::time::timeout(CHECKPOINT_WAIT, running.wait_for(|done| *done)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Unavailable {
                reason: "the session's last checkpoint does not end".to_owned(),
                retry_after: Millis(1000),
            }),
        }
    }

    /// Waits until what is committed has all promised copies.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn checkpoint(&self, key: &SessionKey) -> Result<CheckpointInfo, Error> {
        self.settled(key).await?;
        let info = self.get(key).await?;
        let manifest = info.manifest;
        let verdict = match manifest.state {
            State::Cold(reason) => verdict(
                Outcome::Missing,
                format!("the session is cold ({reason}): there are no bytes to copy"),
            ),
            State::Warm => verdict(Outcome::Accepted, ""),
        };
        let mut hasher = twox_hash::XxHash3_128::new();
        for block in manifest.instances() {
            hasher.write(&block.checksum.as_u128().to_be_bytes());
        }
        Ok(CheckpointInfo { verdict, checksum: hasher.finish_128(), manifest })
    }

    /// Brings bytes to a warmer tier ahead of use.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn prefetch(&self, key: &SessionKey, tier: Tier) -> Result<Verdict, Error> {
        let info = self.get(key).await?;
        if let State::Cold(reason) = info.manifest.state {
            return Ok(verdict(
                Outcome::Missing,
                format!("the session is cold ({reason}): there are no bytes to bring"),
            ));
        }
        match tier {
            Tier::Pinned => {
                let permit = self.admit()?;
                // Whoever reads has them fetched where only other nodes hold them.
                self.ask(key, Verb::ReadAll, Vec::new(), Some(permit)).await?;
                Ok(verdict(Outcome::Accepted, "its bytes are in pinned memory"))
            }
            Tier::Peer => Ok(verdict(Outcome::Rejected, "a peer's memory is colder, not warmer: use demote")),
            Tier::Hbm => {
                let home = self.place(key, None, None, &info.manifest).await?;
                self.bring(key, &home, "prefetch").await
            }
        }
    }

    /// Loads without a lease.
    async fn bring(&self, key: &SessionKey, home: &Home, why: &'static str) -> Result<Verdict, Error> {
        match self.bring_once(key, home, why).await {
            Err(NotLoaded { replaced: true, .. }) => Ok(self.bring_once(key, home, why).await?),
            done => Ok(done?),
        }
    }

    async fn bring_once(
        &self,
        key: &SessionKey,
        home: &Home,
        why: &'static str,
    ) -> Result<Verdict, NotLoaded> {
        let permit = self.admit()?;
        let started = Instant::now();
        let answered = self.ask(key, Verb::ReadAll, Vec::new(), Some(permit)).await?;
        let Answer::Read(grant) = *answered.answer else { return Err(odd("a read").into()) };
        if answered.blocks.is_empty() {
            return Ok(verdict(Outcome::Missing, "the session has no bytes yet"));
        }
        let loaded = self.load(&grant.manifest, home.gpu, answered.blocks, now()).await?;
        self.note_loaded(key, home.gpu, &loaded, why, started.elapsed());
        send(self.links().router()?, RouterMsg::Homed(key.clone(), home.gpu), "the router")?;
        Ok(verdict(Outcome::Accepted, format!("{} moved to GPU {}", loaded.moved, home.gpu)))
    }

    /// Sends bytes to a colder tier: the colder copy is confirmed, then memory is freed.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn demote(&self, key: &SessionKey, tier: Tier) -> Result<Verdict, Error> {
        self.settled(key).await?;
        let info = self.get(key).await?;
        if tier == Tier::Hbm {
            return Ok(verdict(Outcome::Rejected, "HBM is the warmest tier: use prefetch"));
        }
        if let Some(lease) = info.lease {
            return Ok(verdict(Outcome::Rejected, format!("the session is leased ({})", lease.id)));
        }
        if let State::Cold(reason) = info.manifest.state {
            return Ok(verdict(Outcome::Missing, format!("the session is cold ({reason})")));
        }
        let mut freed = Bytes::ZERO;
        if tier == Tier::Peer {
            let pinned = self.tiers(&info.manifest, Bytes::ZERO).pinned;
            let permit = self.admit()?;
            match self.ask(key, Verb::Demote, Vec::new(), Some(permit)).await {
                Ok(_) => freed += pinned,
                Err(Error::Refused(Refusal::Conflict(why))) => return Ok(verdict(Outcome::Rejected, why)),
                Err(error) => return Err(error),
            }
        }
        for (index, gpu) in self.links().gpus().into_iter().enumerate() {
            let (reply, gone) = oneshot::channel();
            if gpu.cast(GpuMsg::Demote { key: key.clone(), reply }).is_ok()
                && let Ok(Some(bytes)) = gone.await
            {
                freed += bytes;
                self.note_move(key, &format!("hbm:{index}"), "none", bytes, "demote", Duration::ZERO);
            }
        }
        Ok(verdict(Outcome::Accepted, format!("{freed} given back")))
    }

    /// Moves a session's home. To another node its whole shard goes, and the answer is [`Refusal::Moving`]: to be asked once more,
    /// at its new owner.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn migrate(
        &self,
        key: &SessionKey,
        node: Option<NodeName>,
        gpu: Option<GpuIndex>,
    ) -> Result<Verdict, Error> {
        self.settled(key).await?;
        let info = self.get(key).await?;
        if let Some(lease) = info.lease {
            return Ok(verdict(Outcome::Rejected, format!("the session is leased ({})", lease.id)));
        }
        let home = self.place(key, node, gpu, &info.manifest).await?;
        let moved = match info.manifest.state {
            State::Cold(_) => verdict(Outcome::Accepted, "the session is cold: its next run begins there"),
            State::Warm if info.manifest.stored_bytes() == Bytes::ZERO => {
                verdict(Outcome::Accepted, "it has no bytes yet")
            }
            State::Warm => self.bring(key, &home, "migrate").await?,
        };
        for (index, other) in self.links().gpus().into_iter().enumerate() {
            if index != usize::from(home.gpu.0) {
                let (reply, gone) = oneshot::channel();
                if other.cast(GpuMsg::Demote { key: key.clone(), reply }).is_ok() {
                    // A GPU that has ended since holds nothing.
                    let _ = gone.await;
                }
            }
        }
        send(self.links().router()?, RouterMsg::Homed(key.clone(), home.gpu), "the router")?;
        match self.ask(key, Verb::SetHome(home), Vec::new(), None).await {
            Ok(_) => Ok(moved),
            Err(Error::Refused(Refusal::UnknownSession)) => {
                Ok(verdict(Outcome::Missing, "the session has ended meanwhile"))
            }
            Err(error) => Err(error),
        }
    }
}

fn activation(grant: LeaseGrant, home: Home, loaded: Loaded, took: Duration) -> Activation {
    let outcome = if grant.clipped { Outcome::Clipped } else { Outcome::Accepted };
    Activation {
        verdict: verdict(
            outcome,
            if grant.clipped { "the lease's time was clipped to the limits" } else { "" },
        ),
        lease: grant.lease,
        home,
        source: loaded.source,
        bytes_moved: loaded.moved,
        duration: took,
        manifest: grant.manifest,
        blocks: loaded.blocks,
    }
}

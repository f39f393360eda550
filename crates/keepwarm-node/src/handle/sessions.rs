//! Sessions at rest: create, show, write, read, cut, fork, end.

use futures::future::join_all;
use keepwarm_config::NodeConfig;
use keepwarm_core::placement::mint;
use keepwarm_core::session::{Labels, Layout, Protect};
use keepwarm_core::shard::{
    Answer, Commit, Create, Cut, Fork, ListQuery, Precondition, Refusal, SessionView, Verb,
};
use keepwarm_memory::Block;
use keepwarm_types::{
    Birth, Bytes, Millis, Outcome, SessionId, SessionKey, ShardId, TenantName, Tier, TxnId,
};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::inner::Handle;
use super::request::{CreateRequest, ForkRequest, WriteRequest};
use super::view::{Freed, Receipt, SessionInfo, SessionPage, TranscriptInfo, Verdict, WriteDone};
use crate::error::Error;
use crate::gpu::GpuMsg;
use crate::read::PartReader;
use crate::router::RouterMsg;
use crate::write::{WriteSink, WriteStart};

/// Sessions on one page at most.
const PAGE_MAX: usize = 1000;

fn odd(what: &'static str) -> Error {
    Error::Internal(format!("the shard answered something else than {what}"))
}

pub(super) fn verdict(outcome: Outcome, reason: impl Into<String>) -> Verdict {
    Verdict { outcome, reason: reason.into() }
}

/// Gives these guards back; says how many bytes nobody else holds, be it another session or a reader.
fn freed(guards: Vec<Block>) -> Bytes {
    Bytes(guards.iter().filter(|block| block.is_last()).map(|block| block.length() as u64).sum())
}

fn cut_verdict(clipped: bool) -> Verdict {
    if clipped {
        verdict(Outcome::Clipped, "cut back to a block boundary")
    } else {
        verdict(Outcome::Accepted, "")
    }
}

impl Handle {
    /// Makes a session, or confirms the same one; true if it was made just now.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create(
        &self,
        tenant: &TenantName,
        request: CreateRequest,
    ) -> Result<(SessionInfo, bool), Error> {
        let permit = self.admit()?;
        if request.protect == Protect::Forever && !self.inner().book.forever(tenant) {
            let reason = "the tenant has no forever_bytes_max".to_owned();
            return Err(Error::InvalidField { field: "protect_s".to_owned(), reason });
        }
        self.can_run(&request.layout)?;
        self.all_can_hold(&request.layout)?;
        let id = request.id.map_or_else(|| self.mint(), Ok)?;
        let key = SessionKey::new(tenant.clone(), id);
        self.inner().book.begin(tenant)?;
        let create = Create {
            layout: request.layout,
            birth: birth(),
            protect: request.protect,
            ttl: request.ttl,
            labels: request.labels,
        };
        let answered = self.ask(&key, Verb::Create(create), Vec::new(), Some(permit)).await;
        let made = matches!(&answered, Ok(answered) if matches!(*answered.answer, Answer::Session { new: true, .. }));
        let unknown = matches!(&answered, Err(Error::Refused(Refusal::OutcomeUnknown)));
        if !made && !unknown {
            self.inner().book.end(tenant);
        }
        let Answer::Session { view, new, .. } = *answered?.answer else { return Err(odd("a session")) };
        if let Some(near) = request.near.filter(|_| new) {
            self.share_home(&key, SessionKey::new(tenant.clone(), near)).await?;
        }
        Ok((self.info(*view).await, new))
    }

    /// Whether some GPU of this node makes such a layout's cold form, and can make it warm again.
    fn can_run(&self, layout: &Layout) -> Result<(), Error> {
        if !layout.is_lossy() || self.inner().boards.iter().any(|board| board.device().quantises()) {
            return Ok(());
        }
        let reason = "no GPU of this node takes keepwarm's kernels, which make the cold form: leave `cold` out, or create it at another node";
        Err(Error::InvalidField { field: "layout".to_owned(), reason: reason.to_owned() })
    }

    /// Whether every node that is connected can be told of such a layout; one that is not would wait for a copy in vain.
    fn all_can_hold(&self, layout: &Layout) -> Result<(), Error> {
        let Some(cluster) = self.inner().cluster.as_ref().filter(|_| layout.is_lossy()) else {
            return Ok(());
        };
        let old = |node: &&NodeConfig| {
            let version = cluster.transport().version(&node.name);
            version.is_some_and(|version| version.number() < keepwarm_wire::envelope::LOSSY_SINCE)
        };
        match self.config().nodes.iter().find(old) {
            None => Ok(()),
            Some(node) => Err(Error::Unavailable {
                reason: format!(
                    "node '{}' is too old to hold sessions with a cold form: update it first",
                    node.name
                ),
                retry_after: Millis(60_000),
            }),
        }
    }

    /// The new session begins where the other is at home.
    async fn share_home(&self, key: &SessionKey, near: SessionKey) -> Result<(), Error> {
        let (reply, history) = oneshot::channel();
        let router = self.links().router()?;
        super::inner::send(router, RouterMsg::Recall(near, reply), "the router")?;
        if let Some(home) = history.await.ok().and_then(|history| history.home) {
            let _ = router.cast(RouterMsg::Homed(key.clone(), home));
        }
        Ok(())
    }

    /// An id in one of this node's shards.
    fn mint(&self) -> Result<SessionId, Error> {
        let owned = self.own_shards();
        if owned.is_empty() {
            return Err(Refusal::Moving("this node owns no shard now").into());
        }
        Ok(mint(Uuid::now_v7(), &owned, self.links().count))
    }

    /// Shows a session.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn get(&self, key: &SessionKey) -> Result<SessionInfo, Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::Get, Vec::new(), Some(permit)).await?;
        let Answer::Session { view, .. } = *answered.answer else { return Err(odd("a session")) };
        Ok(self.info(*view).await)
    }

    /// Shows a tenant's sessions of this node's own shards by id, after `after`, with all of `labels`.
    ///
    /// # Errors
    /// [`Error::Overloaded`], [`Error::Draining`]. Shards that do not answer are named in the page instead.
    pub async fn list(
        &self,
        tenant: &TenantName,
        after: Option<SessionId>,
        limit: usize,
        labels: &Labels,
    ) -> Result<SessionPage, Error> {
        let _permit = self.admit()?;
        let limit = limit.clamp(1, PAGE_MAX);
        let count = self.links().count;
        let anchor = mint(Uuid::now_v7(), &[ShardId(0)], count);
        let labels: Vec<_> = labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        let shards = self.own_shards().into_iter().map(|shard| {
            let key = SessionKey::new(tenant.clone(), anchor.placed_in(shard, count));
            let query = ListQuery { after, limit: limit + 1, labels: labels.clone() };
            async move { (shard, self.ask(&key, Verb::List(query), Vec::new(), None).await) }
        });
        let (mut views, mut incomplete) = (Vec::new(), Vec::new());
        for (shard, answered) in join_all(shards).await {
            match answered.map(|answered| *answered.answer) {
                Ok(Answer::Page(page)) => views.extend(page),
                _ => incomplete.push(shard),
            }
        }
        views.sort_by_key(|view| view.manifest.key.id);
        let more = views.len() > limit;
        views.truncate(limit);
        let next = if more { views.last().map(|view| view.manifest.key.id) } else { None };
        Ok(SessionPage { sessions: self.infos(views).await, next, incomplete })
    }

    pub(super) async fn info(&self, view: SessionView) -> SessionInfo {
        self.infos(vec![view]).await.pop().expect("one view gives one session")
    }

    /// Adds what the GPUs know; a GPU that does not answer has nothing.
    async fn infos(&self, views: Vec<SessionView>) -> Vec<SessionInfo> {
        let keys: Vec<_> = views.iter().map(|view| view.manifest.key.clone()).collect();
        let mut hbm = vec![Bytes::ZERO; views.len()];
        for gpu in self.links().gpus() {
            let (reply, bytes) = oneshot::channel();
            let asked = gpu.cast(GpuMsg::Resident { keys: keys.clone(), reply }).is_ok();
            if let (true, Ok(bytes)) = (asked, bytes.await) {
                hbm.iter_mut().zip(bytes).for_each(|(sum, bytes)| *sum += bytes);
            }
        }
        let info = |(view, hbm): (SessionView, Bytes)| SessionInfo {
            tiers: self.tiers(&view.manifest, hbm),
            owner: self.name().clone(),
            durability: self.durability(&view.manifest),
            home: view.home,
            lease: view.lease,
            last_used_at: view.last_used_at,
            manifest: view.manifest,
        };
        views.into_iter().zip(hbm).map(info).collect()
    }

    /// Begins a write: a sink for the body, or the first answer to a write that was seen before.
    ///
    /// # Errors
    /// [`Error`]; nothing was applied.
    pub async fn open_write(&self, key: &SessionKey, request: WriteRequest) -> Result<WriteStart, Error> {
        WriteSink::open(self, key, request).await
    }

    /// Commits a transaction.
    ///
    /// # Errors
    /// [`Error`]; definite unless it is `outcome_unknown`.
    pub async fn commit(&self, key: &SessionKey, commit: Commit) -> Result<WriteDone, Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::Commit(commit), Vec::new(), Some(permit)).await?;
        let Answer::Written(written) = *answered.answer else { return Err(odd("a commit")) };
        let durability = self.written_durability(&written.manifest);
        Ok(WriteDone::Committed(written, durability))
    }

    /// Drops a transaction's staged bytes.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn abort(&self, key: &SessionKey, txn: TxnId) -> Result<(), Error> {
        let permit = self.admit()?;
        self.ask(key, Verb::Abort(txn), Vec::new(), Some(permit)).await.map(drop)
    }

    /// Pins a part's committed bytes for reading.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open_read(&self, key: &SessionKey, part: &str) -> Result<PartReader, Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::Read { part: part.to_owned() }, Vec::new(), Some(permit)).await?;
        let Answer::Read(grant) = *answered.answer else { return Err(odd("a read")) };
        let index = grant.part.ok_or_else(|| odd("a part"))?;
        Ok(PartReader::new(grant.manifest, index, answered.blocks, self.clone()))
    }

    /// Pins all parts' committed bytes, of one revision, for reading.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open_read_all(&self, key: &SessionKey) -> Result<Vec<PartReader>, Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::ReadAll, Vec::new(), Some(permit)).await?;
        let Answer::Read(grant) = *answered.answer else { return Err(odd("a read")) };
        let mut blocks = answered.blocks.into_iter();
        let counts = grant.manifest.parts.iter().map(|part| part.blocks.len()).enumerate();
        let reader = |(index, count)| {
            let blocks = blocks.by_ref().take(count).collect();
            PartReader::new(grant.manifest.clone(), index, blocks, self.clone())
        };
        Ok(counts.map(reader).collect())
    }

    /// The transcript, warm or cold, with the session it belongs to.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn transcript(&self, key: &SessionKey) -> Result<(SessionInfo, TranscriptInfo), Error> {
        let info = self.get(key).await?;
        let (catalog, key, birth) = (self.inner().catalog.clone(), key.clone(), info.manifest.birth);
        let read = tokio::task::spawn_blocking(move || catalog.transcript(&key, birth)).await;
        let transcript = read.map_err(|error| Error::Internal(error.to_string()))?;
        let mut transcript = transcript.map_err(|error| Error::Internal(error.to_string()))?;
        // A write that is on its way may have reached the disk already: the committed manifest decides.
        transcript.tokens.truncate(info.manifest.transcript_tokens.as_usize());
        transcript.messages.truncate(info.manifest.transcript_messages as usize);
        Ok((info, TranscriptInfo { tokens: transcript.tokens, messages: transcript.messages }))
    }

    /// Cuts a session short.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn truncate(
        &self,
        key: &SessionKey,
        cut: Cut,
        precondition: Precondition,
    ) -> Result<(Verdict, SessionInfo), Error> {
        let permit = self.admit()?;
        let answered = self.ask(key, Verb::Truncate { cut, precondition }, Vec::new(), Some(permit)).await?;
        let Answer::Session { view, clipped, .. } = *answered.answer else { return Err(odd("a session")) };
        Ok((cut_verdict(clipped), self.info(*view).await))
    }

    /// Begins another session as a prefix of this one.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn fork(
        &self,
        key: &SessionKey,
        request: ForkRequest,
    ) -> Result<(Verdict, SessionInfo), Error> {
        let permit = self.admit()?;
        let count = self.links().count;
        let near = || mint(Uuid::now_v7(), &[count.shard_of(key.id)], count);
        let child = request.id.unwrap_or_else(near);
        self.inner().book.begin(&key.tenant)?;
        let fork = Fork {
            child,
            birth: birth(),
            length: request.length,
            labels: request.labels,
            keep_messages: request.keep_messages,
            branch: request.branch,
            lease: request.lease,
        };
        let answered = self.ask(key, Verb::Fork(fork), Vec::new(), Some(permit)).await;
        if !matches!(&answered, Ok(_) | Err(Error::Refused(Refusal::OutcomeUnknown))) {
            self.inner().book.end(&key.tenant);
        }
        let Answer::Session { view, clipped, .. } = *answered?.answer else { return Err(odd("a session")) };
        self.share_home(&SessionKey::new(key.tenant.clone(), child), key.clone()).await?;
        Ok((cut_verdict(clipped), self.info(*view).await))
    }

    /// Ends a session, its lease first.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete(&self, key: &SessionKey) -> Result<Receipt, Error> {
        self.end(key, Verb::Delete).await
    }

    /// Ends a session whose making failed half-way; what that may answer is less than what went wrong.
    pub(crate) async fn abandon(&self, key: &SessionKey) {
        if let Err(error) = self.end(key, Verb::Abandon).await {
            tracing::warn!(%key, %error, "a session that failed half-way could not be taken back");
        }
    }

    async fn end(&self, key: &SessionKey, verb: Verb) -> Result<Receipt, Error> {
        let (pinned, hbm) = (self.pinned_guards(key).await?, self.hbm_guards(key).await);
        let permit = self.admit()?;
        let answered = self.ask(key, verb, Vec::new(), Some(permit)).await?;
        let Answer::Deleted(deleted) = *answered.answer else { return Err(odd("an end")) };
        for gpu in self.links().gpus() {
            let (reply, gone) = oneshot::channel();
            if gpu.cast(GpuMsg::Drop { key: key.clone(), birth: deleted.birth, reply: Some(reply) }).is_ok() {
                // A GPU that has ended since holds nothing.
                let _ = gone.await;
            }
        }
        let freed = [(Tier::Hbm, freed(hbm)), (Tier::Pinned, freed(pinned))]
            .into_iter()
            .filter(|(_, bytes)| *bytes > Bytes::ZERO)
            .map(|(tier, bytes)| Freed { node: self.name().clone(), tier, bytes, scrubbed: false })
            .collect();
        Ok(Receipt {
            id: deleted.id,
            birth: deleted.birth,
            revision: deleted.revision,
            freed,
            pending: Vec::new(),
        })
    }

    /// Guards of a session's pinned blocks; none of a cold one.
    async fn pinned_guards(&self, key: &SessionKey) -> Result<Vec<Block>, Error> {
        let permit = self.admit()?;
        match self.ask(key, Verb::ReadAll, Vec::new(), Some(permit)).await {
            Ok(answered) => Ok(answered.blocks),
            Err(error @ Error::Refused(Refusal::UnknownSession))
            | Err(error @ Error::Refused(Refusal::Deleted { .. } | Refusal::Expired { .. })) => Err(error),
            // What cannot be read here ends all the same; nothing of it is counted.
            Err(_) => Ok(Vec::new()),
        }
    }

    /// Guards of a session's blocks in this node's GPUs.
    async fn hbm_guards(&self, key: &SessionKey) -> Vec<Block> {
        let mut guards = Vec::new();
        for gpu in self.links().gpus() {
            let (reply, blocks) = oneshot::channel();
            if gpu.cast(GpuMsg::Guards { key: key.clone(), reply }).is_ok() {
                // A GPU that has ended since holds nothing.
                guards.extend(blocks.await.unwrap_or_default());
            }
        }
        guards
    }

    /// Ends each of a tenant's sessions.
    ///
    /// # Errors
    /// [`Error`] of the first that could not be ended; those before it are.
    pub async fn purge(&self, tenant: &TenantName) -> Result<Vec<Receipt>, Error> {
        let mut receipts = Vec::new();
        let mut after = None;
        loop {
            let page = self.list(tenant, after, PAGE_MAX, &Labels::new()).await?;
            for session in page.sessions {
                match self.delete(&session.manifest.key).await {
                    Ok(receipt) => receipts.push(receipt),
                    Err(Error::Refused(
                        Refusal::Deleted { .. } | Refusal::Expired { .. } | Refusal::UnknownSession,
                    )) => {}
                    Err(error) => return Err(error),
                }
            }
            after = page.next;
            if after.is_none() {
                return Ok(receipts);
            }
        }
    }
}

fn birth() -> Birth {
    Birth::from_random(Uuid::new_v4().as_u128() as u64)
}

//! Bytes that are found damaged in this node's memory: this copy is let go, and another holder's takes its place.

use keepwarm_core::session::{Manifest, State};
use keepwarm_core::shard::Verb;
use keepwarm_memory::Block;
use keepwarm_types::{Birth, SessionKey};
use tokio::sync::oneshot;

use super::inner::Handle;
use crate::copy;
use crate::error::Error;
use crate::shard::ShardMsg;
use crate::write::block_ref;

/// Why a session's bytes did not come to a GPU.
pub(super) struct NotLoaded {
    pub(super) error: Error,
    /// This node's copy was damaged, and there is one: another attempt finds another holder's, or what was repaired.
    pub(super) replaced: bool,
}

impl From<Error> for NotLoaded {
    fn from(error: Error) -> Self {
        Self { error, replaced: false }
    }
}

impl From<NotLoaded> for Error {
    fn from(failed: NotLoaded) -> Self {
        failed.error
    }
}

impl Handle {
    /// After damage was met: where a session's own bytes are damaged no later use would do better, so they are let go. Other
    /// holders' take their place, or it goes cold, and its transcript can make them anew. What was damaged on the way stays.
    ///
    /// Gives whether another holder's bytes have taken the damaged ones' place, or can be had when they are asked for.
    pub(crate) async fn condemn(&self, key: &SessionKey, birth: Birth, sources: Vec<Block>) -> bool {
        let Some(met) = copy::first_damaged(sources).await else { return false };
        // Somebody else may have found it before, and had it repaired under the same name.
        let present = self.present(key, birth, &met).await;
        if copy::first_damaged(present).await.is_none() {
            return self.is_held(key).await;
        }
        let damaged = met.instance();
        match self.ask(key, Verb::Condemn { birth, damaged }, Vec::new(), None).await {
            Ok(_) => tracing::error!(%key, "pinned bytes are damaged: this copy was dropped"),
            Err(error) => tracing::error!(%key, %error, "pinned bytes are damaged and could not be dropped"),
        }
        self.note_failure(Some(key), "pinned bytes were damaged".to_owned());
        self.is_held(key).await
    }

    /// Whether some node has a session's bytes.
    async fn is_held(&self, key: &SessionKey) -> bool {
        let held = |manifest: &Manifest| manifest.state == State::Warm && !manifest.holders.is_empty();
        self.get(key).await.is_ok_and(|info| held(&info.manifest))
    }

    /// The guard that this node has of a block now, if any.
    async fn present(&self, key: &SessionKey, birth: Birth, block: &Block) -> Vec<Block> {
        let (reply, lent) = oneshot::channel();
        let lend = ShardMsg::Lend(vec![block_ref(block)], birth, reply);
        let asked = self.links().shard(key).is_ok_and(|shard| shard.cast(lend).is_ok());
        let lent = if asked { lent.await.ok().flatten() } else { None };
        lent.unwrap_or_default()
    }

    /// A reader or a writer met a damaged block: its copy is let go in the background, and the next one finds another copy or
    /// says why not.
    pub(crate) fn met_damage(&self, at: &'static str, key: &SessionKey, birth: Birth, block: &Block) {
        self.metrics().checksum_failed(at);
        let (handle, key, block) = (self.clone(), key.clone(), block.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                handle.condemn(&key, birth, vec![block]).await;
            });
        }
    }
}

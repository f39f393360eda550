//! A session that has no room here, or is wanted elsewhere: its shard goes to the replica where it can run.
//!
//! Leases, steps and commits never cross nodes: a session runs where its owner is. So what moves is the owner, and all sessions of
//! the shard with it; none of them may be at work.

use keepwarm_core::placement::Needs;
use keepwarm_core::session::Manifest;
use keepwarm_core::shard::Refusal;
use keepwarm_types::{Bytes, GpuIndex, Millis, NodeName, SessionKey, Tier};

use super::inner::{Handle, no_gpu};
use crate::error::Error;

/// When to ask again where something stands in the way.
const CEDE_RETRY: Millis = Millis(1000);

fn not_now(reason: String) -> Error {
    Error::Unavailable { reason, retry_after: CEDE_RETRY }
}

/// What a session needs of its GPU.
pub(super) fn needs_of(manifest: &Manifest) -> Needs {
    Needs { bytes: manifest.raw_bytes(), kernels: manifest.layout.is_lossy() }
}

impl Handle {
    /// What to answer where a session found no room in HBM: that its owner has changed, where another one has room for it; else
    /// as the request was `refused`.
    pub(super) async fn without_room(&self, key: &SessionKey, refused: Error) -> Error {
        let moving = |error: &Error| matches!(error, Error::Refused(Refusal::Moving(_)));
        let answer = match self.get(key).await {
            Ok(info) => self.cede_for(key, needs_of(&info.manifest)).await,
            Err(error) => Some(error),
        };
        answer.filter(moving).unwrap_or(refused)
    }

    /// Hands a session whose turn found no room here for so many bytes to a node that has it, for its next turn; where none has,
    /// or a session of its shard is at work, it stays.
    pub async fn make_way(&self, key: &SessionKey, wanted: Bytes) {
        if self.in_cluster()
            && self.settled(key).await.is_ok()
            && let Ok(info) = self.get(key).await
        {
            let needs = needs_of(&info.manifest);
            self.cede_for(key, Needs { bytes: needs.bytes.max(wanted), ..needs }).await;
        }
    }

    async fn cede_for(&self, key: &SessionKey, needs: Needs) -> Option<Error> {
        let cluster = self.cluster_link()?;
        let here = self.load_now().await.ok()?;
        let to = cluster.successor(key.id, needs, &here).await?;
        Some(self.cede(key, to).await)
    }

    /// What to answer where a session shall run on another node: that its owner has changed, or what stands in the way.
    pub(super) async fn hand_to(
        &self,
        key: &SessionKey,
        node: NodeName,
        gpu: Option<GpuIndex>,
        needs: Needs,
    ) -> Error {
        let Some(there) = self.config().nodes.iter().find(|known| known.name == node) else {
            return Error::unknown_node(&node);
        };
        let gpus = there.gpus.len();
        if let Some(gpu) = gpu.filter(|gpu| usize::from(gpu.0) >= gpus) {
            return no_gpu(gpu, gpus);
        }
        let Some(cluster) = self.cluster_link() else { return Error::unknown_node(&node) };
        let others = cluster.others_of(key.id);
        if !others.contains(&node) {
            let names: Vec<_> = others.iter().map(NodeName::as_str).collect();
            let reason = match names.as_slice() {
                [] => {
                    format!("beside '{}' no node has a replica of the session's shard and is up", self.name())
                }
                names => format!(
                    "node '{node}' has no replica of the session's shard, or is not up: beside '{}' these have: {}",
                    self.name(),
                    names.join(", ")
                ),
            };
            return Error::InvalidField { field: "node".to_owned(), reason };
        }
        let Some(load) = cluster.load_of(&node).await else {
            return not_now(format!("node '{node}' does not say whether it can run the session"));
        };
        if !load.runs {
            return not_now(format!("no GPU of node '{node}' serves"));
        }
        let largest = load.hbm_for(needs).largest;
        if largest < needs.bytes || largest == Bytes::ZERO {
            let reason = match largest {
                Bytes::ZERO => format!("no GPU of node '{node}' takes the kernels of its cold form"),
                largest => format!("the largest GPU of node '{node}' that could run it has {largest}"),
            };
            let (tier, wanted) = (Tier::Hbm, needs.bytes);
            return Error::NoCapacity { tier, wanted, reason, retry_after: Millis(60_000) };
        }
        self.cede(key, node).await
    }

    /// [`Refusal::Moving`] once the shard has another owner.
    async fn cede(&self, key: &SessionKey, to: NodeName) -> Error {
        let Some(cluster) = self.cluster_link() else { return Error::unknown_node(&to) };
        match cluster.cede(self, key, to.clone()).await {
            Ok(true) => {
                tracing::info!(%key, %to, "the session's shard has gone to a node where it can run");
                Refusal::Moving("its shard has gone to another node").into()
            }
            Ok(false) => not_now(format!("the registry has not made node '{to}' the owner of its shard yet")),
            Err(Error::Refused(Refusal::Conflict(why))) => not_now(why),
            Err(error) => error,
        }
    }
}

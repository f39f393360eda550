//! openraft's own requests over our link.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use keepwarm_types::NodeName;
use openraft::error::{
    Fatal, RPCError, RaftError, RemoteError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, Snapshot, Vote};

use crate::link::{RegistryLink, RegistryLinkError};
use crate::raft_types::{RaftPeer, TypeConfig};
use crate::wire::{Answer, Request};

/// A peer that cannot be reached is tried again after this long: one heartbeat.
const RETRY: Duration = Duration::from_millis(50);
/// A snapshot of some MiB must arrive and be written within this.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(10);

type CallError<E> = RPCError<u64, RaftPeer, E>;

/// Makes [`Peer`]s.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) link: Arc<dyn RegistryLink>,
    pub(crate) cluster: u128,
}

/// One voter or learner, as the others reach it.
pub(crate) struct Peer {
    network: Network,
    id: u64,
    name: Option<NodeName>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &RaftPeer) -> Peer {
        Peer { network: self.clone(), id: target, name: node.name.clone() }
    }
}

impl Network {
    /// One request and its answer.
    pub(crate) async fn call(
        &self,
        to: &NodeName,
        request: &Request,
        deadline: Duration,
    ) -> Result<Answer, CallFailed> {
        let unreachable = || CallFailed::Link(RegistryLinkError::Unreachable(to.clone()));
        let version = self.link.version(to).ok_or_else(unreachable)?;
        let request = request.encode(self.cluster, version);
        let bytes = self.link.call(to, request, deadline).await.map_err(CallFailed::Link)?;
        Answer::decode(self.cluster, &bytes).map_err(|error| CallFailed::Answer(error.to_string()))
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallFailed {
    #[error(transparent)]
    Link(RegistryLinkError),
    #[error("the answer cannot be read: {0}")]
    Answer(String),
}

fn unreachable(what: impl ToString) -> Unreachable {
    Unreachable::new(&io::Error::other(what.to_string()))
}

impl Peer {
    async fn call(&self, request: &Request, deadline: Duration) -> Result<Answer, Unreachable> {
        let Some(name) = &self.name else { return Err(unreachable("the raft id has no name")) };
        match self.network.call(name, request, deadline).await {
            Ok(Answer::Refused(why)) => Err(unreachable(why)),
            Ok(Answer::Unavailable(why)) => Err(unreachable(why)),
            Ok(answer) => Ok(answer),
            Err(error) => Err(unreachable(error)),
        }
    }

    fn odd<E: std::error::Error>(&self) -> CallError<E> {
        unreachable(format!("{:?} answers something else", self.name)).into()
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, CallError<RaftError<u64>>> {
        let request = Request::Append {
            to: self.id,
            vote: (&rpc.vote).into(),
            prev: rpc.prev_log_id.as_ref().map(Into::into),
            entries: rpc.entries.iter().map(Into::into).collect(),
            commit: rpc.leader_commit.as_ref().map(Into::into),
        };
        match self.call(&request, option.hard_ttl()).await? {
            Answer::Appended => Ok(AppendEntriesResponse::Success),
            Answer::AppendedPart(id) => Ok(AppendEntriesResponse::PartialSuccess(id.map(Into::into))),
            Answer::Conflict => Ok(AppendEntriesResponse::Conflict),
            Answer::HigherVote(vote) => Ok(AppendEntriesResponse::HigherVote(vote.into())),
            _ => Err(self.odd()),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, CallError<RaftError<u64>>> {
        let request = Request::Vote {
            to: self.id,
            vote: (&rpc.vote).into(),
            last: rpc.last_log_id.as_ref().map(Into::into),
        };
        match self.call(&request, option.hard_ttl()).await? {
            Answer::Voted { vote, granted, last } => {
                Ok(VoteResponse::new(Vote::from(vote), last.map(Into::into), granted))
            }
            _ => Err(self.odd()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        let request = Request::Snapshot {
            to: self.id,
            vote: (&vote).into(),
            meta: (&snapshot.meta).into(),
            bytes: *snapshot.snapshot,
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = self.call(&request, SNAPSHOT_DEADLINE) => match answer? {
                Answer::Installed(vote) => Ok(SnapshotResponse::new(vote.into())),
                _ => Err(StreamingError::RemoteError(RemoteError::new(self.id, Fatal::Stopped))),
            },
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}

//! Votes, log entries, memberships and snapshots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use openraft::{CommittedLeaderId, EntryPayload, LogId, Membership, SnapshotMeta, StoredMembership, Vote};
use rkyv::{Archive, Deserialize, Serialize};
use uuid::Uuid;

use super::domain::{RawDelta, RawEntry};
use super::{BadBytes, name};
use crate::raft_types::{LogEntry, Proposal, RaftPeer};

#[derive(Debug, Clone, Copy, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawLogId {
    term: u64,
    leader: u64,
    index: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawVote {
    term: u64,
    node: u64,
    committed: bool,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawMembership {
    configs: Vec<Vec<u64>>,
    /// Raft id, node's name, disk.
    nodes: Vec<(u64, String, u128)>,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum RawPayload {
    Blank,
    Normal(RawEntry),
    Membership(RawMembership),
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawLogEntry {
    id: RawLogId,
    payload: RawPayload,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawMeta {
    last: Option<RawLogId>,
    membership_at: Option<RawLogId>,
    membership: RawMembership,
    id: String,
}

/// What a snapshot's slot holds.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawSnapshot {
    pub(crate) meta: RawMeta,
    /// An archived [`RawDelta`] since nothing.
    pub(crate) bytes: Vec<u8>,
}

super::archive!(encode_log_entry, decode_log_entry, RawLogEntry);
super::archive!(encode_log_id, decode_log_id, RawLogId);
super::archive!(encode_vote, decode_vote, RawVote);
super::archive!(encode_snapshot, decode_snapshot, RawSnapshot);
super::archive!(encode_delta, decode_delta, RawDelta);

impl From<&LogId<u64>> for RawLogId {
    fn from(id: &LogId<u64>) -> Self {
        Self { term: id.leader_id.term, leader: id.leader_id.node_id, index: id.index }
    }
}

impl From<RawLogId> for LogId<u64> {
    fn from(raw: RawLogId) -> Self {
        Self::new(CommittedLeaderId::new(raw.term, raw.leader), raw.index)
    }
}

impl From<&Vote<u64>> for RawVote {
    fn from(vote: &Vote<u64>) -> Self {
        Self { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
    }
}

impl From<RawVote> for Vote<u64> {
    fn from(raw: RawVote) -> Self {
        if raw.committed { Self::new_committed(raw.term, raw.node) } else { Self::new(raw.term, raw.node) }
    }
}

impl From<&Membership<u64, RaftPeer>> for RawMembership {
    fn from(membership: &Membership<u64, RaftPeer>) -> Self {
        let node = |(id, peer): (&u64, &RaftPeer)| {
            let name = peer.name.as_ref().map(ToString::to_string).unwrap_or_default();
            (*id, name, peer.disk.as_u128())
        };
        Self {
            configs: membership
                .get_joint_config()
                .iter()
                .map(|config| config.iter().copied().collect())
                .collect(),
            nodes: membership.nodes().map(node).collect(),
        }
    }
}

impl TryFrom<RawMembership> for Membership<u64, RaftPeer> {
    type Error = BadBytes;
    fn try_from(raw: RawMembership) -> Result<Self, BadBytes> {
        let node = |(id, text, disk): (u64, String, u128)| {
            let name = if text.is_empty() { None } else { Some(name(&text)?) };
            Ok((id, RaftPeer { name, disk: Uuid::from_u128(disk) }))
        };
        let nodes: BTreeMap<_, _> = raw.nodes.into_iter().map(node).collect::<Result<_, BadBytes>>()?;
        let configs: Vec<BTreeSet<u64>> =
            raw.configs.into_iter().map(|config| config.into_iter().collect()).collect();
        Ok(Self::new(configs, nodes))
    }
}

impl From<&LogEntry> for RawLogEntry {
    fn from(entry: &LogEntry) -> Self {
        let payload = match &entry.payload {
            EntryPayload::Blank => RawPayload::Blank,
            EntryPayload::Normal(proposal) => RawPayload::Normal((&*proposal.0).into()),
            EntryPayload::Membership(membership) => RawPayload::Membership(membership.into()),
        };
        Self { id: (&entry.log_id).into(), payload }
    }
}

impl TryFrom<RawLogEntry> for LogEntry {
    type Error = BadBytes;
    fn try_from(raw: RawLogEntry) -> Result<Self, BadBytes> {
        let payload = match raw.payload {
            RawPayload::Blank => EntryPayload::Blank,
            RawPayload::Normal(entry) => EntryPayload::Normal(Proposal(Arc::new(entry.try_into()?))),
            RawPayload::Membership(membership) => EntryPayload::Membership(membership.try_into()?),
        };
        Ok(Self { log_id: raw.id.into(), payload })
    }
}

impl From<&SnapshotMeta<u64, RaftPeer>> for RawMeta {
    fn from(meta: &SnapshotMeta<u64, RaftPeer>) -> Self {
        Self {
            last: meta.last_log_id.as_ref().map(Into::into),
            membership_at: meta.last_membership.log_id().as_ref().map(Into::into),
            membership: meta.last_membership.membership().into(),
            id: meta.snapshot_id.clone(),
        }
    }
}

impl TryFrom<RawMeta> for SnapshotMeta<u64, RaftPeer> {
    type Error = BadBytes;
    fn try_from(raw: RawMeta) -> Result<Self, BadBytes> {
        let membership = raw.membership.try_into()?;
        Ok(Self {
            last_log_id: raw.last.map(Into::into),
            last_membership: StoredMembership::new(raw.membership_at.map(Into::into), membership),
            snapshot_id: raw.id,
        })
    }
}

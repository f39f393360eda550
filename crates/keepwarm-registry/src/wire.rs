//! Requests between registries and their answers, as bytes.
//!
//! A frame is a version (2 bytes), the cluster's id (16 bytes), then a validated archive. The version is the one that the
//! link speaks, as in every other payload: a request has its own, and its answer too. Version 2 has one request more
//! ([`Request::Standing`]), behind the others, and is the same otherwise; `keepwarm_wire::envelope` says how to make another.
//! A version that this node does not read, or another cluster, is refused by name, never guessed at.

use bytes::Bytes;
use keepwarm_core::registry::{Fitness, HealthReport};
use keepwarm_wire::{Version, Versions};
use rkyv::{Archive, Deserialize, Serialize};

use crate::codec::domain::{RawDelta, RawEntry, RawReport, RawResponse};
use crate::codec::raft::{RawLogEntry, RawLogId, RawMeta, RawVote};
use crate::codec::{BadBytes, aligned, bad};
use crate::link::MESSAGE_BYTES_MAX;

const HEADER_BYTES: usize = 2 + 16;

/// What one registry asks of another. Raft's own requests name the raft id that they are for: a node with a new disk
/// must not answer for the old one.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum Request {
    Append {
        to: u64,
        vote: RawVote,
        prev: Option<RawLogId>,
        entries: Vec<RawLogEntry>,
        commit: Option<RawLogId>,
    },
    Vote {
        to: u64,
        vote: RawVote,
        last: Option<RawLogId>,
    },
    Snapshot {
        to: u64,
        vote: RawVote,
        meta: RawMeta,
        bytes: Vec<u8>,
    },
    /// Propose an entry, if you lead; give up after so many milliseconds.
    Propose {
        entry: RawEntry,
        wait_ms: u64,
    },
    /// Confirm that you lead, and say which version has everything acknowledged until now.
    Confirm {
        wait_ms: u64,
    },
    /// What a node has not heard.
    Report(RawReport),
    /// What has changed since this version; wait so long for something.
    Follow {
        since: u64,
        wait_ms: u64,
    },
    /// Who are you, and are you in a cluster?
    Probe,
    /// Let me vote under this name with this disk.
    Join {
        node: String,
        disk: u128,
    },
    /// The same as a report, with what the reporter can do, who is slow, and which shards it has ceded. From version 2 on.
    Standing {
        report: RawReport,
        leads: bool,
        learns: bool,
        slow: Vec<(String, u64)>,
        ceded: Vec<u32>,
    },
}

impl Request {
    /// A report, as a reader of this version takes it: of fitness version 1 says nothing, and its leader takes everybody
    /// for well.
    pub(crate) fn report(report: &HealthReport, version: Version) -> Self {
        let raw = RawReport::from(report);
        if version.number() < 2 {
            return Self::Report(raw);
        }
        let slow = report.slow.iter().map(|member| (member.node.to_string(), member.incarnation.0)).collect();
        let ceded = report.ceded.iter().map(|shard| shard.0).collect();
        let Fitness { leads, learns } = report.fitness;
        Self::Standing { report: raw, leads, learns, slow, ceded }
    }
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum Answer {
    Appended,
    AppendedPart(Option<RawLogId>),
    Conflict,
    HigherVote(RawVote),
    Voted {
        vote: RawVote,
        granted: bool,
        last: Option<RawLogId>,
    },
    Installed(RawVote),
    Applied(RawResponse),
    Confirmed(u64),
    /// Certainly nothing was done: this one may lead.
    NotLeader(Option<String>),
    /// Certainly nothing was done, for now.
    Unavailable(String),
    /// It may have been done.
    Unknown,
    Taken,
    Delta {
        delta: RawDelta,
        leader: Option<String>,
    },
    Probed {
        disk: u128,
        in_cluster: bool,
    },
    /// It votes, or learns and will.
    Joined {
        votes: bool,
    },
    /// Another cluster, disk or version: asking again does not help.
    Refused(String),
}

fn frame(cluster: u128, version: Version, archive: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + archive.len());
    bytes.extend(version.number().to_le_bytes());
    bytes.extend(cluster.to_le_bytes());
    bytes.extend_from_slice(archive);
    bytes.into()
}

fn unframe(cluster: u128, bytes: &[u8]) -> Result<&[u8], BadBytes> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(bad(format!("a message of {} bytes; {MESSAGE_BYTES_MAX} are the most", bytes.len())));
    }
    let (version, rest) = bytes.split_first_chunk::<2>().ok_or_else(|| bad("a message is cut short"))?;
    let version = u16::from_le_bytes(*version);
    let read = Versions::ALL;
    if !(read.oldest..=read.newest).contains(&version) {
        return Err(bad(format!(
            "a registry message of version {version}, this node reads {read}: update one step at a time"
        )));
    }
    let (found, archive) = rest.split_first_chunk::<16>().ok_or_else(|| bad("a message is cut short"))?;
    let found = u128::from_le_bytes(*found);
    if found != cluster {
        return Err(bad(format!("a message of cluster {found:032x}, this node is of {cluster:032x}")));
    }
    Ok(archive)
}

macro_rules! framed {
    ($type:ident) => {
        impl $type {
            /// In the version that its reader speaks.
            pub(crate) fn encode(&self, cluster: u128, version: Version) -> Bytes {
                let archive = rkyv::to_bytes::<rkyv::rancor::Error>(self)
                    .expect("plain values of bounded size always archive");
                frame(cluster, version, &archive)
            }

            pub(crate) fn decode(cluster: u128, bytes: &[u8]) -> Result<Self, BadBytes> {
                let archive = aligned(unframe(cluster, bytes)?);
                rkyv::from_bytes::<Self, rkyv::rancor::Error>(&archive)
                    .map_err(|error| bad(error.to_string()))
            }
        }
    };
}
framed!(Request);
framed!(Answer);

//! Entries, responses and deltas of the registry.

use std::collections::BTreeMap;
use std::sync::Arc;

use keepwarm_core::registry::{
    Change, Delta, Entry, HealthReport, NodeState, NodeStatus, Refused, Registration, Response, SetState,
    Unheard,
};
use keepwarm_types::{Generation, Incarnation, Millis, NodeName, ShardId, Timestamp};
use rkyv::{Archive, Deserialize, Serialize};
use uuid::Uuid;

use super::{BadBytes, bad, name};

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawRegistration {
    node: String,
    disk: u128,
    peer: String,
    http: String,
    zone: String,
    stores: bool,
    certificate: [u8; 32],
    process: u128,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum RawChange {
    AddLearner(String),
    DropLearner,
    Promote,
    Remove { node: String, observers: Vec<String> },
    MakePrimary(String),
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum RawEntry {
    Spec {
        version: u64,
        hash: [u8; 32],
    },
    Register {
        registration: RawRegistration,
        at: u64,
    },
    Down {
        node: String,
        incarnation: u64,
        observers: Vec<String>,
    },
    GiveUp {
        node: String,
        incarnation: u64,
        at: u64,
    },
    Drain {
        node: String,
        draining: bool,
    },
    /// Each set's nodes by their place among the names.
    Assign {
        names: Vec<String>,
        sets: Vec<(u32, Vec<u16>)>,
    },
    Change {
        shard: u32,
        generation: u64,
        change: RawChange,
    },
    Return {
        node: String,
        incarnation: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) enum RawResponse {
    Done,
    Registered(u64),
    Stale(u64),
    UnknownNode(String),
    UnknownShard(u32),
    Unfit(String),
    Evidence(String),
    Spec(u64),
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawNode {
    place: u16,
    registration: RawRegistration,
    incarnation: u64,
    /// 0 up, 1 draining, 2 down.
    status: u8,
    drained: bool,
    changed: u64,
}

/// 32 bytes: 16,384 shards are 0.5 MB. `u16::MAX` stands for nobody.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawSet {
    generation: u64,
    changed: u64,
    shard: u32,
    replicas: [u16; keepwarm_core::registry::REPLICAS_MAX - 1],
    learner: u16,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawDelta {
    since: u64,
    version: u64,
    spec_version: u64,
    spec_hash: [u8; 32],
    incarnations: u64,
    nodes: Vec<RawNode>,
    sets: Vec<RawSet>,
    /// The few sets that are as large as they can be: their last replica.
    sixth: Vec<(u32, u16)>,
    /// The few shards that were lost, and when.
    lost: Vec<(u32, u64)>,
}

#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(crate) struct RawReport {
    from: String,
    from_incarnation: u64,
    unheard: Vec<(String, u64, u64)>,
}

const NOBODY: u16 = u16::MAX;
/// Replicas in [`RawSet`]; a sixth is there only while one replaces another.
const INLINE: usize = keepwarm_core::registry::REPLICAS_MAX - 1;

super::archive!(encode_entry, RawEntry);

fn texts(names: &[NodeName]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn names(texts: &[String]) -> Result<Vec<NodeName>, BadBytes> {
    texts.iter().map(|text| name(text)).collect()
}

impl From<&Registration> for RawRegistration {
    fn from(r: &Registration) -> Self {
        Self {
            node: r.node.to_string(),
            disk: r.disk.as_u128(),
            peer: r.peer.clone(),
            http: r.http.clone(),
            zone: r.zone.clone(),
            stores: r.stores,
            certificate: r.certificate,
            process: r.process.as_u128(),
        }
    }
}

impl TryFrom<RawRegistration> for Registration {
    type Error = BadBytes;
    fn try_from(raw: RawRegistration) -> Result<Self, BadBytes> {
        Ok(Self {
            node: name(&raw.node)?,
            disk: Uuid::from_u128(raw.disk),
            peer: raw.peer,
            http: raw.http,
            zone: raw.zone,
            stores: raw.stores,
            certificate: raw.certificate,
            process: Uuid::from_u128(raw.process),
        })
    }
}

impl From<&Change> for RawChange {
    fn from(change: &Change) -> Self {
        match change {
            Change::AddLearner(node) => Self::AddLearner(node.to_string()),
            Change::DropLearner => Self::DropLearner,
            Change::Promote => Self::Promote,
            Change::Remove { node, observers } => {
                Self::Remove { node: node.to_string(), observers: texts(observers) }
            }
            Change::MakePrimary(node) => Self::MakePrimary(node.to_string()),
        }
    }
}

impl TryFrom<RawChange> for Change {
    type Error = BadBytes;
    fn try_from(raw: RawChange) -> Result<Self, BadBytes> {
        Ok(match raw {
            RawChange::AddLearner(node) => Self::AddLearner(name(&node)?),
            RawChange::DropLearner => Self::DropLearner,
            RawChange::Promote => Self::Promote,
            RawChange::Remove { node, observers } => {
                Self::Remove { node: name(&node)?, observers: names(&observers)? }
            }
            RawChange::MakePrimary(node) => Self::MakePrimary(name(&node)?),
        })
    }
}

impl From<&Entry> for RawEntry {
    fn from(entry: &Entry) -> Self {
        match entry {
            Entry::Spec { version, hash } => Self::Spec { version: *version, hash: *hash },
            Entry::Register { registration, at } => {
                Self::Register { registration: registration.into(), at: at.0 }
            }
            Entry::Down { node, incarnation, observers } => {
                Self::Down { node: node.to_string(), incarnation: incarnation.0, observers: texts(observers) }
            }
            Entry::Return { node, incarnation } => {
                Self::Return { node: node.to_string(), incarnation: incarnation.0 }
            }
            Entry::GiveUp { node, incarnation, at } => {
                Self::GiveUp { node: node.to_string(), incarnation: incarnation.0, at: at.0 }
            }
            Entry::Drain { node, draining } => Self::Drain { node: node.to_string(), draining: *draining },
            Entry::Assign(sets) => raw_assign(sets),
            Entry::Change { shard, generation, change } => {
                Self::Change { shard: shard.0, generation: generation.0, change: change.into() }
            }
        }
    }
}

fn raw_assign(sets: &[(ShardId, Vec<NodeName>)]) -> RawEntry {
    let mut places: BTreeMap<&NodeName, u16> = BTreeMap::new();
    let mut names = Vec::new();
    let sets = sets
        .iter()
        .map(|(shard, nodes)| {
            let mut place = |node| {
                *places.entry(node).or_insert_with(|| {
                    names.push(node.to_string());
                    u16::try_from(names.len() - 1).expect("nodes are counted in sixteen bits")
                })
            };
            (shard.0, nodes.iter().map(&mut place).collect())
        })
        .collect();
    RawEntry::Assign { names, sets }
}

impl TryFrom<RawEntry> for Entry {
    type Error = BadBytes;
    fn try_from(raw: RawEntry) -> Result<Self, BadBytes> {
        Ok(match raw {
            RawEntry::Spec { version, hash } => Self::Spec { version, hash },
            RawEntry::Register { registration, at } => {
                Self::Register { registration: registration.try_into()?, at: Timestamp(at) }
            }
            RawEntry::Down { node, incarnation, observers } => Self::Down {
                node: name(&node)?,
                incarnation: Incarnation(incarnation),
                observers: names(&observers)?,
            },
            RawEntry::Return { node, incarnation } => {
                Self::Return { node: name(&node)?, incarnation: Incarnation(incarnation) }
            }
            RawEntry::GiveUp { node, incarnation, at } => {
                Self::GiveUp { node: name(&node)?, incarnation: Incarnation(incarnation), at: Timestamp(at) }
            }
            RawEntry::Drain { node, draining } => Self::Drain { node: name(&node)?, draining },
            RawEntry::Assign { names: table, sets } => {
                let table = names(&table)?;
                let named = |place: &u16| {
                    table.get(usize::from(*place)).cloned().ok_or_else(|| bad("a set names nobody"))
                };
                let set = |(shard, places): (u32, Vec<u16>)| {
                    Ok((ShardId(shard), places.iter().map(named).collect::<Result<_, _>>()?))
                };
                Self::Assign(sets.into_iter().map(set).collect::<Result<_, BadBytes>>()?)
            }
            RawEntry::Change { shard, generation, change } => Self::Change {
                shard: ShardId(shard),
                generation: Generation(generation),
                change: change.try_into()?,
            },
        })
    }
}

impl From<&Response> for RawResponse {
    fn from(response: &Response) -> Self {
        match response {
            Response::Done => Self::Done,
            Response::Registered(incarnation) => Self::Registered(incarnation.0),
            Response::Refused(refused) => match refused {
                Refused::Stale(generation) => Self::Stale(generation.0),
                Refused::UnknownNode(node) => Self::UnknownNode(node.to_string()),
                Refused::UnknownShard(shard) => Self::UnknownShard(shard.0),
                Refused::Unfit(why) => Self::Unfit(why.to_string()),
                Refused::Evidence(node) => Self::Evidence(node.to_string()),
                Refused::Spec(version) => Self::Spec(*version),
            },
        }
    }
}

impl TryFrom<RawResponse> for Response {
    type Error = BadBytes;
    fn try_from(raw: RawResponse) -> Result<Self, BadBytes> {
        Ok(match raw {
            RawResponse::Done => Self::Done,
            RawResponse::Registered(incarnation) => Self::Registered(Incarnation(incarnation)),
            RawResponse::Stale(generation) => Self::Refused(Refused::Stale(Generation(generation))),
            RawResponse::UnknownNode(node) => Self::Refused(Refused::UnknownNode(name(&node)?)),
            RawResponse::UnknownShard(shard) => Self::Refused(Refused::UnknownShard(ShardId(shard))),
            RawResponse::Unfit(why) => Self::Refused(Refused::Unfit(why.into())),
            RawResponse::Evidence(node) => Self::Refused(Refused::Evidence(name(&node)?)),
            RawResponse::Spec(version) => Self::Refused(Refused::Spec(version)),
        })
    }
}

impl From<&Delta> for RawDelta {
    fn from(delta: &Delta) -> Self {
        let node = |(place, node): &(u16, NodeState)| RawNode {
            place: *place,
            registration: (&*node.registration).into(),
            incarnation: node.incarnation.0,
            status: match node.status {
                NodeStatus::Up => 0,
                NodeStatus::Draining => 1,
                NodeStatus::Down => 2,
            },
            drained: node.drained,
            changed: node.changed,
        };
        let set = |set: &SetState| {
            let mut replicas = [NOBODY; INLINE];
            for (to, from) in replicas.iter_mut().zip(&set.replicas) {
                *to = *from;
            }
            RawSet {
                generation: set.generation.0,
                changed: set.changed,
                shard: set.shard.0,
                replicas,
                learner: set.learner.unwrap_or(NOBODY),
            }
        };
        let sixth = |set: &SetState| set.replicas.get(INLINE).map(|place| (set.shard.0, *place));
        Self {
            since: delta.since,
            version: delta.version,
            spec_version: delta.spec.0,
            spec_hash: delta.spec.1,
            incarnations: delta.incarnations,
            nodes: delta.nodes.iter().map(node).collect(),
            sets: delta.sets.iter().map(set).collect(),
            sixth: delta.sets.iter().filter_map(sixth).collect(),
            lost: delta.sets.iter().filter_map(|set| Some((set.shard.0, set.lost_at?.0))).collect(),
        }
    }
}

impl TryFrom<RawDelta> for Delta {
    type Error = BadBytes;
    fn try_from(raw: RawDelta) -> Result<Self, BadBytes> {
        let node = |node: RawNode| {
            let state = NodeState {
                registration: Arc::new(node.registration.try_into()?),
                incarnation: Incarnation(node.incarnation),
                status: match node.status {
                    0 => NodeStatus::Up,
                    1 => NodeStatus::Draining,
                    2 => NodeStatus::Down,
                    other => return Err(bad(format!("{other} is no status of a node"))),
                },
                drained: node.drained,
                changed: node.changed,
            };
            Ok((node.place, state))
        };
        let (lost, sixth): (BTreeMap<u32, u64>, BTreeMap<u32, u16>) =
            (raw.lost.into_iter().collect(), raw.sixth.into_iter().collect());
        let set = |set: RawSet| {
            let inline = set.replicas.into_iter().take_while(|place| *place != NOBODY);
            SetState {
                shard: ShardId(set.shard),
                generation: Generation(set.generation),
                changed: set.changed,
                lost_at: lost.get(&set.shard).copied().map(Timestamp),
                replicas: inline.chain(sixth.get(&set.shard).copied()).collect(),
                learner: Some(set.learner).filter(|place| *place != NOBODY),
            }
        };
        Ok(Self {
            since: raw.since,
            version: raw.version,
            spec: (raw.spec_version, raw.spec_hash),
            incarnations: raw.incarnations,
            nodes: raw.nodes.into_iter().map(node).collect::<Result<_, _>>()?,
            sets: raw.sets.into_iter().map(set).collect(),
        })
    }
}

impl From<&HealthReport> for RawReport {
    fn from(report: &HealthReport) -> Self {
        let unheard = |u: &Unheard| (u.node.to_string(), u.incarnation.0, u.silent.0);
        Self {
            from: report.from.to_string(),
            from_incarnation: report.from_incarnation.0,
            unheard: report.unheard.iter().map(unheard).collect(),
        }
    }
}

impl TryFrom<RawReport> for HealthReport {
    type Error = BadBytes;
    fn try_from(raw: RawReport) -> Result<Self, BadBytes> {
        let unheard = |(node, incarnation, silent): (String, u64, u64)| {
            Ok(Unheard { node: name(&node)?, incarnation: Incarnation(incarnation), silent: Millis(silent) })
        };
        let unheard = raw.unheard.into_iter().map(unheard).collect::<Result<_, BadBytes>>()?;
        Ok(Self { unheard, ..Self::well(name(&raw.from)?, Incarnation(raw.from_incarnation)) })
    }
}

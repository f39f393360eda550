//! Who and which, on the wire: keys, stamps, members, sets.

use keepwarm_core::registry::{Member, REPLICAS_MAX, ReplicaSet};
use keepwarm_core::session::Stamp;
use keepwarm_types::{Birth, Generation, Incarnation, SessionId, SessionKey, ShardId, Timestamp};
use rkyv::{Archive, Serialize};
use uuid::Uuid;

use crate::error::{DecodeError, field, name};
use crate::limits::{SHARDS_MAX, TooLong, counter, within};

#[derive(Archive, Serialize)]
pub(crate) struct WireKey {
    tenant: String,
    id: [u8; 16],
}

#[derive(Archive, Serialize)]
pub(crate) struct WireStamp {
    generation: u64,
    sequence: u64,
}

#[derive(Archive, Serialize)]
pub(crate) struct WireMember {
    node: String,
    incarnation: u64,
}

#[derive(Archive, Serialize)]
pub(crate) struct WireSet {
    generation: u64,
    replicas: Vec<WireMember>,
    learner: Option<WireMember>,
    lost_at: Option<u64>,
}

impl From<&SessionKey> for WireKey {
    fn from(key: &SessionKey) -> Self {
        Self { tenant: key.tenant.as_str().to_owned(), id: *key.id.uuid().as_bytes() }
    }
}

impl From<Stamp> for WireStamp {
    fn from(stamp: Stamp) -> Self {
        Self { generation: stamp.generation.0, sequence: stamp.sequence }
    }
}

impl From<&Member> for WireMember {
    fn from(member: &Member) -> Self {
        Self { node: member.node.as_str().to_owned(), incarnation: member.incarnation.0 }
    }
}

#[cfg(test)]
impl WireKey {
    /// What no honest peer sends.
    pub(crate) fn new_unchecked(tenant: &str, id: [u8; 16]) -> Self {
        Self { tenant: tenant.to_owned(), id }
    }
}

#[cfg(test)]
impl WireMember {
    /// What no honest peer sends.
    pub(crate) fn new_unchecked(node: &str, incarnation: u64) -> Self {
        Self { node: node.to_owned(), incarnation }
    }
}

impl WireSet {
    pub(crate) fn new(set: &ReplicaSet) -> Result<Self, TooLong> {
        within("set.replicas", set.replicas.len(), REPLICAS_MAX)?;
        Ok(Self {
            generation: set.generation.0,
            replicas: set.replicas.iter().map(WireMember::from).collect(),
            learner: set.learner.as_ref().map(WireMember::from),
            lost_at: set.lost_at.map(|at| at.0),
        })
    }
}

impl ArchivedWireKey {
    pub(crate) fn read(&self) -> Result<SessionKey, DecodeError> {
        Ok(SessionKey::new(name("key.tenant", &self.tenant)?, session_id("key.id", self.id)?))
    }
}

impl ArchivedWireStamp {
    pub(crate) fn read(&self) -> Result<Stamp, DecodeError> {
        let generation = Generation(counter("stamp.generation", self.generation.to_native())?);
        Ok(Stamp { generation, sequence: self.sequence.to_native() })
    }
}

impl ArchivedWireMember {
    pub(crate) fn read(&self) -> Result<Member, DecodeError> {
        Ok(Member {
            node: name("member.node", &self.node)?,
            incarnation: Incarnation(counter("member.incarnation", self.incarnation.to_native())?),
        })
    }

    /// The same, sharing the name's memory with a member that is known already.
    pub(crate) fn read_among(&self, known: &[Member]) -> Result<Member, DecodeError> {
        let Some(other) = known.iter().find(|other| other.node.as_str() == &*self.node) else {
            return self.read();
        };
        let incarnation = Incarnation(counter("member.incarnation", self.incarnation.to_native())?);
        Ok(Member { node: other.node.clone(), incarnation })
    }
}

impl ArchivedWireSet {
    pub(crate) fn read(&self) -> Result<ReplicaSet, DecodeError> {
        within("set.replicas", self.replicas.len(), REPLICAS_MAX)?;
        Ok(ReplicaSet {
            generation: Generation(counter("set.generation", self.generation.to_native())?),
            replicas: self.replicas.iter().map(ArchivedWireMember::read).collect::<Result<_, _>>()?,
            learner: self.learner.as_ref().map(ArchivedWireMember::read).transpose()?,
            lost_at: self.lost_at.as_ref().map(|at| Timestamp(at.to_native())),
        })
    }
}

pub(crate) fn session_id(what: &'static str, bytes: [u8; 16]) -> Result<SessionId, DecodeError> {
    SessionId::new(Uuid::from_bytes(bytes)).map_err(|error| field(what, error))
}

pub(crate) fn birth(what: &'static str, number: u64) -> Result<Birth, DecodeError> {
    let birth = Birth::from_random(number);
    if birth.get() == number {
        Ok(birth)
    } else {
        Err(field(what, format!("{number} has more than 50 bits")))
    }
}

pub(crate) fn shard(number: u32) -> Result<ShardId, DecodeError> {
    if number < SHARDS_MAX {
        Ok(ShardId(number))
    } else {
        Err(field("shard", format!("{number} is not below {SHARDS_MAX}")))
    }
}

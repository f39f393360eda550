//! Identities: tenants, sessions, shards, nodes, GPUs, block instances, leases, transactions, writes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::version::Birth;

/// Longest tenant, node, part or model name, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// Whether `text` can name a tenant, a node or a part: 1 to 64 of `a-z A-Z 0-9 . _ -`, first a letter or digit.
#[must_use]
pub fn valid_name(text: &str) -> bool {
    text.len() <= NAME_BYTES_MAX
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Why a text is not an id or a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text is not a UUID.
    #[error("'{0}' is not a UUID")]
    Uuid(String),
    /// The UUID is of a version whose last bits are not random.
    #[error("'{0}' is a UUID of version {1}: session ids are versions 4, 5 or 7")]
    Version(Uuid, usize),
    /// The text is not a name.
    #[error("'{0}' is not a name: 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")]
    Name(String),
    /// The number of shards is not a power of two from 1 to 65,536.
    #[error("{0} shards: must be a power of two from 1 to 65536")]
    Shards(u64),
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if valid_name(text) { Ok(Self(text.into())) } else { Err(ParseIdError::Name(text.to_owned())) }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name! {
    /// Who a request acts for; comes from the credential, never from the body.
    TenantName
}
name! {
    /// A node of the cluster, by its name in the spec.
    NodeName
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(text).map(Self).map_err(|_| ParseIdError::Uuid(text.to_owned()))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
    };
}

uuid_id! {
    /// A write that may be sent again and then gets its first answer back (`Keepwarm-Write-Id`).
    WriteId
}
uuid_id! {
    /// A set of staged parts that one commit turns into one revision.
    TxnId
}
uuid_id! {
    /// A time-limited right to run and write a session.
    LeaseId
}

/// A session's id within its tenant: a UUID of version 4, 5 or 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SessionId(Uuid);

impl SessionId {
    /// Takes a UUID whose version leaves its last 16 bits random.
    ///
    /// # Errors
    /// [`ParseIdError::Version`] for any version but 4, 5 and 7.
    pub fn new(uuid: Uuid) -> Result<Self, ParseIdError> {
        match uuid.get_version_num() {
            4 | 5 | 7 => Ok(Self(uuid)),
            version => Err(ParseIdError::Version(uuid, version)),
        }
    }

    /// The UUID.
    #[must_use]
    pub const fn uuid(self) -> Uuid {
        self.0
    }

    /// The same id moved into `shard`, by overwriting the top bits of its last 16.
    #[must_use]
    pub fn placed_in(self, shard: ShardId, count: ShardCount) -> Self {
        let shift = 16 - count.bits();
        let value = self.0.as_u128();
        let low = (value & 0xffff) as u32;
        let placed = ((shard.0 << shift) | (low & ((1 << shift) - 1))) & 0xffff;
        Self(Uuid::from_u128((value & !0xffff) | u128::from(placed)))
    }
}

impl FromStr for SessionId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map_err(|_| ParseIdError::Uuid(text.to_owned())).and_then(Self::new)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// The key of a session: two tenants may bring the same id and never learn of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    /// Whose session it is.
    pub tenant: TenantName,
    /// Its id within the tenant.
    pub id: SessionId,
}

impl SessionKey {
    /// The session `id` of `tenant`.
    #[must_use]
    pub const fn new(tenant: TenantName, id: SessionId) -> Self {
        Self { tenant, id }
    }
}

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.id)
    }
}

/// Who may read a block's bytes: one life of one tenant's session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Whose bytes.
    pub tenant: TenantName,
    /// Which life of the session.
    pub birth: Birth,
}

/// How many shards the cluster has: a power of two, fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardCount(u32);

impl ShardCount {
    /// Takes a power of two from 1 to 65,536.
    ///
    /// # Errors
    /// [`ParseIdError::Shards`] for any other number.
    pub fn new(count: u64) -> Result<Self, ParseIdError> {
        match u32::try_from(count) {
            Ok(n) if n.is_power_of_two() && n <= 1 << 16 => Ok(Self(n)),
            _ => Err(ParseIdError::Shards(count)),
        }
    }

    /// The number of shards.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// log2 of the number of shards.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The shard of a session: the top bits of its id's last 16.
    #[must_use]
    pub fn shard_of(self, id: SessionId) -> ShardId {
        ShardId(((id.0.as_u128() & 0xffff) as u32) >> (16 - self.bits()))
    }
}

/// A slice of the session-id space: the unit of ownership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u32);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A GPU of a node, by its place in the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GpuIndex(pub u16);

impl fmt::Display for GpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A block instance: bytes written once and shared by reference. Unique within a node's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placed_id_lies_in_its_shard_and_keeps_its_version() {
        for count in [1, 2, 64, 1024, 65_536] {
            let count = ShardCount::new(count).unwrap();
            for shard in [0, count.get() / 2, count.get() - 1] {
                let id = SessionId::new(Uuid::now_v7()).unwrap().placed_in(ShardId(shard), count);
                assert_eq!(count.shard_of(id), ShardId(shard));
                assert_eq!(id.uuid().get_version_num(), 7);
            }
        }
    }

    #[test]
    fn foreign_ids_spread_evenly() {
        let count = ShardCount::new(16).unwrap();
        let mut seen = [0u32; 16];
        for _ in 0..16_000 {
            seen[count.shard_of(SessionId::new(Uuid::new_v4()).unwrap()).0 as usize] += 1;
        }
        assert!(seen.iter().all(|n| (700..1300).contains(n)), "{seen:?}");
    }

    #[test]
    fn ids_without_random_low_bits_are_refused() {
        assert!(matches!(SessionId::new(Uuid::nil()), Err(ParseIdError::Version(_, 0))));
        assert!("not-a-uuid".parse::<SessionId>().is_err());
        assert!(
            ShardCount::new(0).is_err() && ShardCount::new(3).is_err() && ShardCount::new(1 << 17).is_err()
        );
        assert!("-x".parse::<TenantName>().is_err() && "a/b".parse::<TenantName>().is_err());
        assert!("acme-1".parse::<TenantName>().is_ok());
    }
}

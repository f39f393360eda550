//! The group's state machine: the core's registry, its snapshots, and who watches it.

use std::sync::Arc;

use keepwarm_catalog::{LogStep, RaftLog, ReadError, Slot};
use keepwarm_core::registry::{Registry, RegistrySettings, Response};
use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageIOError,
    StoredMembership,
};
use tokio::sync::watch;

use crate::codec::domain::RawDelta;
use crate::codec::raft::{RawSnapshot, decode_delta, decode_snapshot, encode_delta, encode_snapshot};
use crate::codec::{BadBytes, bad};
use crate::log_store::write;
use crate::raft_types::{LogEntry, RaftPeer, StorageError, TypeConfig};

type Meta = SnapshotMeta<u64, RaftPeer>;

/// Applies what was agreed upon; publishes once per batch.
#[derive(Debug)]
pub(crate) struct Machine {
    disk: RaftLog,
    registry: Registry,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, RaftPeer>,
    publish: watch::Sender<Arc<Registry>>,
}

/// A copy of the state to write down while entries go on.
#[derive(Debug)]
pub(crate) struct Builder {
    disk: RaftLog,
    registry: Registry,
    meta: Meta,
}

/// The whole registry as bytes: what a snapshot holds.
#[must_use]
pub fn snapshot_bytes(registry: &Registry) -> Vec<u8> {
    encode_delta(&RawDelta::from(&registry.delta_since(0)))
}

/// The registry of these bytes.
pub(crate) fn registry_from(bytes: &[u8], settings: RegistrySettings) -> Result<Registry, BadBytes> {
    let delta = decode_delta(bytes)?.try_into()?;
    let mut registry = Registry::new(settings);
    registry.merge(&delta).map_err(|error| bad(error.to_string()))?;
    Ok(registry)
}

impl Machine {
    /// From the last snapshot on disk. Blocks.
    ///
    /// # Errors
    /// [`ReadError`] where it is damaged.
    pub(crate) fn open(
        disk: RaftLog,
        settings: RegistrySettings,
        publish: watch::Sender<Arc<Registry>>,
    ) -> Result<Self, ReadError> {
        let damaged =
            |error: BadBytes| ReadError::Damaged(format!("the snapshot of {}: {error}", disk.path()));
        let mut machine = Self {
            registry: Registry::new(settings),
            applied: None,
            membership: StoredMembership::default(),
            publish,
            disk: disk.clone(),
        };
        if let Some(bytes) = disk.value(Slot::Snapshot)? {
            let raw = decode_snapshot(&bytes).map_err(damaged)?;
            let registry = registry_from(&raw.bytes, settings).map_err(damaged)?;
            machine.take(registry, raw.meta.try_into().map_err(damaged)?);
        }
        Ok(machine)
    }

    fn take(&mut self, registry: Registry, meta: Meta) {
        (self.registry, self.applied, self.membership) = (registry, meta.last_log_id, meta.last_membership);
        self.publish();
    }

    fn publish(&self) {
        self.publish.send_replace(Arc::new(self.registry.clone()));
    }

    async fn save(disk: &RaftLog, meta: &Meta, bytes: &[u8]) -> Result<(), StorageError> {
        let raw = RawSnapshot { meta: meta.into(), bytes: bytes.to_vec() };
        write(disk, vec![LogStep::Put(Slot::Snapshot, encode_snapshot(&raw))])
            .await
            .map_err(|error| StorageIOError::write_snapshot(None, AnyError::new(&error)).into())
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        let bytes = snapshot_bytes(&self.registry);
        Machine::save(&self.disk, &self.meta, &bytes).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Box::new(bytes) })
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, RaftPeer>), StorageError> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Response>, StorageError>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut responses = Vec::new();
        for entry in entries {
            self.applied = Some(entry.log_id);
            responses.push(match entry.payload {
                EntryPayload::Blank => Response::Done,
                EntryPayload::Normal(proposal) => self.registry.apply(&proposal.0).response,
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Response::Done
                }
            });
        }
        self.publish();
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let index = self.applied.map_or(0, |id| id.index);
        let meta = SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
            snapshot_id: format!("{index}-{}", self.registry.version()),
        };
        Builder { disk: self.disk.clone(), registry: self.registry.clone(), meta }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Vec<u8>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(&mut self, meta: &Meta, snapshot: Box<Vec<u8>>) -> Result<(), StorageError> {
        let registry = registry_from(&snapshot, self.registry.settings())
            .map_err(|error| StorageIOError::read_snapshot(None, AnyError::new(&error)))?;
        Self::save(&self.disk, meta, &snapshot).await?;
        self.take(registry, meta.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        // Read back from disk: it is rarely asked for, and need not lie in memory meanwhile.
        let fail = |error: AnyError| StorageIOError::read_snapshot(None, error);
        let Some(bytes) = self.disk.value(Slot::Snapshot).map_err(|error| fail(AnyError::new(&error)))?
        else {
            return Ok(None);
        };
        let raw = decode_snapshot(&bytes).map_err(|error| fail(AnyError::new(&error)))?;
        let meta = raw.meta.try_into().map_err(|error: BadBytes| fail(AnyError::new(&error)))?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(raw.bytes) }))
    }
}

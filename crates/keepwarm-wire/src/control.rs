//! Small frames that nodes send each other beside replication.

use bytes::Bytes;
use keepwarm_core::placement::{Hbm, NodeLoad};
use keepwarm_types::{Bytes as ByteCount, TenantName};
use rkyv::{Archive, Serialize};

use crate::archive::{Opened, seal};
use crate::error::{DecodeError, EncodeError, name};
use crate::frame::Frame;
use crate::kinds;
use crate::limits::{CONTROL_BYTES_MAX, TooLong, counter, index, within};
use crate::version::Version;

/// Longest request id, in bytes: a UUID has 36, a trace's id 55.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Most bytes in one message of the registry: a chunk of a snapshot (65,536 shards of 40 bytes are 2.6 MB), or a batch
/// of entries.
pub const REGISTRY_BYTES_MAX: usize = 4 << 20;

/// Who asks in the HTTP request that follows on the stream: the receiver believes the sender's check of the
/// credential, since both have the cluster's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayHeader {
    /// Who the request acts for.
    pub tenant: TenantName,
    /// Whether the credential was an operator's.
    pub admin: bool,
    /// Names the request in both nodes' logs.
    pub request_id: String,
    /// How often it has been relayed, this time included. The receiver says how often is too often.
    pub hops: u8,
}

#[derive(Archive, Serialize)]
struct WireRelayHeader {
    tenant: String,
    admin: bool,
    request_id: String,
    hops: u8,
}

impl RelayHeader {
    /// Makes a frame of it, in the version that its reader speaks.
    ///
    /// # Errors
    /// [`EncodeError`] where the request's id has more than [`REQUEST_ID_BYTES_MAX`] bytes.
    pub fn encode(&self, version: Version) -> Result<Frame, EncodeError> {
        within("relay.request_id", self.request_id.len(), REQUEST_ID_BYTES_MAX)?;
        let wire = WireRelayHeader {
            tenant: self.tenant.as_str().to_owned(),
            admin: self.admin,
            request_id: self.request_id.clone(),
            hops: self.hops,
        };
        seal(version, kinds::RELAY_HEADER, "relay header", &wire, 256, CONTROL_BYTES_MAX)
    }

    /// Reads it from a frame; never panics.
    ///
    /// # Errors
    /// [`DecodeError`] where the frame is of another kind or version, or damaged, or the tenant is not a name.
    pub fn decode(frame: &Frame) -> Result<Self, DecodeError> {
        let opened = Opened::new(frame, kinds::RELAY_HEADER, "relay header", CONTROL_BYTES_MAX)?;
        let wire = opened.root::<ArchivedWireRelayHeader>()?;
        within("relay.request_id", wire.request_id.len(), REQUEST_ID_BYTES_MAX)?;
        Ok(Self {
            tenant: name("relay.tenant", &wire.tenant)?,
            admin: wire.admin,
            request_id: wire.request_id.as_str().to_owned(),
            hops: wire.hops,
        })
    }
}

/// How a node is: what it says where it is asked by a frame of kind [`kinds::LOAD`] without a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadAnswer(pub NodeLoad);

#[derive(Archive, Serialize)]
struct WireLoad {
    runs: bool,
    queue: u32,
    used: u64,
    capacity: u64,
    hbm: (u64, u64),
    with_kernels: (u64, u64),
}

impl LoadAnswer {
    /// The question. A peer of version 1 does not know it.
    ///
    /// # Errors
    /// [`EncodeError::Unsayable`] for such a peer.
    pub fn question(version: Version) -> Result<Frame, EncodeError> {
        since_two(version)?;
        Ok(Frame { kind: kinds::LOAD, payload: Bytes::new() })
    }

    /// Makes a frame of it.
    ///
    /// # Errors
    /// [`EncodeError::Unsayable`] for a peer of version 1.
    pub fn encode(&self, version: Version) -> Result<Frame, EncodeError> {
        since_two(version)?;
        let NodeLoad { runs, queue, used, capacity, hbm, with_kernels } = self.0;
        let pair = |hbm: Hbm| (hbm.largest.0, hbm.room.0);
        let (hbm, with_kernels) = (pair(hbm), pair(with_kernels));
        let wire = WireLoad { runs, queue, used: used.0, capacity: capacity.0, hbm, with_kernels };
        seal(version, kinds::LOAD, "load", &wire, 64, CONTROL_BYTES_MAX)
    }

    /// Reads it from a frame; never panics.
    ///
    /// # Errors
    /// [`DecodeError`] where the frame is of another kind or version, or damaged, or a counter is out of range.
    pub fn decode(frame: &Frame) -> Result<Self, DecodeError> {
        let opened = Opened::new(frame, kinds::LOAD, "load", CONTROL_BYTES_MAX)?;
        let wire = opened.root::<ArchivedWireLoad>()?;
        let bytes = |what, value: rkyv::rend::u64_le| {
            Ok::<_, DecodeError>(ByteCount(counter(what, value.to_native())?))
        };
        let hbm = |pair: &rkyv::tuple::ArchivedTuple2<rkyv::rend::u64_le, rkyv::rend::u64_le>| {
            Ok::<_, DecodeError>(Hbm {
                largest: bytes("load.largest", pair.0)?,
                room: bytes("load.room", pair.1)?,
            })
        };
        Ok(Self(NodeLoad {
            runs: wire.runs,
            queue: index("load.queue", wire.queue.to_native())?,
            used: ByteCount(counter("load.used", wire.used.to_native())?),
            capacity: ByteCount(counter("load.capacity", wire.capacity.to_native())?),
            hbm: hbm(&wire.hbm)?,
            with_kernels: hbm(&wire.with_kernels)?,
        }))
    }
}

fn since_two(version: Version) -> Result<(), EncodeError> {
    const SINCE: u16 = 2;
    let what = "how a node is";
    if version.number() < SINCE {
        return Err(EncodeError::Unsayable { what, version, since: SINCE });
    }
    Ok(())
}

/// A message of the registry's consensus group. Its bytes are the registry's own, which writes the link's version into
/// them; they are not looked at here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryFrame(pub Bytes);

impl RegistryFrame {
    /// Makes a frame of it; nothing is copied.
    ///
    /// # Errors
    /// [`TooLong`] where it has more than [`REGISTRY_BYTES_MAX`] bytes.
    pub fn encode(self) -> Result<Frame, TooLong> {
        within("registry", self.0.len(), REGISTRY_BYTES_MAX)?;
        Ok(Frame { kind: kinds::REGISTRY, payload: self.0 })
    }

    /// Takes it out of a frame; nothing is copied.
    ///
    /// # Errors
    /// [`DecodeError`] where the frame is of another kind or has more than [`REGISTRY_BYTES_MAX`] bytes.
    pub fn decode(frame: Frame) -> Result<Self, DecodeError> {
        if frame.kind != kinds::REGISTRY {
            return Err(DecodeError::Kind { found: frame.kind, wanted: kinds::REGISTRY });
        }
        within("registry", frame.payload.len(), REGISTRY_BYTES_MAX)?;
        Ok(Self(frame.payload))
    }
}

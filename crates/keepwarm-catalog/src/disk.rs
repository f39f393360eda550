//! What lies on disk, apart from the domain's own types, and the way between the two.
//!
//! Each value is 8 bytes of XXH3-64 over the rest, then an rkyv archive that is validated before it is read.
//! Keys sort by shard, tenant and id, so that a shard is one range.

use std::sync::Arc;

use keepwarm_core::registry::Member;
use keepwarm_core::session::{
    Form, Fp8, Labels, Layout, Manifest, Number, Order, Parent, Part, PartState, Planes, Protect, Stamp,
    State, WriteMemo,
};
use keepwarm_core::shard::Tombstone;
use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, Generation, Incarnation, Millis, PlacementSeq, Revision,
    SessionId, SessionKey, ShardCount, ShardId, Timestamp, Tokens, WriteId,
};
use rkyv::rancor;
use rkyv::{Archive, Deserialize, Serialize};
use twox_hash::XxHash3_64;
use uuid::Uuid;

/// What is wrong with a value on disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadValue(pub(crate) String);

fn bad(what: impl Into<String>) -> BadValue {
    BadValue(what.into())
}

#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct DiskPart {
    name: String,
    /// 0 paged, 1 window, 2 snapshot, 3 bytes, 4 paged and kept as FP8 in cold tiers. What has no 4 reads the others as before,
    /// and who does not know it refuses the session rather than taking it for an exact one.
    form: u8,
    /// Tokens per block, planes, plane bytes per token, then the window's tokens, or of 4 what its numbers are: 0 f32, 1 f16,
    /// 2 bf16. Or one size.
    numbers: [u64; 4],
    plane_order: bool,
    length: u64,
    digest: Option<[u64; 2]>,
}

#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct DiskWrite {
    id: u128,
    asked: u64,
    revision: u64,
    length_tokens: u64,
    length: u64,
}

#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct DiskManifest {
    birth: u64,
    model: String,
    fingerprint: String,
    parts: Vec<DiskPart>,
    /// `u64::MAX` stands for forever.
    protect_ms: u64,
    ttl_ms: Option<u64>,
    labels: Vec<(String, String)>,
    /// Generation and sequence.
    stamp: [u64; 2],
    revision: u64,
    placement_seq: u64,
    length_tokens: u64,
    transcript: [u64; 3],
    parent: Option<(u128, u64, u64, u64)>,
    branches: Vec<u128>,
    /// 0 warm, then cold: 1 evicted, 2 restarted, 3 holders lost, 4 corrupt.
    state: u8,
    /// Node and incarnation.
    holders: Vec<(String, u64)>,
    writes: Vec<DiskWrite>,
    created_at: u64,
    last_used_at: u64,
}

#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct DiskTombstone {
    birth: u64,
    revision: u64,
    at: u64,
    expired: bool,
    stamp: [u64; 2],
}

/// A message of a transcript.
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct DiskMessage {
    pub(crate) role: String,
    pub(crate) content: String,
    pub(crate) tokens_end: u64,
}

/// Bytes of a key before its suffix: `shard, length of the tenant's name, the name, the id`.
pub(crate) fn key_bytes(key: &SessionKey, count: ShardCount) -> Vec<u8> {
    let tenant = key.tenant.as_str().as_bytes();
    let mut bytes = Vec::with_capacity(21 + tenant.len() + 12);
    bytes.extend(count.shard_of(key.id).0.to_be_bytes());
    bytes.push(u8::try_from(tenant.len()).expect("a tenant's name has at most 64 bytes"));
    bytes.extend(tenant);
    bytes.extend(key.id.uuid().as_bytes());
    bytes
}

/// The first key of a shard and the first behind it.
pub(crate) fn shard_range(shard: ShardId) -> (Vec<u8>, Vec<u8>) {
    (shard.0.to_be_bytes().to_vec(), (shard.0 + 1).to_be_bytes().to_vec())
}

pub(crate) fn key_from(bytes: &[u8]) -> Result<SessionKey, BadValue> {
    let error = || bad("a key is not of the form shard, tenant, id");
    let (_, rest) = bytes.split_at_checked(4).ok_or_else(error)?;
    let (length, rest) = rest.split_first().ok_or_else(error)?;
    let (tenant, rest) = rest.split_at_checked((*length).into()).ok_or_else(error)?;
    let id = Uuid::from_slice(rest.get(..16).ok_or_else(error)?).map_err(|_| error())?;
    let tenant = std::str::from_utf8(tenant).map_err(|_| error())?.parse().map_err(|_| error())?;
    Ok(SessionKey::new(tenant, SessionId::new(id).map_err(|_| error())?))
}

fn sealed<T>(value: &T) -> Vec<u8>
where
    T: for<'a> Serialize<
        rkyv::api::high::HighSerializer<
            rkyv::util::AlignedVec,
            rkyv::ser::allocator::ArenaHandle<'a>,
            rancor::Error,
        >,
    >,
{
    let archive =
        rkyv::to_bytes::<rancor::Error>(value).expect("plain values of bounded size always archive");
    sealed_bytes(&archive)
}

/// The bytes behind their sum.
pub(crate) fn sealed_bytes(value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + value.len());
    bytes.extend(XxHash3_64::oneshot(value).to_le_bytes());
    bytes.extend_from_slice(value);
    bytes
}

/// Checks the sum and gives the bytes.
pub(crate) fn unsealed(bytes: &[u8]) -> Result<&[u8], BadValue> {
    let (sum, value) = bytes.split_at_checked(8).ok_or_else(|| bad("a value is cut short"))?;
    if XxHash3_64::oneshot(value).to_le_bytes() != sum {
        return Err(bad("a value does not have its checksum"));
    }
    Ok(value)
}

/// Checks the sum and gives the archive, aligned.
fn opened(bytes: &[u8]) -> Result<rkyv::util::AlignedVec, BadValue> {
    let archive = unsealed(bytes)?;
    let mut aligned = rkyv::util::AlignedVec::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    Ok(aligned)
}

macro_rules! codec {
    ($encode:ident, $decode:ident, $disk:ident) => {
        pub(crate) fn $encode(value: &$disk) -> Vec<u8> {
            sealed(value)
        }
        pub(crate) fn $decode(bytes: &[u8]) -> Result<$disk, BadValue> {
            let archive = opened(bytes)?;
            rkyv::from_bytes::<$disk, rancor::Error>(&archive).map_err(|error| bad(error.to_string()))
        }
    };
}

codec!(encode_manifest, decode_manifest, DiskManifest);
codec!(encode_tombstone, decode_tombstone, DiskTombstone);
codec!(encode_message, decode_message, DiskMessage);

impl From<&Manifest> for DiskManifest {
    fn from(m: &Manifest) -> Self {
        let parts =
            m.layout.parts().iter().zip(&m.parts).map(|(part, state)| disk_part(part, state)).collect();
        Self {
            birth: m.birth.get(),
            model: m.layout.model().to_owned(),
            fingerprint: m.layout.fingerprint().to_owned(),
            parts,
            protect_ms: match m.protect {
                Protect::For(duration) => duration.0.min(u64::MAX - 1),
                Protect::Forever => u64::MAX,
            },
            ttl_ms: m.ttl.map(|ttl| ttl.0),
            labels: m.labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            stamp: disk_stamp(m.stamp),
            revision: m.revision.0,
            placement_seq: m.placement_seq.0,
            length_tokens: m.length_tokens.0,
            transcript: [m.transcript_tokens.0, m.transcript_messages.into(), m.transcript_revision.0],
            parent: m
                .parent
                .as_ref()
                .map(|p| (p.id.uuid().as_u128(), p.birth.get(), p.revision.0, p.length.0)),
            branches: m.branches.iter().map(|id| id.uuid().as_u128()).collect(),
            state: match m.state {
                State::Warm => 0,
                State::Cold(ColdReason::Evicted) => 1,
                State::Cold(ColdReason::Restarted) => 2,
                State::Cold(ColdReason::HoldersLost) => 3,
                State::Cold(ColdReason::Corrupt) => 4,
            },
            holders: m.holders.iter().map(|holder| (holder.node.to_string(), holder.incarnation.0)).collect(),
            writes: m.writes.iter().map(disk_write).collect(),
            created_at: m.created_at.0,
            last_used_at: m.last_used_at.0,
        }
    }
}

fn disk_write(memo: &WriteMemo) -> DiskWrite {
    DiskWrite {
        id: memo.id.0.as_u128(),
        asked: memo.asked,
        revision: memo.revision.0,
        length_tokens: memo.length_tokens.0,
        length: memo.length.0,
    }
}

fn disk_part(part: &Part, state: &PartState) -> DiskPart {
    let geometry = |planes: &Planes, last: u64| {
        [
            u64::from(planes.tokens_per_block),
            u64::from(planes.planes),
            u64::from(planes.plane_bytes_per_token),
            last,
        ]
    };
    let number = |from| match from {
        Number::F32 => 0,
        Number::F16 => 1,
        Number::Bf16 => 2,
    };
    let (form, numbers, order) = match &part.form {
        Form::Paged(planes) if let Some(Fp8 { from }) = part.cold => {
            (4, geometry(planes, number(from)), planes.order)
        }
        Form::Paged(planes) => (0, geometry(planes, 0), planes.order),
        Form::Window { planes, window_tokens } => {
            (1, geometry(planes, u64::from(*window_tokens)), planes.order)
        }
        Form::Snapshot { bytes } => (2, [*bytes, 0, 0, 0], Order::Token),
        Form::Bytes { block_bytes } => (3, [*block_bytes, 0, 0, 0], Order::Token),
    };
    DiskPart {
        name: part.name.to_string(),
        form,
        numbers,
        plane_order: order == Order::Plane,
        length: state.length.0,
        digest: state.digest.map(|digest| digest.0),
    }
}

fn part_from(disk: &DiskPart) -> Result<(Part, PartState), BadValue> {
    let small = |n: u64| u32::try_from(n).map_err(|_| bad("a layout's number is too large"));
    let [a, b, c, d] = disk.numbers;
    let order = if disk.plane_order { Order::Plane } else { Order::Token };
    let planes = || {
        Ok(Planes { tokens_per_block: small(a)?, planes: small(b)?, plane_bytes_per_token: small(c)?, order })
    };
    let form = match disk.form {
        0 => Form::Paged(planes()?),
        1 => Form::Window { planes: planes()?, window_tokens: small(d)? },
        2 => Form::Snapshot { bytes: a },
        3 => Form::Bytes { block_bytes: a },
        4 => Form::Paged(planes()?),
        other => return Err(bad(format!("{other} is no form of a part"))),
    };
    let cold = match (disk.form, d) {
        (4, 0) => Some(Fp8 { from: Number::F32 }),
        (4, 1) => Some(Fp8 { from: Number::F16 }),
        (4, 2) => Some(Fp8 { from: Number::Bf16 }),
        (4, other) => return Err(bad(format!("{other} is no kind of number"))),
        _ => None,
    };
    let name = disk.name.parse().map_err(|error| bad(format!("{error}")))?;
    let state = PartState {
        blocks: Vec::new(),
        first_block: 0,
        length: Bytes(disk.length),
        digest: disk.digest.map(BlockChecksum),
    };
    Ok((Part { name, form, cold }, state))
}

/// The manifest, without block instances: they were in the memory of a process that has ended.
pub(crate) fn manifest_from(key: SessionKey, disk: DiskManifest) -> Result<Manifest, BadValue> {
    let session = |id: u128| SessionId::new(Uuid::from_u128(id)).map_err(|error| bad(error.to_string()));
    let parts: Vec<_> = disk.parts.iter().map(part_from).collect::<Result<_, _>>()?;
    let (parts, states): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let layout =
        Layout::new(&disk.model, &disk.fingerprint, parts).map_err(|error| bad(error.to_string()))?;
    let holder = |(name, incarnation): &(String, u64)| {
        let node = name.parse().map_err(|_| bad("a holder is not a name"))?;
        Ok(Member { node, incarnation: Incarnation(*incarnation) })
    };
    let holders: Vec<Member> = disk.holders.iter().map(holder).collect::<Result<_, BadValue>>()?;
    let parent = disk
        .parent
        .map(|(id, birth, revision, length)| -> Result<_, BadValue> {
            let (birth, revision) = (Birth::from_random(birth), Revision(revision));
            Ok(Box::new(Parent { id: session(id)?, birth, revision, length: Tokens(length) }))
        })
        .transpose()?;
    let [transcript_tokens, transcript_messages, transcript_revision] = disk.transcript;
    Ok(Manifest {
        key,
        birth: Birth::from_random(disk.birth),
        layout: Arc::new(layout),
        protect: if disk.protect_ms == u64::MAX {
            Protect::Forever
        } else {
            Protect::For(Millis(disk.protect_ms))
        },
        ttl: disk.ttl_ms.map(Millis),
        labels: disk.labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect::<Labels>(),
        stamp: stamp_from(disk.stamp),
        revision: Revision(disk.revision),
        placement_seq: PlacementSeq(disk.placement_seq),
        length_tokens: Tokens(disk.length_tokens),
        parts: states.into(),
        transcript_tokens: Tokens(transcript_tokens),
        transcript_messages: u32::try_from(transcript_messages).map_err(|_| bad("too many messages"))?,
        transcript_revision: Revision(transcript_revision),
        parent,
        branches: disk.branches.into_iter().map(session).collect::<Result<_, _>>()?,
        state: match disk.state {
            0 => State::Warm,
            1 => State::Cold(ColdReason::Evicted),
            2 => State::Cold(ColdReason::Restarted),
            3 => State::Cold(ColdReason::HoldersLost),
            4 => State::Cold(ColdReason::Corrupt),
            other => return Err(bad(format!("{other} is no state"))),
        },
        holders: holders.into(),
        writes: disk.writes.iter().map(memo_from).collect(),
        created_at: Timestamp(disk.created_at),
        last_used_at: Timestamp(disk.last_used_at),
    })
}

fn memo_from(disk: &DiskWrite) -> WriteMemo {
    WriteMemo {
        id: WriteId(Uuid::from_u128(disk.id)),
        asked: disk.asked,
        revision: Revision(disk.revision),
        length_tokens: Tokens(disk.length_tokens),
        length: Bytes(disk.length),
    }
}

const fn disk_stamp(stamp: Stamp) -> [u64; 2] {
    [stamp.generation.0, stamp.sequence]
}

const fn stamp_from([generation, sequence]: [u64; 2]) -> Stamp {
    Stamp { generation: Generation(generation), sequence }
}

pub(crate) const fn disk_tombstone(tombstone: &Tombstone) -> DiskTombstone {
    DiskTombstone {
        birth: tombstone.birth.get(),
        revision: tombstone.revision.0,
        at: tombstone.at.0,
        expired: tombstone.expired,
        stamp: disk_stamp(tombstone.stamp),
    }
}

pub(crate) const fn tombstone_from(disk: &DiskTombstone) -> Tombstone {
    Tombstone {
        birth: Birth::from_random(disk.birth),
        revision: Revision(disk.revision),
        at: Timestamp(disk.at),
        expired: disk.expired,
        stamp: stamp_from(disk.stamp),
    }
}

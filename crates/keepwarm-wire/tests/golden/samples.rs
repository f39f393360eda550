//! Values that never change: what they are as bytes is kept beside this.

use std::collections::BTreeMap;
use std::sync::Arc;

use keepwarm_core::registry::{Member, ReplicaSet};
use keepwarm_core::replica::{Compare, Content, Envelope, Install, Message, Prepare, Span};
use keepwarm_core::session::{
    BlockRef, Form, Fp8, Layout, Manifest, Message as Said, Number, Order, Parent, Part, PartState, Planes,
    Protect, Stamp, State, TranscriptDelta, WriteMemo,
};
use keepwarm_core::shard::{Record, Tombstone, TranscriptChange};
use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, Generation, Incarnation, InstanceId, Millis, PlacementSeq,
    Revision, SessionId, SessionKey, ShardId, Timestamp, Tokens, WriteId,
};
use keepwarm_wire::blocks::{BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::control::RelayHeader;
use uuid::Uuid;

fn id(n: u128) -> SessionId {
    SessionId::new(Uuid::from_u128(0x1111_2222_3333_4444_8555_0000_0000_0000 | n)).unwrap()
}

fn key(n: u128) -> SessionKey {
    SessionKey::new("acme".parse().unwrap(), id(n))
}

fn stamp(sequence: u64) -> Stamp {
    Stamp { generation: Generation(3), sequence }
}

fn member(n: u64) -> Member {
    Member { node: format!("node-{n}").parse().unwrap(), incarnation: Incarnation(40 + n) }
}

fn block(n: u64) -> BlockRef {
    BlockRef {
        instance: InstanceId(n),
        checksum: BlockChecksum([n << 32, n]),
        length: 1000 + u32::try_from(n).unwrap(),
    }
}

fn layout() -> Arc<Layout> {
    let planes = Planes { tokens_per_block: 16, planes: 2, plane_bytes_per_token: 128, order: Order::Plane };
    let part = |name: &str, form| Part { name: name.parse().unwrap(), form, cold: None };
    let parts = vec![
        part("kv", Form::Paged(planes)),
        part("raw", Form::Bytes { block_bytes: 1 << 20 }),
        part("state", Form::Snapshot { bytes: 1 << 16 }),
        part("window", Form::Window { planes: Planes { order: Order::Token, ..planes }, window_tokens: 64 }),
    ];
    Arc::new(Layout::new("a-model", "weights-1", parts).unwrap())
}

/// A change of a session whose first part cold tiers keep as FP8.
pub(crate) fn lossy() -> Envelope {
    let mut manifest = manifest(State::Warm);
    manifest.layout = Arc::new(layout().with_cold(Some(Fp8 { from: Number::F16 })).unwrap());
    around(prepare(Record::Manifest(Arc::new(manifest), TranscriptChange::Keep)))
}

fn part_state(n: u64) -> PartState {
    PartState {
        blocks: (0..n).map(|at| block(10 * n + at)).collect(),
        first_block: u32::try_from(n).unwrap(),
        length: Bytes(4096 * n),
        digest: (n == 2).then_some(BlockChecksum([5, 6])),
    }
}

fn manifest(state: State) -> Manifest {
    let memo = WriteMemo {
        id: WriteId(Uuid::from_u128(77)),
        asked: 5,
        revision: Revision(8),
        length_tokens: Tokens(32),
        length: Bytes(8192),
    };
    let parent =
        Parent { id: id(2), birth: Birth::from_random(12), revision: Revision(4), length: Tokens(16) };
    Manifest {
        key: key(1),
        birth: Birth::from_random(11),
        layout: layout(),
        protect: Protect::For(Millis(60_000)),
        ttl: Some(Millis(3_600_000)),
        labels: [("team", "blue"), ("ä", "")].map(|(name, value)| (name.into(), value.into())).into(),
        stamp: stamp(9),
        revision: Revision(8),
        placement_seq: PlacementSeq(2),
        length_tokens: Tokens(32),
        parts: (0..4).map(part_state).collect::<Vec<_>>().into(),
        transcript_tokens: Tokens(33),
        transcript_messages: 2,
        transcript_revision: Revision(7),
        parent: Some(Box::new(parent)),
        branches: vec![id(3)],
        state,
        holders: vec![member(1), member(2)].into(),
        writes: vec![memo],
        created_at: Timestamp(1_700_000_000_000),
        last_used_at: Timestamp(1_700_000_001_000),
    }
}

fn delta() -> TranscriptDelta {
    let said = |role: &str, content: &str, end| Said {
        role: role.to_owned(),
        content: content.to_owned(),
        tokens_end: Tokens(end),
    };
    TranscriptDelta {
        keep_tokens: Tokens(1),
        keep_messages: 0,
        tokens: vec![1, 2, 70_000],
        messages: vec![said("user", "Grüß Gott", 2), said("assistant", "Hello.", 4)],
    }
}

fn grave() -> Tombstone {
    Tombstone {
        birth: Birth::from_random(11),
        revision: Revision(8),
        at: Timestamp(1_700_000_002_000),
        expired: true,
        stamp: stamp(10),
    }
}

fn prepare(record: Record) -> Message {
    let previous = Some(stamp(8));
    Message::Prepare(Box::new(Prepare { key: key(1), previous, stamp: stamp(9), record }))
}

fn install(content: Content) -> Message {
    Message::Install(Box::new(Install { key: key(1), content }))
}

fn messages() -> Vec<(&'static str, Message)> {
    let heads = || vec![(key(1), stamp(9)), (key(2), stamp(4))];
    let between = Span::Between { after: Some(key(1)), through: None };
    let copy = TranscriptChange::CopyFrom {
        parent: key(2),
        birth: Birth::from_random(12),
        stamp: stamp(4),
        tokens: Tokens(16),
        messages: 1,
    };
    let live = |change| Record::Manifest(Arc::new(manifest(State::Warm)), change);
    let cold = Arc::new(manifest(State::Cold(ColdReason::HoldersLost)));
    vec![
        ("prepare", prepare(live(TranscriptChange::Delta(delta())))),
        ("prepare-copy", prepare(live(copy))),
        ("prepare-end", prepare(Record::tombstone(key(1), &grave()))),
        ("committed", Message::Committed(heads())),
        ("settled", Message::Settled { before: Generation(3) }),
        ("noted", Message::Noted { heads: heads(), before: Some(Generation(3)) }),
        ("compare-one", Message::Compare(Compare { id: 6, span: Span::One(key(1)), heads: heads() })),
        ("compare", Message::Compare(Compare { id: 7, span: between, heads: heads() })),
        ("install", install(Content::Live(cold, delta()))),
        ("install-end", install(Content::Ended(grave()))),
        ("install-absent", install(Content::Absent)),
        ("confirm", Message::Confirm { round: 21 }),
        ("prepared", Message::Prepared { key: key(1), stamp: stamp(9), holding: true }),
        ("need-whole", Message::NeedWhole { key: key(1) }),
        ("compared", Message::Compared { id: 7, differing: vec![key(1)], lacking: vec![key(2), key(3)] }),
        ("installed", Message::Installed { key: key(1), head: Some(stamp(9)), holding: false }),
        ("confirmed", Message::Confirmed { round: 21 }),
        ("stale", Message::Stale),
        ("evict", Message::Evict { key: key(1), birth: Birth::from_random(11) }),
    ]
}

fn around(message: Message) -> Envelope {
    let set = Arc::new(ReplicaSet {
        generation: Generation(3),
        replicas: vec![member(1), member(2)],
        learner: Some(member(3)),
        lost_at: Some(Timestamp(1_600_000_000_000)),
    });
    Envelope { shard: ShardId(258), from: member(1), to: member(2), set, sent: 99, message }
}

/// An envelope around each message.
pub(crate) fn envelopes() -> BTreeMap<&'static str, Envelope> {
    messages().into_iter().map(|(name, message)| (name, around(message))).collect()
}

/// A header for each way that bytes go.
pub(crate) fn headers() -> BTreeMap<&'static str, BlocksHeader> {
    let header = |direction| BlocksHeader {
        shard: ShardId(258),
        generation: Generation(3),
        key: key(1),
        birth: Birth::from_random(11),
        blocks: vec![block(1), block(2)],
        direction,
    };
    [("blocks-push", Direction::Push), ("blocks-pull", Direction::Pull), ("blocks-spare", Direction::Spare)]
        .map(|(name, direction)| (name, header(direction)))
        .into()
}

pub(crate) fn answers() -> BTreeMap<&'static str, BlocksAnswer> {
    [
        ("answer-taken", BlocksAnswer::Taken),
        ("answer-no-room", BlocksAnswer::NoRoom),
        ("answer-gone", BlocksAnswer::Gone),
        ("answer-damaged", BlocksAnswer::Damaged(InstanceId(7))),
    ]
    .into()
}

pub(crate) fn relay() -> RelayHeader {
    RelayHeader {
        tenant: "acme".parse().unwrap(),
        admin: true,
        request_id: "018f-request".to_owned(),
        hops: 1,
    }
}

//! Random envelopes, of every kind of message.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use keepwarm_core::registry::{Member, ReplicaSet};
use keepwarm_core::replica::{Compare, Content, Envelope, Install, Message, Prepare, Span};
use keepwarm_core::session::{
    BlockRef, Form, Layout, Manifest, Message as Said, Order, Parent, Part, PartState, Planes, Protect,
    Stamp, State, TranscriptDelta, WriteMemo,
};
use keepwarm_core::shard::{Record, Tombstone, TranscriptChange};
use keepwarm_types::{
    Birth, BlockChecksum, Bytes, ColdReason, Generation, Incarnation, InstanceId, Millis, PlacementSeq,
    Revision, SessionId, SessionKey, ShardId, Timestamp, Tokens, WriteId,
};
use keepwarm_wire::limits::{COUNT_MAX, INDEX_MAX};
use keepwarm_wire::{VERSION, VERSION_OLDEST, Version, Versions};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

/// Every version that this build speaks, as a link to a peer of that version has it.
pub(crate) fn versions() -> impl Iterator<Item = Version> {
    let only = |number| Versions { oldest: number, newest: number };
    (VERSION_OLDEST..=VERSION).map(move |number| Versions::ALL.common(only(number)).unwrap())
}

pub(crate) fn version() -> impl Strategy<Value = Version> {
    proptest::sample::select(versions().collect::<Vec<_>>())
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"
}

fn count() -> impl Strategy<Value = u64> + Clone {
    prop_oneof![0..10_000u64, 0..=COUNT_MAX]
}

fn session_id() -> impl Strategy<Value = SessionId> {
    (any::<[u8; 16]>(), prop_oneof![Just(4u8), Just(5), Just(7)]).prop_map(|(mut bytes, version)| {
        bytes[6] = (bytes[6] & 0x0f) | (version << 4);
        SessionId::new(Uuid::from_bytes(bytes)).unwrap()
    })
}

pub(crate) fn key() -> impl Strategy<Value = SessionKey> {
    (name(), session_id()).prop_map(|(tenant, id)| SessionKey::new(tenant.parse().unwrap(), id))
}

pub(crate) fn birth() -> impl Strategy<Value = Birth> {
    any::<u64>().prop_map(Birth::from_random)
}

fn stamp() -> impl Strategy<Value = Stamp> {
    (count(), any::<u64>())
        .prop_map(|(generation, sequence)| Stamp { generation: Generation(generation), sequence })
}

fn member() -> impl Strategy<Value = Member> {
    (name(), count()).prop_map(|(node, incarnation)| Member {
        node: node.parse().unwrap(),
        incarnation: Incarnation(incarnation),
    })
}

fn set() -> impl Strategy<Value = ReplicaSet> {
    (count(), vec(member(), 0..=5), option::of(member()), option::of(any::<u64>())).prop_map(
        |(generation, replicas, learner, lost_at)| ReplicaSet {
            generation: Generation(generation),
            replicas,
            learner,
            lost_at: lost_at.map(Timestamp),
        },
    )
}

fn planes() -> impl Strategy<Value = Planes> {
    (1..=256u32, 1..=64u32, 1..=1024u32, any::<bool>()).prop_map(
        |(tokens_per_block, planes, plane_bytes_per_token, plane)| Planes {
            tokens_per_block,
            planes,
            plane_bytes_per_token,
            order: if plane { Order::Plane } else { Order::Token },
        },
    )
}

fn form() -> impl Strategy<Value = Form> {
    prop_oneof![
        planes().prop_map(Form::Paged),
        (planes(), 1..=(1u32 << 24))
            .prop_map(|(planes, window_tokens)| Form::Window { planes, window_tokens }),
        (1..=(64u64 << 30)).prop_map(|bytes| Form::Snapshot { bytes }),
        (1..=(64u64 << 20)).prop_map(|block_bytes| Form::Bytes { block_bytes }),
    ]
}

pub(crate) fn layout() -> impl Strategy<Value = Arc<Layout>> {
    ("\\PC{1,32}", "[ -~]{1,64}", btree_map(name(), form(), 1..5)).prop_map(|(model, fingerprint, parts)| {
        let part = |(name, form): (String, Form)| Part { name: name.parse().unwrap(), form, cold: None };
        Arc::new(Layout::new(&model, &fingerprint, parts.into_iter().map(part).collect()).unwrap())
    })
}

pub(crate) fn block(block_bytes: u64) -> impl Strategy<Value = BlockRef> {
    let longest = u32::try_from(block_bytes).unwrap();
    (any::<u64>(), any::<[u64; 2]>(), 1..=longest).prop_map(|(instance, checksum, length)| BlockRef {
        instance: InstanceId(instance),
        checksum: BlockChecksum(checksum),
        length,
    })
}

fn part_state(form: &Form) -> impl Strategy<Value = PartState> + use<> {
    let blocks = vec(block(form.block_bytes()), 0..40);
    (blocks, 0..=INDEX_MAX, count(), option::of(any::<[u64; 2]>())).prop_map(
        |(blocks, first_block, length, digest)| PartState {
            blocks,
            first_block,
            length: Bytes(length),
            digest: digest.map(BlockChecksum),
        },
    )
}

fn write_memo() -> impl Strategy<Value = WriteMemo> {
    (any::<u128>(), any::<u64>(), count(), count(), count()).prop_map(
        |(id, asked, revision, length_tokens, length)| WriteMemo {
            id: WriteId(Uuid::from_u128(id)),
            asked,
            revision: Revision(revision),
            length_tokens: Tokens(length_tokens),
            length: Bytes(length),
        },
    )
}

fn parent() -> impl Strategy<Value = Parent> {
    (session_id(), birth(), count(), count()).prop_map(|(id, birth, revision, length)| Parent {
        id,
        birth,
        revision: Revision(revision),
        length: Tokens(length),
    })
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![
        Just(State::Warm),
        Just(State::Cold(ColdReason::Evicted)),
        Just(State::Cold(ColdReason::Restarted)),
        Just(State::Cold(ColdReason::HoldersLost)),
        Just(State::Cold(ColdReason::Corrupt)),
    ]
}

pub(crate) fn manifest(key: SessionKey) -> impl Strategy<Value = Manifest> {
    let parts = layout().prop_flat_map(|layout| {
        let states: Vec<_> = layout.parts().iter().map(|part| part_state(&part.form)).collect();
        (Just(layout), states)
    });
    let life = (birth(), option::of(any::<u64>()), option::of(any::<u64>()), stamp(), state());
    let counts = (count(), count(), count(), count(), 0..=INDEX_MAX, count(), any::<u64>(), any::<u64>());
    let labels = btree_map("\\PC{0,32}", "\\PC{0,32}", 0..=16);
    let kin = (option::of(parent()), vec(session_id(), 0..=8), vec(member(), 0..=6));
    (parts, life, counts, labels, kin, vec(write_memo(), 0..=4)).prop_map(
        move |(parts, life, counts, labels, kin, writes)| Manifest {
            key: key.clone(),
            birth: life.0,
            layout: parts.0,
            protect: life.1.map_or(Protect::Forever, |ms| Protect::For(Millis(ms))),
            ttl: life.2.map(Millis),
            labels: labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            stamp: life.3,
            revision: Revision(counts.0),
            placement_seq: PlacementSeq(counts.1),
            length_tokens: Tokens(counts.2),
            parts: parts.1.into(),
            transcript_tokens: Tokens(counts.3),
            transcript_messages: counts.4,
            transcript_revision: Revision(counts.5),
            parent: kin.0.map(Box::new),
            branches: kin.1,
            state: life.4,
            holders: kin.2.into(),
            writes,
            created_at: Timestamp(counts.6),
            last_used_at: Timestamp(counts.7),
        },
    )
}

fn delta() -> impl Strategy<Value = TranscriptDelta> {
    let said = ("[a-z]{0,9}", "\\PC{0,80}", count()).prop_map(|(role, content, tokens_end)| Said {
        role,
        content,
        tokens_end: Tokens(tokens_end),
    });
    (count(), 0..=INDEX_MAX, vec(any::<u32>(), 0..200), vec(said, 0..6)).prop_map(
        |(keep_tokens, keep_messages, tokens, messages)| TranscriptDelta {
            keep_tokens: Tokens(keep_tokens),
            keep_messages,
            tokens,
            messages,
        },
    )
}

fn change() -> impl Strategy<Value = TranscriptChange> {
    let copy = (key(), birth(), stamp(), count(), 0..=INDEX_MAX).prop_map(
        |(parent, birth, stamp, tokens, messages)| TranscriptChange::CopyFrom {
            parent,
            birth,
            stamp,
            tokens: Tokens(tokens),
            messages,
        },
    );
    prop_oneof![
        Just(TranscriptChange::Keep),
        delta().prop_map(TranscriptChange::Delta),
        count().prop_map(|tokens| TranscriptChange::CutTokens(Tokens(tokens))),
        copy,
    ]
}

fn tombstone() -> impl Strategy<Value = Tombstone> {
    (birth(), count(), any::<u64>(), any::<bool>(), stamp()).prop_map(
        |(birth, revision, at, expired, stamp)| Tombstone {
            birth,
            revision: Revision(revision),
            at: Timestamp(at),
            expired,
            stamp,
        },
    )
}

fn record(key: SessionKey) -> BoxedStrategy<Record> {
    let [of_grave, of_forget, of_drop] = [key.clone(), key.clone(), key.clone()];
    prop_oneof![
        3 => (manifest(key), change())
            .prop_map(|(manifest, change)| Record::Manifest(Arc::new(manifest), change)),
        1 => tombstone().prop_map(move |grave| Record::tombstone(of_grave.clone(), &grave)),
        1 => Just(Record::Forget(of_forget)),
        1 => birth().prop_map(move |birth| Record::Drop(of_drop.clone(), birth)),
    ]
    .boxed()
}

fn prepare() -> impl Strategy<Value = Message> {
    let keyed = key().prop_flat_map(|key| (Just(key.clone()), record(key)));
    (keyed, option::of(stamp()), stamp()).prop_map(|((key, record), previous, stamp)| {
        Message::Prepare(Box::new(Prepare { key, previous, stamp, record }))
    })
}

fn install() -> impl Strategy<Value = Message> {
    key().prop_flat_map(|key| {
        let content = prop_oneof![
            3 => (manifest(key.clone()), delta())
                .prop_map(|(manifest, transcript)| Content::Live(Arc::new(manifest), transcript)),
            1 => tombstone().prop_map(Content::Ended),
            1 => Just(Content::Absent),
        ];
        content.prop_map(move |content| Message::Install(Box::new(Install { key: key.clone(), content })))
    })
}

fn span() -> impl Strategy<Value = Span> {
    prop_oneof![
        key().prop_map(Span::One),
        (option::of(key()), option::of(key())).prop_map(|(after, through)| Span::Between { after, through }),
    ]
}

/// One strategy per kind of message.
pub(crate) fn messages() -> Vec<BoxedStrategy<Message>> {
    let heads = || vec((key(), stamp()), 0..20);
    let keys = || vec(key(), 0..20);
    vec![
        prepare().boxed(),
        heads().prop_map(Message::Committed).boxed(),
        count().prop_map(|before| Message::Settled { before: Generation(before) }).boxed(),
        (heads(), option::of(count()))
            .prop_map(|(heads, before)| Message::Noted { heads, before: before.map(Generation) })
            .boxed(),
        (any::<u64>(), span(), heads())
            .prop_map(|(id, span, heads)| Message::Compare(Compare { id, span, heads }))
            .boxed(),
        install().boxed(),
        any::<u64>().prop_map(|round| Message::Confirm { round }).boxed(),
        (key(), stamp(), any::<bool>())
            .prop_map(|(key, stamp, holding)| Message::Prepared { key, stamp, holding })
            .boxed(),
        key().prop_map(|key| Message::NeedWhole { key }).boxed(),
        (any::<u64>(), keys(), keys())
            .prop_map(|(id, differing, lacking)| Message::Compared { id, differing, lacking })
            .boxed(),
        (key(), option::of(stamp()), any::<bool>())
            .prop_map(|(key, head, holding)| Message::Installed { key, head, holding })
            .boxed(),
        any::<u64>().prop_map(|round| Message::Confirmed { round }).boxed(),
        Just(Message::Stale).boxed(),
        (key(), birth()).prop_map(|(key, birth)| Message::Evict { key, birth }).boxed(),
    ]
}

/// An envelope around such a message.
pub(crate) fn around(message: BoxedStrategy<Message>) -> BoxedStrategy<Envelope> {
    (0..65_536u32, member(), member(), set(), count(), message)
        .prop_map(|(shard, from, to, set, sent, message)| Envelope {
            shard: ShardId(shard),
            from,
            to,
            set: Arc::new(set),
            sent,
            message,
        })
        .boxed()
}

/// Any envelope.
pub(crate) fn envelope() -> BoxedStrategy<Envelope> {
    around(proptest::strategy::Union::new(messages()).boxed())
}

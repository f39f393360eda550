//! What is encoded comes out again as it went in.

mod arbitrary;

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use keepwarm_core::placement::{Hbm, NodeLoad};
use keepwarm_core::replica::{Content, Envelope, Message};
use keepwarm_core::session::{BLOCK_BYTES_MAX, Layout, Manifest};
use keepwarm_core::shard::Record;
use keepwarm_types::{Bytes as ByteCount, Generation, InstanceId, ShardId};
use keepwarm_wire::blocks::{BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::control::{LoadAnswer, RegistryFrame, RelayHeader};
use keepwarm_wire::{EncodeError, Frame, LayoutCache, envelope, kinds};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

/// The version that a payload says it has.
fn said(frame: &Frame) -> u16 {
    u16::from_le_bytes([frame.payload[0], frame.payload[1]])
}

/// The same frame with its payload at an address that is `by` beyond an aligned one.
fn shifted(frame: &Frame, by: usize) -> Frame {
    let mut bytes = BytesMut::with_capacity(frame.payload.len() + 16);
    let to_aligned = bytes.as_ptr().align_offset(8);
    bytes.put_bytes(0, to_aligned + by);
    bytes.put_slice(&frame.payload);
    Frame { kind: frame.kind, payload: bytes.freeze().slice(to_aligned + by..) }
}

fn manifest(envelope: &Envelope) -> Option<&Arc<Manifest>> {
    match &envelope.message {
        Message::Prepare(prepare) => match &prepare.record {
            Record::Manifest(manifest, _) => Some(manifest),
            _ => None,
        },
        Message::Install(install) => match &install.content {
            Content::Live(manifest, _) => Some(manifest),
            Content::Ended(_) | Content::Absent => None,
        },
        _ => None,
    }
}

#[test]
fn every_kind_of_message_comes_back_as_it_was_at_any_address() {
    let layouts = LayoutCache::new();
    for message in arbitrary::messages() {
        let mut runner =
            TestRunner::new(Config { cases: 64, failure_persistence: None, ..Config::default() });
        let strategy = (arbitrary::around(message), 0..8usize, arbitrary::version());
        runner
            .run(&strategy, |(sent, by, version)| {
                let frame = envelope::encode(&sent, version).unwrap();
                prop_assert_eq!((frame.kind, said(&frame)), (kinds::ENVELOPE, version.number()));
                let came = envelope::decode(&shifted(&frame, by), &layouts).unwrap();
                prop_assert_eq!(came, sent);
                Ok(())
            })
            .unwrap();
    }
}

proptest! {
    #![proptest_config(Config { cases: 64, ..Config::default() })]

    #[test]
    fn sessions_of_one_layout_share_it(sent in arbitrary::envelope(), version in arbitrary::version()) {
        let Some(named) = manifest(&sent) else { return Ok(()) };
        let layouts = LayoutCache::new();
        let frame = envelope::encode(&sent, version).unwrap();
        let [one, two] = [(); 2].map(|()| envelope::decode(&frame, &layouts).unwrap());
        let layout = |came: &Envelope| Arc::clone(&manifest(came).unwrap().layout);
        prop_assert!(Arc::ptr_eq(&layout(&one), &layout(&two)));
        prop_assert_eq!(&*layout(&one), &*named.layout);
    }

    #[test]
    fn block_headers_come_back_as_they_were(
        (shard, generation, key, birth) in (0..65_536u32, 0..1u64 << 40, arbitrary::key(), arbitrary::birth()),
        blocks in vec(arbitrary::block(BLOCK_BYTES_MAX), 0..200),
        direction in prop_oneof![Just(Direction::Push), Just(Direction::Pull), Just(Direction::Spare)],
        version in arbitrary::version(),
    ) {
        let (shard, generation) = (ShardId(shard), Generation(generation));
        let header = BlocksHeader { shard, generation, key, birth, blocks, direction };
        let frame = header.encode(version);
        if direction == Direction::Spare && version.number() == 1 {
            let what = "a push into room to spare";
            prop_assert_eq!(frame, Err(EncodeError::Unsayable { what, version, since: 2 }));
            return Ok(());
        }
        let frame = frame.unwrap();
        prop_assert_eq!(said(&frame), version.number());
        prop_assert_eq!(BlocksHeader::decode(&frame), Ok(header));
    }

    #[test]
    fn relay_headers_come_back_as_they_were(
        key in arbitrary::key(), admin in any::<bool>(), request_id in "\\PC{0,40}", hops in any::<u8>(),
        version in arbitrary::version(),
    ) {
        let header = RelayHeader { tenant: key.tenant, admin, request_id, hops };
        let frame = header.encode(version).unwrap();
        prop_assert_eq!(said(&frame), version.number());
        prop_assert_eq!(RelayHeader::decode(&frame), Ok(header));
    }
}

#[test]
fn how_a_node_is_can_be_asked_and_said_from_version_2_on() {
    let load = NodeLoad {
        runs: true,
        queue: 3,
        used: ByteCount(5),
        capacity: ByteCount(1 << 40),
        hbm: Hbm { largest: ByteCount(80 << 30), room: ByteCount(7) },
        with_kernels: Hbm { largest: ByteCount(40 << 30), room: ByteCount(0) },
    };
    for version in arbitrary::versions() {
        let what = "how a node is";
        let older = Err(EncodeError::Unsayable { what, version, since: 2 });
        match version.number() {
            1 => {
                assert_eq!(LoadAnswer::question(version), older);
                assert_eq!(LoadAnswer(load).encode(version), older);
            }
            number => {
                assert_eq!(LoadAnswer::question(version).unwrap().kind, kinds::LOAD);
                let frame = LoadAnswer(load).encode(version).unwrap();
                assert_eq!((said(&frame), LoadAnswer::decode(&frame)), (number, Ok(LoadAnswer(load))));
            }
        }
    }
}

#[test]
fn answers_and_registry_messages_come_back_as_they_were() {
    let damaged = BlocksAnswer::Damaged(InstanceId(u64::MAX));
    for version in arbitrary::versions() {
        for answer in [BlocksAnswer::Taken, BlocksAnswer::NoRoom, BlocksAnswer::Gone, damaged] {
            let frame = answer.encode(version).unwrap();
            assert_eq!((said(&frame), BlocksAnswer::decode(&frame)), (version.number(), Ok(answer)));
        }
    }
    let message = RegistryFrame(Bytes::from_static(b"vote"));
    assert_eq!(RegistryFrame::decode(message.clone().encode().unwrap()), Ok(message));
}

#[test]
fn an_interned_layout_is_the_first_that_came() {
    let layouts = LayoutCache::new();
    let mut runner = TestRunner::deterministic();
    let first: Arc<Layout> = arbitrary::layout().new_tree(&mut runner).unwrap().current();
    let again = Arc::new((*first).clone());
    assert!(Arc::ptr_eq(&layouts.intern(Arc::clone(&first)), &first));
    assert!(Arc::ptr_eq(&layouts.intern(again), &first));
}

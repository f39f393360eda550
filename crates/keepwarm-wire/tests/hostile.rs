//! What no honest peer sends is refused with a reason, and never takes the process down.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod arbitrary;

use std::sync::Arc;

use bytes::Bytes;
use keepwarm_core::replica::{Content, Envelope, Install, Message};
use keepwarm_core::session::{LABELS_MAX, TranscriptDelta, WRITE_IDS_KEPT};
use keepwarm_types::{Birth, Generation, InstanceId, ShardId, Tokens};
use keepwarm_wire::blocks::{BLOCKS_MAX, BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::control::{
    LoadAnswer, REGISTRY_BYTES_MAX, REQUEST_ID_BYTES_MAX, RegistryFrame, RelayHeader,
};
use keepwarm_wire::limits::{
    COUNT_MAX, ENVELOPE_BYTES_MAX, HOLDERS_MAX, KEYS_MAX, MANIFEST_BLOCKS_MAX, ROLE_BYTES_MAX,
    TRANSCRIPT_MESSAGES_MAX, TRANSCRIPT_TEXT_MAX, TRANSCRIPT_TOKENS_MAX,
};
use keepwarm_wire::{
    DecodeError, EncodeError, Frame, LayoutCache, TooLong, VERSION, VERSION_OLDEST, Version, envelope, kinds,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

/// Every reader of this crate, on the same payload.
fn read_all(payload: &Bytes, layouts: &LayoutCache) {
    let frame = |kind| Frame { kind, payload: payload.clone() };
    let _ = envelope::decode(&frame(kinds::ENVELOPE), layouts);
    let _ = BlocksHeader::decode(&frame(kinds::BLOCKS_HEADER));
    let _ = BlocksAnswer::decode(&frame(kinds::BLOCKS_ANSWER));
    let _ = RelayHeader::decode(&frame(kinds::RELAY_HEADER));
    let _ = RegistryFrame::decode(frame(kinds::REGISTRY));
    let _ = LoadAnswer::decode(&frame(kinds::LOAD));
}

/// The newest version.
fn newest() -> Version {
    arbitrary::versions().last().unwrap()
}

fn too_long(error: EncodeError) -> TooLong {
    let EncodeError::TooLong(too_long) = error else { panic!("{error}") };
    too_long
}

/// One value of a strategy, the same each time.
fn one<T>(strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(&mut TestRunner::deterministic()).unwrap().current()
}

fn install() -> (Envelope, Install) {
    let manifest = one(arbitrary::manifest(one(arbitrary::key())));
    let key = manifest.key.clone();
    let install = Install { key, content: Content::Live(Arc::new(manifest), TranscriptDelta::default()) };
    (one(arbitrary::envelope()), install)
}

/// What encoding says of a session that this change was made to.
fn refused(
    change: impl FnOnce(&mut keepwarm_core::session::Manifest, &mut TranscriptDelta),
) -> Option<&'static str> {
    let (mut envelope, mut install) = install();
    let Content::Live(manifest, transcript) = &mut install.content else { unreachable!() };
    change(Arc::make_mut(manifest), transcript);
    envelope.message = Message::Install(Box::new(install));
    envelope::encode(&envelope, newest()).err().map(|error| too_long(error).what)
}

proptest! {
    #![proptest_config(Config { cases: 512, ..Config::default() })]

    #[test]
    fn noise_is_refused(mut payload in vec(any::<u8>(), 0..600), said in 0..=VERSION + 1) {
        // Zero: the noise itself says.
        if said > 0 && payload.len() > 8 {
            payload[..8].copy_from_slice(&u64::from(said).to_le_bytes());
        }
        read_all(&payload.into(), &LayoutCache::new());
    }

    #[test]
    fn damage_is_refused_or_read_as_something_else(
        sent in arbitrary::envelope(),
        version in arbitrary::version(),
        flips in vec((any::<prop::sample::Index>(), 0..8u32), 1..8),
        cut in option_of_index(),
    ) {
        let frame = envelope::encode(&sent, version).unwrap();
        let mut payload = frame.payload.to_vec();
        for (at, bit) in flips {
            let at = at.index(payload.len());
            payload[at] ^= 1 << bit;
        }
        let length = cut.map_or(payload.len(), |cut| cut.index(payload.len()));
        payload.truncate(length);
        let layouts = LayoutCache::new();
        read_all(&payload.clone().into(), &layouts);
        // Whatever was read is a value that can be sent on.
        if let Ok(read) = envelope::decode(&Frame { kind: kinds::ENVELOPE, payload: payload.into() }, &layouts) {
            let again = envelope::encode(&read, version).unwrap();
            prop_assert_eq!(envelope::decode(&again, &layouts), Ok(read));
        }
    }
}

fn option_of_index() -> impl Strategy<Value = Option<prop::sample::Index>> {
    proptest::option::weighted(0.3, any::<prop::sample::Index>())
}

#[test]
fn every_truncation_is_refused() {
    let (mut envelope, install) = install();
    envelope.message = Message::Install(Box::new(install));
    let frame = envelope::encode(&envelope, newest()).unwrap();
    let layouts = LayoutCache::new();
    for length in 0..frame.payload.len() {
        let cut = Frame { kind: frame.kind, payload: frame.payload.slice(..length) };
        // A shorter archive has its root elsewhere; it may by chance be one, but never this one.
        assert_ne!(envelope::decode(&cut, &layouts).as_ref(), Ok(&envelope), "cut at {length}");
        read_all(&cut.payload, &layouts);
    }
}

#[test]
fn a_frame_of_another_kind_or_version_says_so() {
    let (envelope, _) = install();
    let frame = envelope::encode(&envelope, newest()).unwrap();
    let layouts = LayoutCache::new();
    let other = Frame { kind: kinds::REGISTRY, ..frame.clone() };
    let wrong_kind = DecodeError::Kind { found: kinds::REGISTRY, wanted: kinds::ENVELOPE };
    assert_eq!(envelope::decode(&other, &layouts), Err(wrong_kind));
    for beyond in [VERSION_OLDEST - 1, VERSION + 1] {
        let mut payload = frame.payload.to_vec();
        payload[..2].copy_from_slice(&beyond.to_le_bytes());
        let error = envelope::decode(&Frame { kind: frame.kind, payload: payload.into() }, &layouts);
        let error = error.unwrap_err();
        assert_eq!(error, DecodeError::Version(beyond));
        let text = format!("version {beyond} came, and this node reads {VERSION_OLDEST} to {VERSION}");
        assert!(error.to_string().contains(&text), "{error}");
    }
    let short = Frame { kind: frame.kind, payload: Bytes::from_static(&[1, 0, 0]) };
    assert_eq!(envelope::decode(&short, &layouts), Err(DecodeError::Short(3)));
    let long = Frame { kind: frame.kind, payload: vec![0; ENVELOPE_BYTES_MAX + 1].into() };
    assert!(matches!(envelope::decode(&long, &layouts), Err(DecodeError::TooLong(_))));
}

#[test]
fn what_is_too_much_is_not_sent_and_named() {
    assert_eq!(refused(|_, _| ()), None);
    let labels = refused(|manifest, _| {
        let label = |n: usize| (n.to_string().into(), "x".into());
        manifest.labels = (0..=LABELS_MAX).map(label).collect();
    });
    assert_eq!(labels, Some("manifest.labels"));
    let blocks = refused(|manifest, _| {
        manifest.parts[0].blocks = vec![one(arbitrary::block(1)); MANIFEST_BLOCKS_MAX + 1];
    });
    assert_eq!(blocks, Some("manifest.blocks"));
    let holders = refused(|manifest, _| {
        let (envelope, _) = install();
        manifest.holders = vec![envelope.from; HOLDERS_MAX + 1].into();
    });
    assert_eq!(holders, Some("manifest.holders"));
    let branches = refused(|manifest, _| manifest.branches = vec![manifest.key.id; 10]);
    assert_eq!(branches, Some("manifest.branches"));
    let writes = refused(|manifest, _| {
        let memo = keepwarm_core::session::WriteMemo {
            id: keepwarm_types::WriteId(manifest.key.id.uuid()),
            asked: 0,
            revision: manifest.revision,
            length_tokens: manifest.length_tokens,
            length: keepwarm_types::Bytes(0),
        };
        manifest.writes = vec![memo; WRITE_IDS_KEPT + 1];
    });
    assert_eq!(writes, Some("manifest.writes"));
}

#[test]
fn a_transcript_that_is_too_long_is_not_sent_and_named() {
    let said = |role: usize, content: usize| keepwarm_core::session::Message {
        role: "r".repeat(role),
        content: "c".repeat(content),
        tokens_end: Tokens(0),
    };
    let tokens = refused(|_, transcript| transcript.tokens = vec![0; TRANSCRIPT_TOKENS_MAX + 1]);
    assert_eq!(tokens, Some("transcript.tokens"));
    let many = refused(|_, transcript| transcript.messages = vec![said(1, 0); TRANSCRIPT_MESSAGES_MAX + 1]);
    assert_eq!(many, Some("transcript.messages"));
    let role = refused(|_, transcript| transcript.messages = vec![said(ROLE_BYTES_MAX + 1, 0)]);
    assert_eq!(role, Some("transcript.messages.role"));
    let text = refused(|_, transcript| transcript.messages = vec![said(1, TRANSCRIPT_TEXT_MAX / 2 + 1); 2]);
    assert_eq!(text, Some("transcript.messages.content"));
    let most = refused(|manifest, transcript| {
        manifest.parts[0].blocks = vec![one(arbitrary::block(1)); MANIFEST_BLOCKS_MAX / 2];
        transcript.tokens = vec![0; TRANSCRIPT_TOKENS_MAX];
        transcript.messages = vec![said(ROLE_BYTES_MAX, 0); TRANSCRIPT_MESSAGES_MAX - 1];
        transcript.messages.push(said(1, TRANSCRIPT_TEXT_MAX));
    });
    assert_eq!(most, None);
}

#[test]
fn too_many_keys_are_not_sent() {
    let (mut envelope, install) = install();
    let stamp = one(arbitrary::manifest(install.key.clone())).stamp;
    envelope.message = Message::Committed(vec![(install.key.clone(), stamp); KEYS_MAX + 1]);
    assert_eq!(too_long(envelope::encode(&envelope, newest()).unwrap_err()).what, "committed");
    let keys = vec![install.key; KEYS_MAX + 1];
    envelope.message = Message::Compared { id: 1, differing: vec![], lacking: keys };
    let error = too_long(envelope::encode(&envelope, newest()).unwrap_err());
    assert_eq!(error, TooLong { what: "compared.lacking", count: 1025, limit: 1024 });
    assert_eq!(error.to_string(), "compared.lacking: 1025 are more than the 1024 that a frame may hold");
}

#[test]
fn numbers_that_would_overflow_the_receiver_are_refused() {
    let (mut envelope, _) = install();
    envelope.message = Message::Settled { before: Generation(u64::MAX) };
    let error = envelope::decode(&envelope::encode(&envelope, newest()).unwrap(), &LayoutCache::new());
    assert_eq!(error, Err(TooLong { what: "settled.before", count: u64::MAX, limit: COUNT_MAX }.into()));
    envelope.shard = ShardId(65_536);
    envelope.message = Message::Stale;
    let error =
        envelope::decode(&envelope::encode(&envelope, newest()).unwrap(), &LayoutCache::new()).unwrap_err();
    assert_eq!(error.to_string(), "shard: 65536 is not below 65536");
}

#[test]
fn a_manifest_must_fit_its_message_and_its_layout() {
    let said = |change: fn(&mut Install)| {
        let (mut envelope, mut install) = install();
        change(&mut install);
        envelope.message = Message::Install(Box::new(install));
        let frame = envelope::encode(&envelope, newest()).unwrap();
        envelope::decode(&frame, &LayoutCache::new()).unwrap_err().to_string()
    };
    let other_key = said(|install| install.key.tenant = "other".parse().unwrap());
    assert!(other_key.starts_with("manifest.key: is "), "{other_key}");
    let parts = said(|install| {
        let Content::Live(manifest, _) = &mut install.content else { unreachable!() };
        Arc::make_mut(manifest).parts = Box::new([]);
    });
    assert!(parts.starts_with("manifest.parts: 0 of them, and the layout has "), "{parts}");
    let block = said(|install| {
        let Content::Live(manifest, _) = &mut install.content else { unreachable!() };
        let mut large = one(arbitrary::block(1));
        large.length = u32::MAX;
        Arc::make_mut(manifest).parts[0].blocks = vec![large];
    });
    assert!(block.starts_with("manifest.blocks.length: 4294967295 are more than"), "{block}");
}

#[test]
fn damaged_headers_of_either_version_are_refused_or_read_as_something_else() {
    for version in arbitrary::versions() {
        let strategy =
            (arbitrary::key(), vec(arbitrary::block(1 << 20), 0..20), vec(any::<(u16, u8)>(), 1..8));
        let mut runner =
            TestRunner::new(Config { cases: 512, failure_persistence: None, ..Config::default() });
        let run = runner.run(&strategy, |(key, blocks, flips)| {
            let (shard, generation, birth) = (ShardId(0), Generation(1), Birth::from_random(1));
            let header = BlocksHeader { shard, generation, key, birth, blocks, direction: Direction::Pull };
            let mut payload = header.encode(version).unwrap().payload.to_vec();
            for (at, bit) in flips {
                let at = usize::from(at) % payload.len();
                payload[at] ^= 1 << (bit % 8);
            }
            let damaged = Frame { kind: kinds::BLOCKS_HEADER, payload: payload.into() };
            // Whatever was read is a value that can be sent on.
            if let Ok(read) = BlocksHeader::decode(&damaged) {
                prop_assert_eq!(BlocksHeader::decode(&read.encode(newest()).unwrap()), Ok(read));
            }
            Ok(())
        });
        run.unwrap();
    }
}

/// A direction is a byte at the same place in both versions; version 1 knows two.
#[test]
fn a_way_that_a_version_does_not_have_is_refused() {
    for (version, known) in arbitrary::versions().zip([2, 3]) {
        let (shard, generation, birth) = (ShardId(0), Generation(1), Birth::from_random(1));
        let key = one(arbitrary::key());
        let header = |direction| {
            let header =
                BlocksHeader { shard, generation, key: key.clone(), birth, blocks: Vec::new(), direction };
            header.encode(version).unwrap().payload
        };
        let (push, pull) = (header(Direction::Push), header(Direction::Pull));
        let at = (0..push.len()).find(|at| push[*at] != pull[*at]).unwrap();
        for way in 0..=u8::MAX {
            let mut payload = push.to_vec();
            payload[at] = way;
            let read = BlocksHeader::decode(&Frame { kind: kinds::BLOCKS_HEADER, payload: payload.into() });
            assert_eq!(read.is_ok(), way < known, "version {version}, way {way}: {read:?}");
        }
    }
}

#[test]
fn headers_have_their_limits() {
    let (key, block) = (one(arbitrary::key()), one(arbitrary::block(1)));
    let (shard, generation, birth) = (ShardId(0), Generation(1), Birth::from_random(1));
    let direction = Direction::Push;
    let mut header = BlocksHeader {
        shard,
        generation,
        key: key.clone(),
        birth,
        blocks: vec![block; BLOCKS_MAX],
        direction,
    };
    assert_eq!(BlocksHeader::decode(&header.encode(newest()).unwrap()).unwrap().bytes(), BLOCKS_MAX as u64);
    header.blocks.push(block);
    assert_eq!(too_long(header.encode(newest()).unwrap_err()).what, "blocks");
    for length in [0, u32::MAX] {
        header.blocks = vec![keepwarm_core::session::BlockRef { length, instance: InstanceId(1), ..block }];
        let error = BlocksHeader::decode(&header.encode(newest()).unwrap()).unwrap_err();
        assert!(error.to_string().starts_with("blocks.length: "), "{error}");
    }
    let request_id = "x".repeat(REQUEST_ID_BYTES_MAX + 1);
    let relay = RelayHeader { tenant: key.tenant, admin: false, request_id, hops: 1 };
    assert_eq!(too_long(relay.encode(newest()).unwrap_err()).what, "relay.request_id");
    let registry = RegistryFrame(vec![0; REGISTRY_BYTES_MAX + 1].into());
    assert_eq!(registry.encode().unwrap_err().what, "registry");
}

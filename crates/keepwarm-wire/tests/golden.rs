//! Frames as the first encoder of their version wrote them: they are written and read the same for as long as that
//! version is spoken.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "golden/samples.rs"]
mod samples;

use std::collections::BTreeMap;
use std::fmt::Write;

use keepwarm_types::Incarnation;
use keepwarm_wire::blocks::{BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::control::RelayHeader;
use keepwarm_wire::envelope;
use keepwarm_wire::{
    Frame, HEADER_BYTES, Hello, HelloAnswer, LayoutCache, Version, Versions, decode_header, encode_frame,
};

/// One frame a line: its name, then all of it in hexadecimal.
const KEPT: &str = include_str!("golden/version-1.txt");
/// What version 2 says in another way, or is the first to say.
const KEPT_2: &str = include_str!("golden/version-2.txt");

/// The name of the one message that version 1 has no word for.
const LOSSY: &str = "prepare-lossy";

/// The frames that are kept, by name.
fn kept(lines: &'static str) -> BTreeMap<&'static str, Frame> {
    let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
    let read = |line: &'static str| {
        let (name, hex) = line.split_once(' ').unwrap();
        let bytes: Vec<u8> = hex.as_bytes().chunks(2).map(byte).collect();
        let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        (name, decode_header(head).unwrap().frame(payload.to_vec().into()).unwrap())
    };
    lines.lines().map(read).collect()
}

/// Frames as they are kept.
fn lines(frames: &BTreeMap<&'static str, Frame>) -> String {
    let line = |(name, frame): (&&str, &Frame)| {
        let hex = encode_frame(frame).unwrap().iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        format!("{name} {hex}\n")
    };
    frames.iter().map(line).collect()
}

const fn only(number: u16) -> Versions {
    Versions { oldest: number, newest: number }
}

/// What a link to a peer of this version speaks.
fn with(number: u16) -> Version {
    Versions::ALL.common(only(number)).unwrap()
}

/// Every sample that this version can say.
fn written(version: Version) -> BTreeMap<&'static str, Frame> {
    let mut frames = BTreeMap::new();
    for (name, envelope) in samples::envelopes() {
        frames.insert(name, envelope::encode(&envelope, version).unwrap());
    }
    if let Ok(frame) = envelope::encode(&samples::lossy(), version) {
        frames.insert(LOSSY, frame);
    }
    for (name, header) in samples::headers() {
        if let Ok(frame) = header.encode(version) {
            frames.insert(name, frame);
        }
    }
    for (name, answer) in samples::answers() {
        frames.insert(name, answer.encode(version).unwrap());
    }
    frames.insert("relay", samples::relay().encode(version).unwrap());
    let hello = hello(version.number());
    frames.insert("hello", hello.frame());
    frames.insert("hello-accepted", HelloAnswer::Accepted(hello).frame());
    frames
}

/// What a node says that speaks this version alone.
fn hello(number: u16) -> Hello {
    Hello {
        cluster: "prod".to_owned(),
        cluster_id: 0xfeed,
        node: "node-1".parse().unwrap(),
        incarnation: Incarnation(41),
        versions: only(number),
    }
}

#[test]
fn version_1_is_written_byte_for_byte_as_it_was() {
    let written = lines(&written(with(1)));
    for (now, then) in written.lines().zip(KEPT.lines()) {
        assert_eq!(now, then);
    }
    assert_eq!(written, KEPT, "as many");
}

#[test]
fn version_2_is_version_1_but_for_its_number_the_headers_of_blocks_and_lossy_layouts() {
    let (mut kept, mut written) = (kept(KEPT), written(with(2)));
    let own = samples::headers().into_keys().chain([LOSSY]);
    let headers = own.filter_map(|name| written.remove_entry(name)).collect();
    assert_eq!(lines(&headers), KEPT_2);
    kept.retain(|name, _| !headers.contains_key(name) && !name.starts_with("hello"));
    written.retain(|name, _| !name.starts_with("hello"));
    assert!(kept.keys().eq(written.keys()) && !kept.is_empty(), "{:?}", written.keys());
    for (name, frame) in &written {
        let (number, rest) = frame.payload.split_at(2);
        assert_eq!((number, rest), (&[2, 0][..], &kept[name].payload[2..]), "{name}");
    }
}

#[test]
fn both_versions_are_read_as_they_were_meant() {
    let layouts = LayoutCache::new();
    let (one, two) = (kept(KEPT), kept(KEPT_2));
    for (name, meant) in samples::envelopes() {
        assert_eq!(envelope::decode(&one[name], &layouts).as_ref(), Ok(&meant), "{name}");
    }
    assert_eq!(envelope::decode(&two[LOSSY], &layouts), Ok(samples::lossy()));
    for (name, meant) in samples::headers() {
        assert_eq!(BlocksHeader::decode(&two[name]).as_ref(), Ok(&meant), "{name}");
        let old = one.get(name).map(BlocksHeader::decode);
        let sayable = (meant.direction != Direction::Spare).then_some(Ok(meant));
        assert_eq!(old, sayable, "{name}");
    }
    for (name, meant) in samples::answers() {
        assert_eq!(BlocksAnswer::decode(&one[name]), Ok(meant), "{name}");
    }
    assert_eq!(RelayHeader::decode(&one["relay"]), Ok(samples::relay()));
    let mine = Versions::ALL;
    assert_eq!(Hello::read(&one["hello"], mine), Ok(hello(1)));
    assert_eq!(HelloAnswer::read(&one["hello-accepted"], mine), Ok(HelloAnswer::Accepted(hello(1))));
}

#[test]
fn a_lossy_layout_is_not_said_to_a_peer_of_version_1() {
    let error = envelope::encode(&samples::lossy(), with(1)).unwrap_err();
    let text = "a layout with a cold form cannot be said in version 1, which is what the peer speaks: it came with version 2";
    assert_eq!(error.to_string(), text);
}

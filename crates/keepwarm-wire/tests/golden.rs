//! Frames of version 1 as its first encoder wrote them: they are written and read the same for as long as that version
//! is spoken.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "golden/samples.rs"]
mod samples;

use std::collections::BTreeMap;
use std::fmt::Write;

use keepwarm_types::Incarnation;
use keepwarm_wire::blocks::{BlocksAnswer, BlocksHeader};
use keepwarm_wire::control::RelayHeader;
use keepwarm_wire::envelope;
use keepwarm_wire::{Frame, HEADER_BYTES, Hello, HelloAnswer, LayoutCache, decode_header, encode_frame};

/// One frame a line: its name, then all of it in hexadecimal.
const KEPT: &str = include_str!("golden/version-1.txt");

/// The frames that are kept, by name.
fn kept() -> BTreeMap<&'static str, Frame> {
    let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
    let read = |line: &'static str| {
        let (name, hex) = line.split_once(' ').unwrap();
        let bytes: Vec<u8> = hex.as_bytes().chunks(2).map(byte).collect();
        let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        (name, decode_header(head).unwrap().frame(payload.to_vec().into()).unwrap())
    };
    KEPT.lines().map(read).collect()
}

/// Every sample as version 1 writes it, as it is kept.
fn written() -> String {
    let mut frames = BTreeMap::new();
    for (name, envelope) in samples::envelopes() {
        frames.insert(name, envelope::encode(&envelope).unwrap());
    }
    for (name, header) in samples::headers() {
        frames.insert(name, header.encode().unwrap());
    }
    for (name, answer) in samples::answers() {
        frames.insert(name, answer.encode().unwrap());
    }
    frames.insert("relay", samples::relay().encode().unwrap());
    frames.insert("hello", hello().frame());
    frames.insert("hello-accepted", HelloAnswer::Accepted(hello()).frame());
    let line = |(name, frame): (&&str, &Frame)| {
        let hex = encode_frame(frame).unwrap().iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        format!("{name} {hex}\n")
    };
    frames.iter().map(line).collect()
}

fn hello() -> Hello {
    Hello::new("prod".to_owned(), 0xfeed, "node-1".parse().unwrap(), Incarnation(41))
}

#[test]
fn version_1_is_written_byte_for_byte_as_it_was() {
    for (now, then) in written().lines().zip(KEPT.lines()) {
        assert_eq!(now, then);
    }
    assert_eq!(written().lines().count(), KEPT.lines().count());
}

#[test]
fn version_1_is_read_as_it_was_meant() {
    let (kept, layouts) = (kept(), LayoutCache::new());
    for (name, meant) in samples::envelopes() {
        assert_eq!(envelope::decode(&kept[name], &layouts).as_ref(), Ok(&meant), "{name}");
    }
    for (name, meant) in samples::headers() {
        assert_eq!(BlocksHeader::decode(&kept[name]).as_ref(), Ok(&meant), "{name}");
    }
    for (name, meant) in samples::answers() {
        assert_eq!(BlocksAnswer::decode(&kept[name]), Ok(meant), "{name}");
    }
    assert_eq!(RelayHeader::decode(&kept["relay"]), Ok(samples::relay()));
    assert_eq!(Hello::read(&kept["hello"]), Ok(hello()));
    assert_eq!(HelloAnswer::read(&kept["hello-accepted"]), Ok(HelloAnswer::Accepted(hello())));
}

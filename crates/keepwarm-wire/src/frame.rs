//! A frame: what a stream carries, one after another.
//!
//! A header of fixed size (magic, version, kind, payload length, checksum; little endian), then the payload. The
//! length is compared with its limit before anything is allocated for it.

use bytes::{BufMut, Bytes, BytesMut};
use twox_hash::XxHash3_64;

use crate::limits::ENVELOPE_BYTES_MAX;

/// What every frame begins with.
const MAGIC: [u8; 4] = *b"KWF1";
/// Version of the header itself, as it is written: hellos have it too, so it is one that peers of the version before read.
/// A payload says its own.
const FORMAT: u16 = 1;
/// The oldest format that is read, and the newest.
const FORMAT_OLDEST: u16 = 1;
const FORMAT_NEWEST: u16 = 1;
/// Bytes of a header: magic, format, kind, length, checksum.
pub const HEADER_BYTES: usize = 4 + 2 + 2 + 4 + 8;
/// Longest payload: the largest that this crate makes.
pub const FRAME_BYTES_MAX: usize = ENVELOPE_BYTES_MAX;

const _: () = assert!(FRAME_BYTES_MAX <= u32::MAX as usize);
const _: () = assert!(FORMAT_OLDEST <= FORMAT && FORMAT <= FORMAT_NEWEST);

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is: see [`crate::kinds`].
    pub kind: u16,
    /// The payload.
    pub payload: Bytes,
}

/// What is wrong with a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes are no frame: another protocol, or the stream lost its place.
    #[error("not a frame: it begins with {0:02x?}")]
    Garbage([u8; 4]),
    /// The header is of a version that this node does not know.
    #[error(
        "a frame of format {0}; this keepwarm reads {FORMAT_OLDEST} to {FORMAT_NEWEST}: update one step at a time"
    )]
    Format(u16),
    /// The payload is longer than any may be.
    #[error("a frame of {0} bytes is more than the {FRAME_BYTES_MAX} that may be")]
    TooLong(usize),
    /// The payload is not what was sent.
    #[error("a frame of kind {0:#06x} does not have its checksum")]
    Checksum(u16),
}

/// A header that was read and checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    kind: u16,
    length: usize,
    checksum: u64,
}

impl FrameHeader {
    /// Bytes of the payload that follows.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    /// The frame, with its payload.
    ///
    /// # Errors
    /// [`FrameError::Checksum`].
    pub fn frame(&self, payload: Bytes) -> Result<Frame, FrameError> {
        if payload.len() != self.length || XxHash3_64::oneshot(&payload) != self.checksum {
            return Err(FrameError::Checksum(self.kind));
        }
        Ok(Frame { kind: self.kind, payload })
    }
}

/// A frame as bytes.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode_frame(frame: &Frame) -> Result<Bytes, FrameError> {
    let length = frame.payload.len();
    let short = u32::try_from(length).ok().filter(|_| length <= FRAME_BYTES_MAX);
    let short = short.ok_or(FrameError::TooLong(length))?;
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + length);
    bytes.put_slice(&MAGIC);
    bytes.put_u16_le(FORMAT);
    bytes.put_u16_le(frame.kind);
    bytes.put_u32_le(short);
    bytes.put_u64_le(XxHash3_64::oneshot(&frame.payload));
    bytes.put_slice(&frame.payload);
    Ok(bytes.freeze())
}

/// Reads a header.
///
/// # Errors
/// [`FrameError`]; nothing that follows can be read then.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
    let [m0, m1, m2, m3, f0, f1, k0, k1, l0, l1, l2, l3, sum @ ..] = *bytes;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(FrameError::Garbage([m0, m1, m2, m3]));
    }
    let format = u16::from_le_bytes([f0, f1]);
    if !(FORMAT_OLDEST..=FORMAT_NEWEST).contains(&format) {
        return Err(FrameError::Format(format));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    Ok(FrameHeader { kind: u16::from_le_bytes([k0, k1]), length, checksum: u64::from_le_bytes(sum) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    fn split(bytes: &Bytes) -> (FrameHeader, Bytes) {
        let header = decode_header(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap();
        (header, bytes.slice(HEADER_BYTES..))
    }

    proptest! {
        #[test]
        fn a_frame_comes_back_as_it_went(kind: u16, payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let frame = Frame { kind, payload: payload.into() };
            let (header, payload) = split(&encode_frame(&frame).unwrap());
            assert_eq!(header.frame(payload).unwrap(), frame);
        }

        #[test]
        fn no_header_makes_the_decoder_panic(bytes: [u8; HEADER_BYTES]) {
            let _ = decode_header(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_found(payload in prop::collection::vec(any::<u8>(), 1..100), at: prop::sample::Index) {
            let frame = Frame { kind: 7, payload: payload.into() };
            let (header, payload) = split(&encode_frame(&frame).unwrap());
            let mut broken = payload.to_vec();
            let at = at.index(broken.len());
            broken[at] ^= 1;
            assert_eq!(header.frame(broken.into()), Err(FrameError::Checksum(7)));
        }
    }

    #[test]
    fn a_header_of_another_format_says_which_are_read() {
        for format in [FORMAT_OLDEST - 1, FORMAT_NEWEST + 1] {
            let mut bytes = encode_frame(&Frame { kind: 1, payload: Bytes::new() }).unwrap().to_vec();
            bytes[4..6].copy_from_slice(&format.to_le_bytes());
            let header: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            assert_eq!(decode_header(&header), Err(FrameError::Format(format)));
        }
        assert!(FrameError::Format(2).to_string().contains("reads 1 to 1"));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
        let mut bytes = encode_frame(&Frame { kind: 1, payload: Bytes::new() }).unwrap().to_vec();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let header: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
        assert_eq!(decode_header(&header), Err(FrameError::TooLong(u32::MAX as usize)));
    }
}

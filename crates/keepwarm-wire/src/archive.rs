//! The way of a value into a payload and back: a version, then an rkyv archive that is checked before it is read.

use bytes::Bytes;
use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Portable, Serialize, rancor};

use crate::error::{DecodeError, EncodeError};
use crate::frame::Frame;
use crate::limits::within;
use crate::version::Version;

/// The version as two bytes, little endian, and six of zero: so an archive in an aligned payload is aligned too.
const HEADER_BYTES: usize = 8;
/// Alignment of every archive: its widest number has 64 bits.
const ALIGN: usize = 8;

/// Makes a frame of a wire type of this version, whose counts have been checked.
pub(crate) fn seal<T>(
    version: Version,
    kind: u16,
    what: &'static str,
    value: &T,
    size_hint: usize,
    limit: usize,
) -> Result<Frame, EncodeError>
where
    T: for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, rancor::Error>>,
{
    let mut payload = Vec::with_capacity(HEADER_BYTES + size_hint);
    payload.extend(version.number().to_le_bytes());
    payload.resize(HEADER_BYTES, 0);
    let payload = rkyv::api::high::to_bytes_in::<_, rancor::Error>(value, payload)
        .expect("plain values of bounded size always archive");
    within(what, payload.len(), limit)?;
    Ok(Frame { kind, payload: Bytes::from(payload) })
}

/// A payload's archive, in place where it is aligned and as a copy where not.
pub(crate) struct Opened<'a> {
    /// Which version its wire type is of.
    pub(crate) version: Version,
    payload: &'a [u8],
    copy: AlignedVec<ALIGN>,
}

impl<'a> Opened<'a> {
    /// Looks at kind, length and version; the archive itself is not looked at yet.
    pub(crate) fn new(
        frame: &'a Frame,
        kind: u16,
        what: &'static str,
        limit: usize,
    ) -> Result<Self, DecodeError> {
        if frame.kind != kind {
            return Err(DecodeError::Kind { found: frame.kind, wanted: kind });
        }
        within(what, frame.payload.len(), limit)?;
        let (header, archive) =
            frame.payload.split_at_checked(HEADER_BYTES).ok_or(DecodeError::Short(frame.payload.len()))?;
        let number = u16::from_le_bytes([header[0], header[1]]);
        let version = Version::of_payload(number).ok_or(DecodeError::Version(number))?;
        let mut copy = AlignedVec::new();
        if !archive.as_ptr().addr().is_multiple_of(ALIGN) {
            copy.extend_from_slice(archive);
        }
        Ok(Self { version, payload: archive, copy })
    }

    /// Checks the archive from end to end and gives its root: a wire type of its version.
    pub(crate) fn root<T>(&self) -> Result<&T, DecodeError>
    where
        T: Portable + for<'b> CheckBytes<HighValidator<'b, rancor::Error>>,
    {
        let archive = if self.copy.is_empty() { self.payload } else { &self.copy };
        rkyv::access::<T, rancor::Error>(archive).map_err(|error| DecodeError::Archive(error.to_string()))
    }
}

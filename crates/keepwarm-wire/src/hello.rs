//! The first words on a connection: which cluster, which process, which versions.
//!
//! One side says hello, the other answers; before both have, a peer is not up. Fixed little-endian fields and
//! length-prefixed names, since whoever reads this may speak no common version yet: a field may be added behind the
//! last one, and is ignored by whoever does not know it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use keepwarm_types::{Incarnation, NodeName};

use crate::frame::Frame;
use crate::kinds;
use crate::limits::NAME_BYTES_MAX;
use crate::version::{NoCommonVersion, Versions};

/// Longest reason of a refusal, in bytes.
const REASON_BYTES_MAX: usize = 512;

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Name of the cluster.
    pub cluster: String,
    /// Identity of the cluster.
    pub cluster_id: u128,
    /// The node.
    pub node: NodeName,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// The versions that it speaks.
    pub versions: Versions,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloAnswer {
    /// Welcome: who answers.
    Accepted(Hello),
    /// Known, and dialled by the one who answers: of two nodes the one with the lower name dials.
    WillDial,
    /// No, and why.
    Refused(String),
}

/// The bytes are no hello, or none that can be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Something else.
    #[error("the peer does not say hello: {0}")]
    NotHello(&'static str),
    /// Both are of keepwarm, but too far apart.
    #[error(transparent)]
    Versions(#[from] NoCommonVersion),
}

impl Hello {
    fn put(&self, bytes: &mut BytesMut) {
        bytes.put_u16_le(self.versions.oldest);
        bytes.put_u16_le(self.versions.newest);
        bytes.put_u128_le(self.cluster_id);
        bytes.put_u64_le(self.incarnation.0);
        put_text(bytes, &self.cluster, NAME_BYTES_MAX);
        put_text(bytes, self.node.as_str(), NAME_BYTES_MAX);
    }

    fn take(bytes: &mut Bytes, mine: Versions) -> Result<Self, HelloError> {
        if bytes.len() < 28 {
            return Err(HelloError::NotHello("it is too short"));
        }
        let versions = Versions { oldest: bytes.get_u16_le(), newest: bytes.get_u16_le() };
        mine.common(versions)?;
        let (cluster_id, incarnation) = (bytes.get_u128_le(), Incarnation(bytes.get_u64_le()));
        let cluster = take_text(bytes, NAME_BYTES_MAX)?;
        let node = take_text(bytes, NAME_BYTES_MAX)?;
        let node = node.parse().map_err(|_| HelloError::NotHello("the node's name is none"))?;
        Ok(Self { cluster, cluster_id, node, incarnation, versions })
    }

    /// As a frame.
    #[must_use]
    pub fn frame(&self) -> Frame {
        let mut bytes = BytesMut::new();
        self.put(&mut bytes);
        Frame { kind: kinds::HELLO, payload: bytes.freeze() }
    }

    /// Reads it, as a node that speaks `mine`.
    ///
    /// # Errors
    /// [`HelloError`]; of a peer that is too far apart nothing but its versions is read.
    pub fn read(frame: &Frame, mine: Versions) -> Result<Self, HelloError> {
        if frame.kind != kinds::HELLO {
            return Err(HelloError::NotHello("the frame is of another kind"));
        }
        Self::take(&mut frame.payload.clone(), mine)
    }
}

impl HelloAnswer {
    /// As a frame.
    #[must_use]
    pub fn frame(&self) -> Frame {
        let mut bytes = BytesMut::new();
        match self {
            Self::Accepted(hello) => {
                bytes.put_u8(1);
                hello.put(&mut bytes);
            }
            Self::WillDial => bytes.put_u8(2),
            Self::Refused(reason) => {
                bytes.put_u8(0);
                put_text(&mut bytes, reason, REASON_BYTES_MAX);
            }
        }
        Frame { kind: kinds::HELLO_ANSWER, payload: bytes.freeze() }
    }

    /// Reads it, as a node that speaks `mine`.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn read(frame: &Frame, mine: Versions) -> Result<Self, HelloError> {
        let mut bytes = frame.payload.clone();
        if frame.kind != kinds::HELLO_ANSWER || bytes.is_empty() {
            return Err(HelloError::NotHello("the answer is of another kind"));
        }
        match bytes.get_u8() {
            1 => Hello::take(&mut bytes, mine).map(Self::Accepted),
            2 => Ok(Self::WillDial),
            _ => take_text(&mut bytes, REASON_BYTES_MAX).map(Self::Refused),
        }
    }
}

fn put_text(bytes: &mut BytesMut, text: &str, max: usize) {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes.put_u16_le(u16::try_from(end).unwrap_or(0));
    bytes.put_slice(&text.as_bytes()[..end]);
}

fn take_text(bytes: &mut Bytes, max: usize) -> Result<String, HelloError> {
    if bytes.len() < 2 {
        return Err(HelloError::NotHello("it is cut short"));
    }
    let length = usize::from(bytes.get_u16_le());
    if length > max || length > bytes.len() {
        return Err(HelloError::NotHello("a text in it is longer than it may be"));
    }
    String::from_utf8(bytes.split_to(length).to_vec())
        .map_err(|_| HelloError::NotHello("a text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    const MINE: Versions = Versions::ALL;

    fn hello() -> Hello {
        Hello {
            cluster: "prod".to_owned(),
            cluster_id: 7,
            node: "n1".parse().unwrap(),
            incarnation: Incarnation(9),
            versions: MINE,
        }
    }

    #[test]
    fn hellos_and_answers_come_back_as_they_went() {
        assert_eq!(Hello::read(&hello().frame(), MINE), Ok(hello()));
        let refused = HelloAnswer::Refused("no, ä".to_owned());
        for answer in [HelloAnswer::Accepted(hello()), HelloAnswer::WillDial, refused] {
            assert_eq!(HelloAnswer::read(&answer.frame(), MINE), Ok(answer));
        }
    }

    #[test]
    fn a_peer_of_a_far_version_is_told_so() {
        let far = Versions { oldest: MINE.newest + 1, newest: MINE.newest + 2 };
        for (theirs, mine) in [(far, MINE), (MINE, far)] {
            let said = Hello { versions: theirs, ..hello() };
            let apart = HelloError::Versions(NoCommonVersion { mine, theirs });
            assert_eq!(Hello::read(&said.frame(), mine), Err(apart.clone()));
            assert_eq!(HelloAnswer::read(&HelloAnswer::Accepted(said).frame(), mine), Err(apart));
        }
        let near = Hello { versions: Versions { oldest: MINE.newest, newest: MINE.newest + 1 }, ..hello() };
        assert_eq!(Hello::read(&near.frame(), MINE), Ok(near));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Hello::read(&Frame { kind: kinds::HELLO, payload: payload.clone().into() }, MINE);
            let _ = HelloAnswer::read(&Frame { kind: kinds::HELLO_ANSWER, payload: payload.into() }, MINE);
        }
    }
}

//! Messages between replicas of a shard, as frames of kind [`kinds::ENVELOPE`].
//!
//! A payload is a version of 16 bits, little endian, six bytes of zero, and an rkyv archive of a wire type. Wire types
//! are neither the core's types nor those on disk, and each conversion is written out, so that a change of one is
//! not a change of another by accident. Reading checks the archive from end to end before it looks at any of it,
//! then each count against [`crate::limits`], then each value by its own type's rules. What is read takes memory in
//! proportion to the payload, whatever the payload says.
//!
//! # Versions
//!
//! A node of version N talks with nodes of N-1, N and N+1. The hellos on a link name what each side speaks, from the
//! oldest to the newest; the link speaks the lower of the two newest, and is refused where the two ranges have nothing
//! in common. That is a [`Version`], which nothing but two hellos makes: the transport tells it of a peer that is
//! connected, of a stream and of whoever waits for an answer. Every encoder takes one and writes it into the payload;
//! every decoder reads what the payload says it is, from [`crate::VERSION_OLDEST`] to [`crate::VERSION`]. A peer that
//! is not connected has no version, and nothing can be encoded for it.
//!
//! So nodes are updated one after another, and each pair speaks the older one's version until both are new. What the
//! older version cannot say is refused by the encoder ([`EncodeError::Unsayable`]): whoever wants to say it must have
//! another way, or do without, until all nodes are new.
//!
//! An archive has no optional ends: any new field is a new layout of bytes and so a new version. To add a field:
//!
//! 1. Copy the wire types that change into the module `v1` (named for the old number), with a conversion from old to
//!    new that says what the field is where the sender did not have it, and one back that says what has no word there.
//! 2. Raise `VERSION`; `VERSION_OLDEST` becomes the one before it, and what was kept for the one before that goes.
//!    Encoders that write the changed type match on the version to write, decoders on the one that the payload has.
//! 3. Keep frames of the old version as bytes (`tests/golden`): they are made by its last encoder, before the change.
//!
//! A new kind of message is the same; its encoder refuses a lower version. Payloads that nothing changed in have the
//! same layout in both versions, and say which they are of all the same.
//!
//! | version | what it added |
//! |---|---|
//! | 1 | all of it |
//! | 2 | [`crate::blocks::Direction::Spare`]: a header of blocks says its way in a byte, where 1 says whether it pulls |
//! | 2 | [`crate::control::LoadAnswer`], and its question |
//! | 2 | a layout's part that cold tiers keep as FP8: a new form, beside which the others are as they were |
//!
//! A header of frames has a version of its own, its format, which is the same in both: hellos are frames too. The
//! registry's messages ([`crate::control::RegistryFrame`]) begin with the link's version as all others do.
//!
//! # What the decoder does not know
//!
//! Whether a session's id lies in the shard, whether sender and receiver are who they say (the link knows the
//! certificate), and whether a stamp follows another: those are the core's and the node's questions.

use std::sync::Arc;

use keepwarm_core::registry::ReplicaSet;
use keepwarm_core::replica::{Compare, Content, Envelope, Message, Span};
use keepwarm_core::session::{Layout, Stamp};
use keepwarm_core::shard::Record;
use keepwarm_types::{Generation, SessionKey};
use rkyv::{Archive, Serialize};

use crate::archive::{Opened, seal};
use crate::error::{DecodeError, EncodeError};
use crate::frame::Frame;
use crate::identity::{
    ArchivedWireKey, ArchivedWireStamp, WireKey, WireMember, WireSet, WireStamp, birth, shard,
};
use crate::kinds;
use crate::layout::LayoutCache;
use crate::limits::{ENVELOPE_BYTES_MAX, KEYS_MAX, TooLong, counter, within};
use crate::record::{WireInstall, WirePrepare};
use crate::version::Version;

#[derive(Archive, Serialize)]
struct WireEnvelope {
    shard: u32,
    from: WireMember,
    to: WireMember,
    set: WireSet,
    sent: u64,
    message: WireMessage,
}

/// The two large ones are boxed, so that the small ones stay small.
#[derive(Archive, Serialize)]
enum WireMessage {
    Prepare(Box<WirePrepare>),
    Committed(Vec<WireHead>),
    Settled { before: u64 },
    Noted { heads: Vec<WireHead>, before: Option<u64> },
    Compare { id: u64, span: WireSpan, heads: Vec<WireHead> },
    Install(Box<WireInstall>),
    Confirm { round: u64 },
    Prepared { key: WireKey, stamp: WireStamp, holding: bool },
    NeedWhole { key: WireKey },
    Compared { id: u64, differing: Vec<WireKey>, lacking: Vec<WireKey> },
    Installed { key: WireKey, head: Option<WireStamp>, holding: bool },
    Confirmed { round: u64 },
    Stale,
    Evict { key: WireKey, birth: u64 },
}

#[derive(Archive, Serialize)]
struct WireHead {
    key: WireKey,
    stamp: WireStamp,
}

#[derive(Archive, Serialize)]
enum WireSpan {
    One(WireKey),
    Between { after: Option<WireKey>, through: Option<WireKey> },
}

/// The first version that has a word for a part's cold form.
pub const LOSSY_SINCE: u16 = 2;

/// Makes a frame of an envelope, in the version that its reader speaks.
///
/// # Errors
/// [`EncodeError`] where it holds more of something than a frame may: see [`crate::limits`]; and where it is about a session
/// with a lossy layout, which a peer of version 1 could not hold.
pub fn encode(envelope: &Envelope, version: Version) -> Result<Frame, EncodeError> {
    if version.number() < LOSSY_SINCE && layout_in(&envelope.message).is_some_and(Layout::is_lossy) {
        return Err(EncodeError::Unsayable {
            what: "a layout with a cold form",
            version,
            since: LOSSY_SINCE,
        });
    }
    let wire = WireEnvelope {
        shard: envelope.shard.0,
        from: (&envelope.from).into(),
        to: (&envelope.to).into(),
        set: WireSet::new(&envelope.set)?,
        sent: envelope.sent,
        message: WireMessage::new(&envelope.message)?,
    };
    let size_hint = 512 + WireMessage::size_hint(&envelope.message);
    seal(version, kinds::ENVELOPE, "envelope", &wire, size_hint, ENVELOPE_BYTES_MAX)
}

/// Reads an envelope, in any version that this node reads; never panics, whatever the frame holds. Layouts come from the cache where it has them, and go
/// into it where not.
///
/// # Errors
/// [`DecodeError`] where the frame is of another kind or version, or damaged, or holds what no peer would send.
pub fn decode(frame: &Frame, layouts: &LayoutCache) -> Result<Envelope, DecodeError> {
    let opened = Opened::new(frame, kinds::ENVELOPE, "envelope", ENVELOPE_BYTES_MAX)?;
    let wire = opened.root::<ArchivedWireEnvelope>()?;
    let set = wire.set.read()?;
    Ok(Envelope {
        shard: shard(wire.shard.to_native())?,
        from: wire.from.read_among(&set.replicas)?,
        to: wire.to.read_among(&set.replicas)?,
        sent: counter("envelope.sent", wire.sent.to_native())?,
        message: wire.message.read(layouts, &set)?,
        set: Arc::new(set),
    })
}

/// The layout of the session that a message brings.
fn layout_in(message: &Message) -> Option<&Layout> {
    match message {
        Message::Prepare(prepare) => match &prepare.record {
            Record::Manifest(manifest, _) => Some(&manifest.layout),
            _ => None,
        },
        Message::Install(install) => match &install.content {
            Content::Live(manifest, _) => Some(&manifest.layout),
            _ => None,
        },
        _ => None,
    }
}

fn wire_keys(what: &'static str, keys: &[SessionKey]) -> Result<Vec<WireKey>, TooLong> {
    within(what, keys.len(), KEYS_MAX)?;
    Ok(keys.iter().map(WireKey::from).collect())
}

fn wire_heads(what: &'static str, heads: &[(SessionKey, Stamp)]) -> Result<Vec<WireHead>, TooLong> {
    within(what, heads.len(), KEYS_MAX)?;
    Ok(heads.iter().map(|(key, stamp)| WireHead { key: key.into(), stamp: (*stamp).into() }).collect())
}

fn read_keys(what: &'static str, keys: &[ArchivedWireKey]) -> Result<Vec<SessionKey>, DecodeError> {
    within(what, keys.len(), KEYS_MAX)?;
    keys.iter().map(ArchivedWireKey::read).collect()
}

fn read_heads(
    what: &'static str,
    heads: &[ArchivedWireHead],
) -> Result<Vec<(SessionKey, Stamp)>, DecodeError> {
    within(what, heads.len(), KEYS_MAX)?;
    heads.iter().map(|head| Ok((head.key.read()?, head.stamp.read()?))).collect()
}

impl WireMessage {
    fn new(message: &Message) -> Result<Self, TooLong> {
        Ok(match message {
            Message::Prepare(prepare) => Self::Prepare(Box::new(WirePrepare::new(prepare)?)),
            Message::Committed(heads) => Self::Committed(wire_heads("committed", heads)?),
            Message::Settled { before } => Self::Settled { before: before.0 },
            Message::Noted { heads, before } => Self::Noted {
                heads: wire_heads("noted.heads", heads)?,
                before: before.map(|before| before.0),
            },
            Message::Compare(Compare { id, span, heads }) => {
                Self::Compare { id: *id, span: span.into(), heads: wire_heads("compare.heads", heads)? }
            }
            Message::Install(install) => Self::Install(Box::new(WireInstall::new(install)?)),
            Message::Confirm { round } => Self::Confirm { round: *round },
            Message::Prepared { key, stamp, holding } => {
                Self::Prepared { key: key.into(), stamp: (*stamp).into(), holding: *holding }
            }
            Message::NeedWhole { key } => Self::NeedWhole { key: key.into() },
            Message::Compared { id, differing, lacking } => Self::Compared {
                id: *id,
                differing: wire_keys("compared.differing", differing)?,
                lacking: wire_keys("compared.lacking", lacking)?,
            },
            Message::Installed { key, head, holding } => {
                Self::Installed { key: key.into(), head: head.map(WireStamp::from), holding: *holding }
            }
            Message::Confirmed { round } => Self::Confirmed { round: *round },
            Message::Stale => Self::Stale,
            Message::Evict { key, birth } => Self::Evict { key: key.into(), birth: birth.get() },
        })
    }

    /// About how many bytes it takes in an archive.
    fn size_hint(message: &Message) -> usize {
        let per_key = size_of::<ArchivedWireHead>() + 16;
        match message {
            Message::Prepare(prepare) => WirePrepare::size_hint(prepare),
            Message::Install(install) => WireInstall::size_hint(install),
            Message::Committed(heads)
            | Message::Noted { heads, .. }
            | Message::Compare(Compare { heads, .. }) => 128 + per_key * heads.len(),
            Message::Compared { differing, lacking, .. } => per_key * (differing.len() + lacking.len()),
            _ => 0,
        }
    }
}

impl From<&Span> for WireSpan {
    fn from(span: &Span) -> Self {
        match span {
            Span::One(key) => Self::One(key.into()),
            Span::Between { after, through } => Self::Between {
                after: after.as_ref().map(WireKey::from),
                through: through.as_ref().map(WireKey::from),
            },
        }
    }
}

impl ArchivedWireMessage {
    fn read(&self, layouts: &LayoutCache, set: &ReplicaSet) -> Result<Message, DecodeError> {
        let known = &set.replicas;
        Ok(match self {
            Self::Prepare(prepare) => Message::Prepare(Box::new(prepare.read(layouts, known)?)),
            Self::Committed(heads) => Message::Committed(read_heads("committed", heads)?),
            Self::Settled { before } => {
                Message::Settled { before: Generation(counter("settled.before", before.to_native())?) }
            }
            Self::Noted { heads, before } => Message::Noted {
                heads: read_heads("noted.heads", heads)?,
                before: match before.as_ref() {
                    Some(before) => Some(Generation(counter("noted.before", before.to_native())?)),
                    None => None,
                },
            },
            Self::Compare { id, span, heads } => Message::Compare(Compare {
                id: id.to_native(),
                span: span.read()?,
                heads: read_heads("compare.heads", heads)?,
            }),
            Self::Install(install) => Message::Install(Box::new(install.read(layouts, known)?)),
            Self::Confirm { round } => Message::Confirm { round: round.to_native() },
            Self::Prepared { key, stamp, holding } => {
                Message::Prepared { key: key.read()?, stamp: stamp.read()?, holding: *holding }
            }
            Self::NeedWhole { key } => Message::NeedWhole { key: key.read()? },
            Self::Compared { id, differing, lacking } => Message::Compared {
                id: id.to_native(),
                differing: read_keys("compared.differing", differing)?,
                lacking: read_keys("compared.lacking", lacking)?,
            },
            Self::Installed { key, head, holding } => Message::Installed {
                key: key.read()?,
                head: head.as_ref().map(ArchivedWireStamp::read).transpose()?,
                holding: *holding,
            },
            Self::Confirmed { round } => Message::Confirmed { round: round.to_native() },
            Self::Stale => Message::Stale,
            Self::Evict { key, birth: number } => {
                Message::Evict { key: key.read()?, birth: birth("evict.birth", number.to_native())? }
            }
        })
    }
}

impl ArchivedWireSpan {
    fn read(&self) -> Result<Span, DecodeError> {
        Ok(match self {
            Self::One(key) => Span::One(key.read()?),
            Self::Between { after, through } => Span::Between {
                after: after.as_ref().map(ArchivedWireKey::read).transpose()?,
                through: through.as_ref().map(ArchivedWireKey::read).transpose()?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame around this message, whatever it holds.
    fn sent(message: WireMessage) -> Frame {
        let member = || WireMember::new_unchecked("n1", 1);
        let set = WireSet::new(&ReplicaSet {
            generation: Generation(1),
            replicas: Vec::new(),
            learner: None,
            lost_at: None,
        });
        let wire =
            WireEnvelope { shard: 1, from: member(), to: member(), set: set.unwrap(), sent: 1, message };
        seal(Version::NEWEST, kinds::ENVELOPE, "envelope", &wire, 0, ENVELOPE_BYTES_MAX).unwrap()
    }

    fn refused(message: WireMessage) -> String {
        decode(&sent(message), &LayoutCache::new()).unwrap_err().to_string()
    }

    #[test]
    fn a_peer_that_sends_too_much_is_refused() {
        let key = || WireKey::new_unchecked("t", [0; 16]);
        let keys = || (0..=KEYS_MAX).map(|_| key()).collect();
        let too_many = "1025 are more than the 1024 that a frame may hold";
        let compared = WireMessage::Compared { id: 1, differing: Vec::new(), lacking: keys() };
        assert_eq!(refused(compared), format!("compared.lacking: {too_many}"));
        let stamp = || Stamp::default().into();
        let heads = (0..=KEYS_MAX).map(|_| WireHead { key: key(), stamp: stamp() }).collect();
        assert_eq!(refused(WireMessage::Committed(heads)), format!("committed: {too_many}"));
    }

    #[test]
    fn a_peer_that_sends_no_names_is_refused() {
        let long = "x".repeat(1 << 20);
        let text = refused(WireMessage::NeedWhole { key: WireKey::new_unchecked(&long, [0; 16]) });
        assert_eq!(text, "key.tenant: 1048576 are more than the 64 that a frame may hold");
        let text = refused(WireMessage::NeedWhole { key: WireKey::new_unchecked("a/b", [0; 16]) });
        assert!(text.starts_with("key.tenant: 'a/b' is not a name"), "{text}");
        let text = refused(WireMessage::NeedWhole { key: WireKey::new_unchecked("t", [0; 16]) });
        assert!(text.starts_with("key.id: '00000000-"), "{text}");
    }
}

//! Manifests on the wire. Unlike those on disk they name block instances, which are the *sender's*.

use keepwarm_core::registry::Member;
use keepwarm_core::session::{
    BlockRef, LABEL_BYTES_MAX, LABELS_MAX, Labels, Layout, Manifest, PARTS_MAX, Parent, Part, PartState,
    Protect, State, WRITE_IDS_KEPT, WriteMemo,
};
use keepwarm_types::{
    BlockChecksum, Bytes, ColdReason, InstanceId, Millis, PlacementSeq, Revision, Timestamp, Tokens, WriteId,
};
use rkyv::{Archive, Serialize};
use uuid::Uuid;

use crate::error::{DecodeError, field};
use crate::identity::{ArchivedWireMember, WireKey, WireMember, WireStamp, birth, session_id};
use crate::layout::{LayoutCache, WireLayout};
use crate::limits::{HOLDERS_MAX, MANIFEST_BLOCKS_MAX, TooLong, WIRE_BRANCHES_MAX, counter, index, within};

#[derive(Archive, Serialize)]
pub(crate) struct WireManifest {
    key: WireKey,
    birth: u64,
    layout: WireLayout,
    protect: WireProtect,
    ttl_ms: Option<u64>,
    labels: Vec<WireLabel>,
    stamp: WireStamp,
    revision: u64,
    placement_seq: u64,
    length_tokens: u64,
    /// As many as the layout has parts.
    parts: Vec<WirePartState>,
    transcript_tokens: u64,
    transcript_messages: u32,
    transcript_revision: u64,
    parent: Option<WireParent>,
    branches: Vec<[u8; 16]>,
    state: WireState,
    holders: Vec<WireMember>,
    writes: Vec<WireWrite>,
    created_at: u64,
    last_used_at: u64,
}

#[derive(Archive, Serialize)]
enum WireProtect {
    For(u64),
    Forever,
}

#[derive(Archive, Serialize)]
struct WireLabel {
    name: String,
    value: String,
}

#[derive(Archive, Serialize)]
struct WirePartState {
    blocks: Vec<WireBlock>,
    first_block: u32,
    length: u64,
    digest: Option<[u64; 2]>,
}

#[derive(Archive, Serialize)]
pub(crate) struct WireBlock {
    instance: u64,
    checksum: [u64; 2],
    length: u32,
}

#[derive(Archive, Serialize)]
struct WireParent {
    id: [u8; 16],
    birth: u64,
    revision: u64,
    length: u64,
}

#[derive(Archive, Serialize)]
enum WireState {
    Warm,
    Evicted,
    Restarted,
    HoldersLost,
    Corrupt,
}

#[derive(Archive, Serialize)]
struct WireWrite {
    id: [u8; 16],
    asked: u64,
    revision: u64,
    length_tokens: u64,
    length: u64,
}

impl WireManifest {
    pub(crate) fn new(m: &Manifest) -> Result<Self, TooLong> {
        within("manifest.parts", m.parts.len(), PARTS_MAX)?;
        within("manifest.blocks", m.instances().count(), MANIFEST_BLOCKS_MAX)?;
        check_labels(m.labels.iter().map(|(name, value)| (name.len(), value.len())))?;
        within("manifest.branches", m.branches.len(), WIRE_BRANCHES_MAX)?;
        within("manifest.holders", m.holders.len(), HOLDERS_MAX)?;
        within("manifest.writes", m.writes.len(), WRITE_IDS_KEPT)?;
        Ok(Self {
            key: (&m.key).into(),
            birth: m.birth.get(),
            layout: WireLayout::new(&m.layout)?,
            protect: match m.protect {
                Protect::For(duration) => WireProtect::For(duration.0),
                Protect::Forever => WireProtect::Forever,
            },
            ttl_ms: m.ttl.map(|ttl| ttl.0),
            labels: m
                .labels
                .iter()
                .map(|(name, value)| WireLabel { name: name.to_string(), value: value.to_string() })
                .collect(),
            stamp: m.stamp.into(),
            revision: m.revision.0,
            placement_seq: m.placement_seq.0,
            length_tokens: m.length_tokens.0,
            parts: m.parts.iter().map(WirePartState::from).collect(),
            transcript_tokens: m.transcript_tokens.0,
            transcript_messages: m.transcript_messages,
            transcript_revision: m.transcript_revision.0,
            parent: m.parent.as_deref().map(WireParent::from),
            branches: m.branches.iter().map(|id| *id.uuid().as_bytes()).collect(),
            state: m.state.into(),
            holders: m.holders.iter().map(WireMember::from).collect(),
            writes: m.writes.iter().map(WireWrite::from).collect(),
            created_at: m.created_at.0,
            last_used_at: m.last_used_at.0,
        })
    }

    /// About how many bytes it takes in an archive.
    pub(crate) fn size_hint(m: &Manifest) -> usize {
        1024 + 128 * m.parts.len() + size_of::<ArchivedWireBlock>() * m.instances().count()
    }
}

fn check_labels(mut lengths: impl ExactSizeIterator<Item = (usize, usize)>) -> Result<(), TooLong> {
    within("manifest.labels", lengths.len(), LABELS_MAX)?;
    lengths.try_for_each(|(name, value)| {
        within("manifest.labels.name", name, LABEL_BYTES_MAX)?;
        within("manifest.labels.value", value, LABEL_BYTES_MAX)
    })
}

impl From<&PartState> for WirePartState {
    fn from(part: &PartState) -> Self {
        Self {
            blocks: part.blocks.iter().map(WireBlock::from).collect(),
            first_block: part.first_block,
            length: part.length.0,
            digest: part.digest.map(|digest| digest.0),
        }
    }
}

impl From<&BlockRef> for WireBlock {
    fn from(block: &BlockRef) -> Self {
        Self { instance: block.instance.0, checksum: block.checksum.0, length: block.length }
    }
}

impl From<&Parent> for WireParent {
    fn from(parent: &Parent) -> Self {
        Self {
            id: *parent.id.uuid().as_bytes(),
            birth: parent.birth.get(),
            revision: parent.revision.0,
            length: parent.length.0,
        }
    }
}

impl From<State> for WireState {
    fn from(state: State) -> Self {
        match state {
            State::Warm => Self::Warm,
            State::Cold(ColdReason::Evicted) => Self::Evicted,
            State::Cold(ColdReason::Restarted) => Self::Restarted,
            State::Cold(ColdReason::HoldersLost) => Self::HoldersLost,
            State::Cold(ColdReason::Corrupt) => Self::Corrupt,
        }
    }
}

impl From<&WriteMemo> for WireWrite {
    fn from(memo: &WriteMemo) -> Self {
        Self {
            id: *memo.id.0.as_bytes(),
            asked: memo.asked,
            revision: memo.revision.0,
            length_tokens: memo.length_tokens.0,
            length: memo.length.0,
        }
    }
}

impl ArchivedWireManifest {
    /// The manifest. Its layout comes from the cache; its holders share their names with `known` members.
    pub(crate) fn read(&self, layouts: &LayoutCache, known: &[Member]) -> Result<Manifest, DecodeError> {
        self.check_counts()?;
        let layout = self.layout.read(layouts)?;
        let parts = self.read_parts(&layout)?;
        let holder = |holder: &ArchivedWireMember| holder.read_among(known);
        let holders: Vec<_> = self.holders.iter().map(holder).collect::<Result<_, _>>()?;
        Ok(Manifest {
            key: self.key.read()?,
            birth: birth("manifest.birth", self.birth.to_native())?,
            layout,
            protect: match self.protect {
                ArchivedWireProtect::For(duration) => Protect::For(Millis(duration.to_native())),
                ArchivedWireProtect::Forever => Protect::Forever,
            },
            ttl: self.ttl_ms.as_ref().map(|ttl| Millis(ttl.to_native())),
            labels: self.read_labels()?,
            stamp: self.stamp.read()?,
            revision: Revision(counter("manifest.revision", self.revision.to_native())?),
            placement_seq: PlacementSeq(counter("manifest.placement_seq", self.placement_seq.to_native())?),
            length_tokens: Tokens(counter("manifest.length_tokens", self.length_tokens.to_native())?),
            parts,
            transcript_tokens: Tokens(counter(
                "manifest.transcript_tokens",
                self.transcript_tokens.to_native(),
            )?),
            transcript_messages: index("manifest.transcript_messages", self.transcript_messages.to_native())?,
            transcript_revision: Revision(counter(
                "manifest.transcript_revision",
                self.transcript_revision.to_native(),
            )?),
            parent: self.parent.as_ref().map(|parent| parent.read().map(Box::new)).transpose()?,
            branches: self
                .branches
                .iter()
                .map(|id| session_id("manifest.branches", *id))
                .collect::<Result<_, _>>()?,
            state: match self.state {
                ArchivedWireState::Warm => State::Warm,
                ArchivedWireState::Evicted => State::Cold(ColdReason::Evicted),
                ArchivedWireState::Restarted => State::Cold(ColdReason::Restarted),
                ArchivedWireState::HoldersLost => State::Cold(ColdReason::HoldersLost),
                ArchivedWireState::Corrupt => State::Cold(ColdReason::Corrupt),
            },
            holders: holders.into(),
            writes: self.writes.iter().map(ArchivedWireWrite::read).collect::<Result<_, _>>()?,
            created_at: Timestamp(self.created_at.to_native()),
            last_used_at: Timestamp(self.last_used_at.to_native()),
        })
    }

    fn check_counts(&self) -> Result<(), TooLong> {
        within("manifest.parts", self.parts.len(), PARTS_MAX)?;
        let blocks = self.parts.iter().map(|part| part.blocks.len()).sum();
        within("manifest.blocks", blocks, MANIFEST_BLOCKS_MAX)?;
        check_labels(self.labels.iter().map(|label| (label.name.len(), label.value.len())))?;
        within("manifest.branches", self.branches.len(), WIRE_BRANCHES_MAX)?;
        within("manifest.holders", self.holders.len(), HOLDERS_MAX)?;
        within("manifest.writes", self.writes.len(), WRITE_IDS_KEPT)
    }

    fn read_labels(&self) -> Result<Labels, DecodeError> {
        let pair = |label: &ArchivedWireLabel| (Box::from(&*label.name), Box::from(&*label.value));
        let labels: Labels = self.labels.iter().map(pair).collect();
        if labels.len() < self.labels.len() {
            return Err(field("manifest.labels", "a name is there twice"));
        }
        Ok(labels)
    }

    fn read_parts(&self, layout: &Layout) -> Result<Box<[PartState]>, DecodeError> {
        let (states, parts) = (&self.parts, layout.parts());
        if states.len() != parts.len() {
            let reason = format!("{} of them, and the layout has {}", states.len(), parts.len());
            return Err(field("manifest.parts", reason));
        }
        states.iter().zip(parts).map(|(state, part)| state.read(part)).collect()
    }
}

impl ArchivedWirePartState {
    fn read(&self, part: &Part) -> Result<PartState, DecodeError> {
        let block_bytes = part.stored_block_bytes();
        let block = |block: &ArchivedWireBlock| block.read("manifest.blocks.length", block_bytes);
        Ok(PartState {
            blocks: self.blocks.iter().map(block).collect::<Result<_, _>>()?,
            first_block: index("manifest.parts.first_block", self.first_block.to_native())?,
            length: Bytes(counter("manifest.parts.length", self.length.to_native())?),
            digest: self.digest.as_ref().map(|digest| BlockChecksum(digest.map(|word| word.to_native()))),
        })
    }
}

impl ArchivedWireBlock {
    /// The block, which may have at most `block_bytes`.
    pub(crate) fn read(&self, what: &'static str, block_bytes: u64) -> Result<BlockRef, DecodeError> {
        let length = self.length.to_native();
        if u64::from(length) > block_bytes {
            return Err(TooLong { what, count: length.into(), limit: block_bytes }.into());
        }
        Ok(BlockRef {
            instance: InstanceId(self.instance.to_native()),
            checksum: BlockChecksum(self.checksum.map(|word| word.to_native())),
            length,
        })
    }
}

impl ArchivedWireParent {
    fn read(&self) -> Result<Parent, DecodeError> {
        Ok(Parent {
            id: session_id("manifest.parent.id", self.id)?,
            birth: birth("manifest.parent.birth", self.birth.to_native())?,
            revision: Revision(counter("manifest.parent.revision", self.revision.to_native())?),
            length: Tokens(counter("manifest.parent.length", self.length.to_native())?),
        })
    }
}

impl ArchivedWireWrite {
    fn read(&self) -> Result<WriteMemo, DecodeError> {
        Ok(WriteMemo {
            id: WriteId(Uuid::from_bytes(self.id)),
            asked: self.asked.to_native(),
            revision: Revision(counter("manifest.writes.revision", self.revision.to_native())?),
            length_tokens: Tokens(counter("manifest.writes.length_tokens", self.length_tokens.to_native())?),
            length: Bytes(counter("manifest.writes.length", self.length.to_native())?),
        })
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_core::session::{LABELS_MAX, Part};

    use super::*;
    use crate::archive::{Opened, seal};
    use crate::version::Version;

    fn wire() -> WireManifest {
        let part = Part {
            name: "kv".parse().unwrap(),
            form: keepwarm_core::session::Form::Bytes { block_bytes: 16 },
            cold: None,
        };
        let stamp = || WireStamp::from(keepwarm_core::session::Stamp::default());
        WireManifest {
            key: WireKey::new_unchecked("t", 0x4000_u128.rotate_left(64).to_be_bytes()),
            birth: 1,
            layout: WireLayout::new(&Layout::new("m", "f", vec![part]).unwrap()).unwrap(),
            protect: WireProtect::Forever,
            ttl_ms: None,
            labels: Vec::new(),
            stamp: stamp(),
            revision: 1,
            placement_seq: 0,
            length_tokens: 0,
            parts: vec![WirePartState { blocks: Vec::new(), first_block: 0, length: 0, digest: None }],
            transcript_tokens: 0,
            transcript_messages: 0,
            transcript_revision: 0,
            parent: None,
            branches: Vec::new(),
            state: WireState::Warm,
            holders: Vec::new(),
            writes: Vec::new(),
            created_at: 0,
            last_used_at: 0,
        }
    }

    /// What reading says of this manifest; nothing where it takes it.
    fn read(change: impl FnOnce(&mut WireManifest)) -> String {
        let mut wire = wire();
        change(&mut wire);
        let frame = seal(Version::NEWEST, 1, "manifest", &wire, 0, 64 << 20).unwrap();
        let opened = Opened::new(&frame, 1, "manifest", 64 << 20).unwrap();
        let root = opened.root::<ArchivedWireManifest>().unwrap();
        root.read(&LayoutCache::new(), &[]).map_or_else(|error| error.to_string(), |_| String::new())
    }

    fn label(name: usize) -> WireLabel {
        WireLabel { name: name.to_string(), value: String::new() }
    }

    fn more(what: &str, count: u64, limit: u64) -> String {
        format!("{what}: {count} are more than the {limit} that a frame may hold")
    }

    #[test]
    fn a_peer_that_names_too_much_is_refused() {
        assert_eq!(read(|_| ()), "");
        let block = || WireBlock { instance: 0, checksum: [0; 2], length: 1 };
        let blocks = MANIFEST_BLOCKS_MAX + 1;
        assert_eq!(
            read(|wire| wire.parts[0].blocks = (0..blocks).map(|_| block()).collect()),
            more("manifest.blocks", 524_289, 524_288)
        );
        assert_eq!(
            read(|wire| wire.labels = (0..=LABELS_MAX).map(label).collect()),
            more("manifest.labels", 17, 16)
        );
        let long = || WireLabel { name: "x".repeat(129), value: String::new() };
        assert_eq!(read(|wire| wire.labels = vec![long()]), more("manifest.labels.name", 129, 128));
        assert_eq!(read(|wire| wire.branches = vec![[0; 16]; 10]), more("manifest.branches", 10, 9));
        let holder = || WireMember::new_unchecked("n", 1);
        assert_eq!(
            read(|wire| wire.holders = (0..=HOLDERS_MAX).map(|_| holder()).collect()),
            more("manifest.holders", HOLDERS_MAX as u64 + 1, HOLDERS_MAX as u64)
        );
        let write = || WireWrite { id: [0; 16], asked: 0, revision: 0, length_tokens: 0, length: 0 };
        assert_eq!(
            read(|wire| wire.writes = (0..5).map(|_| write()).collect()),
            more("manifest.writes", 5, 4)
        );
    }

    #[test]
    fn a_peer_that_sends_what_cannot_be_is_refused() {
        assert_eq!(
            read(|wire| wire.labels = vec![label(1), label(1)]),
            "manifest.labels: a name is there twice"
        );
        assert_eq!(
            read(|wire| wire.birth = 1 << 50),
            "manifest.birth: 1125899906842624 has more than 50 bits"
        );
        assert_eq!(read(|wire| wire.revision = u64::MAX), more("manifest.revision", u64::MAX, u64::MAX / 2));
        assert_eq!(
            read(|wire| wire.transcript_messages = u32::MAX),
            more("manifest.transcript_messages", u32::MAX.into(), (u32::MAX / 2).into())
        );
    }
}

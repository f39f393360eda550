//! Changes of one session on the wire, and a session whole.

use std::sync::Arc;

use keepwarm_core::registry::Member;
use keepwarm_core::replica::{Content, Install, Prepare};
use keepwarm_core::shard::{Record, Tombstone};
use keepwarm_types::{Revision, SessionKey, Timestamp};
use rkyv::{Archive, Serialize};

use crate::error::{DecodeError, field};
use crate::identity::{ArchivedWireStamp, WireKey, WireStamp, birth};
use crate::layout::LayoutCache;
use crate::limits::{TooLong, counter};
use crate::session::WireManifest;
use crate::transcript::{WireChange, WireDelta};

#[derive(Archive, Serialize)]
pub(crate) struct WirePrepare {
    key: WireKey,
    previous: Option<WireStamp>,
    stamp: WireStamp,
    record: WireRecord,
}

/// A record of the prepare's own key, which is therefore not sent again.
#[derive(Archive, Serialize)]
enum WireRecord {
    Manifest(Box<WireManifest>, WireChange),
    Tombstone(WireTombstone),
    Forget,
    Drop { birth: u64 },
}

#[derive(Archive, Serialize)]
struct WireTombstone {
    birth: u64,
    revision: u64,
    at: u64,
    expired: bool,
    stamp: WireStamp,
}

#[derive(Archive, Serialize)]
pub(crate) struct WireInstall {
    key: WireKey,
    content: WireContent,
}

#[derive(Archive, Serialize)]
enum WireContent {
    Live(Box<WireManifest>, WireDelta),
    Ended(WireTombstone),
    Absent,
}

impl WirePrepare {
    pub(crate) fn new(prepare: &Prepare) -> Result<Self, TooLong> {
        debug_assert_eq!(prepare.record.key(), &prepare.key, "a change is of one session");
        Ok(Self {
            key: (&prepare.key).into(),
            previous: prepare.previous.map(WireStamp::from),
            stamp: prepare.stamp.into(),
            record: match &prepare.record {
                Record::Manifest(manifest, change) => {
                    WireRecord::Manifest(Box::new(WireManifest::new(manifest)?), WireChange::new(change)?)
                }
                Record::Tombstone { birth, revision, at, expired, stamp, .. } => {
                    let (birth, revision) = (*birth, *revision);
                    let grave = Tombstone { birth, revision, at: *at, expired: *expired, stamp: *stamp };
                    WireRecord::Tombstone(WireTombstone::from(&grave))
                }
                Record::Forget(_) => WireRecord::Forget,
                Record::Drop(_, birth) => WireRecord::Drop { birth: birth.get() },
            },
        })
    }

    /// About how many bytes it takes in an archive.
    pub(crate) fn size_hint(prepare: &Prepare) -> usize {
        match &prepare.record {
            Record::Manifest(manifest, change) => {
                WireManifest::size_hint(manifest) + WireChange::size_hint(change)
            }
            _ => 512,
        }
    }
}

impl WireInstall {
    pub(crate) fn new(install: &Install) -> Result<Self, TooLong> {
        Ok(Self {
            key: (&install.key).into(),
            content: match &install.content {
                Content::Live(manifest, transcript) => {
                    WireContent::Live(Box::new(WireManifest::new(manifest)?), WireDelta::new(transcript)?)
                }
                Content::Ended(grave) => WireContent::Ended(grave.into()),
                Content::Absent => WireContent::Absent,
            },
        })
    }

    /// About how many bytes it takes in an archive.
    pub(crate) fn size_hint(install: &Install) -> usize {
        match &install.content {
            Content::Live(manifest, transcript) => {
                WireManifest::size_hint(manifest) + WireDelta::size_hint(transcript)
            }
            _ => 512,
        }
    }
}

impl From<&Tombstone> for WireTombstone {
    fn from(grave: &Tombstone) -> Self {
        Self {
            birth: grave.birth.get(),
            revision: grave.revision.0,
            at: grave.at.0,
            expired: grave.expired,
            stamp: grave.stamp.into(),
        }
    }
}

impl ArchivedWirePrepare {
    pub(crate) fn read(&self, layouts: &LayoutCache, known: &[Member]) -> Result<Prepare, DecodeError> {
        let key = self.key.read()?;
        let record = match &self.record {
            ArchivedWireRecord::Manifest(manifest, change) => {
                let manifest = manifest.read(layouts, known)?;
                same_key(&key, &manifest.key)?;
                Record::Manifest(Arc::new(manifest), change.read()?)
            }
            ArchivedWireRecord::Tombstone(grave) => Record::tombstone(key.clone(), &grave.read()?),
            ArchivedWireRecord::Forget => Record::Forget(key.clone()),
            ArchivedWireRecord::Drop { birth: number } => {
                Record::Drop(key.clone(), birth("record.birth", number.to_native())?)
            }
        };
        let previous = self.previous.as_ref().map(ArchivedWireStamp::read).transpose()?;
        Ok(Prepare { key, previous, stamp: self.stamp.read()?, record })
    }
}

impl ArchivedWireInstall {
    pub(crate) fn read(&self, layouts: &LayoutCache, known: &[Member]) -> Result<Install, DecodeError> {
        let key = self.key.read()?;
        let content = match &self.content {
            ArchivedWireContent::Live(manifest, transcript) => {
                let manifest = manifest.read(layouts, known)?;
                same_key(&key, &manifest.key)?;
                Content::Live(Arc::new(manifest), transcript.read()?)
            }
            ArchivedWireContent::Ended(grave) => Content::Ended(grave.read()?),
            ArchivedWireContent::Absent => Content::Absent,
        };
        Ok(Install { key, content })
    }
}

impl ArchivedWireTombstone {
    fn read(&self) -> Result<Tombstone, DecodeError> {
        Ok(Tombstone {
            birth: birth("tombstone.birth", self.birth.to_native())?,
            revision: Revision(counter("tombstone.revision", self.revision.to_native())?),
            at: Timestamp(self.at.to_native()),
            expired: self.expired,
            stamp: self.stamp.read()?,
        })
    }
}

fn same_key(key: &SessionKey, of_manifest: &SessionKey) -> Result<(), DecodeError> {
    if key == of_manifest {
        return Ok(());
    }
    Err(field("manifest.key", format!("is {of_manifest}, and the message is about {key}")))
}

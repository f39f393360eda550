//! Which versions of the protocol a node speaks, and which one two nodes have in common.

use std::fmt;

/// The newest version that this node writes and reads.
pub const VERSION: u16 = 2;
/// The oldest: the one before.
pub const VERSION_OLDEST: u16 = 1;

const _: () = assert!(VERSION_OLDEST <= VERSION && VERSION - VERSION_OLDEST <= 1, "N and N-1");

/// The versions that a node speaks, from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

/// The version that both ends of a link speak: the lower of their two newest.
///
/// Only two hellos make one ([`Versions::common`]), and every encoder asks for one: so nothing is written in a version
/// that its reader was not asked about. It is always one that this node writes and reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16);

/// Two nodes are too far apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer speaks versions {theirs}, this node {mine}: update one step at a time")]
pub struct NoCommonVersion {
    /// What this node speaks.
    pub mine: Versions,
    /// What the peer speaks.
    pub theirs: Versions,
}

impl Versions {
    /// All that this build speaks.
    pub const ALL: Self = Self { oldest: VERSION_OLDEST, newest: VERSION };

    /// The version to speak with a peer.
    ///
    /// # Errors
    /// [`NoCommonVersion`] where the two ranges do not overlap.
    pub fn common(self, theirs: Self) -> Result<Version, NoCommonVersion> {
        // Whatever the two ranges are, nobody writes what this build does not know.
        let newest = self.newest.min(theirs.newest).min(VERSION);
        let oldest = self.oldest.max(theirs.oldest).max(VERSION_OLDEST);
        if newest < oldest {
            return Err(NoCommonVersion { mine: self, theirs });
        }
        Ok(Version(newest))
    }
}

impl Default for Versions {
    fn default() -> Self {
        Self::ALL
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.oldest, self.newest)
    }
}

impl Version {
    /// Its number, as payloads and hellos have it.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }

    /// For tests of what is within this crate.
    #[cfg(test)]
    pub(crate) const NEWEST: Self = Self(VERSION);

    /// The version of a payload that came; none where this node does not read it.
    pub(crate) fn of_payload(number: u16) -> Option<Self> {
        (VERSION_OLDEST..=VERSION).contains(&number).then_some(Self(number))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;

    const fn range(oldest: u16, newest: u16) -> Versions {
        Versions { oldest, newest }
    }

    #[test]
    fn two_nodes_speak_the_lower_of_their_newest() {
        let common = |mine: Versions, theirs: Versions| mine.common(theirs).map(Version::number);
        assert_eq!(common(range(1, 1), range(1, 2)), Ok(1));
        assert_eq!(common(range(1, 2), range(1, 2)), Ok(2));
        assert_eq!(common(range(1, 2), range(2, 3)), Ok(2));
        let apart = common(range(1, 1), range(2, 3)).unwrap_err();
        let text = "the peer speaks versions 2 to 3, this node 1 to 1: update one step at a time";
        assert_eq!(apart.to_string(), text);
        assert!(common(Versions::ALL, range(3, 1)).is_err(), "a range that has nothing in it");
    }

    proptest! {
        #[test]
        fn both_ends_find_the_same_version(a in any::<(u16, u16)>(), b in any::<(u16, u16)>()) {
            let (a, b) = (range(a.0, a.1), range(b.0, b.1));
            let found = a.common(b).ok();
            assert_eq!(found, b.common(a).ok());
            if let Some(Version(number)) = found {
                for range in [a, b, Versions::ALL] {
                    assert!((range.oldest..=range.newest).contains(&number));
                }
            }
        }
    }
}

//! States, tiers and outcomes, by the words that clients see.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant,)+
        }
        impl $name {
            /// Every value, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word that the API, the logs and the metrics use.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }
    };
}

words! {
    /// Where bytes lie, warmest first.
    Tier {
        /// A GPU's memory.
        Hbm = "hbm",
        /// Page-locked host memory of this node.
        Pinned = "pinned",
        /// Another node's pinned memory.
        Peer = "peer",
    }
}

words! {
    /// Where an activation found a session's bytes.
    Source {
        /// They were in the GPU's memory.
        Hbm = "hbm",
        /// They came from this node's pinned memory.
        Pinned = "pinned",
        /// They came from another node.
        Peer = "peer",
        /// There were none: the state is computed again.
        None = "none",
    }
}

words! {
    /// What became of a verb.
    Outcome {
        /// It was done as asked.
        Accepted = "accepted",
        /// It was done in part.
        Clipped = "clipped",
        /// It was noted and will be done later.
        Deferred = "deferred",
        /// It was refused.
        Rejected = "rejected",
        /// There is nothing to do it on.
        Missing = "missing",
    }
}

words! {
    /// Why a session has no bytes in any tier.
    ColdReason {
        /// Memory was needed for others and its protection had ended, or someone demoted it to nothing.
        Evicted = "evicted",
        /// The process that held the bytes ended.
        Restarted = "restarted",
        /// Every holder is gone, or the device or memory that held them failed.
        HoldersLost = "holders_lost",
        /// They did not have their checksums any more.
        Corrupt = "corrupt",
    }
}

words! {
    /// Whether a session has all the copies that the spec promises.
    Durability {
        /// As many as `replication` says.
        Full = "full",
        /// Fewer.
        Degraded = "degraded",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_distinct() {
        let mut words: Vec<_> = Outcome::ALL.iter().map(|o| o.word()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Outcome::ALL.len());
        assert_eq!(Tier::Hbm.to_string(), "hbm");
    }
}

//! Bugs that are planted on purpose: each must be caught, or the invariants are worth nothing.

/// One thing that a simulated node does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// Records are acknowledged while they are still in memory.
    AcknowledgedBeforeSync,
    /// A failed sync is reported as "certainly not applied".
    UnknownCalledNo,
    /// A deletion's tombstone never reaches the disk.
    DeletionIsNotWritten,
    /// A manifest becomes durable without its transcript.
    TranscriptLagsBehind,
    /// A fork does not count as a reference of the blocks it shares.
    ForkSharesWithoutCounting,
    /// Replaced blocks are given back before the new manifest is durable.
    FreedBeforeCommit,
    /// Blocks that nobody names any more stay.
    NothingIsGivenBack,
    /// A reader does not pin what it reads.
    ReaderDoesNotPin,
    /// The new bytes of a part-full last block replace its old ones.
    TailOverwritten,
    /// Blocks are read without looking at their checksums.
    ChecksumsNotVerified,
    /// Protected sessions are evicted like all others.
    ProtectionIgnored,
    /// Some answers get lost.
    AnswerLost,
    /// A session's blocks are read through another session's manifest.
    AnotherSessionsBlocks,
}

impl Bug {
    /// Every one.
    pub const ALL: [Self; 13] = [
        Self::AcknowledgedBeforeSync,
        Self::UnknownCalledNo,
        Self::DeletionIsNotWritten,
        Self::TranscriptLagsBehind,
        Self::ForkSharesWithoutCounting,
        Self::FreedBeforeCommit,
        Self::NothingIsGivenBack,
        Self::ReaderDoesNotPin,
        Self::TailOverwritten,
        Self::ChecksumsNotVerified,
        Self::ProtectionIgnored,
        Self::AnswerLost,
        Self::AnotherSessionsBlocks,
    ];
}

//! Manifests, transcripts and tombstones on disk, group-committed.

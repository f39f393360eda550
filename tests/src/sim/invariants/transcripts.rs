//! On disk, a manifest and its transcript are of one revision.
//= GUARANTEES.md#G1

use crate::sim::disk::Store;

pub fn check(store: &Store) -> Result<(), String> {
    for manifest in store.manifests.values() {
        let name = (manifest.key.clone(), manifest.birth);
        let tokens = store.transcripts.get(&name).map_or(0, Vec::len) as u64;
        if tokens != manifest.transcript_tokens.0 {
            return Err(format!(
                "{} counts {} tokens of transcript, the disk has {tokens}",
                manifest.key, manifest.transcript_tokens
            ));
        }
    }
    Ok(())
}

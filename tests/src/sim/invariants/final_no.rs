//! What was refused never shows up later.
//= GUARANTEES.md#G3

use crate::sim::oracle::{Fate, Oracle, Seen, fits};

pub fn check(oracle: &Oracle, seen: &Seen<'_>) -> Result<(), String> {
    let manifest = seen.manifest;
    let Some(life) = oracle.lives.get(&(manifest.key.clone(), manifest.birth)) else { return Ok(()) };
    let attempts = life.revisions.get(&manifest.revision.0).map(Vec::as_slice).unwrap_or_default();
    let (mut refused, mut others) = (false, false);
    for attempt in attempts.iter().filter(|attempt| fits(&attempt.content, seen)) {
        if attempt.fate == Fate::Refused { refused = true } else { others = true }
    }
    if refused && !others {
        return Err(format!(
            "{} shows revision {}, which only a refused write would have made",
            manifest.key, manifest.revision
        ));
    }
    Ok(())
}

//! What is read is one revision as somebody wrote it: never a mix, never anything else.
//= GUARANTEES.md#G2
//= GUARANTEES.md#G5

use crate::sim::oracle::{Fate, Oracle, Seen, fits};

pub fn check(oracle: &Oracle, seen: &Seen<'_>) -> Result<(), String> {
    let manifest = seen.manifest;
    let (key, revision) = (&manifest.key, manifest.revision);
    let Some(life) = oracle.lives.get(&(key.clone(), manifest.birth)) else {
        return Err(format!("{key}: nobody began life {}", manifest.birth));
    };
    let Some(attempts) = life.revisions.get(&revision.0) else {
        return Err(format!("{key}: nobody wrote revision {revision}"));
    };
    let committed = attempts.iter().any(|attempt| attempt.fate == Fate::Committed);
    let possible = attempts.iter().filter(|attempt| {
        if committed { attempt.fate == Fate::Committed } else { attempt.fate != Fate::Refused }
    });
    let mut possible = possible.peekable();
    let first = possible.peek().map(|attempt| attempt.content.clone());
    if possible.any(|attempt| fits(&attempt.content, seen)) {
        return Ok(());
    }
    Err(format!(
        "{key}: revision {revision} is not what was written: {:?} with {} tokens of transcript, instead of {first:?}",
        seen.parts, manifest.transcript_tokens
    ))
}

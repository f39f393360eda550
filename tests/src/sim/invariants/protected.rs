//! A session's bytes are not dropped to make room within its protection after its last use.
//= GUARANTEES.md#G6

use keepwarm_core::session::Manifest;
use keepwarm_types::Timestamp;

use crate::sim::oracle::Oracle;

/// `manifest` says that the session was evicted at `at`.
pub fn check(oracle: &Oracle, manifest: &Manifest, at: Timestamp) -> Result<(), String> {
    let Some(life) = oracle.lives.get(&(manifest.key.clone(), manifest.birth)) else { return Ok(()) };
    let until = manifest.protect.until(life.used);
    if at < until {
        return Err(format!(
            "{} was evicted {} ms before its protection ended",
            manifest.key,
            until.0 - at.0
        ));
    }
    Ok(())
}

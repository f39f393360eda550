//! No byte of another tenant, or of a session that this one was not forked from, is ever read.
//= GUARANTEES.md#G4

use crate::cluster_sim::keys::{number, number_of, tenant_of};
use crate::sim::memory::POISON;
use crate::sim::oracle::Seen;

pub fn check(seen: &Seen<'_>) -> Result<(), String> {
    let key = &seen.manifest.key;
    for stamp in seen.parts.iter().flatten().flatten() {
        if *stamp == POISON {
            return Err(format!("{key} was read from memory that had been given back"));
        }
        if tenant_of(*stamp) != key.tenant {
            return Err(format!("{key} was read with bytes of tenant {}", tenant_of(*stamp)));
        }
        if seen.manifest.parent.is_none() && number_of(*stamp) != number(key) {
            return Err(format!("{key} was read with bytes of session {}", number_of(*stamp)));
        }
    }
    Ok(())
}

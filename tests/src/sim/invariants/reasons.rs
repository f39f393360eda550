//! A session is cold for a reason that really was.
//= GUARANTEES.md#G5

use keepwarm_core::session::State;

use crate::sim::oracle::{Oracle, Seen};

pub fn check(oracle: &Oracle, seen: &Seen<'_>) -> Result<(), String> {
    match seen.manifest.state {
        State::Cold(reason) if !oracle.explains(reason) => {
            Err(format!("{} is cold ({reason}), which never happened", seen.manifest.key))
        }
        _ => Ok(()),
    }
}

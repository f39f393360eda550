//! What is read is one revision as somebody wrote it, transcript and bytes: never a mix, never anything else.
//= GUARANTEES.md#G2
//= GUARANTEES.md#G10

use crate::sim::oracle::{Oracle, Seen};

pub fn check(oracle: &Oracle, seen: &Seen<'_>) -> Result<(), String> {
    crate::sim::invariants::whole::check(oracle, seen)
}

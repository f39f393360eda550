//! What was refused never shows up later.
//= GUARANTEES.md#G3

use crate::sim::oracle::{Oracle, Seen};

pub fn check(oracle: &Oracle, seen: &Seen<'_>) -> Result<(), String> {
    crate::sim::invariants::final_no::check(oracle, seen)
}

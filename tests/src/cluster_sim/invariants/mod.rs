//! What must hold, one thing a file, each citing the guarantee it watches.
//!
//! That every queue is bounded, and each replica's state sound, is asserted by
//! [`Replica::validate`](keepwarm_core::replica::Replica::validate) after each step.

pub mod answered;
pub mod copies;
pub mod equal;
pub mod final_no;
pub mod foreign;
pub mod kept;
pub mod loud;
pub mod memory;
pub mod one_primary;
pub mod serves;
pub mod whole;

use keepwarm_core::shard::Refusal;
use keepwarm_types::SessionKey;

use super::world::World;
use crate::sim::oracle::{Floor, Seen};

/// Of an answer that shows a session.
pub fn seen(world: &World, seen: &Seen<'_>, floor: &Floor) -> Result<(), String> {
    foreign::check(seen)?;
    kept::check(world, seen, floor)?;
    final_no::check(&world.promises.oracle, seen)?;
    whole::check(&world.promises.oracle, seen)?;
    loud::check(world, seen)
}

/// Of an answer that says that a session is not there.
pub fn absent(world: &World, key: &SessionKey, refusal: &Refusal, floor: &Floor) -> Result<(), String> {
    kept::check_absence(world, key, refusal, floor)
}

/// Once nothing goes wrong any more and all is quiet.
pub fn settled(world: &World) -> Result<(), String> {
    equal::check(world)?;
    copies::check(world)?;
    memory::check(world)
}

//! What must hold, one thing a file, each citing the guarantee it watches.

pub mod answered;
pub mod bounded;
pub mod final_no;
pub mod foreign;
pub mod given_back;
pub mod kept;
pub mod protected;
pub mod reasons;
pub mod transcripts;
pub mod whole;

use keepwarm_core::shard::Refusal;
use keepwarm_types::SessionKey;

use super::oracle::{Floor, Seen};
use super::world::World;

/// After every happening.
pub fn always(world: &World) -> Result<(), String> {
    bounded::check(world)?;
    answered::check(world)
}

/// Of an answer that shows a session.
pub fn seen(world: &World, seen: &Seen<'_>, floor: &Floor) -> Result<(), String> {
    foreign::check(seen)?;
    kept::check(&world.oracle, seen, floor)?;
    final_no::check(&world.oracle, seen)?;
    whole::check(&world.oracle, seen)?;
    reasons::check(&world.oracle, seen)
}

/// Of an answer that says that a session is not there.
pub fn absent(world: &World, key: &SessionKey, refusal: &Refusal, floor: &Floor) -> Result<(), String> {
    kept::check_absence(world, key, refusal, floor)
}

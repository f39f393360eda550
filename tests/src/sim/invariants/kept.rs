//! Nobody is told less than somebody was told before: no acknowledged revision, life or end is lost.
//= GUARANTEES.md#G1

use keepwarm_core::shard::Refusal;
use keepwarm_types::{Millis, SessionKey};

use crate::sim::oracle::{Floor, Oracle, Seen};
use crate::sim::world::World;

pub fn check(oracle: &Oracle, seen: &Seen<'_>, floor: &Floor) -> Result<(), String> {
    let manifest = seen.manifest;
    let (key, birth) = (&manifest.key, manifest.birth);
    if floor.ended.contains(&birth) {
        return Err(format!("{key}: life {birth} had ended before this was asked, and is back"));
    }
    match floor.life {
        Some((known, told)) if known == birth && manifest.revision.0 < told => {
            Err(format!("{key}: revision {told} was acknowledged, now there is {}", manifest.revision))
        }
        Some((known, _)) if known != birth => {
            let may_end = oracle
                .lives
                .get(&(key.clone(), known))
                .is_some_and(|life| life.may_end || life.ttl.is_some());
            if may_end { Ok(()) } else { Err(format!("{key}: life {known} is gone though nobody ended it")) }
        }
        _ => Ok(()),
    }
}

pub fn check_absence(
    world: &World,
    key: &SessionKey,
    refusal: &Refusal,
    floor: &Floor,
) -> Result<(), String> {
    let Some((birth, _)) = floor.life else { return Ok(()) };
    let Some(life) = world.oracle.lives.get(&(key.clone(), birth)) else { return Ok(()) };
    let expired = life.ttl.is_some_and(|ttl| life.used + Millis(ttl) <= world.now);
    let explained = match refusal {
        Refusal::Expired { .. } => expired || life.may_end,
        _ => life.may_end || expired,
    };
    if explained { Ok(()) } else { Err(format!("{key}: it was acknowledged, now the answer is: {refusal}")) }
}

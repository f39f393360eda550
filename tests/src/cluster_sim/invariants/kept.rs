//! Nobody is told less than somebody was told before: no acknowledged revision, life or end is lost or goes back,
//! whichever nodes have failed, unless every catalog of the shard was lost.
//= GUARANTEES.md#G1
//= GUARANTEES.md#G10
//= GUARANTEES.md#G11

use keepwarm_core::shard::Refusal;
use keepwarm_types::SessionKey;

use crate::cluster_sim::world::World;
use crate::sim::oracle::{Floor, Seen};

pub fn check(world: &World, seen: &Seen<'_>, floor: &Floor) -> Result<(), String> {
    let manifest = seen.manifest;
    if world.promises.was_lost(&manifest.key) {
        return Ok(());
    }
    let (key, birth) = (&manifest.key, manifest.birth);
    if floor.ended.contains(&birth) {
        return Err(format!("{key}: life {birth} had ended before this was asked, and is back"));
    }
    match floor.life {
        Some((known, told)) if known == birth && manifest.revision.0 < told => {
            Err(format!("{key}: revision {told} was acknowledged, now there is {}", manifest.revision))
        }
        Some((known, _)) if known != birth && !may_have_ended(world, key, known) => {
            Err(format!("{key}: life {known} is gone though nobody ended it"))
        }
        _ => Ok(()),
    }
}

fn may_have_ended(world: &World, key: &SessionKey, birth: keepwarm_types::Birth) -> bool {
    let life = world.promises.oracle.lives.get(&(key.clone(), birth));
    life.is_none_or(|life| life.may_end || life.ttl.is_some())
}

pub fn check_absence(
    world: &World,
    key: &SessionKey,
    refusal: &Refusal,
    floor: &Floor,
) -> Result<(), String> {
    let Some((birth, _)) = floor.life else { return Ok(()) };
    if may_have_ended(world, key, birth) || world.promises.was_lost(key) {
        return Ok(());
    }
    Err(format!("{key}: it was acknowledged, now the answer is: {refusal}"))
}

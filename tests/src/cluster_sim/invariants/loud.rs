//! Acknowledged bytes are there unless as many of their holders as there are copies have gone, or somebody evicted
//! them; and then the session says that it is cold.
//= GUARANTEES.md#G10

use keepwarm_core::session::State;
use keepwarm_types::ColdReason;

use crate::cluster_sim::world::World;
use crate::sim::oracle::Seen;

pub fn check(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let manifest = seen.manifest;
    let State::Cold(reason) = manifest.state else { return Ok(()) };
    let Some(told) = world.promises.told.get(&manifest.key) else { return Ok(()) };
    if told.birth != manifest.birth || told.revision != manifest.revision.0 || told.evicting {
        return Ok(());
    }
    if reason == ColdReason::Evicted {
        return Err(format!("{}: evicted, and nobody asked for it", manifest.key));
    }
    let gone = told.holders.iter().filter(|holder| world.promises.gone.contains(holder)).count();
    let copies = told.holders.len().min(world.shape.replication);
    if gone < copies {
        return Err(format!(
            "{}: cold ({reason}) at revision {}, though only {gone} of its holders {:?} have gone",
            manifest.key, manifest.revision, told.holders
        ));
    }
    Ok(())
}

//! Acknowledged bytes are there unless as many of their holders as there are copies have gone or damaged theirs, or
//! somebody evicted them; and then the session says that it is cold.
//= GUARANTEES.md#G10

use keepwarm_core::registry::Member;
use keepwarm_core::session::State;
use keepwarm_types::ColdReason;

use crate::cluster_sim::world::World;
use crate::sim::oracle::Seen;

pub fn check(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let manifest = seen.manifest;
    let State::Cold(reason) = manifest.state else { return Ok(()) };
    let Some(told) = world.promises.told.get(&manifest.key) else { return Ok(()) };
    if told.birth != manifest.birth || told.revision != manifest.revision.0 || told.evicting.is_some() {
        return Ok(());
    }
    if reason == ColdReason::Evicted {
        return Err(format!("{}: evicted, and nobody asked for it", manifest.key));
    }
    // The bytes may have been placed anew since: some placement of this state must have lost its holders.
    let state = (manifest.key.clone(), manifest.birth, manifest.revision.0);
    let all = world.promises.placements.get(&state).map(Vec::as_slice).unwrap_or_default();
    let damaged = |holder: &Member| {
        world.promises.damaged.contains(&(manifest.key.clone(), manifest.birth, holder.clone()))
    };
    let gone = |holder: &&Member| world.promises.gone.contains(*holder) || damaged(holder);
    let lost = all
        .iter()
        .any(|holders| holders.iter().filter(gone).count() >= holders.len().min(world.shape.replication));
    if !lost {
        return Err(format!(
            "{}: cold ({reason}) at revision {}, though too few of its holders have gone: {all:?}",
            manifest.key, manifest.revision
        ));
    }
    Ok(())
}

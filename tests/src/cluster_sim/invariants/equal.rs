//! Once all is quiet, every replica has the same: heads, catalogs, transcripts, ends; and those that should be there.
//= GUARANTEES.md#G1
//= GUARANTEES.md#G11

use crate::cluster_sim::world::World;

pub fn check(world: &World) -> Result<(), String> {
    if !world.whole() {
        return Err("the sets are not full, or not known to all".to_owned());
    }
    for key in world.keys.all() {
        let shard = world.keys.shard(&key);
        let set = world.registry.set(shard).expect("the sets are full");
        let mut first = None;
        for member in &set.replicas {
            let at = world.place(member);
            let head = world.replica(at, shard).and_then(|replica| replica.head(&key));
            let store = &world.nodes[at].disk.store;
            let manifest = store.manifests.get(&key);
            let grave = store.tombstones.get(&key);
            let stamp = manifest.map(|manifest| manifest.stamp).or_else(|| grave.map(|grave| grave.stamp));
            let tokens = manifest.map(|manifest| {
                let name = (key.clone(), manifest.birth);
                store.transcripts.get(&name).cloned().unwrap_or_default()
            });
            if manifest.is_some() && grave.is_some() {
                return Err(format!("{key} is both alive and ended on n{}'s disk", at + 1));
            }
            if head != stamp {
                return Err(format!("{key}: n{} has {head:?} in memory and {stamp:?} on disk", at + 1));
            }
            let have = (head, grave.copied(), tokens);
            let first = first.get_or_insert_with(|| (at, have.clone()));
            if first.1 != have {
                let (a, b) = (first.0 + 1, at + 1);
                return Err(format!("{key}: n{a} has {:?} and n{b} has {have:?}", first.1));
            }
        }
    }
    Ok(())
}

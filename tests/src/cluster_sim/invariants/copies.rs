//! Once all is quiet, every warm session has as many holders as it should, which really have all its bytes.
//= GUARANTEES.md#G10

use keepwarm_core::session::State;
use keepwarm_types::Bytes;

use crate::cluster_sim::world::World;
use crate::sim::memory::checksum;

pub fn check(world: &World) -> Result<(), String> {
    for key in world.keys.all() {
        let shard = world.keys.shard(&key);
        let set = world.registry.set(shard).expect("the sets are full");
        let primary = world.place(&set.replicas[0]);
        let Some(manifest) = world.replica(primary, shard).and_then(|replica| replica.manifest(&key)) else {
            continue;
        };
        if manifest.state != State::Warm || manifest.stored_bytes() == Bytes::ZERO {
            continue;
        }
        let wanted = world.shape.replication.min(set.replicas.len());
        if manifest.holders.len() != wanted {
            return Err(format!("{key}: {:?} hold it, there should be {wanted}", manifest.holders));
        }
        for holder in manifest.holders.iter() {
            let at = world.place(holder);
            let process =
                world.nodes[at].process.as_ref().filter(|process| process.member.as_ref() == Some(holder));
            let Some(process) = process else {
                return Err(format!("{key}: {}.{} holds it and has gone", holder.node, holder.incarnation));
            };
            for block in manifest.instances() {
                let there = process.memory.get(block.instance);
                if there.is_none_or(|slot| checksum(&slot.content) != block.checksum) {
                    return Err(format!("{key}: n{} should hold {:?}", at + 1, block.instance));
                }
            }
        }
    }
    Ok(())
}

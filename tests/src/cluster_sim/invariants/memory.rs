//! Once all is quiet, exactly what manifests name is in memory, with as many names as there are manifests.
//= GUARANTEES.md#G2
//= GUARANTEES.md#G8

use std::collections::BTreeMap;

use keepwarm_types::InstanceId;

use crate::cluster_sim::world::World;

pub fn check(world: &World) -> Result<(), String> {
    for (at, node) in world.nodes.iter().enumerate() {
        let Some(process) = &node.process else { continue };
        let mut named: BTreeMap<InstanceId, (u32, String)> = BTreeMap::new();
        for key in world.keys.all() {
            let replica = process.replicas.get(&world.keys.shard(&key));
            let member = process.member.as_ref();
            let manifest =
                replica.filter(|replica| member.is_some_and(|me| replica.set().replicas.contains(me)));
            let Some(manifest) = manifest.and_then(|replica| replica.manifest(&key)) else { continue };
            if manifest.holders.iter().any(|holder| Some(holder) == member) {
                for block in manifest.instances() {
                    let name = named.entry(block.instance).or_default();
                    name.0 += 1;
                    name.1 += &format!(" {key}");
                }
            }
        }
        for (instance, slot) in process.memory.slots() {
            let names = named.remove(instance).unwrap_or_default();
            if names.0 != slot.names {
                return Err(format!(
                    "n{}: {instance:?} of {:?} has {} names, and should have {} ({})",
                    at + 1,
                    slot.of,
                    slot.names,
                    names.0,
                    names.1
                ));
            }
            if slot.pins > 0 {
                return Err(format!("n{}: {instance:?} is held by nobody", at + 1));
            }
        }
        if let Some((instance, (_, names))) = named.first_key_value() {
            return Err(format!("n{}: {instance:?} is named by{names} and is not there", at + 1));
        }
    }
    Ok(())
}

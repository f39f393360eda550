//! At most one process answers for a shard in one generation.
//= GUARANTEES.md#G11

use keepwarm_types::ShardId;

use crate::cluster_sim::world::World;

pub fn check(world: &mut World, at: usize, shard: ShardId) -> Result<(), String> {
    let Some(replica) = world.replica(at, shard) else { return Ok(()) };
    let Some(member) = world.nodes[at].member().cloned() else {
        return Err(format!("n{} answers and is not registered", at + 1));
    };
    let generation = replica.set().generation;
    if replica.set().replicas.first() != Some(&member) {
        return Err(format!("n{} answers for {shard} and is not its primary in g{generation}", at + 1));
    }
    let first = world.promises.primaries.entry((shard, generation)).or_insert_with(|| member.clone());
    if *first != member {
        return Err(format!("{shard} g{generation}: both {} and {} answer", first.node, member.node));
    }
    Ok(())
}

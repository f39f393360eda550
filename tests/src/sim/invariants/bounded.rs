//! The arena is never overdrawn, and no reference is given back twice.
//= GUARANTEES.md#G8

use crate::sim::node::ARENA_BLOCKS;
use crate::sim::world::World;

pub fn check(world: &World) -> Result<(), String> {
    let Some(node) = &world.node else { return Ok(()) };
    if node.memory.underflows > 0 {
        return Err("a reference was taken of, or given back to, an instance that is not there".to_owned());
    }
    if node.memory.used() > ARENA_BLOCKS {
        return Err(format!("{} blocks of {ARENA_BLOCKS} are in use", node.memory.used()));
    }
    Ok(())
}

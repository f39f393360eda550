//! Once all is quiet, exactly the blocks that manifests and stages name are taken.
//= GUARANTEES.md#G2

use keepwarm_core::session::Manifest;

use crate::sim::world::World;

/// `manifests` are all that the node has; nothing is staged any more.
pub fn check(world: &World, manifests: &[Manifest]) -> Result<(), String> {
    let Some(node) = &world.node else { return Err("the node is down".to_owned()) };
    let named: u64 = manifests.iter().map(|manifest| manifest.instances().count() as u64).sum();
    if node.memory.names() != named {
        return Err(format!("{} references are counted, manifests have {named}", node.memory.names()));
    }
    if node.memory.pinned() > 0 {
        return Err(format!("{} blocks are held by nobody", node.memory.pinned()));
    }
    Ok(())
}

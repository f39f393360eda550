//! No call waits for ever: a client knows in time, or the world has forgotten somebody.
//= GUARANTEES.md#G8

use keepwarm_types::Millis;

use crate::cluster_sim::world::{CLIENT_PATIENCE_MS, World};

pub fn check(world: &World) -> Result<(), String> {
    let late = |(_, since): &&(String, keepwarm_types::Timestamp)| {
        *since + Millis(CLIENT_PATIENCE_MS + 10) < world.now
    };
    match world.waiting.values().next().filter(late) {
        Some((what, _)) => Err(format!("not answered within {CLIENT_PATIENCE_MS} ms: {what}")),
        None => Ok(()),
    }
}

//! Every call is answered, or its connection ends, within a bounded time.

use keepwarm_types::Millis;

use crate::sim::world::{ANSWERED_WITHIN_MS, World};

pub fn check(world: &World) -> Result<(), String> {
    let late =
        |(_, since): &&(String, keepwarm_types::Timestamp)| *since + Millis(ANSWERED_WITHIN_MS) < world.now;
    match world.waiting.values().find(late) {
        Some((what, _)) => Err(format!("not answered within {ANSWERED_WITHIN_MS} ms: {what}")),
        None => Ok(()),
    }
}

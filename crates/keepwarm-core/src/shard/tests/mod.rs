//! Scenarios of one shard: events in, commands out, no runtime.

mod bench;
mod model;
mod verbs;

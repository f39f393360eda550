//! Which shard a new session is minted into and which GPU it runs on.

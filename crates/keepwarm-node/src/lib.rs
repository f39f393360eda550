//! ractor actors: thin shells that feed the core and carry out its commands.

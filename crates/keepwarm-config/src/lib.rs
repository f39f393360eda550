//! cluster.toml: text to a validated Config, with errors that name file, line and key.

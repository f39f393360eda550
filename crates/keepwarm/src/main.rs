//! The keepwarm binary: command line, wiring, signals, exit codes.
fn main() {}

//! The one door to standard error: a library in another's process says little, and says who it is.
#![expect(clippy::print_stderr, reason = "a driver has no other way to say what its codes cannot")]

/// Prints one line.
pub(crate) fn say(line: &str) {
    eprintln!("softcuda: {line}");
}

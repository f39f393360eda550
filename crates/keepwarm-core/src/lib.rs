//! The brain: every decision, as event in and commands out, without IO.

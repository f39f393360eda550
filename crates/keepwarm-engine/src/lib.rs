//! Executors, batchers and the built-in Llama engine.

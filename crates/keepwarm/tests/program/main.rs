//! The binary as its users run it: one program of tests, which links the system once.

mod chaos;
mod cluster_files;
mod gpus;
mod homes;
mod process;
mod tiers;

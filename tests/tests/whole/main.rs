//! Whole-system tests in one program, which links the system once: the HTTP contract, the simulations, what operators see.

mod api;
mod archives;
mod cluster_simulation;
mod codes;
mod differential;
mod lossy;
mod operators;
mod shells;
mod simulation;
mod tenants;

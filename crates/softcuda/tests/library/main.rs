//! The built library as programs see it: real cudarc code, and its raw calls where its safe layer has none. Each test
//! runs in a process of its own, whose loader finds the library laid out as the driver's. Tests that run kernels need
//! g++.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a child tells its parent what it saw")]
#![expect(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "calls a C interface throughout, with handles and places of its own making"
)]

mod cudarc_layers;
#[macro_use]
mod driver;
mod faults;
mod ipc;
mod kernels;
mod memory;
mod observation;
mod order;
mod process;
mod races;

//! A software stand-in for the CUDA driver library, over host memory.
//!
//! Built as a shared object that is laid out as `libcuda.so` and `libcuda.so.1`, it lets programs written for the
//! driver API run and be tested on machines without a GPU: streams are threads, copies are really asynchronous,
//! memory is poisoned, accesses are checked when they run, and what nothing orders is reported as a race. The README
//! says what is modelled and what is not.

mod api;
mod call;
mod context;
pub mod describe;
mod driver;
mod error;
mod event;
mod fault;
mod ipc;
pub mod kernels;
mod launch;
pub mod layout;
mod locks;
pub mod memory;
mod module;
mod operation;
pub mod preload;
mod races;
mod report;
pub mod settings;
mod statistics;
mod stream;
pub mod symbols;
mod trace;

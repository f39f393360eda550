//! Names the shared object as the driver's, so that a copy which is loaded already answers `dlopen("libcuda.so")`, and
//! keeps it loaded: its streams' threads run in it.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
}

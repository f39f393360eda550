//! Names the shared object as the driver's, so that a copy which is loaded already answers `dlopen("libcuda.so")`.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo::rerun-if-changed=build.rs");
}

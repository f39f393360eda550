//! Settings by name: what the program set through `softcudaSet`, else the environment. Owns what was set.
//!
//! A process that has threads cannot change its environment safely; a test that plays its own machine sets it here.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::locks::lock;

/// All there are.
pub const NAMES: &[&str] = &[
    "SOFTCUDA_DEVICES",
    "SOFTCUDA_FAULTS",
    "SOFTCUDA_KERNELS",
    "SOFTCUDA_KERNEL_ORDER",
    "SOFTCUDA_RACES",
    "SOFTCUDA_TRACE",
    "CUDA_VISIBLE_DEVICES",
];

static SET: Mutex<BTreeMap<&'static str, String>> = Mutex::new(BTreeMap::new());

/// What was set, else what the environment says; none where it says nothing or no text.
pub(crate) fn get(name: &str) -> Option<String> {
    let set = lock(&SET).get(name).cloned();
    set.or_else(|| std::env::var(name).ok())
}

/// Sets one; false if there is none of that name.
pub(crate) fn set(name: &str, value: String) -> bool {
    let Some(name) = NAMES.iter().find(|known| **known == name) else { return false };
    lock(&SET).insert(name, value);
    true
}

//! Modules: names of kernels out of PTX text, found in the shared object that holds them for the CPU.
#![expect(unsafe_code, reason = "opens a shared object and reads its kernels' descriptions")]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;

use crate::error::{Answer, Code};
use crate::report;
use crate::settings;

/// Bytes of PTX that are read for its end.
const PTX_MAX: usize = 256 << 20;

/// What a compiled kernel says of itself; the layout is that of `softcuda_kernel` in `shim/softcuda.h`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Kernel {
    name: *const c_char,
    pub(crate) parameters: u32,
    pub(crate) sizes: *const u32,
    pub(crate) run: unsafe extern "C" fn(*const *mut c_void, *const c_void) -> u32,
}

// SAFETY: a description is constant data of a shared object that is never closed.
unsafe impl Sync for Kernel {}
// SAFETY: as above.
unsafe impl Send for Kernel {}

/// A loaded module.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) context: usize,
    pub(crate) kernels: HashMap<String, &'static Kernel>,
}

/// A kernel of a module.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) context: usize,
    pub(crate) module: usize,
    pub(crate) name: String,
    pub(crate) kernel: &'static Kernel,
}

static OBJECT: OnceLock<Option<usize>> = OnceLock::new();

/// The shared object named by `SOFTCUDA_KERNELS`, opened once.
fn object() -> Answer<usize> {
    let open = || {
        let Some(path) = settings::get("SOFTCUDA_KERNELS") else {
            report::say(
                "SOFTCUDA_KERNELS is not set: it names the shared object that softcuda-kernels makes of .cu files",
            );
            return None;
        };
        let name = CString::new(path.clone()).ok()?;
        // SAFETY: opens a library that the program's user named.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror's answer is a C string or null, read before any other call.
            let why = unsafe { libc::dlerror() };
            let why = if why.is_null() {
                "unknown".into()
            } else {
                // SAFETY: not null, hence a C string.
                unsafe { CStr::from_ptr(why) }.to_string_lossy()
            };
            report::say(&format!("SOFTCUDA_KERNELS='{path}' cannot be opened: {why}"));
            return None;
        }
        Some(handle as usize)
    };
    OBJECT.get_or_init(open).ok_or(Code::NOT_FOUND)
}

fn find(name: &str) -> Answer<&'static Kernel> {
    let handle = object()?;
    let symbol = CString::new(format!("softcuda_kernel_{name}")).map_err(|_| Code::INVALID_IMAGE)?;
    // SAFETY: a handle of an open library and a C string.
    let found = unsafe { libc::dlsym(handle as *mut c_void, symbol.as_ptr()) };
    if found.is_null() {
        report::say(&format!(
            "kernel '{name}' is in the PTX but not in SOFTCUDA_KERNELS: compile its .cu file in"
        ));
        return Err(Code::NOT_FOUND);
    }
    // SAFETY: symbols of that name are `softcuda_kernel` structures, made by this crate's compiler.
    Ok(unsafe { &*found.cast::<Kernel>() })
}

impl Module {
    /// From PTX text that ends with a NUL.
    pub(crate) fn load(image: usize, context: usize) -> Answer<Self> {
        // SAFETY: cuModuleLoadData's contract for text: a C string.
        let image = unsafe { CStr::from_ptr(image as *const c_char) };
        let text = image.to_str().map_err(|_| Code::INVALID_IMAGE)?;
        if text.len() > PTX_MAX || !text.contains(".version") {
            report::say("a module's image is not PTX text: cubins and fatbins cannot run on a CPU");
            return Err(Code::INVALID_IMAGE);
        }
        let mut kernels = HashMap::new();
        for name in entries(text) {
            kernels.insert(name.to_owned(), find(name)?);
        }
        Ok(Self { context, kernels })
    }
}

/// The names of a PTX text's entry functions.
fn entries(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default();
        let mut words = code.split(|c: char| c.is_whitespace() || c == '(').filter(|word| !word.is_empty());
        while let Some(word) = words.next() {
            if word == ".entry" {
                names.extend(words.next());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_names_are_found() {
        let ptx =
            ".version 8.4\n.visible .entry gather(\n .param .u64 a)\n// .entry none(\n.entry scrub ()\n{ }";
        assert_eq!(entries(ptx), ["gather", "scrub"]);
    }
}

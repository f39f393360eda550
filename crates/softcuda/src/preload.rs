//! softcuda as the driver of the running program: for tests that call CUDA in their own process.
#![expect(unsafe_code, reason = "opens a shared object and calls its C symbols")]

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::layout;

/// The opened library. It stays open for as long as the process lives.
#[derive(Debug, Clone, Copy)]
pub struct Preloaded {
    fault: unsafe extern "C" fn(*const c_char) -> u32,
    statistics: unsafe extern "C" fn(*mut c_char, usize) -> usize,
}

/// Opens the built library before anything else looks for a driver, with these settings in place of the environment's
/// (`("SOFTCUDA_DEVICES", "gpus=2,memory=64MiB")`). They count until the program's first `cuInit`; more than one call is no
/// harm.
///
/// # Errors
/// The library was not built, does not open, or does not know a setting.
pub fn preload(settings: &[(&str, &str)]) -> io::Result<Preloaded> {
    let library = open(&layout::beside_this_program()?)?;
    // SAFETY: these are the types of the library's own symbols, which were built from the same source.
    let (set, preloaded) = unsafe {
        let set: unsafe extern "C" fn(*const c_char, *const c_char) -> u32 =
            std::mem::transmute(symbol(library, c"softcudaSet")?);
        let fault = std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn(*const c_char) -> u32>(
            symbol(library, c"softcudaFault")?,
        );
        let statistics = std::mem::transmute::<
            *mut libc::c_void,
            unsafe extern "C" fn(*mut c_char, usize) -> usize,
        >(symbol(library, c"softcudaStatistics")?);
        (set, Preloaded { fault, statistics })
    };
    for (name, value) in settings {
        let (c_name, c_value) = (CString::new(*name)?, CString::new(*value)?);
        // SAFETY: both are C strings that live through the call.
        if unsafe { set(c_name.as_ptr(), c_value.as_ptr()) } != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("softcuda has no setting '{name}'"),
            ));
        }
    }
    Ok(preloaded)
}

fn open(path: &Path) -> io::Result<*mut libc::c_void> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the library's initialisers do nothing but set it up.
    let opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if opened.is_null() {
        Err(io::Error::other(format!("{} does not open", path.display())))
    } else {
        Ok(opened)
    }
}

fn symbol(library: *mut libc::c_void, name: &CStr) -> io::Result<*mut libc::c_void> {
    // SAFETY: the library is open and stays so.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() {
        return Err(io::Error::other(format!("{} is not exported", name.to_string_lossy())));
    }
    Ok(found)
}

impl Preloaded {
    /// Carries fault orders out, as `softcudaFault` does. The driver must have been initialised.
    ///
    /// # Errors
    /// It was not, or the orders are not understood; what was wrong is on standard error.
    pub fn order(&self, orders: &str) -> io::Result<()> {
        let text = CString::new(orders)?;
        // SAFETY: a C string that lives through the call.
        match unsafe { (self.fault)(text.as_ptr()) } {
            0 => Ok(()),
            code => Err(io::Error::other(format!("softcuda answers {code} to '{orders}'"))),
        }
    }

    /// The statistics as JSON; nothing before `cuInit`.
    #[must_use]
    pub fn statistics(&self) -> String {
        // SAFETY: a null buffer asks for the length alone.
        let needed = unsafe { (self.statistics)(std::ptr::null_mut(), 0) };
        // Counts grow meanwhile, by a few digits.
        let mut text = vec![0_u8; needed + 4096];
        // SAFETY: the buffer has that length.
        unsafe { (self.statistics)(text.as_mut_ptr().cast(), text.len()) };
        CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned()
    }
}

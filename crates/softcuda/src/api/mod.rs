//! The exported symbols: thin shells that read C arguments and call the safe core. One file per subject; a symbol
//! that is not here does not exist, so that a program which asks for it learns that it is missing.
//!
//! Every function's contract is the driver API's own.

mod contexts;
mod control;
mod copies;
mod devices;
mod memory;
mod modules;
mod streams;

/// Exports one symbol that answers a `CUresult`: `plain`, `about(device)` or `within` the current context.
macro_rules! symbol {
    ($kind:ident$(($device:ident))? fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$call:ident| $body:block) => {
        /// As in the CUDA driver API.
        ///
        /// # Safety
        /// The driver API's contract for its arguments.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, unreachable_pub, reason = "exported under the driver API's name")]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> u32 {
            $crate::call::$kind(stringify!($name), $($device,)? |$call| $body)
        }
    };
}
pub(crate) use symbol;

//! Ranges on a profiler's time line, one around each batch from its submission to its end: NVTX version 3, spoken to the
//! library that a profiler names in the environment.
//!
//! NVTX has no library of its own: what a program calls is a table of pointers that is empty until a tool fills it
//! (`nvtxDetail/nvtxInit.h` and `nvtxTypes.h` of NVIDIA's NVTX 3). This is that table, with the three calls that are used:
//! the crate `nvtx` needs libclang and a C compiler to build it from the headers.
//!
//! Without the feature `nvtx` nothing of it is there; with it and without a profiler, a batch costs one look at a word.

use keepwarm_types::Owner;

/// What a range says.
#[derive(Debug)]
#[cfg_attr(not(feature = "nvtx"), expect(dead_code, reason = "said to profilers only"))]
pub(crate) struct Label {
    /// What is done: `copy in`.
    pub(crate) work: String,
    /// The tier that bytes come from, by its arena's name.
    pub(crate) from: String,
    /// The tier that they go to.
    pub(crate) to: String,
    pub(crate) blocks: usize,
    pub(crate) bytes: usize,
    /// Whose blocks they are.
    pub(crate) owner: Owner,
    /// Whether others have some too.
    pub(crate) shared: bool,
}

/// A range; ends when it drops.
#[derive(Debug)]
pub(crate) struct Range {
    #[cfg(feature = "nvtx")]
    number: Option<u64>,
}

impl Range {
    /// Ends it now.
    pub(crate) fn end(self) {}
}

/// Begins a range, where a profiler asks for ranges; none where there is nothing to say.
#[cfg(not(feature = "nvtx"))]
pub(crate) fn begin(_label: impl FnOnce() -> Option<Label>) -> Range {
    Range {}
}

#[cfg(feature = "nvtx")]
pub(crate) use profiler::begin;

#[cfg(feature = "nvtx")]
#[allow(unsafe_code)]
mod profiler {
    use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicPtr, Ordering};

    use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};

    use super::{Label, Range};

    /// Names the profiler's library.
    const LIBRARY: &str = "NVTX_INJECTION64_PATH";
    /// Its entry.
    const ENTRY: &CStr = c"InitializeInjectionNvtx2";
    /// How ranges of this program are grouped.
    const DOMAIN: &CStr = c"keepwarm";
    /// `NVTX_VERSION`.
    const VERSION: u16 = 3;
    /// `NVTX_PAYLOAD_TYPE_UNSIGNED_INT64` and `NVTX_MESSAGE_TYPE_ASCII`.
    const PAYLOAD_U64: i32 = 1;
    const MESSAGE_TEXT: i32 = 1;
    /// `NVTX_ETID_CALLBACKS` and `NVTX_ETID_VERSIONINFO`.
    const TABLE_CALLBACKS: u32 = 1;
    const TABLE_VERSION: u32 = 3;
    /// Calls of each module (`NVTX_CBID_…_SIZE`), by `NvtxCallbackModule`; the first is none.
    const CALLS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
    /// `NVTX_CB_MODULE_CORE2` and its calls that are used.
    const CORE2: usize = 5;
    const RANGE_START: usize = 2;
    const RANGE_END: usize = 3;
    const DOMAIN_CREATE: usize = 12;

    type Slot = AtomicPtr<c_void>;
    type GetTable = extern "C" fn(u32) -> *const c_void;

    /// A module's calls, as tools see them: pointers to where each call's pointer is kept, and a null behind them.
    struct Module {
        slots: Vec<Slot>,
        entries: Vec<*const Slot>,
    }

    // SAFETY: the entries point to the slots beside them, which are atomic and never move.
    unsafe impl Send for Module {}
    // SAFETY: as above.
    unsafe impl Sync for Module {}

    impl Module {
        fn new(calls: usize) -> Self {
            let slots: Vec<Slot> = (0..calls).map(|_| Slot::default()).collect();
            // The first of each module is no call.
            let entry =
                |(at, slot): (usize, &Slot)| if at == 0 { std::ptr::null() } else { &raw const *slot };
            let entries = slots.iter().enumerate().map(entry).chain([std::ptr::null()]).collect();
            Self { slots, entries }
        }
    }

    fn modules() -> &'static [Module] {
        static MODULES: OnceLock<Vec<Module>> = OnceLock::new();
        MODULES.get_or_init(|| CALLS.iter().map(|calls| Module::new(*calls)).collect())
    }

    /// `NvtxExportTableCallbacks`.
    #[repr(C)]
    struct Callbacks {
        bytes: usize,
        module: extern "C" fn(c_uint, *mut *const *const Slot, *mut c_uint) -> c_int,
    }

    /// `NvtxExportTableVersionInfo`.
    #[repr(C)]
    struct VersionInfo {
        bytes: usize,
        version: u32,
        reserved: u32,
        tool: extern "C" fn(u32),
    }

    static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module: module_table };
    static VERSION_INFO: VersionInfo = VersionInfo {
        bytes: size_of::<VersionInfo>(),
        version: VERSION as u32,
        reserved: 0,
        tool: tool_version,
    };

    extern "C" fn tool_version(_version: u32) {}

    extern "C" fn module_table(module: c_uint, table: *mut *const *const Slot, calls: *mut c_uint) -> c_int {
        let Some(module) = modules().get(module as usize).filter(|module| !module.slots.is_empty()) else {
            return 0;
        };
        if !table.is_null() {
            // SAFETY: the tool's place for it, by the interface.
            unsafe { *table = module.entries.as_ptr() };
        }
        if !calls.is_null() {
            // SAFETY: as above.
            unsafe { *calls = module.slots.len() as c_uint };
        }
        1
    }

    extern "C" fn export_table(which: u32) -> *const c_void {
        match which {
            TABLE_CALLBACKS => (&raw const CALLBACKS).cast(),
            TABLE_VERSION => (&raw const VERSION_INFO).cast(),
            _ => std::ptr::null(),
        }
    }

    /// `nvtxEventAttributes_v2`.
    #[repr(C)]
    struct Attributes {
        version: u16,
        size: u16,
        category: u32,
        color_type: i32,
        color: u32,
        payload_type: i32,
        reserved: i32,
        payload: u64,
        message_type: i32,
        message: *const c_char,
    }

    type DomainCreate = extern "C" fn(*const c_char) -> *mut c_void;
    type RangeStart = extern "C" fn(*mut c_void, *const Attributes) -> u64;
    type RangeEnd = extern "C" fn(*mut c_void, u64);

    /// What a tool takes.
    struct Tool {
        domain: *mut c_void,
        start: RangeStart,
        end: RangeEnd,
    }

    // SAFETY: NVTX's calls may come from any thread, with the same domain.
    unsafe impl Send for Tool {}
    // SAFETY: as above.
    unsafe impl Sync for Tool {}

    impl Tool {
        /// Lets the library that the environment names fill the table.
        fn attach() -> Option<Self> {
            let path = std::env::var_os(LIBRARY)?;
            let give_up = |why: &str| {
                tracing::warn!(library = ?path, "{LIBRARY} is set, but there will be no ranges: {why}");
                None
            };
            // SAFETY: a profiler's library, which the environment says to load; its initialisers are its purpose.
            let library = match unsafe { Library::open(Some(&path), RTLD_LAZY | RTLD_LOCAL) } {
                Ok(library) => library,
                Err(error) => return give_up(&error.to_string()),
            };
            // SAFETY: the entry's type by `nvtxTypes.h`.
            let entry = unsafe { library.get::<extern "C" fn(GetTable) -> c_int>(ENTRY.to_bytes_with_nul()) };
            let attached = match entry {
                Ok(entry) => entry(export_table),
                Err(error) => return give_up(&error.to_string()),
            };
            if attached == 0 {
                return give_up("the profiler did not attach");
            }
            // It is called as long as the process lives.
            std::mem::forget(library);
            let call = |at: usize| {
                let call = modules()[CORE2].slots[at].load(Ordering::Acquire);
                (!call.is_null()).then_some(call)
            };
            let (Some(start), Some(end)) = (call(RANGE_START), call(RANGE_END)) else {
                return give_up("the profiler takes no ranges");
            };
            // SAFETY: a tool puts calls of these types there, by `nvtxTypes.h`.
            let (start, end) = unsafe {
                (
                    std::mem::transmute::<*mut c_void, RangeStart>(start),
                    std::mem::transmute::<*mut c_void, RangeEnd>(end),
                )
            };
            // SAFETY: as above. Without a domain of its own, ranges go to the program's.
            let create = call(DOMAIN_CREATE)
                .map(|call| unsafe { std::mem::transmute::<*mut c_void, DomainCreate>(call) });
            let domain = create.map_or(std::ptr::null_mut(), |create| create(DOMAIN.as_ptr()));
            Some(Self { domain, start, end })
        }
    }

    fn tool() -> Option<&'static Tool> {
        static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
        TOOL.get_or_init(Tool::attach).as_ref()
    }

    /// Begins a range, where a profiler asks for ranges; none where there is nothing to say.
    pub(crate) fn begin(label: impl FnOnce() -> Option<Label>) -> Range {
        let number = tool().and_then(|tool| {
            let label = label()?;
            // Names have no NUL.
            let message = CString::new(label.to_string()).ok()?;
            let attributes = Attributes {
                version: VERSION,
                size: size_of::<Attributes>() as u16,
                category: 0,
                color_type: 0,
                color: 0,
                payload_type: PAYLOAD_U64,
                reserved: 0,
                payload: label.bytes as u64,
                message_type: MESSAGE_TEXT,
                message: message.as_ptr(),
            };
            Some((tool.start)(tool.domain, &raw const attributes))
        });
        Range { number }
    }

    impl Drop for Range {
        fn drop(&mut self) {
            if let (Some(number), Some(tool)) = (self.number, tool()) {
                (tool.end)(tool.domain, number);
            }
        }
    }

    impl std::fmt::Display for Label {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let Self { work, from, to, blocks, bytes, owner, shared } = self;
            let others = if *shared { " and others" } else { "" };
            write!(
                f,
                "{work}: {from} -> {to}, {blocks} blocks, {bytes} bytes, {}/{}{others}",
                owner.tenant, owner.birth
            )
        }
    }
}

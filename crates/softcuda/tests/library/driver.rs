//! The driver API with results instead of codes, and no more than that.

use std::ffi::{CString, c_char, c_void};

use cudarc::driver::sys;

/// A call's answer: nothing, or its code.
pub(crate) type Answer<T = ()> = Result<T, u32>;

pub(crate) fn answer(code: sys::CUresult) -> Answer {
    match code as u32 {
        0 => Ok(()),
        code => Err(code),
    }
}

/// Calls the driver: `cu!(cuCtxSynchronize())`.
macro_rules! cu {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::driver::answer(unsafe { cudarc::driver::sys::$name($($argument),*) })
    };
}

/// A stream of the driver, which a host function may own.
#[derive(Clone, Copy)]
pub(crate) struct Stream(pub(crate) sys::CUstream);

/// The legacy default stream.
pub(crate) const NULL: Stream = Stream(std::ptr::null_mut());

/// Starts the driver and makes a device's primary context current.
pub(crate) fn open(device: i32) -> sys::CUcontext {
    cu!(cuInit(0)).expect("cuInit");
    let mut context = std::ptr::null_mut();
    cu!(cuDevicePrimaryCtxRetain(&raw mut context, device)).expect("a context");
    cu!(cuCtxSetCurrent(context)).expect("it is current");
    context
}

/// A stream that does not take part in the legacy stream's order.
pub(crate) fn stream() -> Stream {
    made(1)
}

/// A stream that does.
pub(crate) fn blocking_stream() -> Stream {
    made(0)
}

fn made(flags: u32) -> Stream {
    let mut stream = std::ptr::null_mut();
    cu!(cuStreamCreate(&raw mut stream, flags)).expect("a stream");
    Stream(stream)
}

pub(crate) fn event() -> sys::CUevent {
    let mut event = std::ptr::null_mut();
    cu!(cuEventCreate(&raw mut event, 0)).expect("an event");
    event
}

pub(crate) fn alloc(bytes: usize) -> u64 {
    let mut at = 0;
    cu!(cuMemAlloc_v2(&raw mut at, bytes)).expect("device memory");
    at
}

/// Page-locked memory; as a slice only between operations.
#[derive(Clone, Copy)]
pub(crate) struct Pinned {
    pub(crate) at: *mut u8,
    bytes: usize,
}

impl Pinned {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }.to_vec()
    }

    pub(crate) fn fill(&self, byte: u8) {
        unsafe { std::ptr::write_bytes(self.at, byte, self.bytes) };
    }
}

pub(crate) fn pinned(bytes: usize) -> Pinned {
    let mut at = std::ptr::null_mut();
    cu!(cuMemHostAlloc(&raw mut at, bytes, 0)).expect("page-locked memory");
    Pinned { at: at.cast(), bytes }
}

impl Stream {
    pub(crate) fn sync(self) -> Answer {
        cu!(cuStreamSynchronize(self.0))
    }

    pub(crate) fn record(self, event: sys::CUevent) {
        cu!(cuEventRecord(event, self.0)).expect("a record");
    }

    pub(crate) fn wait(self, event: sys::CUevent) {
        cu!(cuStreamWaitEvent(self.0, event, 0)).expect("a wait");
    }

    pub(crate) fn fill(self, at: u64, byte: u8, bytes: usize) -> Answer {
        cu!(cuMemsetD8Async(at, byte, bytes, self.0))
    }

    pub(crate) fn copy_in(self, to: u64, from: &[u8]) -> Answer {
        cu!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.0))
    }

    /// To pageable memory: the bytes are there when it returns.
    pub(crate) fn copy_out(self, from: u64, bytes: usize) -> Answer<Vec<u8>> {
        let mut to = vec![0; bytes];
        cu!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, bytes, self.0))?;
        Ok(to)
    }

    pub(crate) fn copy_in_pinned(self, to: u64, from: Pinned) -> Answer {
        cu!(cuMemcpyHtoDAsync_v2(to, from.at.cast(), from.bytes, self.0))
    }

    pub(crate) fn copy_out_pinned(self, to: Pinned, from: u64) -> Answer {
        cu!(cuMemcpyDtoHAsync_v2(to.at.cast(), from, to.bytes, self.0))
    }

    pub(crate) fn copy(self, to: u64, from: u64, bytes: usize) -> Answer {
        cu!(cuMemcpyDtoDAsync_v2(to, from, bytes, self.0))
    }

    /// Runs a closure on the stream's thread, as a host function.
    pub(crate) fn host(self, function: impl FnOnce() + Send + 'static) -> Answer {
        unsafe extern "C" fn call(data: *mut c_void) {
            let function = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
            function();
        }
        let boxed: Box<Box<dyn FnOnce() + Send>> = Box::new(Box::new(function));
        cu!(cuLaunchHostFunc(self.0, Some(call), Box::into_raw(boxed).cast()))
    }

    /// Holds the stream until the sender is dropped.
    pub(crate) fn hold(self) -> std::sync::mpsc::Sender<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let wait = move || assert!(receiver.recv().is_err(), "nothing is ever sent");
        self.host(wait).expect("a host function");
        sender
    }
}

/// A loaded module's kernels.
pub(crate) struct Module(pub(crate) sys::CUmodule);

/// Loads a module whose PTX has these entries.
pub(crate) fn module(entries: &[&str]) -> Answer<Module> {
    let mut ptx = ".version 8.0\n.target sm_90\n.address_size 64\n".to_owned();
    for entry in entries {
        ptx.push_str(&format!(".visible .entry {entry}()\n{{ ret; }}\n"));
    }
    let ptx = CString::new(ptx).expect("no NUL in it");
    let mut module = std::ptr::null_mut();
    cu!(cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()))?;
    Ok(Module(module))
}

impl Module {
    /// Launches a kernel; each parameter is eight bytes or fewer.
    pub(crate) fn launch(&self, name: &str, shape: Shape, stream: Stream, parameters: &[u64]) -> Answer {
        let mut parameters = parameters.to_vec();
        let pointers: Vec<*mut c_void> = parameters.iter_mut().map(|word| (&raw mut *word).cast()).collect();
        let Shape { grid, block, shared } = shape;
        self.launch_cube(name, ([grid, 1, 1], [block, 1, 1], shared), stream, &pointers)
    }

    /// Launches a kernel with all sides of its shape, and pointers to its parameters.
    pub(crate) fn launch_cube(
        &self,
        name: &str,
        (grid, block, shared): ([u32; 3], [u32; 3], u32),
        stream: Stream,
        parameters: &[*mut c_void],
    ) -> Answer {
        let name = CString::new(name).expect("no NUL in it");
        let mut function = std::ptr::null_mut();
        cu!(cuModuleGetFunction(&raw mut function, self.0, name.as_ptr()))?;
        let mut parameters = parameters.to_vec();
        let ([x, y, z], [threads_x, threads_y, threads_z]) = (grid, block);
        cu!(cuLaunchKernel(
            function,
            x,
            y,
            z,
            threads_x,
            threads_y,
            threads_z,
            shared,
            stream.0,
            parameters.as_mut_ptr(),
            std::ptr::null_mut()
        ))
    }
}

/// Blocks, threads of each, bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) grid: u32,
    pub(crate) block: u32,
    pub(crate) shared: u32,
}

pub(crate) fn shape(grid: u32, block: u32) -> Shape {
    Shape { grid, block, shared: 0 }
}

/// Orders faults.
pub(crate) fn fault(orders: &str) -> Answer {
    let orders = CString::new(orders).expect("no NUL in it");
    let code = unsafe {
        let function = sys::culib().get::<unsafe extern "C" fn(*const c_char) -> u32>(b"softcudaFault\0");
        function.expect("the library is softcuda")(orders.as_ptr())
    };
    if code == 0 { Ok(()) } else { Err(code) }
}

/// The library's statistics.
pub(crate) fn statistics() -> serde_json::Value {
    let text = unsafe {
        let function =
            sys::culib().get::<unsafe extern "C" fn(*mut c_char, usize) -> usize>(b"softcudaStatistics\0");
        let function = function.expect("the library is softcuda");
        // What the call itself adds, such as a digit more, is far less than this.
        let mut buffer = vec![0_u8; function(std::ptr::null_mut(), 0) + 4096];
        function(buffer.as_mut_ptr().cast(), buffer.len());
        std::ffi::CStr::from_bytes_until_nul(&buffer).expect("a C string").to_string_lossy().into_owned()
    };
    serde_json::from_str(&text).expect("statistics are JSON")
}

/// Declares an access of the host to page-locked memory.
pub(crate) fn host_access(at: *mut u8, bytes: usize, write: bool) -> Answer {
    let code = unsafe {
        let function =
            sys::culib().get::<unsafe extern "C" fn(usize, usize, i32) -> u32>(b"softcudaHostAccess\0");
        function.expect("the library is softcuda")(at as usize, bytes, i32::from(write))
    };
    if code == 0 { Ok(()) } else { Err(code) }
}

/// Waits for a condition, and stops the test where it does not come.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::yield_now();
    }
}

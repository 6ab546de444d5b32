//! The CUDA driver API. Every call completes before it returns; what a host must not rely on (a copy
//! that nothing waits for, a queue that grows) is counted. An error of a kernel is sticky, as on a
//! GPU: until its context is reset every call there fails with it.

mod device;
mod launch;
mod memory;
mod module;
mod stream;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};

use crate::Status;
use crate::memory::{DEVICES, INVALID_VALUE};

pub use device::*;
pub use launch::*;
pub use memory::*;
pub use module::*;
pub use stream::*;

const NOT_INITIALIZED: i32 = 3;
const INVALID_DEVICE: i32 = 101;
const INVALID_IMAGE: i32 = 200;
const INVALID_CONTEXT: i32 = 201;
const FILE_NOT_FOUND: i32 = 301;
const INVALID_HANDLE: i32 = 400;
const NOT_FOUND: i32 = 500;
const LAUNCH_OUT_OF_RESOURCES: i32 = 701;
const NOT_SUPPORTED: i32 = 801;

const SHARED_PER_BLOCK: usize = 48 << 10;
const SHARED_OPT_IN: usize = 163 << 10;

type Handle = usize;

/// What handles mean, but for memory.
#[derive(Default)]
struct State {
    module: module::Modules,
    /// Streams that were made, with their devices.
    streams: HashMap<Handle, usize>,
    queues: [stream::Queue; DEVICES],
    events: HashMap<Handle, stream::Event>,
    pinned: HashSet<u64>,
    next: Handle,
}

impl State {
    fn handle(&mut self) -> Handle {
        self.next += 0x100;
        0x10_0000 + self.next
    }

    /// The device of a stream; the default streams are those of the current context.
    fn stream(&self, s: Handle) -> Result<usize, i32> {
        if s <= 2 { Ok(current()) } else { self.streams.get(&s).copied().ok_or(INVALID_HANDLE) }
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap()
}

/// The error that a device's context is lost by, or 0.
static LOST: [AtomicI32; DEVICES] = [const { AtomicI32::new(0) }; DEVICES];

/// Fails if the device's context is lost.
fn healthy(device: usize) -> Status {
    match LOST[device].load(Ordering::Relaxed) {
        0 => Ok(()),
        error => Err(error),
    }
}

fn lose(device: usize, error: i32) {
    LOST[device].store(error, Ordering::Relaxed);
}

/// The context of device 0; that of the next is one more.
const CONTEXT: Handle = 0xc0_0000;

thread_local! {
    /// This thread's context, or 0.
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

/// The device of this thread's context.
fn current() -> usize {
    CURRENT.get().saturating_sub(CONTEXT)
}

fn out<T>(p: *mut T, v: T) -> Status {
    if p.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: a result pointer is null or valid for the result.
    unsafe { p.write(v) };
    Ok(())
}

fn c_text<'a>(p: *const c_char) -> Result<&'a str, i32> {
    if p.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: a NUL-terminated string.
    unsafe { CStr::from_ptr(p) }.to_str().map_err(|_| INVALID_IMAGE)
}

/// Defines exported functions whose bodies end in a `Status`. Those `in context` fail while the
/// current context is lost.
macro_rules! api {
    (in context; $($functions:tt)*) => { $crate::driver::api!(@in_context $($functions)*); };
    (@$first:ident $($(#[$m:meta])* fn $name:ident($($a:ident: $t:ty),* $(,)?) $body:block)*) => {$(
        $(#[$m])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($a: $t),*) -> ::std::ffi::c_int {
            let run = move || -> $crate::Status { $crate::driver::$first()?; $body };
            $crate::code(run())
        }
    )*};
    ($($functions:tt)*) => { $crate::driver::api!(@anywhere $($functions)*); };
}
pub(crate) use api;

fn in_context() -> Status {
    healthy(current())
}

#[inline(always)]
pub(crate) fn anywhere() -> Status {
    Ok(())
}

api! {
    fn cuGetErrorName(e: c_int, text: *mut *const c_char) { out(text, error_text(e).0.as_ptr()) }
    fn cuGetErrorString(e: c_int, text: *mut *const c_char) { out(text, error_text(e).1.as_ptr()) }
}

fn error_text(e: c_int) -> (&'static CStr, &'static CStr) {
    match e {
        0 => (c"CUDA_SUCCESS", c"no error"),
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        3 => (c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
        46 => {
            (c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable")
        }
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        200 => (c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
        201 => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        209 => (
            c"CUDA_ERROR_NO_BINARY_FOR_GPU",
            c"no kernel image is available for execution on the device",
        ),
        214 => (c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered"),
        222 => (
            c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            c"the provided PTX was compiled with an unsupported toolchain.",
        ),
        301 => (c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found"),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        500 => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        700 => (c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
        701 => (c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
        702 => (c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
        709 => (c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
        710 => (c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
        714 => (c"CUDA_ERROR_HARDWARE_STACK_ERROR", c"hardware stack error"),
        715 => (c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"),
        716 => (c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
        717 => (
            c"CUDA_ERROR_INVALID_ADDRESS_SPACE",
            c"operation not supported on global/shared address space",
        ),
        718 => (c"CUDA_ERROR_INVALID_PC", c"invalid program counter"),
        719 => (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
        801 => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
        803 => (
            c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            c"system has unsupported display driver / cuda driver combination",
        ),
        _ => (c"CUDA_ERROR_UNKNOWN", c"unknown error"),
    }
}

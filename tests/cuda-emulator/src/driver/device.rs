//! Devices and their contexts.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::Ordering;

use super::{
    CONTEXT, CURRENT, Handle, INVALID_CONTEXT, INVALID_DEVICE, LOST, NOT_FOUND, SHARED_OPT_IN,
    SHARED_PER_BLOCK, api, current, healthy, out, state,
};
use crate::memory::{self, DEVICES, INVALID_VALUE};
use crate::{Status, report};

/// Compute capability: `EMUCUDA_CC` as in `80` or `89`.
pub(super) fn capability() -> (i32, i32) {
    let cc = crate::env_number("EMUCUDA_CC").unwrap_or(80) as i32;
    (cc / 10, cc % 10)
}

/// The version of CUDA that the driver says it is for: `EMUCUDA_DRIVER` as in `12040`.
pub(super) fn driver_version() -> i32 {
    crate::env_number("EMUCUDA_DRIVER").unwrap_or(13000) as i32
}

/// Devices: `EMUCUDA_DEVICES`, by default 1.
pub(crate) fn count() -> usize {
    crate::env_number("EMUCUDA_DEVICES").map_or(1, |n| n as usize).min(DEVICES)
}

/// The UUID of a device.
pub(crate) fn uuid(device: usize) -> [u8; 16] {
    let mut uuid = *b"emucuda-device-0";
    uuid[15] += device as u8;
    uuid
}

fn known(device: c_int) -> Status {
    if (0..count() as c_int).contains(&device) { Ok(()) } else { Err(INVALID_DEVICE) }
}

/// Wait for all work of the current context.
fn synchronize() -> Status {
    if CURRENT.get() == 0 {
        return Err(INVALID_CONTEXT);
    }
    healthy(current())?;
    state().queues[current()].wait(None);
    memory::synchronized(current());
    Ok(())
}

api! {
    fn cuInit(_flags: c_uint) {
        report::start();
        Ok(())
    }
    fn cuDriverGetVersion(v: *mut c_int) { out(v, driver_version()) }
    fn cuDeviceGetCount(n: *mut c_int) { out(n, count() as c_int) }
    fn cuDeviceGet(dev: *mut c_int, ordinal: c_int) {
        known(ordinal)?;
        out(dev, ordinal)
    }
    fn cuDeviceGetName(name: *mut c_char, len: c_int, _dev: c_int) {
        let text = b"emucuda (CPU)\0";
        if name.is_null() || (len as usize) < text.len() { return Err(INVALID_VALUE); }
        // SAFETY: the buffer has `len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
        Ok(())
    }
    fn cuDeviceGetUuid_v2(id: *mut [u8; 16], dev: c_int) {
        known(dev)?;
        out(id, uuid(dev as usize))
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _dev: c_int) { out(bytes, memory::capacity()) }
    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, _dev: c_int) {
        out(major, capability().0)?;
        out(minor, capability().1)
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _dev: c_int) {
        let v = match attribute {
            1..=3 => 1024,
            4 => 64,
            5 => i32::MAX,
            6 | 7 => 65535,
            8 => SHARED_PER_BLOCK as i32,
            9 => 64 << 10,
            10 => 32,
            11 => i32::MAX,
            12 | 82 => 64 << 10,
            13 => 1_410_000,
            16 => crate::env_number("EMUCUDA_PROCESSORS").unwrap_or(108) as i32,
            31 | 40 | 41 | 83 | 89 | 115 => 1,
            36 => 1_215_000,
            37 => 5120,
            38 => 40 << 20,
            39 => 2048,
            75 => capability().0,
            76 => capability().1,
            81 => SHARED_OPT_IN as i32 + 1024,
            97 => SHARED_OPT_IN as i32,
            106 => 32,
            111 => 1024,
            _ => 0,
        };
        out(value, v)
    }
    fn cuDevicePrimaryCtxRetain(ctx: *mut Handle, dev: c_int) {
        known(dev)?;
        out(ctx, CONTEXT + dev as usize)
    }
    fn cuDevicePrimaryCtxRelease_v2(_dev: c_int) { Ok(()) }
    fn cuDevicePrimaryCtxReset_v2(dev: c_int) {
        known(dev)?;
        LOST[dev as usize].store(0, Ordering::Relaxed);
        Ok(())
    }
    fn cuDevicePrimaryCtxSetFlags_v2(_dev: c_int, _flags: c_uint) { Ok(()) }
    fn cuDevicePrimaryCtxGetState(_dev: c_int, flags: *mut c_uint, active: *mut c_int) {
        out(flags, 0)?;
        out(active, 1)
    }
    fn cuCtxCreate_v4(ctx: *mut Handle, _params: *mut c_void, _flags: c_uint, dev: c_int) {
        known(dev)?;
        CURRENT.set(CONTEXT + dev as usize);
        out(ctx, CURRENT.get())
    }
    fn cuCtxDestroy_v2(_ctx: Handle) { Ok(()) }
    fn cuCtxSetCurrent(ctx: Handle) {
        if ctx != 0 && !(CONTEXT..CONTEXT + count()).contains(&ctx) { return Err(INVALID_CONTEXT); }
        CURRENT.set(ctx);
        Ok(())
    }
    fn cuCtxGetCurrent(ctx: *mut Handle) { out(ctx, CURRENT.get()) }
    fn cuCtxPushCurrent_v2(ctx: Handle) {
        CURRENT.set(ctx);
        Ok(())
    }
    fn cuCtxPopCurrent_v2(ctx: *mut Handle) { out(ctx, CURRENT.get()) }
    fn cuCtxGetDevice(dev: *mut c_int) { out(dev, current() as c_int) }
    fn cuCtxGetApiVersion(_ctx: Handle, v: *mut c_uint) { out(v, driver_version() as c_uint) }
    fn cuCtxSynchronize() { synchronize() }
    fn cuCtxSetFlags(_flags: c_uint) { Ok(()) }
    fn cuCtxGetFlags(flags: *mut c_uint) { out(flags, 0) }
    fn cuCtxGetLimit(value: *mut usize, _limit: c_uint) { out(value, 1 << 20) }
    fn cuCtxSetLimit(_limit: c_uint, _value: usize) { Ok(()) }
    fn cuCtxGetCacheConfig(v: *mut c_uint) { out(v, 0) }
    fn cuCtxSetCacheConfig(_v: c_uint) { Ok(()) }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        out(least, 0)?;
        out(greatest, -5)
    }
    fn cuGetExportTable(_table: *mut c_void, _id: *const c_void) { Err(NOT_FOUND) } // libnvrtc asks
    fn cuProfilerStart() { Ok(()) }
    fn cuProfilerStop() { Ok(()) }
}

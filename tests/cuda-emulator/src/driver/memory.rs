//! Allocations, the pools that they come from, and copies.

use std::ffi::{c_int, c_uint, c_void};

use super::{CONTEXT, Handle, INVALID_DEVICE, NOT_FOUND, api, current, device, out, state};
use crate::Status;
use crate::memory::{self, INVALID_VALUE, Way};

/// The default pool of device 0; that of the next is one more.
const POOL: Handle = 0xd0_0000;

const USED_PEAK: c_uint = 8;
const RESERVED_PEAK: c_uint = 6;
const RELEASE_THRESHOLD: c_uint = 4;

fn pool_of(dev: c_int) -> Result<Handle, i32> {
    if (0..device::count() as c_int).contains(&dev) {
        Ok(POOL + dev as usize)
    } else {
        Err(INVALID_DEVICE)
    }
}

fn device_of(pool: Handle) -> Result<usize, i32> {
    pool.checked_sub(POOL).filter(|dev| *dev < device::count()).ok_or(INVALID_VALUE)
}

fn pinned(p: *mut u64, size: usize) -> Status {
    let a = memory::alloc(current(), size)?;
    state().pinned.insert(a);
    out(p, a)
}

/// A copy in the order of a stream.
///
/// # Safety
/// The host's side must be valid for `n` bytes.
unsafe fn queue(s: Handle, to: u64, from: u64, n: usize, way: Way) -> Status {
    let mut st = state();
    let device = st.stream(s)?;
    if way == Way::ToHost && !st.pinned.contains(&to) {
        st.queues[device].push_copy_to_host();
    } else {
        st.queues[device].push_copy();
    }
    drop(st);
    // SAFETY: the caller's.
    unsafe { memory::copy(to, from, n, way) }
}

fn fill(p: u64, value: u32, width: usize, n: usize, s: Handle) -> Status {
    let mut st = state();
    let device = st.stream(s)?;
    st.queues[device].push_copy();
    drop(st);
    memory::fill(p, value, width, n)
}

api! { in context;
    fn cuMemAlloc_v2(p: *mut u64, size: usize) { out(p, memory::alloc(current(), size)?) }
    fn cuMemAllocAsync(p: *mut u64, size: usize, s: Handle) {
        let device = state().stream(s)?;
        // Unlike cuMemAlloc this takes a size of 0: candle makes empty tensors.
        out(p, if size == 0 { 0 } else { memory::alloc(device, size)? })
    }
    fn cuMemAllocFromPoolAsync(p: *mut u64, size: usize, pool: Handle, s: Handle) {
        state().stream(s)?;
        out(p, memory::alloc(device_of(pool)?, size)?)
    }
    fn cuMemAllocManaged(p: *mut u64, size: usize, _flags: c_uint) {
        out(p, memory::alloc(current(), size)?)
    }
    fn cuMemFree_v2(p: u64) { memory::free(p) }
    fn cuMemFreeAsync(p: u64, s: Handle) {
        state().stream(s)?;
        memory::free(p)
    }
    fn cuMemAllocHost_v2(p: *mut u64, size: usize) { pinned(p, size) }
    fn cuMemHostAlloc(p: *mut u64, size: usize, _flags: c_uint) { pinned(p, size) }
    fn cuMemFreeHost(p: u64) {
        if !state().pinned.remove(&p) { return Err(INVALID_VALUE); }
        memory::free(p)
    }
    fn cuMemHostGetDevicePointer_v2(d: *mut u64, h: u64, _flags: c_uint) { out(d, h) }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        out(free, memory::capacity() - memory::table(current()).pool().reserved)?;
        out(total, memory::capacity())
    }
    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, p: u64) {
        let r = memory::table(current()).find(p).ok_or(NOT_FOUND)?;
        if !base.is_null() { out(base, r.0)?; }
        if !size.is_null() { out(size, (r.1 - r.0) as usize)?; }
        Ok(())
    }
    fn cuMemAdvise_v2(_p: u64, _n: usize, _advice: c_uint, _location: u64) { Ok(()) }
    fn cuMemPrefetchAsync_v2(_p: u64, _n: usize, _location: u64, _flags: c_uint, _s: Handle) { Ok(()) }
    fn cuMemcpyHtoD_v2(d: u64, h: u64, n: usize) { unsafe { memory::copy(d, h, n, Way::ToDevice) } }
    fn cuMemcpyDtoH_v2(h: u64, d: u64, n: usize) { unsafe { memory::copy(h, d, n, Way::ToHost) } }
    fn cuMemcpyDtoD_v2(d: u64, s: u64, n: usize) { unsafe { memory::copy(d, s, n, Way::OnDevice) } }
    fn cuMemcpy(d: u64, s: u64, n: usize) { unsafe { memory::copy(d, s, n, Way::Unknown) } }
    fn cuMemcpyHtoDAsync_v2(d: u64, h: u64, n: usize, s: Handle) {
        unsafe { queue(s, d, h, n, Way::ToDevice) }
    }
    fn cuMemcpyDtoHAsync_v2(h: u64, d: u64, n: usize, s: Handle) {
        unsafe { queue(s, h, d, n, Way::ToHost) }
    }
    fn cuMemcpyDtoDAsync_v2(d: u64, from: u64, n: usize, s: Handle) {
        unsafe { queue(s, d, from, n, Way::OnDevice) }
    }
    fn cuMemcpyAsync(d: u64, from: u64, n: usize, s: Handle) {
        unsafe { queue(s, d, from, n, Way::Unknown) }
    }
    fn cuMemcpyPeerAsync(d: u64, _dc: Handle, from: u64, _fc: Handle, n: usize, s: Handle) {
        unsafe { queue(s, d, from, n, Way::OnDevice) }
    }
    fn cuMemsetD8_v2(p: u64, v: u8, n: usize) { memory::fill(p, v.into(), 1, n) }
    fn cuMemsetD16_v2(p: u64, v: u16, n: usize) { memory::fill(p, v.into(), 2, n) }
    fn cuMemsetD32_v2(p: u64, v: u32, n: usize) { memory::fill(p, v, 4, n) }
    fn cuMemsetD8Async(p: u64, v: u8, n: usize, s: Handle) { fill(p, v.into(), 1, n, s) }
    fn cuMemsetD16Async(p: u64, v: u16, n: usize, s: Handle) { fill(p, v.into(), 2, n, s) }
    fn cuMemsetD32Async(p: u64, v: u32, n: usize, s: Handle) { fill(p, v, 4, n, s) }
    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, dev: c_int) { out(pool, pool_of(dev)?) }
    fn cuDeviceGetMemPool(pool: *mut Handle, dev: c_int) { out(pool, pool_of(dev)?) }
    fn cuDeviceSetMemPool(_dev: c_int, _pool: Handle) { Ok(()) }
    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_uint, value: *mut c_void) {
        let device = device_of(pool)?;
        match attribute {
            RESERVED_PEAK | USED_PEAK => memory::reset_peak(device),
            RELEASE_THRESHOLD if value.is_null() => return Err(INVALID_VALUE),
            // SAFETY: CUDA's contract: this attribute is a cuuint64_t.
            RELEASE_THRESHOLD => memory::keep(device, unsafe { value.cast::<u64>().read() }),
            _ => {}
        }
        Ok(())
    }
    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_uint, value: *mut u64) {
        let table = memory::table(device_of(pool)?);
        let ((used, peak), pool) = (table.used(), table.pool());
        match attribute {
            RELEASE_THRESHOLD => out(value, pool.threshold),
            5 => out(value, pool.reserved as u64),
            7 => out(value, used as u64),
            RESERVED_PEAK | USED_PEAK => out(value, peak as u64),
            _ => out(value.cast::<c_int>(), 1),
        }
    }
    fn cuMemPoolTrimTo(pool: Handle, keep: usize) {
        memory::trim(device_of(pool)?, keep);
        Ok(())
    }
}

const _: () = assert!(CONTEXT + crate::memory::DEVICES < POOL);

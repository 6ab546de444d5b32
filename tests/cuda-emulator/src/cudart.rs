//! The runtime API symbols that precompiled objects (candle's libmoe) link against. They register
//! machine code for a GPU at start-up, which is ignored; launching it is not supported.
use crate::driver::api;
use crate::memory;
use crate::unsupported;
use std::ffi::{c_char, c_int, c_uint, c_void};

static FATBIN: usize = 0;

#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinary(_image: *mut c_void) -> *mut *mut c_void {
    std::ptr::addr_of!(FATBIN) as *mut *mut c_void
}
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinaryEnd(_handle: *mut *mut c_void) {}
#[unsafe(no_mangle)]
pub extern "C" fn __cudaUnregisterFatBinary(_handle: *mut *mut c_void) {}
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn __cudaRegisterFunction(
    _handle: *mut *mut c_void,
    _host: *const c_char,
    _device: *mut c_char,
    _name: *const c_char,
    _limit: c_int,
    _tid: *mut c_void,
    _bid: *mut c_void,
    _block: *mut c_void,
    _grid: *mut c_void,
    _warp: *mut c_int,
) {
}
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn __cudaRegisterVar(
    _handle: *mut *mut c_void,
    _host: *mut c_char,
    _device: *mut c_char,
    _name: *const c_char,
    _ext: c_int,
    _size: usize,
    _constant: c_int,
    _global: c_int,
) {
}

api! {
    fn __cudaPushCallConfiguration(_gx: u64, _gz: u64, _bx: u64, _bz: u64, _shared: usize, _s: *mut c_void) { Ok(()) }
    fn __cudaPopCallConfiguration(_grid: *mut c_void, _block: *mut c_void, _shared: *mut usize, _s: *mut c_void) { Ok(()) }
    fn __cudaGetKernel(_kernel: *mut *mut c_void, _entry: *const c_void) { Err(unsupported("__cudaGetKernel", 801)) }
    fn cudaGetDevice(dev: *mut c_int) {
        // SAFETY: CUDA's contract, here and below.
        unsafe { *dev = 0 };
        Ok(())
    }
    fn cudaGetDeviceCount(n: *mut c_int) {
        unsafe { *n = 1 };
        Ok(())
    }
    fn cudaSetDevice(_dev: c_int) { Ok(()) }
    fn cudaDeviceSynchronize() { Ok(()) }
    fn cudaGetLastError() { Ok(()) }
    fn cudaPeekAtLastError() { Ok(()) }
    fn cudaDeviceGetAttribute(value: *mut c_int, attribute: c_int, dev: c_int) {
        match unsafe { crate::driver::cuDeviceGetAttribute(value, attribute, dev) } { 0 => Ok(()), e => Err(e) }
    }
    fn cudaMalloc(p: *mut u64, size: usize) {
        unsafe { *p = memory::alloc(0, size)? };
        Ok(())
    }
    fn cudaMallocAsync_ptsz(p: *mut u64, size: usize, _s: usize) {
        unsafe { *p = memory::alloc(0, size)? };
        Ok(())
    }
    fn cudaFree(p: u64) { memory::free(p) }
    fn cudaFreeAsync_ptsz(p: u64, _s: usize) { memory::free(p) }
    fn cudaMemsetAsync_ptsz(p: u64, v: c_int, n: usize, _s: usize) { memory::fill(p, v as c_uint, 1, n) }
    fn cudaStreamSynchronize_ptsz(_s: usize) { Ok(()) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorName(_e: c_int) -> *const c_char {
    c"cudaError".as_ptr()
}
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorString(_e: c_int) -> *const c_char {
    c"runtime API error (emucuda)".as_ptr()
}

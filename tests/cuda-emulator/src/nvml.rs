//! NVIDIA's management library: the memory of the devices and some constants. It numbers the devices
//! from the last to the first, since a real one does not count as CUDA does either.
use crate::driver::{api, count, uuid};
use crate::{Status, memory};
use std::ffi::{CStr, c_char, c_uint};

const INVALID_ARGUMENT: i32 = 2;
const NOT_FOUND: i32 = 6;
const INSUFFICIENT_SIZE: i32 = 7;

/// nvmlMemory_v2_t.
#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// nvmlUtilization_t.
#[repr(C)]
pub struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// A UUID as the library writes it.
fn written(device: usize) -> String {
    let hex: Vec<_> = uuid(device).iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |from: usize, to: usize| hex[from..to].concat();
    format!("GPU-{}-{}-{}-{}-{}", part(0, 4), part(4, 6), part(6, 8), part(8, 10), part(10, 16))
}

fn text(to: *mut c_char, length: c_uint, text: &str) -> Status {
    if text.len() >= length as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: NVML's contract: the buffer has `length` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), text.len());
        *to.add(text.len()) = 0;
    }
    Ok(())
}

fn put<T>(to: *mut T, value: T) -> Status {
    // SAFETY: NVML's contract: a valid place for the result.
    unsafe { to.write(value) };
    Ok(())
}

// A handle is the device's number for CUDA, and one.
api! {
    fn nvmlInit_v2() { Ok(()) }
    fn nvmlShutdown() { Ok(()) }
    fn nvmlSystemGetDriverVersion(to: *mut c_char, length: c_uint) { text(to, length, "580.00") }
    fn nvmlDeviceGetCount_v2(n: *mut c_uint) { put(n, count() as c_uint) }
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut usize) {
        let from_last = count().checked_sub(index as usize + 1).ok_or(INVALID_ARGUMENT)?;
        put(device, from_last + 1)
    }
    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut usize) {
        // SAFETY: NVML's contract: a NUL-terminated string.
        let uuid = unsafe { CStr::from_ptr(uuid) }.to_str().map_err(|_| INVALID_ARGUMENT)?;
        let found = (0..count()).find(|device| written(*device) == uuid).ok_or(NOT_FOUND)?;
        put(device, found + 1)
    }
    fn nvmlDeviceGetUUID(device: usize, to: *mut c_char, length: c_uint) {
        text(to, length, &written(device - 1))
    }
    fn nvmlDeviceGetMemoryInfo_v2(device: usize, to: *mut Memory) {
        let (total, used) = (memory::capacity() as u64, memory::table(device - 1).pool().reserved as u64);
        put(to, Memory { version: 2, total, reserved: 0, free: total - used, used })
    }
    fn nvmlDeviceGetUtilizationRates(_device: usize, to: *mut Utilization) {
        put(to, Utilization { gpu: 0, memory: 0 })
    }
    fn nvmlDeviceGetPowerUsage(device: usize, milliwatts: *mut c_uint) {
        put(milliwatts, 1000 * device as c_uint)
    }
    fn nvmlDeviceGetTemperature(_device: usize, _sensor: c_uint, celsius: *mut c_uint) {
        put(celsius, 40)
    }
}

//! Device memory: host allocations with a table a device of what is allocated, so that every access
//! of a kernel, a copy or a matrix product can be checked.
//!
//! What is allocated comes out of the device's default pool, which has no fragments: it reserves
//! what is used at the most, and gives back what is above its release threshold (0 at first) at
//! every synchronisation.
use crate::report;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::VecDeque;
use std::sync::{OnceLock, RwLock, RwLockReadGuard};

pub const INVALID_VALUE: i32 = 1;
pub const OUT_OF_MEMORY: i32 = 2;

const ALIGN: usize = 256;
/// Unallocated bytes kept behind an allocation, so that running over its end is noticed.
const GAP: usize = 256;

/// Devices at the most.
pub const DEVICES: usize = 8;

/// Allocated ranges of a device, sorted by address.
pub struct Table {
    ranges: Vec<(u64, u64)>,
    /// Freed lately, for messages.
    freed: VecDeque<(u64, u64)>,
    used: usize,
    peak: usize,
    pool: Pool,
}

/// Bytes of a device's pool.
#[derive(Clone, Copy)]
pub struct Pool {
    /// Taken from the device: what is used, and what is kept for the next allocation.
    pub reserved: usize,
    pub threshold: u64,
    /// Given back to the device at synchronisations, in all.
    pub released: u64,
}

static TABLES: [RwLock<Table>; DEVICES] = [const {
    RwLock::new(Table {
        ranges: Vec::new(),
        freed: VecDeque::new(),
        used: 0,
        peak: 0,
        pool: Pool { reserved: 0, threshold: 0, released: 0 },
    })
}; DEVICES];

/// The memory of a device.
pub fn table(device: usize) -> RwLockReadGuard<'static, Table> {
    TABLES[device].read().unwrap()
}

/// The device in whose memory an address lies.
fn owner(addr: u64) -> Option<usize> {
    (0..DEVICES).find(|device| table(*device).find(addr).is_some())
}

/// The pool's release threshold.
pub fn keep(device: usize, bytes: u64) {
    TABLES[device].write().unwrap().pool.threshold = bytes;
}

/// A synchronisation: the pool gives back what is above its threshold.
pub fn synchronized(device: usize) {
    let keep = table(device).pool.threshold;
    if keep != u64::MAX {
        TABLES[device].write().unwrap().shrink(usize::try_from(keep).unwrap_or(usize::MAX));
    }
}

/// Gives back all of the pool but what is used and `keep` bytes.
pub fn trim(device: usize, keep: usize) {
    TABLES[device].write().unwrap().shrink(keep);
}

/// Memory the emulated device has: `EMUCUDA_MEMORY` bytes, by default 80 GiB.
pub fn capacity() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| crate::env_number("EMUCUDA_MEMORY").map_or(80 << 30, |n| n as usize))
}

impl Table {
    /// The allocation an address lies in.
    pub fn find(&self, addr: u64) -> Option<(u64, u64)> {
        let k = self.ranges.partition_point(|r| r.0 <= addr);
        let r = *self.ranges.get(k.checked_sub(1)?)?;
        (addr < r.1).then_some(r)
    }
    pub fn used(&self) -> (usize, usize) {
        (self.used, self.peak)
    }
    pub fn pool(&self) -> Pool {
        self.pool
    }
    fn shrink(&mut self, keep: usize) {
        let left = self.pool.reserved.min(self.used.max(keep));
        self.pool.released += (self.pool.reserved - left) as u64;
        self.pool.reserved = left;
    }
    /// What is known about a bad address.
    pub fn describe(&self, addr: u64) -> String {
        if let Some(f) = self.freed.iter().rev().find(|f| f.0 <= addr && addr < f.1) {
            return format!("in freed memory ({} bytes at {:#x})", f.1 - f.0, f.0);
        }
        let k = self.ranges.partition_point(|r| r.0 <= addr);
        match k.checked_sub(1).map(|k| self.ranges[k]) {
            Some(r) if addr < r.1 => {
                format!("runs over the end of {} bytes at {:#x}", r.1 - r.0, r.0)
            }
            Some(r) if addr - r.1 < 1 << 30 => {
                format!("{} bytes after the end of {} bytes at {:#x}", addr - r.1, r.1 - r.0, r.0)
            }
            _ => "not device memory".into(),
        }
    }
    fn insert(&mut self, addr: u64, size: usize) {
        let k = self.ranges.partition_point(|r| r.0 < addr);
        self.ranges.insert(k, (addr, addr + size as u64));
    }
}

/// Room for the alignment and the host's own address before the aligned start; asking for no more
/// than malloc's alignment lets large blocks come as untouched zero pages.
fn layout(size: usize) -> Layout {
    Layout::from_size_align(size + ALIGN + 16 + GAP, 16).expect("allocation size")
}

/// `EMUCUDA_POISON`: what is not initialised (device and shared memory) is full of NaNs.
pub fn poisoned() -> bool {
    static POISON: OnceLock<bool> = OnceLock::new();
    *POISON.get_or_init(|| std::env::var_os("EMUCUDA_POISON").is_some())
}

/// Allocates device memory. It reads as zeros, or as NaNs if `EMUCUDA_POISON` is set.
pub fn alloc(device: usize, size: usize) -> Result<u64, i32> {
    if size == 0 || size > isize::MAX as usize / 2 {
        return Err(INVALID_VALUE);
    }
    let mut t = TABLES[device].write().unwrap();
    if t.used + size > capacity() {
        return Err(OUT_OF_MEMORY);
    }
    // SAFETY: the layout has a size above zero.
    let p = unsafe { alloc_zeroed(layout(size)) };
    if p.is_null() {
        return Err(OUT_OF_MEMORY);
    }
    let raw = p as usize;
    let p = (raw + 16).next_multiple_of(ALIGN) as *mut u8;
    // SAFETY: at least 16 bytes of the block lie before `p`.
    unsafe { p.cast::<usize>().sub(1).write(raw) };
    if poisoned() {
        // SAFETY: just allocated with at least `size` bytes.
        unsafe { p.write_bytes(0xff, size) };
    }
    t.insert(p as u64, size);
    t.used += size;
    t.peak = t.peak.max(t.used);
    t.pool.reserved = t.pool.reserved.max(t.used);
    Ok(p as u64)
}

pub fn free(addr: u64) -> Result<(), i32> {
    if addr == 0 {
        return Ok(());
    }
    let mut t = TABLES[owner(addr).unwrap_or(0)].write().unwrap();
    let Ok(k) = t.ranges.binary_search_by_key(&addr, |r| r.0) else {
        eprintln!("emucuda: free of {addr:#x}: {}", t.describe(addr));
        return Err(INVALID_VALUE);
    };
    let r = t.ranges.remove(k);
    let size = (r.1 - r.0) as usize;
    t.used -= size;
    t.freed.push_back(r);
    if t.freed.len() > 256 {
        t.freed.pop_front();
    }
    // SAFETY: allocated by `alloc` with this size, its block's start noted before it.
    unsafe {
        let raw = (addr as *const usize).sub(1).read();
        dealloc(raw as *mut u8, layout(size));
    }
    Ok(())
}

/// Forgets the peak so far.
pub fn reset_peak(device: usize) {
    let mut t = TABLES[device].write().unwrap();
    t.peak = t.used;
}

/// Checks that `addr..addr+size` is allocated device memory.
pub fn check(addr: u64, size: usize, what: &str) -> Result<(), i32> {
    if size == 0 {
        return Ok(());
    }
    let t = table(owner(addr).unwrap_or(0));
    match t.find(addr) {
        Some(r) if addr + size as u64 <= r.1 => Ok(()),
        _ => {
            eprintln!("emucuda: {what} of {size} bytes at {addr:#x}: {}", t.describe(addr));
            Err(INVALID_VALUE)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToDevice,
    ToHost,
    OnDevice,
    Unknown,
}

/// Copies bytes; the device side of the copy is checked.
///
/// # Safety
/// The host side must be valid for `size` bytes.
pub unsafe fn copy(dst: u64, src: u64, size: usize, way: Way) -> Result<(), i32> {
    if size == 0 {
        return Ok(());
    }
    let way = match way {
        Way::Unknown => match (owner(dst).is_some(), owner(src).is_some()) {
            (true, true) => Way::OnDevice,
            (true, false) => Way::ToDevice,
            (false, true) => Way::ToHost,
            _ => Way::Unknown,
        },
        w => w,
    };
    if matches!(way, Way::ToDevice | Way::OnDevice) {
        check(dst, size, "copy to")?;
    }
    if matches!(way, Way::ToHost | Way::OnDevice) {
        check(src, size, "copy from")?;
    }
    report::copied(way, size);
    if report::dry() && way == Way::ToDevice {
        // Untouched pages of the device take none of the host.
        return Ok(());
    }
    // SAFETY: device ranges were checked, the host range is the caller's promise.
    unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, size) };
    Ok(())
}

/// Fills `count` elements of 1, 2 or 4 bytes.
pub fn fill(addr: u64, value: u32, width: usize, count: usize) -> Result<(), i32> {
    if count == 0 {
        return Ok(());
    }
    check(addr, width * count, "memset")?;
    if !(addr as usize).is_multiple_of(width) {
        return Err(INVALID_VALUE);
    }
    // SAFETY: range and alignment were checked.
    unsafe {
        match width {
            1 => std::slice::from_raw_parts_mut(addr as *mut u8, count).fill(value as u8),
            2 => std::slice::from_raw_parts_mut(addr as *mut u16, count).fill(value as u16),
            _ => std::slice::from_raw_parts_mut(addr as *mut u32, count).fill(value),
        }
    }
    Ok(())
}

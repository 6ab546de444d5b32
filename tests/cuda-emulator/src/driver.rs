//! The CUDA driver API. Every call completes before it returns, so streams have no work of their
//! own and events are just times.
use crate::memory::{self, INVALID_VALUE, Way};
use crate::ptx::exec;
use crate::ptx::ir::Kernel;
use crate::ptx::{lower, parse};
use crate::{Status, code, report};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

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

/// A loaded module: its text (kept for good), its variables and the functions asked for so far.
struct Module {
    unit: &'static parse::Unit<'static>,
    globals: HashMap<String, u64>,
    sizes: HashMap<String, usize>,
    functions: HashMap<String, Handle>,
}

struct Function {
    kernel: Arc<Kernel>,
    dynamic_shared: usize,
}

#[derive(Default)]
struct State {
    units: HashMap<u64, &'static parse::Unit<'static>>,
    modules: HashMap<Handle, Module>,
    functions: HashMap<Handle, Function>,
    streams: HashSet<Handle>,
    events: HashMap<Handle, Option<Instant>>,
    pinned: HashSet<u64>,
    next: Handle,
}

impl State {
    fn handle(&mut self) -> Handle {
        self.next += 0x100;
        0x10_0000 + self.next
    }
    fn stream(&self, s: Handle) -> Status {
        if s <= 2 || self.streams.contains(&s) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> std::sync::MutexGuard<'static, State> {
    STATE.lock().unwrap()
}

const CONTEXT: Handle = 0xc0_0000;

thread_local! {
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

/// Compute capability: `EMUCUDA_CC` as in `80` or `89`.
fn capability() -> (i32, i32) {
    let cc = crate::env_number("EMUCUDA_CC").unwrap_or(80) as i32;
    (cc / 10, cc % 10)
}

fn out<T>(p: *mut T, v: T) -> Status {
    if p.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: a result pointer is null or valid for the result.
    unsafe { p.write(v) };
    Ok(())
}

/// Defines exported functions whose bodies end in a `Status`.
macro_rules! api {
    ($($(#[$m:meta])* fn $name:ident($($a:ident: $t:ty),* $(,)?) $body:block)*) => {$(
        $(#[$m])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($a: $t),*) -> c_int {
            let run = move || -> Status { $body };
            code(run())
        }
    )*};
}
pub(crate) use api;

// ---- devices and contexts ----
api! {
    fn cuInit(_flags: c_uint) {
        report::start();
        Ok(())
    }
    fn cuDriverGetVersion(v: *mut c_int) { out(v, 13000) }
    fn cuDeviceGetCount(n: *mut c_int) { out(n, 1) }
    fn cuDeviceGet(dev: *mut c_int, ordinal: c_int) {
        if ordinal != 0 { return Err(INVALID_DEVICE); }
        out(dev, 0)
    }
    fn cuDeviceGetName(name: *mut c_char, len: c_int, _dev: c_int) {
        let text = b"emucuda (CPU)\0";
        if name.is_null() || (len as usize) < text.len() { return Err(INVALID_VALUE); }
        // SAFETY: the buffer has `len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
        Ok(())
    }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _dev: c_int) { out(uuid, *b"emucuda-cpu-0000") }
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
            16 => 108,
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
        if dev != 0 { return Err(INVALID_DEVICE); }
        out(ctx, CONTEXT)
    }
    fn cuDevicePrimaryCtxRelease_v2(_dev: c_int) { Ok(()) }
    fn cuDevicePrimaryCtxReset_v2(_dev: c_int) { Ok(()) }
    fn cuDevicePrimaryCtxSetFlags_v2(_dev: c_int, _flags: c_uint) { Ok(()) }
    fn cuDevicePrimaryCtxGetState(_dev: c_int, flags: *mut c_uint, active: *mut c_int) {
        out(flags, 0)?;
        out(active, 1)
    }
    fn cuCtxCreate_v4(ctx: *mut Handle, _params: *mut c_void, _flags: c_uint, _dev: c_int) {
        CURRENT.set(CONTEXT);
        out(ctx, CONTEXT)
    }
    fn cuCtxDestroy_v2(_ctx: Handle) { Ok(()) }
    fn cuCtxSetCurrent(ctx: Handle) {
        if ctx != 0 && ctx != CONTEXT { return Err(INVALID_CONTEXT); }
        CURRENT.set(ctx);
        Ok(())
    }
    fn cuCtxGetCurrent(ctx: *mut Handle) { out(ctx, CURRENT.get()) }
    fn cuCtxPushCurrent_v2(ctx: Handle) {
        CURRENT.set(ctx);
        Ok(())
    }
    fn cuCtxPopCurrent_v2(ctx: *mut Handle) { out(ctx, CURRENT.get()) }
    fn cuCtxGetDevice(dev: *mut c_int) { out(dev, 0) }
    fn cuCtxGetApiVersion(_ctx: Handle, v: *mut c_uint) { out(v, 13000) }
    fn cuCtxSynchronize() {
        if CURRENT.get() == 0 { return Err(INVALID_CONTEXT); }
        Ok(())
    }
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

// ---- streams and events ----
api! {
    fn cuStreamCreate(s: *mut Handle, _flags: c_uint) {
        let mut st = state();
        let h = st.handle();
        st.streams.insert(h);
        out(s, h)
    }
    fn cuStreamCreateWithPriority(s: *mut Handle, flags: c_uint, _priority: c_int) {
        // SAFETY: same contract.
        match unsafe { cuStreamCreate(s, flags) } { 0 => Ok(()), e => Err(e) }
    }
    fn cuStreamDestroy_v2(s: Handle) {
        if state().streams.remove(&s) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
    fn cuStreamSynchronize(s: Handle) { state().stream(s) }
    fn cuStreamQuery(s: Handle) { state().stream(s) }
    fn cuStreamWaitEvent(s: Handle, event: Handle, _flags: c_uint) {
        let st = state();
        st.stream(s)?;
        if st.events.contains_key(&event) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
    fn cuStreamGetFlags(s: Handle, flags: *mut c_uint) {
        state().stream(s)?;
        out(flags, 1)
    }
    fn cuStreamGetPriority(s: Handle, p: *mut c_int) {
        state().stream(s)?;
        out(p, 0)
    }
    fn cuStreamIsCapturing(s: Handle, status: *mut c_uint) {
        state().stream(s)?;
        out(status, 0)
    }
    fn cuStreamAttachMemAsync(_s: Handle, _p: u64, _n: usize, _flags: c_uint) { Ok(()) }
    fn cuLaunchHostFunc(s: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) {
        state().stream(s)?;
        // SAFETY: the caller's function with the caller's argument.
        unsafe { f.ok_or(INVALID_VALUE)?(data) };
        Ok(())
    }
    fn cuEventCreate(e: *mut Handle, _flags: c_uint) {
        let mut st = state();
        let h = st.handle();
        st.events.insert(h, None);
        out(e, h)
    }
    fn cuEventDestroy_v2(e: Handle) {
        state().events.remove(&e).map(|_| ()).ok_or(INVALID_HANDLE)
    }
    fn cuEventRecord(e: Handle, s: Handle) {
        let mut st = state();
        st.stream(s)?;
        *st.events.get_mut(&e).ok_or(INVALID_HANDLE)? = Some(Instant::now());
        Ok(())
    }
    fn cuEventRecordWithFlags(e: Handle, s: Handle, _flags: c_uint) {
        // SAFETY: same contract.
        match unsafe { cuEventRecord(e, s) } { 0 => Ok(()), e => Err(e) }
    }
    fn cuEventQuery(e: Handle) { state().events.get(&e).map(|_| ()).ok_or(INVALID_HANDLE) }
    fn cuEventSynchronize(e: Handle) { state().events.get(&e).map(|_| ()).ok_or(INVALID_HANDLE) }
    fn cuEventElapsedTime_v2(ms: *mut f32, start: Handle, end: Handle) {
        let st = state();
        let at = |e| st.events.get(&e).copied().flatten().ok_or(INVALID_HANDLE);
        out(ms, at(end)?.saturating_duration_since(at(start)?).as_secs_f32() * 1e3)
    }
    fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) {
        // SAFETY: same contract.
        match unsafe { cuEventElapsedTime_v2(ms, start, end) } { 0 => Ok(()), e => Err(e) }
    }
}

// ---- memory ----
fn pinned(p: *mut u64, size: usize) -> Status {
    let a = memory::alloc(size)?;
    state().pinned.insert(a);
    out(p, a)
}

api! {
    fn cuMemAlloc_v2(p: *mut u64, size: usize) { out(p, memory::alloc(size)?) }
    fn cuMemAllocAsync(p: *mut u64, size: usize, s: Handle) {
        state().stream(s)?;
        // unlike cuMemAlloc this takes a size of 0: candle makes empty tensors
        out(p, if size == 0 { 0 } else { memory::alloc(size)? })
    }
    fn cuMemAllocFromPoolAsync(p: *mut u64, size: usize, _pool: Handle, s: Handle) {
        state().stream(s)?;
        out(p, memory::alloc(size)?)
    }
    fn cuMemAllocManaged(p: *mut u64, size: usize, _flags: c_uint) { out(p, memory::alloc(size)?) }
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
        out(free, memory::capacity() - memory::table().used().0)?;
        out(total, memory::capacity())
    }
    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, p: u64) {
        let r = memory::table().find(p).ok_or(NOT_FOUND)?;
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
        state().stream(s)?;
        unsafe { memory::copy(d, h, n, Way::ToDevice) }
    }
    fn cuMemcpyDtoHAsync_v2(h: u64, d: u64, n: usize, s: Handle) {
        state().stream(s)?;
        unsafe { memory::copy(h, d, n, Way::ToHost) }
    }
    fn cuMemcpyDtoDAsync_v2(d: u64, from: u64, n: usize, s: Handle) {
        state().stream(s)?;
        unsafe { memory::copy(d, from, n, Way::OnDevice) }
    }
    fn cuMemcpyAsync(d: u64, from: u64, n: usize, s: Handle) {
        state().stream(s)?;
        unsafe { memory::copy(d, from, n, Way::Unknown) }
    }
    fn cuMemcpyPeerAsync(d: u64, _dc: Handle, from: u64, _fc: Handle, n: usize, s: Handle) {
        state().stream(s)?;
        unsafe { memory::copy(d, from, n, Way::OnDevice) }
    }
    fn cuMemsetD8_v2(p: u64, v: u8, n: usize) { memory::fill(p, v.into(), 1, n) }
    fn cuMemsetD16_v2(p: u64, v: u16, n: usize) { memory::fill(p, v.into(), 2, n) }
    fn cuMemsetD32_v2(p: u64, v: u32, n: usize) { memory::fill(p, v, 4, n) }
    fn cuMemsetD8Async(p: u64, v: u8, n: usize, _s: Handle) { memory::fill(p, v.into(), 1, n) }
    fn cuMemsetD16Async(p: u64, v: u16, n: usize, _s: Handle) { memory::fill(p, v.into(), 2, n) }
    fn cuMemsetD32Async(p: u64, v: u32, n: usize, _s: Handle) { memory::fill(p, v, 4, n) }
    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, _dev: c_int) { out(pool, 0xd0_0000) }
    fn cuDeviceGetMemPool(pool: *mut Handle, _dev: c_int) { out(pool, 0xd0_0000) }
    fn cuDeviceSetMemPool(_dev: c_int, _pool: Handle) { Ok(()) }
    fn cuMemPoolSetAttribute(_pool: Handle, attribute: c_uint, _value: *mut c_void) {
        if matches!(attribute, 6 | 8) { memory::reset_peak(); }
        Ok(())
    }
    fn cuMemPoolGetAttribute(_pool: Handle, attribute: c_uint, value: *mut u64) {
        let (used, peak) = memory::table().used();
        match attribute {
            5 | 7 => out(value, used as u64),
            6 | 8 => out(value, peak as u64),
            4 => out(value, 0),
            _ => out(value.cast::<c_int>(), 1),
        }
    }
    fn cuMemPoolTrimTo(_pool: Handle, _keep: usize) { Ok(()) }
}

// ---- modules and functions ----
fn load(text: &str) -> Result<Handle, i32> {
    if !text.contains(".version") {
        eprintln!("emucuda: module is not PTX text");
        return Err(INVALID_IMAGE);
    }
    let mut h = DefaultHasher::new();
    text.hash(&mut h);
    let key = h.finish();
    let known = state().units.get(&key).copied();
    let unit = match known {
        Some(u) => u,
        None => {
            // a module's text is kept for the life of the process, once
            let text: &'static str = Box::leak(parse::strip_comments(text).into_boxed_str());
            let unit = parse::unit(text).map_err(|e| {
                eprintln!("emucuda: PTX: {e}");
                INVALID_IMAGE
            })?;
            Box::leak(Box::new(unit))
        }
    };
    let (mut globals, mut sizes) = (HashMap::new(), HashMap::new());
    for (name, var) in &unit.globals {
        let size = var.size.max(1);
        let a = memory::alloc(size)?;
        memory::fill(a, 0, 1, size)?; // initialisers may leave out zeros at the end
        // SAFETY: the initial bytes are at most `size`, just allocated.
        unsafe { std::ptr::copy_nonoverlapping(var.init.as_ptr(), a as *mut u8, var.init.len()) };
        globals.insert((*name).to_string(), a);
        sizes.insert((*name).to_string(), size);
    }
    for (name, var) in &unit.globals {
        for (at, symbol) in &var.refs {
            let target = *globals.get(symbol).ok_or(INVALID_IMAGE)?;
            // SAFETY: `at` lies inside the variable's initial bytes.
            unsafe { ((globals[*name] as usize + at) as *mut u64).write_unaligned(target) };
        }
    }
    let mut st = state();
    st.units.insert(key, unit);
    let h = st.handle();
    st.modules.insert(h, Module { unit, globals, sizes, functions: HashMap::new() });
    Ok(h)
}

fn c_text<'a>(p: *const c_char) -> Result<&'a str, i32> {
    if p.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: a NUL-terminated string.
    unsafe { CStr::from_ptr(p) }.to_str().map_err(|_| INVALID_IMAGE)
}

fn function(module: Handle, name: &str) -> Result<Handle, i32> {
    let mut st = state();
    let m = st.modules.get(&module).ok_or(INVALID_HANDLE)?;
    if let Some(&f) = m.functions.get(name) {
        return Ok(f);
    }
    if m.unit.funcs.get(name).is_none_or(|f| !f.entry) {
        return Err(NOT_FOUND);
    }
    let kernel = lower::kernel(m.unit, &m.globals, name).map_err(|e| {
        eprintln!("emucuda: kernel {name}: {e}");
        NOT_SUPPORTED
    })?;
    let f = st.handle();
    st.functions.insert(f, Function { kernel: Arc::new(kernel), dynamic_shared: SHARED_PER_BLOCK });
    if let Some(m) = st.modules.get_mut(&module) {
        m.functions.insert(name.to_string(), f);
    }
    Ok(f)
}

api! {
    fn cuModuleLoadData(module: *mut Handle, image: *const c_char) { out(module, load(c_text(image)?)?) }
    fn cuModuleLoadDataEx(module: *mut Handle, image: *const c_char, _n: c_uint, _options: *mut c_void, _values: *mut c_void) {
        out(module, load(c_text(image)?)?)
    }
    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let text = std::fs::read_to_string(c_text(path)?).map_err(|_| FILE_NOT_FOUND)?;
        out(module, load(&text)?)
    }
    fn cuModuleUnload(module: Handle) {
        let m = state().modules.remove(&module).ok_or(INVALID_HANDLE)?;
        let mut st = state();
        m.functions.values().for_each(|f| {
            st.functions.remove(f);
        });
        drop(st);
        m.globals.values().try_for_each(|&a| memory::free(a))
    }
    fn cuModuleGetFunction(f: *mut Handle, module: Handle, name: *const c_char) {
        out(f, function(module, c_text(name)?)?)
    }
    fn cuModuleGetGlobal_v2(p: *mut u64, size: *mut usize, module: Handle, name: *const c_char) {
        let st = state();
        let m = st.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let name = c_text(name)?;
        let a = *m.globals.get(name).ok_or(NOT_FOUND)?;
        if !size.is_null() { out(size, m.sizes[name])?; }
        if !p.is_null() { out(p, a)?; }
        Ok(())
    }
    fn cuModuleGetLoadingMode(mode: *mut c_uint) { out(mode, 2) }
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, f: Handle) {
        let st = state();
        let f = st.functions.get(&f).ok_or(INVALID_HANDLE)?;
        out(value, match attribute {
            0 => 1024,
            1 => f.kernel.shared as i32,
            3 => f.kernel.local as i32,
            4 => 64,
            5 | 6 => capability().0 * 10 + capability().1,
            8 => f.dynamic_shared as i32,
            _ => 0,
        })
    }
    fn cuFuncSetAttribute(f: Handle, attribute: c_uint, value: c_int) {
        let mut st = state();
        let f = st.functions.get_mut(&f).ok_or(INVALID_HANDLE)?;
        if attribute == 8 {
            if value as usize + f.kernel.shared > SHARED_OPT_IN { return Err(INVALID_VALUE); }
            f.dynamic_shared = value as usize;
        }
        Ok(())
    }
    fn cuFuncSetCacheConfig(_f: Handle, _config: c_uint) { Ok(()) }
}

// ---- launching ----
fn launch(
    f: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    dyn_shared: usize,
    s: Handle,
    args: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status {
    let (kernel, limit) = {
        let st = state();
        st.stream(s)?;
        let f = st.functions.get(&f).ok_or(INVALID_HANDLE)?;
        (f.kernel.clone(), f.dynamic_shared)
    };
    if CURRENT.get() == 0 {
        return Err(NOT_INITIALIZED);
    }
    let complain = |what: &str, code: i32| {
        eprintln!("emucuda: launch of {} with grid {grid:?} block {block:?}: {what}", kernel.name);
        Err(code)
    };
    if grid.contains(&0)
        || block.contains(&0)
        || grid[1] > 65535
        || grid[2] > 65535
        || grid[0] > i32::MAX as u32
        || block[2] > 64
    {
        return complain("dimensions out of range", INVALID_VALUE);
    }
    if block.iter().map(|&b| u64::from(b)).product::<u64>() > 1024 {
        return complain("more than 1024 threads", INVALID_VALUE);
    }
    if dyn_shared > limit || dyn_shared + kernel.shared > SHARED_OPT_IN {
        return complain("too much shared memory", LAUNCH_OUT_OF_RESOURCES);
    }
    let mut params = vec![0u8; kernel.param_bytes];
    if !kernel.params.is_empty() {
        if args.is_null() || !extra.is_null() {
            return complain("arguments must come as kernelParams", NOT_SUPPORTED);
        }
        for (k, p) in kernel.params.iter().enumerate() {
            // SAFETY: CUDA's contract: one pointer per parameter, valid for its size.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (*args.add(k)).cast::<u8>(),
                    params[p.offset..].as_mut_ptr(),
                    p.size,
                )
            };
        }
    }
    if report::dry() {
        report::launched(&kernel.name, 0, 0);
        return Ok(());
    }
    let start = Instant::now();
    let result = exec::run_kernel(&kernel, &params, &memory::table(), grid, block, dyn_shared);
    let ns = start.elapsed().as_nanos() as u64;
    match result {
        Ok(count) => {
            report::launched(&kernel.name, count, ns);
            Ok(())
        }
        Err((fault, place)) => {
            let line = kernel
                .source
                .lines()
                .nth((fault.line as usize).wrapping_sub(1))
                .unwrap_or("")
                .trim();
            eprintln!(
                "emucuda: kernel {} {place}: {}\n  at line {} of its PTX body: {line}",
                kernel.name, fault.message, fault.line
            );
            Err(fault.code)
        }
    }
}

/// The head of CUlaunchConfig.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
}

api! {
    #[allow(clippy::too_many_arguments)]
    fn cuLaunchKernel(f: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
                      shared: c_uint, s: Handle, args: *mut *mut c_void, extra: *mut *mut c_void) {
        launch(f, [gx, gy, gz], [bx, by, bz], shared as usize, s, args, extra)
    }
    fn cuLaunchKernelEx(config: *const LaunchConfig, f: Handle, args: *mut *mut c_void, extra: *mut *mut c_void) {
        // SAFETY: CUDA's contract.
        let c = unsafe { config.as_ref() }.ok_or(INVALID_VALUE)?;
        launch(f, c.grid, c.block, c.shared as usize, c.stream, args, extra)
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(n: *mut c_int, f: Handle, block: c_int, shared: usize) {
        let st = state();
        let k = &st.functions.get(&f).ok_or(INVALID_HANDLE)?.kernel;
        let by_shared = SHARED_OPT_IN / (k.shared + shared + 1024).max(1);
        out(n, (2048 / block.max(1)).min(32).min(by_shared as i32))
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n: *mut c_int, f: Handle, block: c_int, shared: usize, _flags: c_uint) {
        // SAFETY: same contract.
        match unsafe { cuOccupancyMaxActiveBlocksPerMultiprocessor(n, f, block, shared) } { 0 => Ok(()), e => Err(e) }
    }
    fn cuOccupancyMaxPotentialBlockSize(min_grid: *mut c_int, block: *mut c_int, _f: Handle, _b2d: *mut c_void, _shared: usize, limit: c_int) {
        out(min_grid, 216)?;
        out(block, if limit > 0 { limit.min(1024) } else { 1024 })
    }
    fn cuOccupancyAvailableDynamicSMemPerBlock(size: *mut usize, f: Handle, _blocks: c_int, _block: c_int) {
        let st = state();
        out(size, SHARED_OPT_IN - st.functions.get(&f).ok_or(INVALID_HANDLE)?.kernel.shared)
    }
    fn cuGetErrorName(e: c_int, text: *mut *const c_char) { out(text, error_text(e).0.as_ptr()) }
    fn cuGetErrorString(e: c_int, text: *mut *const c_char) { out(text, error_text(e).1.as_ptr()) }
}

fn error_text(e: c_int) -> (&'static CStr, &'static CStr) {
    match e {
        0 => (c"CUDA_SUCCESS", c"no error"),
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        3 => (c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        200 => (c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
        201 => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        301 => (c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found"),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        500 => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        700 => (c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
        701 => (c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
        710 => (c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
        716 => (c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
        719 => (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
        801 => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported by emucuda"),
        _ => (c"CUDA_ERROR_UNKNOWN", c"unknown error"),
    }
}

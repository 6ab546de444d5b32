//! Modules of PTX, and their kernels.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::{
    FILE_NOT_FOUND, Handle, INVALID_HANDLE, INVALID_IMAGE, NOT_FOUND, NOT_SUPPORTED, SHARED_OPT_IN,
    SHARED_PER_BLOCK, api, c_text, current, device, out, state,
};
use crate::memory::{self, INVALID_VALUE};
use crate::ptx::ir::Kernel;
use crate::ptx::{lower, parse};

/// The PTX is of a later version than the driver knows.
const UNSUPPORTED_PTX_VERSION: i32 = 222;

/// What is loaded.
#[derive(Default)]
pub(super) struct Modules {
    units: HashMap<u64, &'static parse::Unit<'static>>,
    modules: HashMap<Handle, Module>,
    pub(super) functions: HashMap<Handle, Function>,
}

/// A loaded module: its text (kept for good), its variables and the functions asked for so far.
struct Module {
    unit: &'static parse::Unit<'static>,
    globals: HashMap<String, u64>,
    sizes: HashMap<String, usize>,
    functions: HashMap<String, Handle>,
}

pub(super) struct Function {
    pub(super) kernel: Arc<Kernel>,
    pub(super) dynamic_shared: usize,
}

/// The latest version of PTX that a driver for this version of CUDA (12040 for 12.4) reads.
fn ptx_version(cuda: i32) -> f32 {
    match (cuda / 1000, cuda % 1000 / 10) {
        (13, minor) => 9.0 + minor as f32 / 10.0,
        // 12.5 and 12.6 have one version.
        (12, minor) => 8.0 + if minor > 5 { minor - 1 } else { minor } as f32 / 10.0,
        (_, minor) => 7.0 + minor as f32 / 10.0,
    }
}

/// The version that a module names.
fn version(text: &str) -> Option<f32> {
    text.split_once(".version")?.1.split_whitespace().next()?.parse().ok()
}

fn load(text: &str) -> Result<Handle, i32> {
    if !text.contains(".version") {
        eprintln!("emucuda: module is not PTX text");
        return Err(INVALID_IMAGE);
    }
    if version(text).is_some_and(|version| version > ptx_version(device::driver_version())) {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    let mut h = DefaultHasher::new();
    text.hash(&mut h);
    let key = h.finish();
    let known = state().module.units.get(&key).copied();
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
        let a = memory::alloc(current(), size)?;
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
    st.module.units.insert(key, unit);
    let h = st.handle();
    st.module.modules.insert(h, Module { unit, globals, sizes, functions: HashMap::new() });
    Ok(h)
}

fn function(module: Handle, name: &str) -> Result<Handle, i32> {
    let mut st = state();
    let m = st.module.modules.get(&module).ok_or(INVALID_HANDLE)?;
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
    st.module
        .functions
        .insert(f, Function { kernel: Arc::new(kernel), dynamic_shared: SHARED_PER_BLOCK });
    if let Some(m) = st.module.modules.get_mut(&module) {
        m.functions.insert(name.to_string(), f);
    }
    Ok(f)
}

api! { in context;
    fn cuModuleLoadData(module: *mut Handle, image: *const c_char) { out(module, load(c_text(image)?)?) }
    fn cuModuleLoadDataEx(module: *mut Handle, image: *const c_char, _n: c_uint, _options: *mut c_void, _values: *mut c_void) {
        out(module, load(c_text(image)?)?)
    }
    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let text = std::fs::read_to_string(c_text(path)?).map_err(|_| FILE_NOT_FOUND)?;
        out(module, load(&text)?)
    }
    fn cuModuleUnload(module: Handle) {
        let m = state().module.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        let mut st = state();
        m.functions.values().for_each(|f| {
            st.module.functions.remove(f);
        });
        drop(st);
        m.globals.values().try_for_each(|&a| memory::free(a))
    }
    fn cuModuleGetFunction(f: *mut Handle, module: Handle, name: *const c_char) {
        out(f, function(module, c_text(name)?)?)
    }
    fn cuModuleGetGlobal_v2(p: *mut u64, size: *mut usize, module: Handle, name: *const c_char) {
        let st = state();
        let m = st.module.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let name = c_text(name)?;
        let a = *m.globals.get(name).ok_or(NOT_FOUND)?;
        if !size.is_null() { out(size, m.sizes[name])?; }
        if !p.is_null() { out(p, a)?; }
        Ok(())
    }
    fn cuModuleGetLoadingMode(mode: *mut c_uint) { out(mode, 2) }
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, f: Handle) {
        let st = state();
        let f = st.module.functions.get(&f).ok_or(INVALID_HANDLE)?;
        out(value, match attribute {
            0 => 1024,
            1 => f.kernel.shared as i32,
            3 => f.kernel.local as i32,
            4 => 64,
            5 | 6 => device::capability().0 * 10 + device::capability().1,
            8 => f.dynamic_shared as i32,
            _ => 0,
        })
    }
    fn cuFuncSetAttribute(f: Handle, attribute: c_uint, value: c_int) {
        let mut st = state();
        let f = st.module.functions.get_mut(&f).ok_or(INVALID_HANDLE)?;
        if attribute == 8 {
            if value as usize + f.kernel.shared > SHARED_OPT_IN { return Err(INVALID_VALUE); }
            f.dynamic_shared = value as usize;
        }
        Ok(())
    }
    fn cuFuncSetCacheConfig(_f: Handle, _config: c_uint) { Ok(()) }
}

//! Launches.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{
    CURRENT, Handle, INVALID_HANDLE, LAUNCH_OUT_OF_RESOURCES, NOT_INITIALIZED, NOT_SUPPORTED,
    SHARED_OPT_IN, api, lose, out, state,
};
use crate::memory::{self, INVALID_VALUE};
use crate::ptx::exec;
use crate::{Status, report};

/// The error of this launch, if `EMUCUDA_FAIL=ERROR@LAUNCH` names it: `716@120` is a misaligned
/// address in the 120th launch of the process.
fn injected() -> Option<i32> {
    static PLAN: OnceLock<Option<(i32, u64)>> = OnceLock::new();
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let plan = PLAN.get_or_init(|| {
        let plan = std::env::var("EMUCUDA_FAIL").ok()?;
        let (error, launch) = plan.split_once('@')?;
        Some((error.parse().ok()?, launch.parse().ok()?))
    });
    let (error, launch) = (*plan)?;
    (LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1 == launch).then_some(error)
}

fn launch(
    f: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    dyn_shared: usize,
    s: Handle,
    args: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status {
    let (kernel, limit, device) = {
        let st = state();
        let f = st.module.functions.get(&f).ok_or(INVALID_HANDLE)?;
        (f.kernel.clone(), f.dynamic_shared, st.stream(s)?)
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
    state().queues[device].push_launch();
    if let Some(error) = injected() {
        // As on a GPU: the launch is queued, and what comes after it fails.
        lose(device, error);
        return Ok(());
    }
    if report::dry() {
        report::launched(&kernel.name, 0, 0);
        return Ok(());
    }
    let start = Instant::now();
    let result =
        exec::run_kernel(&kernel, &params, &memory::table(device), grid, block, dyn_shared);
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
            lose(device, fault.code);
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

api! { in context;
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
        let k = &st.module.functions.get(&f).ok_or(INVALID_HANDLE)?.kernel;
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
        out(size, SHARED_OPT_IN - st.module.functions.get(&f).ok_or(INVALID_HANDLE)?.kernel.shared)
    }
}

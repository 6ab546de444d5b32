//! Launches of kernels.

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    DeviceRepr, LaunchConfig, PushKernelArg as _, sys,
};
use candle_core::{DType, Error, Result};

use super::device::Gpu;
use super::images::KernelFile;

/// Blocks, threads per block, and bytes of dynamic shared memory.
pub(super) struct Grid {
    pub(super) blocks: (usize, usize, usize),
    pub(super) threads: usize,
    pub(super) shared: usize,
}

/// Queues the kernel `name` of the type.
///
/// # Safety
///
/// `args` must be the argument of the kernel, and every address in it that of as much memory as the
/// kernel accesses.
pub(super) unsafe fn launch<P: DeviceRepr>(
    device: &CudaDevice,
    file: &KernelFile,
    (name, dtype): (&str, DType),
    grid: &Grid,
    args: &P,
) -> Result<()> {
    let function = Gpu::of(device)?.function(file, format!("{name}_{}", dtype.as_str()))?;
    let shared = u32::try_from(grid.shared).map_err(Error::wrap)?;
    if shared > 48 << 10 {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(which, shared as i32).w()?;
    }
    let side = |n: usize| u32::try_from(n).map_err(Error::wrap);
    let (x, y, z) = grid.blocks;
    let config = LaunchConfig {
        grid_dim: (side(x)?, side(y)?, side(z)?),
        block_dim: (side(grid.threads)?, 1, 1),
        shared_mem_bytes: shared,
    };
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(args);
    // SAFETY: the caller's.
    unsafe { builder.launch(config) }.w()?;
    file.count_launch();
    Ok(())
}

//! The memory pool of a card. It keeps what is freed: as the driver makes it, it would give all of
//! that back at each synchronisation, and the next step would have to map it anew.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUmemPool_attribute, CUmemoryPool,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};

/// The pool that allocations come from; `None` on a card without pools.
fn pool(context: &CudaContext) -> std::result::Result<Option<CUmemoryPool>, DriverError> {
    let supported = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    if context.attribute(supported)? == 0 {
        return Ok(None);
    }
    // SAFETY: the device is that of an open context.
    unsafe { device::get_mem_pool(context.cu_device()) }.map(Some)
}

/// Lets the pool keep what is freed.
pub(super) fn keep(context: &Arc<CudaContext>) -> Result<()> {
    let Some(pool) = pool(context).w()? else { return Ok(()) };
    let mut threshold = u64::MAX;
    let which = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let value = (&raw mut threshold).cast::<c_void>();
    // SAFETY: the attribute is a 64-bit number.
    unsafe { mem_pool::set_attribute(pool, which, value) }.w()
}

/// Bytes that the pool keeps and nothing uses.
pub(super) fn kept_bytes(context: &CudaContext) -> Option<u64> {
    let pool = pool(context).ok()??;
    let read = |which| {
        let mut bytes = 0_u64;
        // SAFETY: these attributes are 64-bit numbers.
        let read = unsafe { mem_pool::get_attribute(pool, which, (&raw mut bytes).cast()) };
        read.ok().map(|()| bytes)
    };
    let reserved = read(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    let used = read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    Some(reserved.saturating_sub(used))
}

/// Gives back what the pool keeps. It waits for the card, since what is freed behind work under way
/// counts as used.
pub(super) fn trim(context: &CudaContext) -> std::result::Result<(), DriverError> {
    context.synchronize()?;
    match pool(context)? {
        // SAFETY: the pool is that of an open context.
        Some(pool) => unsafe { mem_pool::trim_to(pool, 0) },
        None => Ok(()),
    }
}

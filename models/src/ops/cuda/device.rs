//! CUDA devices, and what there are kernels for.

use candle_core::{DType, Device, Result, Tensor};

use super::kernels::{self, Gpu};

/// A device with one stream of its own.
pub(crate) fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)?;
    // SAFETY: events order the work of several streams on one tensor, and every tensor stays on
    // the one stream of its device.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// Bytes that are free on the device.
pub(crate) fn free_bytes(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    context.mem_get_info().ok().map(|(free, _)| free as u64)
}

/// The device's name.
pub(crate) fn name(device: &Device) -> Option<String> {
    device.as_cuda_device().ok()?.cuda_stream().context().name().ok()
}

/// What our kernels were loaded from: see [`kernels::loaded_images`].
pub(crate) fn loaded_images(device: &Device) -> Option<String> {
    kernels::loaded_images(device.as_cuda_device().ok()?).ok()
}

/// Whether there are kernels on tensor cores for this type on this device.
pub(super) fn has_products(device: &Device, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = device else { return Ok(false) };
    let capability = Gpu::of(device)?.capability;
    Ok((dtype == DType::F16 && capability >= 75) || (dtype == DType::BF16 && capability >= 80))
}

/// Whether there are kernels without tensor cores for this type on the tensor's device, and it is
/// contiguous.
pub(super) fn has_plain(x: &Tensor, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = x.device() else { return Ok(false) };
    let single = dtype == DType::F32 && Gpu::of(device)?.capability >= 75;
    Ok(x.is_contiguous() && (single || has_products(x.device(), dtype)?))
}

//! Our kernels on CUDA devices: `cuda/*.cu`, compiled by `build.rs`.
//!
//! Every function answers `None` where there is no kernel for a device, type or shape; the caller
//! then composes the operation from candle's. There are kernels for devices of compute capability
//! 7.5 and above: in f16, from 8.0 on in bf16, and norms in f32 too. Every launch goes to the one
//! stream of its device, and none waits for it.

mod attention;
mod combine;
mod kernels;
mod layout;
mod memory;
mod norm;
mod product;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Result, Tensor};

pub(super) use attention::attention;
pub(super) use combine::{combine, extrapolate};
pub(super) use kernels::forget as forget_closed;
pub(crate) use kernels::work;
pub(super) use layout::{channels_first, channels_last};
pub(super) use norm::{group_norm, layer_norm};
pub(super) use product::{After, Field, Filter};

use kernels::Card;

/// A device with one stream of its own.
pub(crate) fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)?;
    // SAFETY: events order the work of several streams on one tensor, and every tensor stays on
    // the stream of the device that it was made for.
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

/// What our kernels were loaded from.
pub(crate) fn images(device: &Device) -> Option<String> {
    kernels::images(device.as_cuda_device().ok()?).ok()
}

/// Whether the kernels of the tensor cores know this type on this device.
pub(super) fn has_products(device: &Device, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = device else { return Ok(false) };
    let capability = Card::of(device)?.capability;
    Ok((dtype == DType::F16 && capability >= 75) || (dtype == DType::BF16 && capability >= 80))
}

/// Whether the kernels that need no tensor cores know this type on this device.
fn has_plain(x: &Tensor, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = x.device() else { return Ok(false) };
    let single = dtype == DType::F32 && Card::of(device)?.capability >= 75;
    Ok(x.is_contiguous() && (single || has_products(x.device(), dtype)?))
}

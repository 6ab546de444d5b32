//! Tensors from the device to the host.

use candle_core::{Device, Result, Tensor};

/// The tensor on the CPU. The host has waited for the copy: one to memory that is not pinned may be
/// under way when the call returns.
pub(crate) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    let copy = tensor.to_device(&Device::Cpu)?;
    tensor.device().synchronize()?;
    Ok(copy)
}

//! The CUDA backend of a build without the feature `cuda`: it opens no device, and no operation has
//! a kernel.

use candle_core::{DType, Device, Error, Result, Tensor};

use super::concat::ChannelConcat;
use super::types::{Attention, DeviceFault, Epilogue, Geometry, KernelStats};

/// There are none.
pub(super) enum CudaFilter {}

impl CudaFilter {
    pub(super) fn new(
        _: &Tensor,
        _: Option<&Tensor>,
        _: bool,
        _: &Device,
        _: DType,
    ) -> Result<Option<Self>> {
        Ok(None)
    }

    pub(super) fn bytes(&self) -> usize {
        match *self {}
    }

    pub(super) fn linear(&self, _: &Tensor, _: Epilogue<'_>) -> Result<Tensor> {
        match *self {}
    }

    pub(super) fn convolve(
        &self,
        _: &ChannelConcat,
        _: (usize, usize),
        _: Geometry,
        _: Epilogue<'_>,
    ) -> Result<Tensor> {
        match *self {}
    }
}

pub(super) fn attention(
    _: &Tensor,
    _: &Tensor,
    _: &Tensor,
    _: Attention,
) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn group_norm(
    _: &ChannelConcat,
    _: (&Tensor, &Tensor),
    _: usize,
    _: f64,
    _: bool,
) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn layer_norm(_: &Tensor, _: &Tensor, _: &Tensor, _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn linear_combination(_: &[(f64, &Tensor)]) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn lerp(_: &Tensor, _: &Tensor, _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn channels_last(_: &Tensor, _: DType) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn channels_first(_: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn convert(_: &Tensor, _: DType) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn scaled_sum(
    _: &Tensor,
    _: f64,
    _: Option<&Tensor>,
    _: bool,
) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn cat_rows<T: AsRef<Tensor>>(_: &[T]) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn embed(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// Fails: candle says that it has no CUDA.
pub(crate) fn open(number: usize) -> Result<Device> {
    Device::new_cuda(number)
}

pub(crate) fn free_bytes(_: &Device) -> Option<u64> {
    None
}

pub(crate) fn pool_bytes(_: &Device) -> Option<u64> {
    None
}

pub(crate) fn name(_: &Device) -> Option<String> {
    None
}

pub(crate) fn loaded_images(_: &Device) -> Option<String> {
    None
}

pub(crate) fn stats() -> Vec<(&'static str, KernelStats)> {
    Vec::new()
}

pub(crate) fn uuids() -> Vec<String> {
    Vec::new()
}

pub(crate) fn device_fault(_: &Error) -> Option<DeviceFault> {
    None
}

pub(crate) fn begin_step(_: &Device) -> Result<()> {
    Ok(())
}

pub(crate) fn end_step(_: &Device) -> Result<()> {
    Ok(())
}

pub(super) fn return_memory() {}

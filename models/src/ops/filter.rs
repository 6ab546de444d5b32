//! The weights of linear layers and convolutions where they are computed with.

use candle_core::{DType, Device, Result, Tensor};

use super::concat::ChannelConcat;
use super::cpu::{PackedFilter, Weight};
use super::cuda::CudaFilter;
use super::reference::TensorFilter;
use super::types::{Epilogue, Geometry};

/// A weight and its bias on one of the backends.
pub(super) enum PlacedFilter {
    /// Packed into panels in host memory.
    Cpu(PackedFilter),
    /// As our CUDA kernels read it.
    Cuda(CudaFilter),
    /// As candle's operations read it.
    Device(TensorFilter),
}

impl PlacedFilter {
    /// From a weight (out, in, k, k) or (out, in), and a bias (out), for a device and its type.
    ///
    /// A gated weight is (2 out, in): values, then gates.
    pub(super) fn new(
        weight: &Weight<'_>,
        bias: Option<&Tensor>,
        geometry: Geometry,
        gated: bool,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        if device.is_cpu() {
            return PackedFilter::new(weight, bias, geometry, gated, dtype).map(Self::Cpu);
        }
        let (outputs, depth) = weight.matrix();
        let (side, inputs) = (geometry.kernel, depth / geometry.taps());
        let weight = weight.tensor()?.reshape((outputs, inputs, side, side))?;
        if let Some(filter) = CudaFilter::new(&weight, bias, gated, device, dtype)? {
            return Ok(Self::Cuda(filter));
        }
        TensorFilter::new(&weight, bias, gated, device, dtype).map(Self::Device)
    }

    /// Bytes of the weight as it is stored.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Cpu(filter) => filter.bytes(),
            Self::Cuda(filter) => filter.bytes(),
            Self::Device(filter) => filter.bytes(),
        }
    }

    /// Whether operands are rounded to bf16 and multiplied by AMX.
    pub(super) fn uses_amx(&self) -> bool {
        matches!(self, Self::Cpu(filter) if filter.uses_amx())
    }

    /// x (.., in) -> (.., out)
    pub(super) fn linear(&self, x: &Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
        match self {
            Self::Cpu(filter) => filter.linear(x, epilogue),
            Self::Cuda(filter) => filter.linear(x, epilogue),
            Self::Device(filter) => filter.linear(x, epilogue),
        }
    }

    /// x (B, H, W, in), resized to `size` (height, width) by nearest neighbours
    /// -> (B, H', W', out)
    pub(super) fn convolve(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        geometry: Geometry,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        match self {
            Self::Cpu(filter) => filter.convolve(x, size, geometry, epilogue),
            Self::Cuda(filter) => filter.convolve(x, size, geometry, epilogue),
            Self::Device(filter) => filter.convolve(x, size, geometry, epilogue),
        }
    }
}

//! Arguments of kernels: addresses in device memory, and 32-bit integers.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr as _};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Error, Result, Shape, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16};

use crate::ops::concat::ChannelConcat;

/// A tensor in device memory, locked until the launch that reads it has been queued.
pub(super) struct Operand<'a> {
    _storage: StorageRef<'a>,
    pub(super) address: u64,
}

impl<'a> Operand<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(cuda) = &*storage else { bail!("expected a tensor on a CUDA device") };
        let stream = cuda.device().cuda_stream();
        // Dropping the guard at once records nothing: events are off.
        let base = match &cuda.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
            _ => bail!("no kernel for {:?}", tensor.dtype()),
        };
        let bytes = layout.start_offset() * tensor.dtype().size_in_bytes();
        Ok(Self { address: base + bytes as u64, _storage: storage })
    }

    /// As `new`, of a contiguous tensor.
    pub(super) fn dense(tensor: &'a Tensor) -> Result<Self> {
        if !tensor.is_contiguous() {
            bail!("expected a contiguous tensor, got strides {:?}", tensor.stride());
        }
        Self::new(tensor)
    }
}

pub(super) fn address(operand: Option<&Operand<'_>>) -> u64 {
    operand.map_or(0, |operand| operand.address)
}

/// A new tensor, its contents still undefined, and its address.
pub(super) fn output(
    device: &CudaDevice,
    dtype: DType,
    shape: impl Into<Shape>,
) -> Result<(Tensor, u64)> {
    let shape = shape.into();
    let len = shape.elem_count();
    let stream = device.cuda_stream();
    // SAFETY: the kernel that the tensor is made for writes every element.
    let (slice, address) = unsafe {
        match dtype {
            DType::F32 => {
                let slice: CudaSlice<f32> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::F32(slice), address)
            }
            DType::F16 => {
                let slice: CudaSlice<f16> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::F16(slice), address)
            }
            DType::BF16 => {
                let slice: CudaSlice<bf16> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::BF16(slice), address)
            }
            other => bail!("no kernel for {other:?}"),
        }
    };
    let storage = Storage::Cuda(CudaStorage { slice, device: device.clone() });
    Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), address))
}

pub(super) fn int(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(Error::wrap)
}

/// The second of two images, and its channels.
pub(super) fn second(x: &ChannelConcat) -> Result<(Option<Operand<'_>>, usize)> {
    match &x.second {
        Some(second) => Ok((Some(Operand::dense(second)?), second.dim(3)?)),
        None => Ok((None, 0)),
    }
}

/// Bytes of some tensors in all.
pub(super) fn bytes(tensors: &[Option<&Tensor>]) -> u64 {
    let size = |t: &&Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    tensors.iter().flatten().map(size).sum()
}

//! f32 tensors in host memory as slices.

use candle_core::{CpuStorage, DType, Result, Storage, StorageRef, Tensor, bail};

use crate::ops::host_copy::on_host;

/// A contiguous f32 tensor in host memory, locked while its data is read.
pub(super) struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Host<'_> {
    pub(super) fn data(&self) -> Result<&[f32]> {
        Ok(&floats(&self.storage)?[self.start..self.start + self.len])
    }
}

/// The whole storage of a tensor.
pub(super) fn floats(storage: &Storage) -> Result<&[f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(floats)) => Ok(floats),
        _ => bail!("a CPU kernel was given a tensor that is not f32 in host memory"),
    }
}

/// All elements of a contiguous tensor.
pub(super) fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Host { storage, start, len: end - start }),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// Parameters as f32 in host memory, whatever their type and device.
pub(in crate::ops) fn to_host(tensor: &Tensor) -> Result<Vec<f32>> {
    on_host(tensor)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

//! Conversions between types, sums and embeddings of tokens, in `elements.cu`.

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::driver::result::memcpy_dtod_async;
use candle_core::{DType, Result, Tensor};

use super::device::has_plain;
use super::images::ELEMENTS;
use super::launch::{Grid, launch};
use super::memory::{Operand, address, bytes, int, output};

/// Mirrors `Convert` in `elements.cu`.
#[repr(C)]
struct ConvertArgs {
    out: u64,
    input: u64,
    count: i32,
    unused: i32,
}

const _: () = assert!(size_of::<ConvertArgs>() == 24);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for ConvertArgs {}

/// Mirrors `ScaledSum` in `elements.cu`.
#[repr(C)]
struct ScaledSumArgs {
    out: u64,
    a: u64,
    b: u64,
    factor: f32,
    count: i32,
    silu: i32,
    unused: i32,
}

const _: () = assert!(size_of::<ScaledSumArgs>() == 40);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for ScaledSumArgs {}

/// Mirrors `Embed` in `elements.cu`.
#[repr(C)]
struct EmbedArgs {
    out: u64,
    table: u64,
    positions: u64,
    ids: u64,
    width: i32,
    length: i32,
    count: i32,
}

const _: () = assert!(size_of::<EmbedArgs>() == 48);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for EmbedArgs {}

/// From f32 to a network's type or back, of any shape.
pub(in crate::ops) fn convert(x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let known = (x.dtype() == DType::F32) != (dtype == DType::F32);
    let own = |dtype| has_plain(x, dtype);
    if !known || !own(x.dtype())? || !own(dtype)? {
        return Ok(None);
    }
    let (device, count) = (x.device().as_cuda_device()?, x.elem_count());
    let (y, out) = output(device, dtype, x.shape())?;
    let input = Operand::dense(x)?;
    let args = ConvertArgs { out, input: input.address, count: int(count)?, unused: 0 };
    let kernel = format!("convert_{}", x.dtype().as_str());
    let grid = Grid { blocks: (count.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: both tensors have the elements that the arguments say.
    unsafe { launch(device, &ELEMENTS, (&kernel, dtype), &grid, &args)? };
    ELEMENTS.count(0, bytes(&[Some(x), Some(&y)]));
    Ok(Some(y))
}

/// factor * a + b, of one shape and type, or the SiLU of that.
pub(in crate::ops) fn scaled_sum(
    a: &Tensor,
    factor: f64,
    b: Option<&Tensor>,
    silu: bool,
) -> Result<Option<Tensor>> {
    let fits = |b: &Tensor| b.shape() == a.shape() && b.dtype() == a.dtype() && b.is_contiguous();
    if !b.is_none_or(fits) || !has_plain(a, a.dtype())? {
        return Ok(None);
    }
    let (device, count) = (a.device().as_cuda_device()?, a.elem_count());
    let (y, out) = output(device, a.dtype(), a.shape())?;
    let (first, second) = (Operand::dense(a)?, b.map(Operand::dense).transpose()?);
    let args = ScaledSumArgs {
        out,
        a: first.address,
        b: address(second.as_ref()),
        factor: factor as f32,
        count: int(count)?,
        silu: i32::from(silu),
        unused: 0,
    };
    let grid = Grid { blocks: (count.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: all tensors have the elements that the arguments say.
    unsafe { launch(device, &ELEMENTS, ("scaled_sum", a.dtype()), &grid, &args)? };
    ELEMENTS.count(0, bytes(&[Some(a), b, Some(&y)]));
    Ok(Some(y))
}

/// Tensors of one type, below each other: copies, and no kernel.
pub(in crate::ops) fn cat_rows<T: AsRef<Tensor>>(tensors: &[T]) -> Result<Option<Tensor>> {
    let Some(first) = tensors.first().map(AsRef::as_ref) else { return Ok(None) };
    let ([_, row @ ..], dtype) = (first.dims(), first.dtype()) else { return Ok(None) };
    let mut rows = 0;
    for tensor in tensors.iter().map(AsRef::as_ref) {
        match tensor.dims() {
            [own, rest @ ..] if rest == row && tensor.dtype() == dtype => rows += own,
            _ => return Ok(None),
        }
        if !has_plain(tensor, dtype)? {
            return Ok(None);
        }
    }
    let device = first.device().as_cuda_device()?;
    let (y, mut to) = output(device, dtype, [&[rows], row].concat())?;
    let stream = device.cuda_stream();
    for tensor in tensors.iter().map(AsRef::as_ref) {
        let (from, size) = (Operand::dense(tensor)?, bytes(&[Some(tensor)]));
        // SAFETY: the output has the bytes of all tensors.
        unsafe { memcpy_dtod_async(to, from.address, size as usize, stream.cu_stream()) }.w()?;
        to += size;
    }
    Ok(Some(y))
}

/// ids (B * L) u32 below the rows of the table (V, C), positions (L, C) -> (B * L, C)
pub(in crate::ops) fn embed(
    table: &Tensor,
    positions: &Tensor,
    ids: &Tensor,
) -> Result<Option<Tensor>> {
    let known = ids.dtype() == DType::U32 && positions.is_contiguous() && ids.is_contiguous();
    if !known || !has_plain(table, table.dtype())? {
        return Ok(None);
    }
    let (device, width) = (table.device().as_cuda_device()?, table.dim(1)?);
    let count = ids.elem_count() * width;
    let (y, out) = output(device, table.dtype(), (ids.elem_count(), width))?;
    let [table, places, tokens] =
        [Operand::dense(table)?, Operand::dense(positions)?, Operand::dense(ids)?];
    let args = EmbedArgs {
        out,
        table: table.address,
        positions: places.address,
        ids: tokens.address,
        width: int(width)?,
        length: int(positions.dim(0)?)?,
        count: int(count)?,
    };
    let grid = Grid { blocks: (count.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: the operands have the shapes that the arguments say, and ids are rows of the table.
    unsafe { launch(device, &ELEMENTS, ("embed", y.dtype()), &grid, &args)? };
    ELEMENTS.count(0, 3 * bytes(&[Some(&y)]));
    Ok(Some(y))
}

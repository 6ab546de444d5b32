//! Group and layer norms, the former with or without SiLU, in `norm.cu`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::device::has_plain;
use super::images::NORM;
use super::launch::{Grid, launch};
use super::memory::{Operand, address, bytes, int, output, second};
use crate::ops::concat::ChannelConcat;

/// Mirrors `GroupNorm` in `norm.cu`.
#[repr(C)]
struct GroupNormArgs {
    out: u64,
    input: [u64; 2],
    weight: u64,
    bias: u64,
    partial: u64,
    pixels: i32,
    channels: i32,
    c1: i32,
    groups: i32,
    run: i32,
    parts: i32,
    eps: f32,
    silu: i32,
}

const _: () = assert!(size_of::<GroupNormArgs>() == 80);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for GroupNormArgs {}

/// Maximum number of pixels whose groups are normalised by one block each.
const SMALL: usize = 1024;

/// (B, H, W, C) -> (B, H, W, C), `weight` and `bias` (C) f32.
pub(in crate::ops) fn group_norm(
    x: &ChannelConcat,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    if !has_plain(&x.first, x.first.dtype())? {
        return Ok(None);
    }
    let (batch, h, w, c1) = x.first.dims4()?;
    let (first, (second, c2)) = (Operand::dense(&x.first)?, second(x)?);
    let (weight, bias) = (Operand::dense(weight)?, Operand::dense(bias)?);
    let (device, dtype) = (x.first.device().as_cuda_device()?, x.first.dtype());
    let (pixels, channels) = (h * w, c1 + c2);
    let parts = if pixels <= SMALL { 0 } else { (pixels / 64).clamp(1, 256) };
    let partial = (parts > 0).then(|| output(device, DType::F32, (batch, parts, groups, 2)));
    let partial = partial.transpose()?;
    let (y, out) = output(device, dtype, (batch, h, w, channels))?;
    let args = GroupNormArgs {
        out,
        input: [first.address, address(second.as_ref())],
        weight: weight.address,
        bias: bias.address,
        partial: partial.as_ref().map_or(0, |(_, address)| *address),
        pixels: int(pixels)?,
        channels: int(channels)?,
        c1: int(c1)?,
        groups: int(groups)?,
        run: int(pixels.div_ceil(parts.max(1)))?,
        parts: int(parts)?,
        eps: eps as f32,
        silu: i32::from(silu),
    };
    let threads = 512;
    // SAFETY: the operands have the shapes that the arguments say.
    unsafe {
        if parts == 0 {
            let grid = Grid { blocks: (groups, batch, 1), threads, shared: 0 };
            launch(device, &NORM, ("group_norm_small", dtype), &grid, &args)?;
        } else {
            let blocks = (parts, batch, 1);
            let grid = Grid { blocks, threads, shared: 8 * channels.max(threads) };
            launch(device, &NORM, ("group_norm_sums", dtype), &grid, &args)?;
            let grid = Grid { blocks, threads, shared: 8 * groups };
            launch(device, &NORM, ("group_norm_apply", dtype), &grid, &args)?;
        }
    }
    let moved = bytes(&[Some(&x.first), x.second.as_ref(), Some(&y)]);
    NORM.count(0, moved);
    Ok(Some(y))
}

/// Mirrors `LayerNorm` in `norm.cu`.
#[repr(C)]
struct LayerNormArgs {
    out: u64,
    input: u64,
    weight: u64,
    bias: u64,
    rows: i32,
    width: i32,
    eps: f32,
}

const _: () = assert!(size_of::<LayerNormArgs>() == 48);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for LayerNormArgs {}

/// (.., C) -> (.., C), `weight` and `bias` (C) f32.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Option<Tensor>> {
    if !has_plain(x, x.dtype())? {
        return Ok(None);
    }
    let (device, width) = (x.device().as_cuda_device()?, weight.elem_count());
    let rows = x.elem_count() / width;
    let (input, weight, bias) = (Operand::new(x)?, Operand::dense(weight)?, Operand::dense(bias)?);
    let (y, out) = output(device, x.dtype(), x.shape())?;
    let args = LayerNormArgs {
        out,
        input: input.address,
        weight: weight.address,
        bias: bias.address,
        rows: int(rows)?,
        width: int(width)?,
        eps: eps as f32,
    };
    let grid = Grid { blocks: (rows.div_ceil(4), 1, 1), threads: 128, shared: 0 };
    // SAFETY: the operands have the shapes that the arguments say.
    unsafe { launch(device, &NORM, ("layer_norm", x.dtype()), &grid, &args)? };
    NORM.count(0, bytes(&[Some(x), Some(&y)]));
    Ok(Some(y))
}

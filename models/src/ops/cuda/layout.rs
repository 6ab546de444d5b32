//! Latents to activations and back, in `layout.cu`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor};

use super::device::has_plain;
use super::images::LAYOUT;
use super::launch::{Grid, launch};
use super::memory::{Operand, bytes, int, output};

/// Mirrors `Layout` in `layout.cu`.
#[repr(C)]
struct LayoutArgs {
    out: u64,
    input: u64,
    pixels: i32,
    channels: i32,
    count: i32,
}

const _: () = assert!(size_of::<LayoutArgs>() == 32);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for LayoutArgs {}

/// (B, C, H, W) f32 -> (B, H, W, C)
pub(in crate::ops) fn channels_last(x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if x.dtype() != DType::F32 || !has_plain(x, dtype)? {
        return Ok(None);
    }
    let (batch, channels, h, w) = x.dims4()?;
    let (y, out) = output(x.device().as_cuda_device()?, dtype, (batch, h, w, channels))?;
    turn(("channels_last", dtype), x, (&y, out), (h * w, channels)).map(|()| Some(y))
}

/// (B, H, W, C) -> (B, C, H, W) f32
pub(in crate::ops) fn channels_first(x: &Tensor) -> Result<Option<Tensor>> {
    if !has_plain(x, x.dtype())? {
        return Ok(None);
    }
    let (batch, h, w, channels) = x.dims4()?;
    let (y, out) = output(x.device().as_cuda_device()?, DType::F32, (batch, channels, h, w))?;
    turn(("channels_first", x.dtype()), x, (&y, out), (h * w, channels)).map(|()| Some(y))
}

fn turn(
    kernel: (&str, DType),
    x: &Tensor,
    (y, out): (&Tensor, u64),
    (pixels, channels): (usize, usize),
) -> Result<()> {
    let (device, elements) = (x.device().as_cuda_device()?, x.elem_count());
    let input = Operand::dense(x)?;
    let args = LayoutArgs {
        out,
        input: input.address,
        pixels: int(pixels)?,
        channels: int(channels)?,
        count: int(elements)?,
    };
    let grid = Grid { blocks: (elements.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: both tensors have the elements that the arguments say.
    unsafe { launch(device, &LAYOUT, kernel, &grid, &args)? };
    LAYOUT.count(0, bytes(&[Some(x), Some(y)]));
    Ok(())
}

//! Attention without stored scores, in `attention.cu`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{Error, Result, Tensor};

use super::device::has_products;
use super::images::ATTENTION;
use super::launch::{Grid, launch};
use super::memory::{Operand, bytes, int, output};
use crate::ops::types::Attention;

/// Mirrors `Attention` of `attention.cu`.
#[repr(C)]
struct AttentionArgs {
    qkv: [u64; 3],
    out: u64,
    samples: [i64; 3],
    rows: [i32; 3],
    heads: i32,
    width: i32,
    queries: i32,
    keys: i32,
    scale: f32,
    causal: i32,
}

const _: () = assert!(size_of::<AttentionArgs>() == 96);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for AttentionArgs {}

/// Head widths of the kernels; each is for all narrower multiples of 8, too.
const WIDTHS: [usize; 7] = [16, 32, 48, 64, 80, 128, 160];
/// The head width of the kernel that divides a head among warps.
const WIDE: usize = 512;

/// q (B, Lq, C), k and v (B, Lk, C), rows strided or not -> (B, Lq, C)
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: Attention,
) -> Result<Option<Tensor>> {
    let (batch, queries, channels) = q.dims3()?;
    let (keys, width) = (k.dim(1)?, channels / kind.heads);
    let wide = width == WIDE && !kind.causal;
    let known = WIDTHS.into_iter().find(|w| width <= *w).filter(|_| width.is_multiple_of(8));
    let Some(known) = known.or(wide.then_some(WIDE)) else { return Ok(None) };
    if !has_products(q.device(), q.dtype())? {
        return Ok(None);
    }
    let device = q.device().as_cuda_device()?;
    let operands = [Operand::new(q)?, Operand::new(k)?, Operand::new(v)?];
    let (mut samples, mut rows) = ([0; 3], [0; 3]);
    for (i, tensor) in [q, k, v].into_iter().enumerate() {
        let [sample, row, 1] = *tensor.stride() else { return Ok(None) };
        // Rows are read in pieces of 16 bytes.
        let aligned = operands[i].address.is_multiple_of(16);
        if !aligned || !row.is_multiple_of(8) || !sample.is_multiple_of(8) {
            return Ok(None);
        }
        (samples[i], rows[i]) = (i64::try_from(sample).map_err(Error::wrap)?, int(row)?);
    }
    let (y, out) = output(device, q.dtype(), (batch, queries, channels))?;
    let scale = (width as f32).powf(-0.5) * std::f32::consts::LOG2_E;
    let args = AttentionArgs {
        qkv: [operands[0].address, operands[1].address, operands[2].address],
        out,
        samples,
        rows,
        heads: int(kind.heads)?,
        width: int(width)?,
        queries: int(queries)?,
        keys: int(keys)?,
        scale,
        causal: i32::from(kind.causal),
    };
    let grid = if known == WIDE {
        // Queries, probabilities, values in f16 and maxima in f32, as `attention_wide` lays them.
        let halves = 32 * (WIDE + 8) + 32 * (64 + 8) + 8 * 16 * (WIDE / 8 + 8);
        let shared = 2 * halves + 4 * 8 * 32;
        Grid { blocks: (queries.div_ceil(32), kind.heads, batch), threads: 256, shared }
    } else {
        Grid { blocks: (queries.div_ceil(64), kind.heads, batch), threads: 128, shared: 0 }
    };
    // SAFETY: the operands have the shapes and strides that the arguments say.
    unsafe {
        launch(device, &ATTENTION, (&format!("attention_{known}"), q.dtype()), &grid, &args)?;
    }
    let flops = (4 * batch * queries * keys * channels) as u64;
    let moved = bytes(&[Some(q), Some(k), Some(v), Some(&y)]);
    ATTENTION.count(flops, moved);
    Ok(Some(y))
}

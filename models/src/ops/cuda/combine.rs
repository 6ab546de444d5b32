//! Sums of scaled tensors, and guidance, in `combine.cu`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, Tensor, bail};

use super::device::has_plain;
use super::images::COMBINE;
use super::launch::{Grid, launch};
use super::memory::{Operand, bytes, int, output};

/// Maximum number of terms of a sum: that of the Adams-Bashforth method.
const TERMS: usize = 4;

/// Mirrors `Combine` in `combine.cu`.
#[repr(C)]
struct CombineArgs {
    out: u64,
    input: [u64; TERMS],
    factor: [f32; TERMS],
    terms: i32,
    count: i32,
}

const _: () = assert!(size_of::<CombineArgs>() == 64);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for CombineArgs {}

/// f32 of one shape -> the same
pub(in crate::ops) fn linear_combination(terms: &[(f64, &Tensor)]) -> Result<Option<Tensor>> {
    match terms {
        [(1.0, x)] => Ok(Some(Tensor::clone(x))),
        _ => run("linear_combination", terms),
    }
}

/// a and b f32 of one shape -> the same
pub(in crate::ops) fn lerp(a: &Tensor, b: &Tensor, t: f64) -> Result<Option<Tensor>> {
    run("lerp", &[(1.0, a), (t, b)])
}

fn run(kernel: &str, terms: &[(f64, &Tensor)]) -> Result<Option<Tensor>> {
    let Some((_, first)) = terms.first() else { return Ok(None) };
    let mut known = terms.len() <= TERMS;
    for (_, x) in terms {
        known &= x.dtype() == DType::F32 && has_plain(x, DType::F32)?;
        if x.shape() != first.shape() {
            bail!("{:?} and {:?} cannot be combined", first.shape(), x.shape());
        }
    }
    if !known {
        return Ok(None);
    }
    let (device, count) = (first.device().as_cuda_device()?, first.elem_count());
    let (y, out) = output(device, DType::F32, first.shape())?;
    let operands: Vec<_> = terms.iter().map(|(_, x)| Operand::dense(x)).collect::<Result<_>>()?;
    let (mut input, mut factor) = ([0; TERMS], [0.0; TERMS]);
    for (i, (operand, (scale, _))) in operands.iter().zip(terms).enumerate() {
        (input[i], factor[i]) = (operand.address, *scale as f32);
    }
    let args = CombineArgs { out, input, factor, terms: int(terms.len())?, count: int(count)? };
    let grid = Grid { blocks: (count.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: all tensors have the elements that the arguments say.
    unsafe { launch(device, &COMBINE, (kernel, DType::F32), &grid, &args)? };
    let moved: u64 = terms.iter().map(|(_, x)| bytes(&[Some(x)])).sum();
    COMBINE.count(0, moved + bytes(&[Some(&y)]));
    Ok(Some(y))
}

//! Pointwise nonlinearities, and GEGLU.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::buffers::written_in_chunks;
use super::simd::{erf, exp, vectorized};
use super::{host, on_cpu};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// A pointwise nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// x * Phi(x), exact
    Gelu,
    /// x * sigmoid(1.702 x)
    QuickGelu,
}

/// The activation of every element.
pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !on_cpu(x) {
        return match activation {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
        };
    }
    let x = x.contiguous()?;
    let source = host(&x)?;
    let mut out = source.data()?.to_vec();
    out.par_chunks_mut(CHUNK).for_each(|chunk| match activation {
        Activation::Silu => silu(chunk),
        Activation::Gelu => gelu(chunk),
        Activation::QuickGelu => quick_gelu(chunk),
    });
    Tensor::from_vec(out, x.shape(), x.device())
}

vectorized! {
    /// x * sigmoid(x), in place
    pub(super) fn silu(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp::<FMA>(-*x);
        }
    }
}

vectorized! {
    fn gelu(x: &mut [f32]) {
        for x in x {
            *x *= 0.5 + 0.5 * erf::<FMA>(*x * std::f32::consts::FRAC_1_SQRT_2);
        }
    }
}

vectorized! {
    fn quick_gelu(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp::<FMA>(-1.702 * *x);
        }
    }
}

vectorized! {
    fn gate(value: &[f32], gate: &[f32], out: &mut [f32]) {
        for ((out, value), gate) in out.iter_mut().zip(value).zip(gate) {
            *out = value * gate * (0.5 + 0.5 * erf::<FMA>(gate * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

/// GEGLU (Shazeer 2020): (.., 2D) -> (.., D), the first half times the gelu of the second.
pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(candle_core::D::Minus1)? / 2;
    if !on_cpu(x) {
        let gate = x.narrow(candle_core::D::Minus1, width, width)?.contiguous()?.gelu_erf()?;
        return x.narrow(candle_core::D::Minus1, 0, width)?.contiguous()? * gate;
    }
    let source = host(x)?;
    let data = source.data()?;
    let rows = (CHUNK / width).max(1);
    let gated = |i: usize, out: &mut [f32]| {
        let data = data[2 * i * rows * width..].chunks_exact(2 * width);
        for (out, row) in out.chunks_exact_mut(width).zip(data) {
            gate(&row[..width], &row[width..], out);
        }
    };
    // SAFETY: gate() writes all of what it is given, and there is a row for each chunk.
    let out = unsafe { written_in_chunks(data.len() / 2, rows * width, gated) };
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(width);
    Tensor::from_vec(out, shape, x.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn activations_agree_with_candle() {
        let x = (tensor(&[3, 7, 129], 1) * 6.0).unwrap();
        let sigmoid = |x: &Tensor| candle_nn::ops::sigmoid(x).unwrap();
        let quick = (&x * sigmoid(&(&x * 1.702).unwrap())).unwrap();
        let close = |a, b: &Tensor| assert!(difference(&activate(&x, a).unwrap(), b) < 1e-6);
        close(Activation::Silu, &x.silu().unwrap());
        close(Activation::Gelu, &x.gelu_erf().unwrap());
        close(Activation::QuickGelu, &quick);
    }

    #[test]
    fn geglu_agrees_with_candle() {
        let x = (tensor(&[2, 5, 74], 2) * 4.0).unwrap();
        let (value, gate) = (x.narrow(2, 0, 37).unwrap(), x.narrow(2, 37, 37).unwrap());
        let want = (value * gate.gelu_erf().unwrap()).unwrap();
        assert!(difference(&geglu(&x).unwrap(), &want) < 1e-6);
    }
}

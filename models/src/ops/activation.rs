//! Pointwise nonlinearities, and GEGLU.

use candle_core::{D, Result, Tensor};

use super::packed::NR;
use super::simd::{erf, exp, vectorized};

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

impl Activation {
    /// The activation of every element, in place.
    pub(super) fn apply(self, x: &mut [f32]) {
        match self {
            Self::Silu => silu(x),
            Self::Gelu => gelu(x),
            Self::QuickGelu => quick_gelu(x),
        }
    }

    /// The same from candle's operations.
    pub(super) fn reference(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
        }
    }
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
    /// Rows of NR / 2 values and their gates, without `bias`: each value times the gelu of its
    /// gate, in place.
    pub(super) fn gate(rows: &mut [f32], bias: &[f32]) {
        let (value_bias, gate_bias) = bias.split_at(NR / 2);
        for row in rows.chunks_exact_mut(NR) {
            let (values, gates) = row.split_at_mut(NR / 2);
            let biases = value_bias.iter().zip(gate_bias);
            for ((value, gate), (b, c)) in values.iter_mut().zip(gates).zip(biases) {
                let gate = *gate + c;
                let gelu = gate * (0.5 + 0.5 * erf::<FMA>(gate * std::f32::consts::FRAC_1_SQRT_2));
                *value = (*value + b) * gelu;
            }
        }
    }
}

/// GEGLU (Shazeer 2020) from candle's operations: (.., 2D) -> (.., D), the first half times the
/// gelu of the second.
pub(super) fn geglu_reference(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    let gate = x.narrow(D::Minus1, width, width)?.contiguous()?.gelu_erf()?;
    x.narrow(D::Minus1, 0, width)?.contiguous()? * gate
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn activations_agree_with_candle() {
        let x = (tensor(&[3, 7, 129], 1) * 6.0).unwrap();
        for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            let mut values = x.flatten_all().unwrap().to_vec1().unwrap();
            activation.apply(&mut values);
            let got = Tensor::from_vec(values, x.shape(), x.device()).unwrap();
            assert!(difference(&got, &activation.reference(&x).unwrap()) < 1e-6);
        }
    }
}

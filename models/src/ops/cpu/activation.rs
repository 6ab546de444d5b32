//! Pointwise nonlinearities, and the gate of GEGLU, in place.

use super::simd::{erf, exp, vectorized};
use super::tile::NR;
use crate::ops::types::Activation;

/// The activation of every element.
pub(super) fn activate(x: &mut [f32], activation: Activation) {
    match activation {
        Activation::Silu => silu(x),
        Activation::Gelu => gelu(x),
        Activation::QuickGelu => quick_gelu(x),
        Activation::LeakyRelu => x.iter_mut().for_each(|x| *x = x.max(0.2 * *x)),
    }
}

vectorized! {
    /// x * sigmoid(x)
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
    /// Rows of NR / 2 values and their gates, and their bias (NR): each value times the gelu of its
    /// gate, in the place of the value.
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

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::ops::reference;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn activations_agree_with_candle() {
        let x = (tensor(&[3, 7, 129], 1) * 6.0).unwrap();
        for activation in
            [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::LeakyRelu]
        {
            let mut values = x.flatten_all().unwrap().to_vec1().unwrap();
            activate(&mut values, activation);
            let got = Tensor::from_vec(values, x.shape(), x.device()).unwrap();
            assert!(difference(&got, &reference::activate(&x, activation).unwrap()) < 1e-6);
        }
    }
}

//! y = x W^T + b, with its epilogue or its gate.

use candle_core::{DType, Device, Result, Tensor};

use super::cpu::Weight;
use super::filter::PlacedFilter;
use super::types::{Epilogue, Geometry};

/// A linear layer; a gated one is GEGLU (Shazeer 2020): the first half of its outputs times the gelu
/// of the second.
pub(crate) struct Linear {
    filter: PlacedFilter,
    gated: bool,
}

impl Linear {
    /// From a weight (out, in) or (out, in, 1, 1) and a bias (out), for a device and its type.
    pub(crate) fn new<'a>(
        weight: impl Into<Weight<'a>>,
        bias: Option<&Tensor>,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weight = weight.into();
        let filter = PlacedFilter::new(&weight, bias, Geometry::POINT, false, device, dtype)?;
        Ok(Self { filter, gated: false })
    }

    /// From a weight (2 out, in) and a bias (2 out), values, then gates, for a device and its type.
    pub(crate) fn geglu<'a>(
        weight: impl Into<Weight<'a>>,
        bias: &Tensor,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weight = weight.into();
        let filter = PlacedFilter::new(&weight, Some(bias), Geometry::POINT, true, device, dtype)?;
        Ok(Self { filter, gated: true })
    }

    /// Whether the layer is linear in its input, up to its bias, with this epilogue.
    pub(crate) fn is_linear(&self, epilogue: Epilogue<'_>) -> bool {
        !self.gated && epilogue.activation.is_none()
    }

    /// Whether operands are rounded to bf16 and multiplied by AMX.
    pub(crate) fn uses_amx(&self) -> bool {
        self.filter.uses_amx()
    }

    /// Bytes of the weight as it is stored.
    pub(crate) fn bytes(&self) -> usize {
        self.filter.bytes()
    }

    /// x (.., in) -> (.., out)
    pub(crate) fn forward(&self, x: &Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
        self.filter.linear(x, epilogue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;
    use crate::ops::tests::{difference, tensor};
    use crate::ops::types::Activation;

    #[test]
    fn linear_agrees_with_candle() {
        let (x, w, b) = (tensor(&[2, 9, 70], 1), tensor(&[45, 70], 2), tensor(&[45], 3));
        let r = tensor(&[2, 9, 45], 4);
        let layer = Linear::new(&w, Some(&b), &Device::Cpu, DType::F32).unwrap();
        let want = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
        assert!(difference(&layer.forward(&x, Epilogue::NONE).unwrap(), &want) < 1e-5);
        let got = layer.forward(&x, Epilogue::activation(Activation::Silu)).unwrap();
        assert!(difference(&got, &want.silu().unwrap()) < 1e-5);
        let want = (want + &r).unwrap();
        assert!(difference(&layer.forward(&x, Epilogue::residual(&r)).unwrap(), &want) < 1e-5);
        let both = Epilogue { activation: Some(Activation::Silu), ..Epilogue::residual(&r) };
        let (got, want) = (layer.forward(&x, both), want.silu());
        assert!(difference(&got.unwrap(), &want.unwrap()) < 1e-5);
    }

    #[test]
    fn a_term_is_added_before_the_gate() {
        let (x, w, b) = (tensor(&[2, 9, 70], 1), tensor(&[46, 70], 2), tensor(&[46], 3));
        let term = tensor(&[2, 9, 46], 4);
        let linear = Linear::new(&w, Some(&b), &Device::Cpu, DType::F32).unwrap();
        let want =
            reference::geglu(&(linear.forward(&x, Epilogue::NONE).unwrap() + &term).unwrap())
                .unwrap();
        let gate = Linear::geglu(&w, &b, &Device::Cpu, DType::F32).unwrap();
        assert!(difference(&gate.forward(&x, Epilogue::residual(&term)).unwrap(), &want) < 1e-6);
    }

    #[test]
    fn geglu_agrees_with_candle() {
        for (inputs, width) in [(70, 37), (300, 64), (5, 3), (1300, 16)] {
            let x = (tensor(&[2, 9, inputs], 1) * 4.0).unwrap();
            let (w, b) = (tensor(&[2 * width, inputs], 2), tensor(&[2 * width], 3));
            let layer = Linear::geglu(&w, &b, &Device::Cpu, DType::F32).unwrap();
            let product = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
            let want = reference::geglu(&product).unwrap();
            assert!(
                difference(&layer.forward(&x, Epilogue::NONE).unwrap(), &want) < 1e-5,
                "{inputs} {width}"
            );
        }
    }
}

//! y = x W^T + b, with what follows it.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::activation::{Activation, geglu_reference};
#[cfg(feature = "cuda")]
use super::cuda;
use super::gemm::{Epilogue, Matrix, gemm};
use super::packed::{Packed, gated_columns};
use super::{Weight, host, to_host};

/// A linear layer; its weights are packed for the CPU, or lie on another device.
pub(crate) struct Linear {
    weights: Weights,
    out: usize,
}

enum Weights {
    Cpu {
        packed: Packed,
        bias: Option<Vec<f32>>,
    },
    #[cfg(feature = "cuda")]
    Cuda(cuda::Filter),
    Device {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

/// What is done with a product before it is stored.
#[derive(Default, Clone, Copy)]
struct After<'a> {
    activation: Option<Activation>,
    residual: Option<&'a Tensor>,
}

impl Linear {
    /// From a weight (out, in), which may be a kernel of side 1, and a bias (out), for a device and
    /// its type.
    pub(crate) fn new<'a>(
        weight: impl Into<Weight<'a>>,
        bias: Option<&Tensor>,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weight = weight.into();
        let (out, k) = weight.matrix();
        let weights = if device.is_cpu() {
            let packed = Packed::new(&weight, 1, dtype)?;
            Weights::Cpu { packed, bias: bias.map(to_host).transpose()? }
        } else {
            Self::on_device(&weight.tensor()?.reshape((out, k))?, bias, device, dtype)?
        };
        Ok(Self { weights, out })
    }

    fn on_device(
        weight: &Tensor,
        bias: Option<&Tensor>,
        device: &Device,
        dtype: DType,
    ) -> Result<Weights> {
        #[cfg(feature = "cuda")]
        if let Some(filter) = cuda::Filter::new(&weight.unsqueeze(1)?, bias, false, device, dtype)?
        {
            return Ok(Weights::Cuda(filter));
        }
        let place = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
        Ok(Weights::Device { weight: place(weight)?, bias: bias.map(place).transpose()? })
    }

    /// Whether its products are those of bf16 on tiles.
    pub(crate) fn on_tiles(&self) -> bool {
        matches!(&self.weights, Weights::Cpu { packed, .. } if packed.tiled())
    }

    /// Bytes of its weights as they lie in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Cpu { packed, .. } => packed.bytes(),
            #[cfg(feature = "cuda")]
            Weights::Cuda(filter) => filter.bytes(),
            Weights::Device { weight, .. } => weight.elem_count() * weight.dtype().size_in_bytes(),
        }
    }

    /// (.., in) -> (.., out)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, After::default())
    }

    /// (.., in) -> (.., out), through an activation
    pub(crate) fn forward_activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.run(x, After { activation: Some(activation), residual: None })
    }

    /// (.., in) -> (.., out), plus `residual` (.., out)
    pub(crate) fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, After { activation: None, residual: Some(residual) })
    }

    /// (.., in) -> (.., out), plus `term` (.., out), and then through an activation
    pub(crate) fn forward_add_activate(
        &self,
        x: &Tensor,
        term: &Tensor,
        activation: Activation,
    ) -> Result<Tensor> {
        match &self.weights {
            #[cfg(feature = "cuda")]
            Weights::Cuda(_) => activation.reference(&self.forward_add(x, term)?),
            _ => self.run(x, After { activation: Some(activation), residual: Some(term) }),
        }
    }

    fn run(&self, x: &Tensor, after: After<'_>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let k = shape.pop().unwrap_or_default();
        let rows = shape.iter().product::<usize>();
        shape.push(self.out);
        match &self.weights {
            Weights::Cpu { packed, bias } => {
                if k != packed.k {
                    bail!("a linear layer of {} inputs was given {k}", packed.k);
                }
                let source = host(x)?;
                let residual = after.residual.map(host).transpose()?;
                let epilogue = Epilogue {
                    bias: bias.as_deref(),
                    residual: residual.as_ref().map(|r| r.data()).transpose()?,
                    activation: after.activation,
                    row_bias: None,
                };
                let a = Matrix { data: source.data()?, stride: k };
                Tensor::from_vec(gemm(rows, &a, packed, epilogue), shape, x.device())
            }
            #[cfg(feature = "cuda")]
            Weights::Cuda(filter) => {
                let After { activation, residual } = after;
                filter.linear(x, cuda::After { activation, residual, ..cuda::After::default() })
            }
            Weights::Device { weight, bias } => {
                let mut y = x.reshape((rows, k))?.matmul(&weight.t()?)?;
                if let Some(bias) = bias {
                    y = y.broadcast_add(bias)?;
                }
                let y = y.reshape(shape)?;
                let y = after.residual.map_or(Ok(y.clone()), |residual| y + residual)?;
                after.activation.map_or(Ok(y.clone()), |activation| activation.reference(&y))
            }
        }
    }
}

/// GEGLU (Shazeer 2020): a linear layer, and the first half of its outputs times the gelu of the
/// second.
pub(crate) struct Geglu(Linear);

impl Geglu {
    /// From a weight (2D, in) and a bias (2D), for a device and its type.
    pub(crate) fn new<'a>(
        weight: impl Into<Weight<'a>>,
        bias: &Tensor,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weight = weight.into();
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            let taps = weight.tensor()?.unsqueeze(1)?;
            if let Some(filter) = cuda::Filter::new(&taps, Some(bias), true, device, dtype)? {
                return Ok(Self(Linear { weights: Weights::Cuda(filter), out: taps.dim(0)? }));
            }
        }
        if !device.is_cpu() {
            return Ok(Self(Linear::new(weight, Some(bias), device, dtype)?));
        }
        let packed = Packed::gated(&weight, dtype)?;
        let bias = to_host(bias)?;
        // As the columns of the panels lie.
        let columns = gated_columns(packed.n);
        let bias = columns.into_iter().map(|at| at.map_or(0.0, |at| bias[at])).collect();
        Ok(Self(Linear { out: packed.n, weights: Weights::Cpu { packed, bias: Some(bias) } }))
    }

    /// (.., in) -> (.., D)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.0.forward(x)?;
        match &self.0.weights {
            Weights::Device { .. } => geglu_reference(&y),
            _ => Ok(y),
        }
    }

    /// As `forward`, with `term` (.., 2D) added to the linear layer's outputs.
    pub(crate) fn forward_add(&self, x: &Tensor, term: &Tensor) -> Result<Tensor> {
        match &self.0.weights {
            Weights::Cpu { .. } => self.0.forward_add(x, term),
            #[cfg(feature = "cuda")]
            Weights::Cuda(filter) => geglu_reference(&(filter.ungated(x)? + term)?),
            Weights::Device { .. } => geglu_reference(&self.0.forward_add(x, term)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn linear_agrees_with_candle() {
        let (x, w, b) = (tensor(&[2, 9, 70], 1), tensor(&[45, 70], 2), tensor(&[45], 3));
        let r = tensor(&[2, 9, 45], 4);
        let layer = Linear::new(&w, Some(&b), &Device::Cpu, DType::F32).unwrap();
        let want = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
        assert!(difference(&layer.forward(&x).unwrap(), &want) < 1e-5);
        let got = layer.forward_activate(&x, Activation::Silu).unwrap();
        assert!(difference(&got, &want.silu().unwrap()) < 1e-5);
        let want = (want + &r).unwrap();
        assert!(difference(&layer.forward_add(&x, &r).unwrap(), &want) < 1e-5);
        let (got, want) = (layer.forward_add_activate(&x, &r, Activation::Silu), want.silu());
        assert!(difference(&got.unwrap(), &want.unwrap()) < 1e-5);
    }

    #[test]
    fn a_term_is_added_before_the_gate() {
        let (x, w, b) = (tensor(&[2, 9, 70], 1), tensor(&[46, 70], 2), tensor(&[46], 3));
        let term = tensor(&[2, 9, 46], 4);
        let linear = Linear::new(&w, Some(&b), &Device::Cpu, DType::F32).unwrap();
        let want = geglu_reference(&(linear.forward(&x).unwrap() + &term).unwrap()).unwrap();
        let gate = Geglu::new(&w, &b, &Device::Cpu, DType::F32).unwrap();
        assert!(difference(&gate.forward_add(&x, &term).unwrap(), &want) < 1e-6);
    }

    #[test]
    fn geglu_agrees_with_candle() {
        for (inputs, width) in [(70, 37), (300, 64), (5, 3), (1300, 16)] {
            let x = (tensor(&[2, 9, inputs], 1) * 4.0).unwrap();
            let (w, b) = (tensor(&[2 * width, inputs], 2), tensor(&[2 * width], 3));
            let layer = Geglu::new(&w, &b, &Device::Cpu, DType::F32).unwrap();
            let product = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
            let want = geglu_reference(&product).unwrap();
            assert!(difference(&layer.forward(&x).unwrap(), &want) < 1e-5, "{inputs} {width}");
        }
    }
}

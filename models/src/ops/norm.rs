//! Group and layer normalisation, accumulated in f32 or better on every device.

use candle_core::{DType, Device, Result, Tensor};

use super::concat::ChannelConcat;
use super::{cpu, cuda, reference};

/// Scale and shift of a normalisation, f32 (C).
enum Affine {
    Cpu { weight: Vec<f32>, bias: Vec<f32> },
    Device { weight: Tensor, bias: Tensor },
}

impl Affine {
    fn new(weight: &Tensor, bias: &Tensor, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self::Cpu { weight: cpu::to_host(weight)?, bias: cpu::to_host(bias)? });
        }
        let place = |t: &Tensor| t.to_dtype(DType::F32)?.to_device(device);
        Ok(Self::Device { weight: place(weight)?, bias: place(bias)? })
    }
}

/// Group normalisation (Wu and He 2018) over (B, H, W, C), with or without a SiLU after it.
pub(crate) struct GroupNorm {
    affine: Affine,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// From a weight (C) and a bias (C).
    pub(crate) fn new(
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        eps: f64,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self { affine: Affine::new(weight, bias, device)?, groups, eps })
    }

    /// (B, H, W, C) -> (B, H, W, C)
    pub(crate) fn forward(&self, x: impl Into<ChannelConcat>) -> Result<Tensor> {
        self.run(&x.into(), false)
    }

    /// (B, H, W, C) -> (B, H, W, C), through SiLU
    pub(crate) fn forward_silu(&self, x: impl Into<ChannelConcat>) -> Result<Tensor> {
        self.run(&x.into(), true)
    }

    fn run(&self, x: &ChannelConcat, silu: bool) -> Result<Tensor> {
        let Self { groups, eps, .. } = *self;
        match &self.affine {
            Affine::Cpu { weight, bias } => cpu::group_norm(x, (weight, bias), groups, eps, silu),
            Affine::Device { weight, bias } => {
                match cuda::group_norm(x, (weight, bias), groups, eps, silu)? {
                    Some(y) => Ok(y),
                    None => reference::group_norm(x, (weight, bias), groups, eps, silu),
                }
            }
        }
    }
}

/// Layer normalisation (Ba et al. 2016) over the last dimension.
pub(crate) struct LayerNorm {
    affine: Affine,
    eps: f64,
}

impl LayerNorm {
    /// From a weight (C) and a bias (C).
    pub(crate) fn new(weight: &Tensor, bias: &Tensor, eps: f64, device: &Device) -> Result<Self> {
        Ok(Self { affine: Affine::new(weight, bias, device)?, eps })
    }

    /// (.., C) -> (.., C)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.affine {
            Affine::Cpu { weight, bias } => cpu::layer_norm(x, weight, bias, self.eps),
            Affine::Device { weight, bias } => match cuda::layer_norm(x, weight, bias, self.eps)? {
                Some(y) => Ok(y),
                None => reference::layer_norm(x, weight, bias, self.eps),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn group_norm_agrees_with_the_reference() {
        for (h, w, channels, groups) in [(8, 8, 64, 32), (5, 13, 48, 16), (1, 1, 32, 32)] {
            let (weight, bias) = (tensor(&[channels], 2), tensor(&[channels], 3));
            let norm = GroupNorm::new(&weight, &bias, groups, 1e-5, &Device::Cpu).unwrap();
            // The rounding of the numbers themselves counts where their mean is large.
            for (mean, allowed) in [(0.7, 1e-5), (300.0, 1e-4)] {
                let x = tensor(&[2, h, w, channels], 1).affine(3.0, mean).unwrap();
                let want =
                    reference::group_norm(&(&x).into(), (&weight, &bias), groups, 1e-5, false)
                        .unwrap();
                assert!(difference(&norm.forward(&x).unwrap(), &want) < allowed, "mean {mean}");
                let want = want.silu().unwrap();
                assert!(difference(&norm.forward_silu(&x).unwrap(), &want) < allowed);
            }
        }
    }

    #[test]
    fn two_pictures_are_normalised_as_one() {
        // The groups of 17 straddle the border.
        let (x, skip) = (tensor(&[2, 9, 8, 40], 1), tensor(&[2, 9, 8, 28], 2));
        let (weight, bias) = (tensor(&[68], 3), tensor(&[68], 4));
        let norm = GroupNorm::new(&weight, &bias, 4, 1e-5, &Device::Cpu).unwrap();
        let joined = ChannelConcat::new(&x, &skip).unwrap();
        let want = norm.forward_silu(&joined.whole().unwrap()).unwrap();
        assert_eq!(difference(&norm.forward_silu(&joined).unwrap(), &want), 0.0);
    }

    #[test]
    fn layer_norm_agrees_with_the_reference() {
        for width in [5, 64, 77] {
            let x = tensor(&[2, 70, width], 1).affine(3.0, -0.2).unwrap();
            let (weight, bias) = (tensor(&[width], 2), tensor(&[width], 3));
            let norm = LayerNorm::new(&weight, &bias, 1e-5, &Device::Cpu).unwrap();
            let want = reference::layer_norm(&x, &weight, &bias, 1e-5).unwrap();
            assert!(difference(&norm.forward(&x).unwrap(), &want) < 1e-5);
        }
    }
}

//! The meaning of the UNet's output: from a prediction to x0 or epsilon, and classifier-free
//! guidance. Not the steps between noise levels, which are the samplers'.

use candle_core::Tensor;

use super::schedule::NoiseLevel;
use crate::error::Result;
use crate::ops;

/// What the UNet was trained to predict: diffusers' `prediction_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise epsilon (Ho et al. 2020).
    Epsilon,
    /// The velocity v = alpha epsilon - sigma x0 (Salimans and Ho 2022, appendix D).
    Velocity,
    /// x0 itself.
    Sample,
}

/// Converts the outputs of a UNet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Denoiser {
    pub(super) prediction: Prediction,
    /// x0 is clamped to plus and minus this.
    pub(super) clip: Option<f64>,
}

impl Denoiser {
    /// x0 from x = alpha x0 + sigma epsilon and the output for it, both (B, C, H, W).
    ///
    /// The level need not have unit variance: the velocity is that of x divided by its norm.
    pub(super) fn predicted_x0(
        &self,
        x: &Tensor,
        output: &Tensor,
        at: NoiseLevel,
    ) -> Result<Tensor> {
        let (alpha, sigma, norm) = (at.alpha, at.sigma, at.norm());
        let x0 = match self.prediction {
            Prediction::Epsilon => {
                linear_combination(&[(1.0 / alpha, x), (-sigma / alpha, output)])?
            }
            Prediction::Velocity => {
                linear_combination(&[(alpha / (norm * norm), x), (-sigma / norm, output)])?
            }
            Prediction::Sample => output.clone(),
        };
        match self.clip {
            Some(range) => Ok(x0.clamp(-range, range)?),
            None => Ok(x0),
        }
    }

    /// epsilon from x = alpha x0 + sigma epsilon and the output for it, both (B, C, H, W).
    pub(super) fn epsilon(&self, x: &Tensor, output: &Tensor, at: NoiseLevel) -> Result<Tensor> {
        let (alpha, sigma, norm) = (at.alpha, at.sigma, at.norm());
        match self.prediction {
            Prediction::Epsilon => Ok(output.clone()),
            Prediction::Velocity => {
                linear_combination(&[(alpha / norm, output), (sigma / (norm * norm), x)])
            }
            Prediction::Sample => linear_combination(&[(1.0 / sigma, x), (-alpha / sigma, output)]),
        }
    }
}

/// Classifier-free guidance (Ho and Salimans 2022, equation 6, in diffusers' numbering of the
/// scale, where 1 is no guidance): both outputs (B, C, H, W).
pub fn guide(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(ops::lerp(unconditional, conditional, scale)?)
}

/// Rescales a guided output by a share of the way to the standard deviation of the conditional one
/// (Lin et al. 2024, section 3.4; diffusers' `rescale_noise_cfg`): both (1, C, H, W).
pub fn rescale(guided: &Tensor, conditional: &Tensor, share: f64) -> Result<Tensor> {
    let deviation = |x: &Tensor| x.flatten_all()?.var_keepdim(0)?.sqrt();
    let ratio = (deviation(conditional)? / deviation(guided)?)?;
    Ok(guided.broadcast_mul(&ratio.affine(share, 1.0 - share)?)?)
}

/// The sum of tensors of one shape, each times its factor.
pub(super) fn linear_combination(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    Ok(ops::linear_combination(terms)?)
}

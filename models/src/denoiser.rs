//! What the UNet's output means: from a prediction to the picture x0 or the noise epsilon, and
//! classifier-free guidance. Not the steps between noise levels, which are [`crate::sampler`]'s.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops;
use crate::schedule::{Level, SchedulerConfig, choose};
use crate::spec::Scheduler::{self, Ddim, Ddpm, EulerAncestral, Heun, Lcm, Pndm};

/// What the UNet was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prediction {
    /// The noise epsilon (Ho et al. 2020).
    Epsilon,
    /// The velocity v = alpha epsilon - sigma x0 (Salimans and Ho 2022, appendix D).
    Velocity,
    /// The picture x0.
    Sample,
}

/// Reads the output of a UNet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Denoiser {
    prediction: Prediction,
    /// x0 is clamped to plus and minus this.
    clip: Option<f64>,
}

impl Denoiser {
    /// The denoiser that diffusers' class of this sampler takes from the file.
    pub(crate) fn new(scheduler: Scheduler, config: &SchedulerConfig) -> Result<Self> {
        let known = [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::Velocity),
            ("sample", Prediction::Sample),
        ];
        let known = if matches!(scheduler, Pndm | EulerAncestral) { &known[..2] } else { &known };
        let prediction =
            choose("prediction_type", config.prediction_type.as_deref(), "epsilon", known)?;
        let clips = match scheduler {
            Ddim | Ddpm => config.clip_sample.unwrap_or(true),
            Heun | Lcm => config.clip_sample.unwrap_or(false),
            _ => false,
        };
        let clip = clips.then(|| config.clip_sample_range.unwrap_or(1.0));
        Ok(Self { prediction, clip })
    }

    /// x0 from x = alpha x0 + sigma epsilon and the output for it, both (B, C, H, W).
    ///
    /// The level need not have unit variance: the velocity is that of x divided by its norm.
    pub(crate) fn denoised(&self, x: &Tensor, output: &Tensor, at: Level) -> Result<Tensor> {
        let (alpha, sigma, norm) = (at.alpha, at.sigma, at.norm());
        let x0 = match self.prediction {
            Prediction::Epsilon => combine(&[(1.0 / alpha, x), (-sigma / alpha, output)])?,
            Prediction::Velocity => {
                combine(&[(alpha / (norm * norm), x), (-sigma / norm, output)])?
            }
            Prediction::Sample => output.clone(),
        };
        match self.clip {
            Some(range) => Ok(x0.clamp(-range, range)?),
            None => Ok(x0),
        }
    }

    /// epsilon from x = alpha x0 + sigma epsilon and the output for it, both (B, C, H, W).
    pub(crate) fn noise(&self, x: &Tensor, output: &Tensor, at: Level) -> Result<Tensor> {
        let (alpha, sigma, norm) = (at.alpha, at.sigma, at.norm());
        match self.prediction {
            Prediction::Epsilon => Ok(output.clone()),
            Prediction::Velocity => combine(&[(alpha / norm, output), (sigma / (norm * norm), x)]),
            Prediction::Sample => combine(&[(1.0 / sigma, x), (-alpha / sigma, output)]),
        }
    }
}

/// Classifier-free guidance (Ho and Salimans 2022, equation 6, in diffusers' numbering of the
/// scale, where 1 is no guidance): both outputs (B, C, H, W).
pub fn guide(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(ops::extrapolate(unconditional, conditional, scale)?)
}

/// The sum of some tensors of one shape, each times its factor.
pub(crate) fn combine(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    Ok(ops::combine(terms)?)
}

//! The samplers on timesteps of the training: Ho et al. 2020, "Denoising Diffusion Probabilistic
//! Models", and Song et al. 2021, "Denoising Diffusion Implicit Models".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{SamplerState, draw};
use crate::error::Result;

/// Song et al. 2021, equation 12 with eta 0.
pub(super) fn ddim(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    let epsilon = state.denoiser.epsilon(x, output, step.from)?;
    linear_combination(&[(step.to.alpha, &x0), (step.to.sigma, &epsilon)])
}

/// Ho et al. 2020, equations 6 and 7.
pub(super) fn ddpm(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    let alpha = step.from.alpha / step.to.alpha;
    let beta = 1.0 - alpha * alpha;
    let (to, from) = (step.to.sigma.powi(2), step.from.sigma.powi(2));
    let mean = linear_combination(&[(step.to.alpha * beta / from, &x0), (alpha * to / from, x)])?;
    if step.evaluation.timestep == 0.0 {
        return Ok(mean);
    }
    let variance = (to / from * beta).max(1e-20);
    linear_combination(&[(1.0, &mean), (variance.sqrt(), &draw(x, noise)?)])
}

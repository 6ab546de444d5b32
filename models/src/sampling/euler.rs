//! The samplers on sigmas of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
//! Generative Models": x = x0 + sigma epsilon.

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::{NoiseLevel, Step};
use super::state::{SamplerState, draw, first_order};
use crate::error::Result;

/// Karras et al. 2022, algorithm 1 without its second-order correction.
pub(super) fn euler(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    first_order(x, &x0, step.from, step.to)
}

/// Crowson's k-diffusion, `sample_euler_ancestral`: Euler's step to below the next level, then
/// noise up to it.
pub(super) fn euler_ancestral(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    noise: &mut Noise,
) -> Result<Tensor> {
    let (from, to) = (step.from.sigma, step.to.sigma);
    let up = to * (1.0 - (to / from).powi(2)).sqrt();
    let down = NoiseLevel { alpha: 1.0, sigma: to * to / from };
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    let below = first_order(x, &x0, step.from, down)?;
    linear_combination(&[(1.0, &below), (up, &draw(x, noise)?)])
}

/// Karras et al. 2022, algorithm 1: Euler's step, then the same step with the mean of the slopes
/// at its ends. The last step, to sigma 0, is Euler's.
pub(super) fn heun(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    let sigma = step.from.sigma;
    let slope = linear_combination(&[(1.0 / sigma, x), (-1.0 / sigma, &x0)])?;
    let Some(start) = state.anchor.take() else {
        state.anchor = Some(x.clone());
        let next = linear_combination(&[(1.0, x), (step.to.sigma - sigma, &slope)]);
        state.remember(slope, 1);
        return next;
    };
    let half = (sigma - state.schedule.steps[state.completed - 1].from.sigma) / 2.0;
    linear_combination(&[(1.0, &start), (half, &state.history[0]), (half, &slope)])
}

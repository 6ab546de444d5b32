//! The samplers on timesteps of the training: Ho et al. 2020, "Denoising Diffusion Probabilistic
//! Models", and Song et al. 2021, "Denoising Diffusion Implicit Models".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{Outputs, SamplerState};
use crate::error::Result;

/// Song et al. 2021, equation 12; and Zheng et al. 2024, "Trajectory Consistency Distillation",
/// algorithm 2, which differs in how far below the next level a step goes.
pub(super) fn ddim(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let epsilon = state.denoiser.epsilon(x, outputs.guided, step.at)?;
    let below = linear_combination(&[(step.below.alpha, &x0), (step.below.sigma, &epsilon)])?;
    state.renoised(below, step, noise)
}

/// The same with CFG++ (Chung et al. 2024, algorithm 1), as AUTOMATIC1111's `ddim_cfgpp` has it: x0
/// of the guided output under the noise of the unguided one.
pub(super) fn ddim_cfg_pp(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let epsilon = state.denoiser.epsilon(x, outputs.unguided, step.at)?;
    let below = linear_combination(&[(step.below.alpha, &x0), (step.below.sigma, &epsilon)])?;
    state.renoised(below, step, noise)
}

/// Ho et al. 2020, equations 6 and 7.
pub(super) fn ddpm(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let alpha = step.from.alpha / step.to.alpha;
    let beta = 1.0 - alpha * alpha;
    let (to, from) = (step.to.sigma.powi(2), step.from.sigma.powi(2));
    let mean = linear_combination(&[(step.to.alpha * beta / from, &x0), (alpha * to / from, x)])?;
    if step.evaluation.timestep == 0.0 {
        return Ok(mean);
    }
    let variance = (to / from * beta).max(1e-20);
    linear_combination(&[(1.0, &mean), (variance.sqrt(), &state.draw(x, noise)?)])
}

//! Luo et al. 2023, "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step
//! Inference".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{Outputs, SamplerState};
use crate::error::{Error, Result};

/// Algorithm 3: the consistency function, then fresh noise up to the next level.
pub(super) fn lcm(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    const SIGMA_DATA: f64 = 0.5;
    let t = step.evaluation.timestep * state.timestep_scaling;
    let norm = t.hypot(SIGMA_DATA);
    let (c_skip, c_out) = ((SIGMA_DATA / norm).powi(2), t / norm);
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let denoised = linear_combination(&[(c_out, &x0), (c_skip, x)])?;
    if state.is_last() {
        return Ok(denoised);
    }
    linear_combination(&[(step.to.alpha, &denoised), (step.to.sigma, &state.draw(x, noise)?)])
}

/// `steps` timesteps, descending, evenly among the first `levels` timesteps of the distillation
/// (section 4.3), each of which is `stride` timesteps of the training.
pub(super) fn timesteps(steps: usize, levels: usize, stride: usize) -> Result<Vec<f64>> {
    if steps > levels {
        let reason = format!("must be 1 to {levels} with the samplers of consistency models");
        return Err(Error::Spec { field: "steps", reason });
    }
    let index = |i: usize| levels - (i as f64 * (levels as f64 / steps as f64)) as usize;
    Ok((0..steps).map(|i| (index(i) * stride - 1) as f64).collect())
}

//! Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
//! Models".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{SamplerState, first_order};
use crate::error::Result;

/// Algorithm 2: second order, multistep.
pub(super) fn dpmpp_2m(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    state.remember(x0, 2);
    first_order(x, &extrapolated_x0(state, step)?, step.from, step.to)
}

/// x0 halfway through a step in lambda, on the line through the last two predictions: D of
/// algorithm 2, and the same in UniP-2 (Zhao et al. 2023).
pub(super) fn extrapolated_x0(state: &SamplerState, step: Step) -> Result<Tensor> {
    let m0 = &state.history[0];
    let Some(m1) = state.history.get(1).filter(|_| step.order > 1) else {
        return Ok(m0.clone());
    };
    let lambda = step.from.lambda();
    let before = lambda - state.schedule.steps[state.completed - 1].from.lambda();
    let half = (step.to.lambda() - lambda) / before / 2.0;
    linear_combination(&[(1.0 + half, m0), (-half, m1)])
}

//! Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
//! Diffusion Models".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::dpmpp::extrapolated_x0;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{SamplerState, first_order};
use crate::error::Result;

/// Algorithms 1 and 2 of second order on the predicted x0: the corrector UniC takes the step
/// before again with the prediction at its end, then the predictor UniP takes the next step.
pub(super) fn unipc(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    output: &Tensor,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, output, step.from)?;
    let x = match state.anchor.take() {
        Some(start) => corrected(state, step, &start, &x0)?,
        None => x.clone(),
    };
    state.remember(x0, 2);
    let next = first_order(&x, &extrapolated_x0(state, step)?, step.from, step.to)?;
    state.anchor = Some(x);
    Ok(next)
}

/// UniC with B(h) = e^h - 1: the step that led to `step` once more from `start`, where `x0` is
/// the prediction at its end.
fn corrected(state: &SamplerState, step: Step, start: &Tensor, x0: &Tensor) -> Result<Tensor> {
    let before = state.schedule.steps[state.completed - 1];
    let h = step.from.lambda() - before.from.lambda();
    let m0 = &state.history[0];
    let mixed = match state.history.get(1).filter(|_| before.order > 1) {
        None => linear_combination(&[(0.5, m0), (0.5, x0)])?,
        Some(m1) => {
            let earlier = state.schedule.steps[state.completed - 2];
            let r = (earlier.from.lambda() - before.from.lambda()) / h;
            let phi_1 = (-h).exp_m1();
            let phi_2 = phi_1 / -h - 1.0;
            let phi_3 = phi_2 / -h - 0.5;
            let (b_1, b_2) = (phi_2 / phi_1, 2.0 * phi_3 / phi_1);
            let rho_1 = (b_1 - b_2) / (1.0 - r);
            let rho_2 = b_1 - rho_1;
            linear_combination(&[(1.0 - rho_1 / r - rho_2, m0), (rho_1 / r, m1), (rho_2, x0)])?
        }
    };
    first_order(start, &mixed, before.from, step.from)
}

//! Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{Outputs, SamplerState};
use crate::error::Result;

/// Algorithm 2 without its Runge-Kutta start: a linear multistep method, whose second evaluation
/// takes the first step again, and the transfer of equation 9.
pub(super) fn pndm(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let output = outputs.guided;
    let (x, output) = match state.anchor.take() {
        Some(start) => (start, linear_combination(&[(0.5, output), (0.5, &state.history[0])])?),
        None => {
            if state.completed() == 0 {
                state.anchor = Some(x.clone());
            }
            state.remember(output.clone(), 4);
            (x.clone(), adams_bashforth(&state.history)?)
        }
    };
    let epsilon = state.denoiser.epsilon(&x, &output, step.from)?;
    let scale = step.to.alpha / step.from.alpha;
    linear_combination(&[(scale, &x), (step.to.sigma - scale * step.from.sigma, &epsilon)])
}

/// The slope of a step from one to four outputs, the newest first: Adams-Bashforth weights.
fn adams_bashforth(outputs: &[Tensor]) -> Result<Tensor> {
    const WEIGHTS: [&[f64]; 4] = [
        &[1.0],
        &[3.0 / 2.0, -1.0 / 2.0],
        &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    ];
    let weights = WEIGHTS[outputs.len() - 1].iter().copied();
    linear_combination(&weights.zip(outputs).collect::<Vec<_>>())
}

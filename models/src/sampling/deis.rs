//! Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::{NoiseLevel, Step};
use super::state::{Outputs, SamplerState};
use crate::error::Result;

/// Log-rho DEIS of second order, multistep: equation 15 for the line through the last two
/// predictions of epsilon in log rho, rho = sigma / alpha.
pub(super) fn deis(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let epsilon = state.denoiser.epsilon(x, outputs.guided, step.at)?;
    state.remember(epsilon, 2);
    let rho = |level: NoiseLevel| level.sigma / level.alpha;
    let (from, to, alpha) = (rho(step.from), rho(step.to), step.to.alpha);
    let m0 = &state.history[0];
    let kept = (alpha / step.from.alpha, x);
    let Some(m1) = state.history.get(1).filter(|_| step.order > 1) else {
        return linear_combination(&[kept, (alpha * (to - from), m0)]);
    };
    let before = rho(state.earlier(1).from);
    // The integral over rho of (log rho - log other) / (log own - log other).
    let integral = |own: f64, other: f64| {
        let at = |rho: f64| rho * (rho.ln() - other.ln() - 1.0) / (own.ln() - other.ln());
        at(to) - at(from)
    };
    let (c0, c1) = (integral(from, before), integral(before, from));
    linear_combination(&[kept, (alpha * c0, m0), (alpha * c1, m1)])
}

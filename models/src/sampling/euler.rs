//! The samplers on sigmas of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
//! Generative Models": x = x0 + sigma epsilon.

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{Outputs, SamplerState, first_order};
use crate::error::Result;

/// Karras et al. 2022, algorithm 2 without its second-order correction. With noise after the step
/// it is Crowson's k-diffusion, `sample_euler_ancestral`: to below the next level, then up to it.
pub(super) fn euler(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let below = first_order(x, &x0, step.from, step.below)?;
    state.renoised(below, step, noise)
}

/// Karras et al. 2022, algorithm 2: Euler's step, then the same step with the mean of the slopes
/// at its ends. The last step, to sigma 0, is Euler's.
pub(super) fn heun(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let slope = state.slope(step, x, outputs.guided)?;
    let length = step.to.sigma - step.from.sigma;
    let Some(start) = state.anchor.take() else {
        state.anchor = Some(x.clone());
        let next = linear_combination(&[(1.0, x), (length, &slope)]);
        state.remember(slope, 1);
        return next;
    };
    let half = length / 2.0;
    linear_combination(&[(1.0, &start), (half, &state.history[0]), (half, &slope)])
}

/// k-diffusion's `sample_dpm_2` and, with noise, `sample_dpm_2_ancestral`: a step to the middle in
/// the logarithm of sigma, then the whole step with the slope there.
pub(super) fn dpm2(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let slope = state.slope(step, x, outputs.guided)?;
    let length = step.below.sigma - step.from.sigma;
    let below = linear_combination(&[(1.0, &state.start(x)), (length, &slope)])?;
    state.renoised(below, step, noise)
}

/// k-diffusion's `sample_lms`: Adams-Bashforth of order four on uneven steps. Where a run begins
/// in the middle, diffusers takes the weights of a run from the begin; so do we.
pub(super) fn lms(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let slope = state.slope(step, x, outputs.guided)?;
    state.remember(slope, 4);
    let order = (state.position + 1).min(4);
    let sigmas: Vec<f64> = (0..order).map(|back| state.earlier(back).from.sigma).collect();
    let weights = lagrange_integrals(&sigmas, step.from.sigma, step.to.sigma);
    let slopes = weights.into_iter().zip(&state.history);
    linear_combination(&std::iter::once((1.0, x)).chain(slopes).collect::<Vec<_>>())
}

/// The integrals from `a` to `b` of the Lagrange polynomials through up to four points: Gauss'
/// rule of two points is exact for cubics.
fn lagrange_integrals(points: &[f64], a: f64, b: f64) -> Vec<f64> {
    let (middle, half) = ((a + b) / 2.0, (b - a) / 2.0);
    let value = |j: usize, at: f64| -> f64 {
        let others = points.iter().enumerate().filter(|(k, _)| *k != j);
        others.map(|(_, point)| (at - point) / (points[j] - point)).product()
    };
    let offset = half / 3_f64.sqrt();
    let integral = |j| half * (value(j, middle - offset) + value(j, middle + offset));
    (0..points.len()).map(integral).collect()
}

/// CFG++ (Chung et al. 2024, algorithm 1; ComfyUI's `sample_euler_cfg_pp`): x0 of the guided
/// output under the noise of the unguided one.
pub(super) fn cfg_pp(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let epsilon = state.denoiser.epsilon(x, outputs.unguided, step.at)?;
    linear_combination(&[(step.to.alpha, &x0), (step.to.sigma, &epsilon)])
}

impl SamplerState {
    /// The latents from which a step of two evaluations began: at its first evaluation `x`.
    pub(super) fn start(&mut self, x: &Tensor) -> Tensor {
        self.anchor.take().unwrap_or_else(|| {
            self.anchor = Some(x.clone());
            x.clone()
        })
    }

    /// dx / d sigma at x (Karras et al. 2022, equation 1).
    fn slope(&self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.predicted_x0(x, output, step.at)?;
        let sigma = step.at.sigma;
        linear_combination(&[(1.0 / sigma, x), (-1.0 / sigma, &x0)])
    }
}

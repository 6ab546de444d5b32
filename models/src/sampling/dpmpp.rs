//! Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
//! Models": the multistep and singlestep solvers, and their stochastic variants, in which a step
//! goes below its end and noise takes it up again.

use candle_core::Tensor;

use super::brownian::Brownian;
use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::Step;
use super::state::{Outputs, SamplerState, first_order};
use crate::error::Result;

/// Algorithm 2: second order, multistep. With noise it is SDE-DPM-Solver++(2M) of appendix B.
pub(super) fn dpmpp_2m(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    state.remember(x0, 2);
    let below = first_order(x, &extrapolated_x0(state, step)?, step.from, step.below)?;
    state.renoised(below, step, noise)
}

/// The same of Heun's type: the slope between the last two predictions counts as in diffusers'
/// `solver_type="heun"`, k-diffusion's `sample_dpmpp_2m_sde`.
pub(super) fn dpmpp_2m_heun(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    state.remember(x0, 2);
    let mixed = match &state.history[..] {
        [m0, m1] if step.order > 1 => {
            let whole = step.below.lambda() - step.from.lambda();
            let phi_1 = -(-whole).exp_m1();
            let part = 2.0 * half_ratio(state, step) * (1.0 / phi_1 - 1.0 / whole);
            linear_combination(&[(1.0 + part, m0), (-part, m1)])?
        }
        [newest, ..] => newest.clone(),
        [] => x.clone(),
    };
    let below = first_order(x, &mixed, step.from, step.below)?;
    state.renoised(below, step, noise)
}

/// Third order, multistep, as diffusers' `multistep_dpm_solver_third_order_update` has it for
/// `sde-dpmsolver++`, with the sign of its last term.
pub(super) fn dpmpp_3m_sde(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    state.remember(x0, 3);
    let mixed = match &state.history[..] {
        [m0, m1, m2] if step.order > 2 => {
            let lambda = step.from.lambda();
            let (h, whole) = (step.to.lambda() - lambda, step.below.lambda() - lambda);
            let r0 = (lambda - state.earlier(1).from.lambda()) / h;
            let r1 = (state.earlier(1).from.lambda() - state.earlier(2).from.lambda()) / h;
            let phi_1 = -(-whole).exp_m1();
            let phi_2 = 1.0 - phi_1 / whole;
            let phi_3 = phi_2 / whole + 0.5;
            // D1 = (m0 - m1) / r0 + r0 D2, D2 = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1).
            let first = phi_2 / phi_1 / r0;
            let second = (phi_2 * r0 - phi_3) / phi_1 / (r0 + r1);
            linear_combination(&[
                (1.0 + first + second / r0, m0),
                (-first - second / r0 - second / r1, m1),
                (second / r1, m2),
            ])?
        }
        _ => extrapolated_x0(state, step)?,
    };
    let below = first_order(x, &mixed, step.from, step.below)?;
    state.renoised(below, step, noise)
}

/// Algorithm 1 with r = 1/2 on steps in pairs: the second of a pair takes both again, with the
/// prediction in their middle.
pub(super) fn dpmpp_2s(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    match state.anchor.take().filter(|_| step.order > 1) {
        None => {
            state.anchor = Some(x.clone());
            let next = first_order(x, &x0, step.from, step.to)?;
            state.remember(x0, 1);
            Ok(next)
        }
        Some(start) => {
            let from = state.earlier(1).from;
            let whole = step.to.lambda() - from.lambda();
            let half = 0.5 * whole / (step.from.lambda() - from.lambda());
            let mixed = linear_combination(&[(1.0 - half, &state.history[0]), (half, &x0)])?;
            first_order(&start, &mixed, from, step.to)
        }
    }
}

/// k-diffusion's `sample_dpmpp_2s_ancestral`: a step to the middle, then the whole step with the
/// prediction there.
pub(super) fn dpmpp_2s_ancestral(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let below = first_order(&state.start(x), &x0, step.from, step.below)?;
    state.renoised(below, step, noise)
}

/// k-diffusion's `sample_dpmpp_sde`: the same with noise in the middle too, both from one Brownian
/// motion.
pub(super) fn dpmpp_sde(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    noise: &mut Noise,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let below = first_order(&state.start(x), &x0, step.from, step.below)?;
    if step.noise() == 0.0 {
        return Ok(below);
    }
    let levels = || state.schedule.steps.iter().flat_map(|step| [step.from.sigma, step.to.sigma]);
    let least = levels().filter(|sigma| *sigma > 0.0).fold(f64::INFINITY, f64::min);
    let most = levels().fold(0.0, f64::max);
    let motion = Brownian { seed: noise.seed(), least, most, values: x.elem_count() };
    // k-diffusion passes sigmas through their logarithms in f32, which moves some of them.
    let passed = |sigma: f64| f64::from((sigma as f32).ln().exp());
    let is_middle = step.at == step.from;
    let to = if is_middle { step.to.sigma } else { passed(step.to.sigma) };
    let drawn = state.ahead.next(x, || motion.between(passed(step.from.sigma), to))?;
    state.with_noise(&below, step, &drawn)
}

/// x0 halfway through a step in lambda, on the line through the last two predictions: D of
/// algorithm 2, and the same in UniP-2 (Zhao et al. 2023).
fn extrapolated_x0(state: &SamplerState, step: Step) -> Result<Tensor> {
    let m0 = &state.history[0];
    let Some(m1) = state.history.get(1).filter(|_| step.order > 1) else {
        return Ok(m0.clone());
    };
    let half = half_ratio(state, step);
    linear_combination(&[(1.0 + half, m0), (-half, m1)])
}

/// Half the length of a step in lambda, by the length of the step before.
fn half_ratio(state: &SamplerState, step: Step) -> f64 {
    let lambda = step.from.lambda();
    (step.to.lambda() - lambda) / (lambda - state.earlier(1).from.lambda()) / 2.0
}

/// ComfyUI's `sample_dpmpp_2m_cfg_pp`: algorithm 2 as CFG++ (Chung et al. 2024) has it, where the
/// noise that stays is that of the unguided prediction.
pub(super) fn dpmpp_2m_cfg_pp(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    let guided = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let unguided = state.denoiser.predicted_x0(x, outputs.unguided, step.at)?;
    let kept = step.to.sigma / step.from.sigma;
    let next = match state.history.first().filter(|_| step.order > 1) {
        None => linear_combination(&[(1.0, &guided), (-kept, &unguided), (kept, x)])?,
        Some(before) => {
            let part = (1.0 - kept) * half_ratio(state, step);
            linear_combination(&[
                (1.0 + part, &guided),
                (-part, before),
                (-kept, &unguided),
                (kept, x),
            ])?
        }
    };
    state.remember(unguided, 1);
    Ok(next)
}

//! Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
//! Diffusion Models".

use candle_core::Tensor;

use super::denoiser::linear_combination;
use super::noise::Noise;
use super::schedule::{NoiseLevel, Step};
use super::state::{Outputs, SamplerState, first_order};
use crate::error::Result;

/// B(h) of section 3.1, of h that is negative on predicted x0.
type BhKind = fn(f64) -> f64;

/// B_1(h) = h.
pub(super) fn unipc_bh1(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    unipc(state, step, x, outputs, |h| h)
}

/// B_2(h) = e^h - 1.
pub(super) fn unipc_bh2(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    _: &mut Noise,
) -> Result<Tensor> {
    unipc(state, step, x, outputs, f64::exp_m1)
}

/// Algorithms 1 and 2 on the predicted x0, of up to third order: the corrector UniC takes the step
/// before again with the prediction at its end, then the predictor UniP takes the next step.
fn unipc(
    state: &mut SamplerState,
    step: Step,
    x: &Tensor,
    outputs: Outputs<'_>,
    b: BhKind,
) -> Result<Tensor> {
    let x0 = state.denoiser.predicted_x0(x, outputs.guided, step.at)?;
    let x = match state.anchor.take() {
        Some(start) => {
            let before = state.earlier(1);
            let mixed = mixed(state, before, 1, Some(&x0), b)?;
            first_order(&start, &mixed, before.from, before.to)?
        }
        None => x.clone(),
    };
    state.remember(x0, 3);
    let next = first_order(&x, &mixed(state, step, 0, None, b)?, step.from, step.to)?;
    state.anchor = Some(x);
    Ok(next)
}

/// The x0 with which a first-order step is the step of UniP or, with the prediction at its end, of
/// UniC. The step is `back` steps before the next, and the history is that before it.
fn mixed(
    state: &SamplerState,
    step: Step,
    back: usize,
    end: Option<&Tensor>,
    b: BhKind,
) -> Result<Tensor> {
    let order = step.order.min(state.history.len());
    let m0 = &state.history[0];
    let h = step.to.lambda() - step.from.lambda();
    let lambda = |level: NoiseLevel| (level.lambda() - step.from.lambda()) / h;
    // The points of the predictions in units of the step, the newest at 0.
    let mut r: Vec<f64> = (1..order).map(|k| lambda(state.earlier(back + k).from)).collect();
    let mut outputs: Vec<&Tensor> = state.history[1..order].iter().collect();
    if let Some(end) = end {
        r.push(1.0);
        outputs.push(end);
    }
    if r.is_empty() {
        return Ok(m0.clone());
    }
    let weights = match r.len() {
        // Of first order, and of second without the end, rho is 1/2 (appendix F).
        1 => vec![0.5],
        _ => solved(&r, -h, b),
    };
    let scale = b(-h) / (-h).exp_m1();
    let parts: Vec<f64> = weights.iter().zip(&r).map(|(rho, r)| scale * rho / r).collect();
    let rest = 1.0 - parts.iter().sum::<f64>();
    let terms = parts.into_iter().zip(outputs);
    linear_combination(&std::iter::once((rest, m0)).chain(terms).collect::<Vec<_>>())
}

/// rho of equation 8: R(r) rho = the right side for h, by elimination.
fn solved(r: &[f64], h: f64, b: BhKind) -> Vec<f64> {
    let n = r.len();
    let (mut phi, mut factorial) = (h.exp_m1() / h - 1.0, 1.0);
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|k| {
            let mut row: Vec<f64> = r.iter().map(|r| r.powi(k as i32)).collect();
            row.push(phi * factorial / b(h));
            factorial *= (k + 2) as f64;
            phi = phi / h - 1.0 / factorial;
            row
        })
        .collect();
    for pivot in 0..n {
        let top = rows[pivot].clone();
        for row in rows.iter_mut().skip(pivot + 1) {
            let factor = row[pivot] / top[pivot];
            row.iter_mut().zip(&top).for_each(|(value, top)| *value -= factor * top);
        }
    }
    let mut rho = vec![0.0; n];
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| rows[k][j] * rho[j]).sum();
        rho[k] = (rows[k][n] - known) / rows[k][k];
    }
    rho
}

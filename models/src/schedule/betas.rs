//! The noise that a model was trained with: the betas of each timestep, and what they add up to.
//!
//! In f32 with products in f64, as torch computes them.

use std::f64::consts::FRAC_PI_2;

use super::config::{Betas, SchedulerConfig, unsupported};
use crate::error::Result;
use crate::spec::Scheduler::{self, Ddim, Ddpm, Lcm};

/// The product of the alphas up to each timestep of the training.
pub(super) fn alphas_cumprod(scheduler: Scheduler, config: &SchedulerConfig) -> Result<Vec<f32>> {
    let train = config.num_train_timesteps.unwrap_or(1000);
    let (start, end, kind) = config.betas(scheduler)?;
    let betas: Vec<f32> = match (&config.trained_betas, kind) {
        (Some(betas), _) => betas.clone(),
        (None, Betas::Linear) => linspace(start, end, train).collect(),
        (None, Betas::ScaledLinear) => {
            linspace(start.sqrt(), end.sqrt(), train).map(|root| root * root).collect()
        }
        (None, Betas::Cosine) => {
            // Nichol and Dhariwal 2021, equation 17.
            let root = |i| ((i as f64 / train as f64 + 0.008) / 1.008 * FRAC_PI_2).cos();
            let beta = |i| (1.0 - (root(i + 1) / root(i)).powi(2)).min(0.999);
            (0..train).map(|i| beta(i) as f32).collect()
        }
    };
    if betas.is_empty() || betas.len() != train {
        let reason = format!("num_train_timesteps {train} with {} betas", betas.len());
        return Err(unsupported(reason));
    }
    let mut product = 1.0;
    let next = |beta: f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    let mut bars: Vec<f32> = betas.into_iter().map(next).collect();
    if config.zero_snr(scheduler) {
        rescale_zero_terminal_snr(&mut bars);
        if !matches!(scheduler, Ddim | Ddpm | Lcm) {
            // Sigma must be finite.
            bars[train - 1] = 2_f32.powi(-24);
        }
    }
    Ok(bars)
}

/// The last timestep becomes pure noise (Lin et al. 2024, algorithm 1).
fn rescale_zero_terminal_snr(bars: &mut [f32]) {
    let root = |bar: f32| f64::from(bar).sqrt();
    let (first, last) = (root(bars[0]), root(bars[bars.len() - 1]));
    for bar in bars {
        *bar = ((root(*bar) - last) * first / (first - last)).powi(2) as f32;
    }
}

/// `torch.linspace` in f32, which counts from both ends.
fn linspace(start: f64, end: f64, n: usize) -> impl Iterator<Item = f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n.max(2) - 1) as f32;
    (0..n).map(move |i| match i < n / 2 {
        true => start + step * i as f32,
        false => end - step * (n - 1 - i) as f32,
    })
}

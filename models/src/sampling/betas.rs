//! The noise that a model was trained with: the betas of each timestep, and their products.
//!
//! In f32 with products in f64, as torch computes them.

use std::f64::consts::FRAC_PI_2;

/// A beta schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Betas {
    Linear,
    ScaledLinear,
    Cosine,
}

impl Betas {
    /// The betas of `train` timesteps, from `start` to `end`; the cosine schedule has no ends.
    pub(super) fn values(self, start: f64, end: f64, train: usize) -> Vec<f32> {
        match self {
            Self::Linear => linspace(start, end, train).collect(),
            Self::ScaledLinear => {
                linspace(start.sqrt(), end.sqrt(), train).map(|root| root * root).collect()
            }
            Self::Cosine => {
                // Nichol and Dhariwal 2021, equation 17.
                let root = |i| ((i as f64 / train as f64 + 0.008) / 1.008 * FRAC_PI_2).cos();
                let beta = |i| (1.0 - (root(i + 1) / root(i)).powi(2)).min(0.999);
                (0..train).map(|i| beta(i) as f32).collect()
            }
        }
    }
}

/// The product of the alphas up to each timestep of the training.
pub(super) fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(next).collect()
}

/// Rescales the products so that the last timestep is pure noise (Lin et al. 2024, algorithm 1).
pub(super) fn rescale_zero_terminal_snr(alphas_cumprod: &mut [f32]) {
    let root = |product: f32| f64::from(product).sqrt();
    let (first, last) = (root(alphas_cumprod[0]), root(alphas_cumprod[alphas_cumprod.len() - 1]));
    for product in alphas_cumprod {
        *product = ((root(*product) - last) * first / (first - last)).powi(2) as f32;
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

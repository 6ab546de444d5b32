//! What a request can change in a sampler, apart from its schedule and the number of steps.

/// The random part of a sampler. What is none is the sampler's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SamplerOptions {
    /// The share of a step's noise that is drawn anew, 0 to 1: `eta` in diffusers and k-diffusion,
    /// gamma of TCD.
    pub eta: Option<f64>,
    /// Scales the noise that is drawn: k-diffusion's `s_noise`.
    pub s_noise: Option<f64>,
    /// Noise that is added before steps.
    pub churn: Churn,
}

/// Noise that is added before each step whose sigma is in a range (Karras et al. 2022, algorithm
/// 2; k-diffusion's `s_churn`, `s_tmin` and `s_tmax`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Churn {
    /// The amount over all steps; 0 is none.
    pub amount: f64,
    /// The smallest sigma.
    pub from: f64,
    /// The largest sigma.
    pub to: f64,
}

impl Default for Churn {
    fn default() -> Self {
        Self { amount: 0.0, from: 0.0, to: f64::INFINITY }
    }
}

impl Churn {
    /// How much a sigma grows before a step, in a run of `steps` steps.
    pub(super) fn growth(self, sigma: f64, steps: usize) -> f64 {
        let within = (self.from..=self.to).contains(&sigma);
        let most = std::f64::consts::SQRT_2 - 1.0;
        if within { (self.amount / steps as f64).min(most) } else { 0.0 }
    }
}

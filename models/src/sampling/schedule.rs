//! The table of one run: for every evaluation of the UNet its timestep and the noise levels that
//! the latents move between. Scalars in f64. It is made in [`super::plan`].

/// A noise level: x = alpha x0 + sigma epsilon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NoiseLevel {
    pub(super) alpha: f64,
    pub(super) sigma: f64,
}

impl NoiseLevel {
    /// Of unit variance, from the product of the alphas (Ho et al. 2020, equation 4).
    pub(super) fn of_product(alpha_cumprod: f32) -> Self {
        let product = f64::from(alpha_cumprod);
        Self { alpha: product.sqrt(), sigma: (1.0 - product).sqrt() }
    }

    /// From a sigma of Karras et al. 2022: x = x0 + sigma epsilon, or the same scaled to unit
    /// variance.
    pub(super) fn of_sigma(sigma: f64, unit_variance: bool) -> Self {
        let alpha = if unit_variance { 1.0 / sigma.hypot(1.0) } else { 1.0 };
        Self { alpha, sigma: sigma * alpha }
    }

    /// Standard deviation of x when that of x0 is 1.
    pub(super) fn norm(self) -> f64 {
        self.alpha.hypot(self.sigma)
    }

    /// Half the logarithm of the signal-to-noise ratio; infinite where sigma is 0.
    pub(super) fn lambda(self) -> f64 {
        (self.alpha / self.sigma).ln()
    }
}

/// The arguments of a UNet evaluation: `unet(latents * input_scale, timestep)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// The timestep; a fraction for some samplers.
    pub timestep: f64,
    /// Scales the latents to unit variance.
    pub input_scale: f64,
}

/// One evaluation and the move that follows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    pub(super) evaluation: Evaluation,
    /// The level of the latents that are evaluated.
    pub(super) at: NoiseLevel,
    /// The levels that the latents move between. `from` is `at`, but where a second evaluation
    /// takes the first's step again.
    pub(super) from: NoiseLevel,
    pub(super) to: NoiseLevel,
    /// The level to which the latents move before noise takes them up to `to`; `to` itself for a
    /// step without noise.
    pub(super) below: NoiseLevel,
    /// Standard deviation of the noise that has taken the latents up to `at` before the
    /// evaluation. Noise of deviation 0 is drawn, too.
    pub(super) raised_by: Option<f64>,
    /// The highest order that a multistep solver may use here.
    pub(super) order: usize,
}

/// The way from one sigma to the next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// The timesteps at the begin and at the end.
    pub(super) times: [f64; 2],
    pub(super) sigmas: [f64; 2],
    /// Standard deviation of the noise that has taken the latents up to the first sigma.
    pub(super) raised_by: Option<f64>,
}

/// The table of one run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Schedule {
    pub(super) steps: Vec<Step>,
    /// The number of steps that are left out at the begin.
    pub(super) skipped: usize,
    /// The number of steps after which the run ends.
    pub(super) end: usize,
    /// Standard deviation of the initial latents.
    pub(super) init_noise_sigma: f64,
}

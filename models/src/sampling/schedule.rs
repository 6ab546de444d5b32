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
    /// The level of the evaluation's timestep.
    pub(super) at: NoiseLevel,
    /// The levels that the latents move between. `from` is `at`, but for PNDM's second evaluation,
    /// which takes the first step again.
    pub(super) from: NoiseLevel,
    pub(super) to: NoiseLevel,
    /// The highest order that a multistep solver may use here.
    pub(super) order: usize,
}

/// The table of one run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Schedule {
    pub(super) steps: Vec<Step>,
    /// Standard deviation of the initial latents.
    pub(super) init_noise_sigma: f64,
}

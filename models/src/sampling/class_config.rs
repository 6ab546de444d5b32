//! What the class of a sampler reads in a scheduler configuration.
//!
//! The reference is diffusers 0.42.1, `Class.from_config(config)`: a key that the file leaves out
//! takes the default of the class that is asked for, not of the class that wrote the file, and a
//! key that this class does not have is not read. What differs by class is in the rows of
//! [`super::table`].

use super::algorithm::{Algorithm, LevelGrid, Orders};
use super::betas::{Betas, alphas_cumprod, rescale_zero_terminal_snr};
use super::config::{DEFAULT_TRAIN_TIMESTEPS, SchedulerConfig, is_known, unsupported};
use super::denoiser::{Denoiser, Prediction};
use super::sigmas::SigmaSchedule;
use super::spacing::Spacing;
use crate::error::Result;

impl SchedulerConfig {
    /// Refuses what a sampler's class would do and we do not.
    pub(super) fn check(&self, row: &Algorithm) -> Result<()> {
        self.spacing(row)?;
        self.ends_at_zero(row)?;
        self.denoiser(row)?;
        // The key is of this class alone: that it is absent tells nothing in the file of another.
        let is_own = self.class_name.as_deref() == row.class;
        if row.skip_prk_steps && is_own && self.skip_prk_steps != Some(true) {
            let reason = "skip_prk_steps must be true: there is no Runge-Kutta start";
            return Err(unsupported(reason.into()));
        }
        for (key, value) in self.rest.iter().filter(|(key, _)| !key.starts_with('_')) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let accepted = match row.supported(key) {
                Some(values) => values.contains(&text.as_str()),
                None => !is_own || is_known(key) || matches!(text.as_str(), "null" | "false"),
            };
            if !accepted {
                return Err(unsupported(format!("{key} {text} is not supported by {}", row.name)));
            }
        }
        Ok(())
    }

    pub(super) fn spacing(&self, row: &Algorithm) -> Result<Spacing> {
        if let Some(spacing) = row.fixed_spacing {
            return Ok(spacing);
        }
        let known = [
            ("leading", Spacing::Leading),
            ("trailing", Spacing::Trailing),
            ("linspace", Spacing::Linspace),
        ];
        choose("timestep_spacing", self.timestep_spacing.as_deref(), row.spacing, &known)
    }

    pub(super) fn beta_schedule(&self, row: &Algorithm) -> Result<Betas> {
        let known = [
            ("linear", Betas::Linear),
            ("scaled_linear", Betas::ScaledLinear),
            ("squaredcos_cap_v2", Betas::Cosine),
        ];
        choose("beta_schedule", self.beta_schedule.as_deref(), row.betas.2, &known)
    }

    /// The product of the alphas up to each timestep of the training.
    pub(super) fn alphas_cumprod(&self, row: &Algorithm) -> Result<Vec<f32>> {
        let train = self.num_train_timesteps.unwrap_or(DEFAULT_TRAIN_TIMESTEPS);
        let schedule = self.beta_schedule(row)?;
        let (start, end, _) = row.betas;
        let (start, end) = (self.beta_start.unwrap_or(start), self.beta_end.unwrap_or(end));
        let betas = match &self.trained_betas {
            Some(betas) => betas.clone(),
            None => schedule.values(start, end, train),
        };
        if betas.is_empty() || betas.len() != train {
            let reason = format!("num_train_timesteps {train} with {} betas", betas.len());
            return Err(unsupported(reason));
        }
        let mut products = alphas_cumprod(&betas);
        if products.iter().any(|product| !(*product > 0.0 && *product < 1.0)) {
            let reason = format!("the betas of {train} timesteps leave no image or no noise");
            return Err(unsupported(format!("beta_start, beta_end or trained_betas: {reason}")));
        }
        if row.rescale_betas_zero_snr && self.rescale_betas_zero_snr.unwrap_or(false) {
            if products[0] <= products[train - 1] {
                let reason = "rescale_betas_zero_snr: needs more than one timestep";
                return Err(unsupported(reason.into()));
            }
            rescale_zero_terminal_snr(&mut products);
            if row.grid != LevelGrid::Timesteps {
                // Sigma must be finite.
                products[train - 1] = 2_f32.powi(-24);
            }
        }
        Ok(products)
    }

    /// Whether the level after the last timestep is x0 itself, or else that of timestep 0.
    pub(super) fn alpha_to_one(&self, row: &Algorithm) -> bool {
        row.set_alpha_to_one.is_none_or(|default| self.set_alpha_to_one.unwrap_or(default))
    }

    /// The schedule of the sigmas, where a request asks for `asked`.
    pub(super) fn schedule(&self, row: &Algorithm, asked: SigmaSchedule) -> SigmaSchedule {
        let asks = |key: Option<bool>| row.use_sigmas && key == Some(true);
        match asked {
            SigmaSchedule::Model if asks(self.use_karras_sigmas) => SigmaSchedule::Karras,
            SigmaSchedule::Model if asks(self.use_exponential_sigmas) => SigmaSchedule::Exponential,
            SigmaSchedule::Model if asks(self.use_beta_sigmas) => SigmaSchedule::Beta,
            asked => asked,
        }
    }

    /// Whether the last sigma is 0, or else the least of the training.
    pub(super) fn ends_at_zero(&self, row: &Algorithm) -> Result<bool> {
        let value = self.final_sigmas_type.as_deref().filter(|_| row.final_sigmas_type);
        let known = [("zero", true), ("sigma_min", false)];
        choose("final_sigmas_type", value, !row.ends_at_least, &known)
    }

    /// The highest order at step `i` of `steps`, in a run that ends at sigma 0 or does not, and
    /// whose end is of lower order because it is short.
    pub(super) fn order(
        &self,
        row: &Algorithm,
        (i, steps): (usize, usize),
        zero: bool,
        short: bool,
    ) -> usize {
        let left = steps - i;
        let lower = self.lower_order_final.unwrap_or(row.orders != Orders::Pairs);
        // The class that reads this key is the one that can end at either sigma.
        let euler_at_final = row.final_sigmas_type && self.euler_at_final == Some(true);
        match row.orders {
            Orders::Multistep(_) if left == 1 && (zero || euler_at_final) => 1,
            Orders::Multistep(most) if lower && short => most.min(left),
            Orders::Multistep(most) => most,
            Orders::Falling(most) if lower => most.min(left),
            Orders::Falling(most) => {
                if left == 1 && zero {
                    1
                } else {
                    most
                }
            }
            // diffusers takes lower orders at the end where the steps are odd or the end is zero.
            Orders::Pairs => {
                let lower = lower || zero || !steps.is_multiple_of(2);
                if i.is_multiple_of(2) || lower && left == 1 { 1 } else { 2 }
            }
        }
    }

    /// The denoiser of the sampler's class.
    pub(super) fn denoiser(&self, row: &Algorithm) -> Result<Denoiser> {
        let known = [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::Velocity),
            ("sample", Prediction::Sample),
        ];
        let known = if row.predicts_x0 { &known } else { &known[..2] };
        let asked = self.prediction_type.as_deref();
        let prediction = choose("prediction_type", asked, Prediction::Epsilon, known)?;
        let clips = row.clip_sample.is_some_and(|default| self.clip_sample.unwrap_or(default));
        let clip = clips.then(|| self.clip_sample_range.unwrap_or(1.0));
        Ok(Denoiser { prediction, clip })
    }
}

/// The value of a key whose values have names.
fn choose<T: Copy>(key: &str, value: Option<&str>, default: T, known: &[(&str, T)]) -> Result<T> {
    let Some(value) = value else { return Ok(default) };
    known.iter().find(|row| row.0 == value).map(|row| row.1).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|row| row.0).collect();
        unsupported(format!("{key} {value:?} is not supported: it may be {}", names.join(", ")))
    })
}

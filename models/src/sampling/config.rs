//! `scheduler/scheduler_config.json`, and what each class of diffusers reads in it.
//!
//! The reference is diffusers 0.42.1, `Class.from_config(config)`: a key that the file leaves out
//! takes the default of the class that is asked for, not of the class that wrote the file, and a
//! key that this class does not have is not read. What differs by class is in the rows of
//! [`super::table`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::algorithm::{Algorithm, LevelGrid, Orders};
use super::betas::{Betas, alphas_cumprod, rescale_zero_terminal_snr};
use super::denoiser::{Denoiser, Prediction};
use super::names::SamplerName;
use super::sigmas::SigmaSchedule;
use super::spacing::Spacing;
use super::table::ALGORITHMS;
use crate::error::{Error, Result};

/// The file, key for key.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the keys are diffusers'")]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    pub num_train_timesteps: Option<usize>,
    pub beta_start: Option<f64>,
    pub beta_end: Option<f64>,
    pub beta_schedule: Option<String>,
    pub trained_betas: Option<Vec<f32>>,
    pub rescale_betas_zero_snr: Option<bool>,
    pub prediction_type: Option<String>,
    pub timestep_spacing: Option<String>,
    pub steps_offset: Option<u32>,
    pub set_alpha_to_one: Option<bool>,
    pub clip_sample: Option<bool>,
    pub clip_sample_range: Option<f64>,
    pub skip_prk_steps: Option<bool>,
    pub use_karras_sigmas: Option<bool>,
    pub use_exponential_sigmas: Option<bool>,
    pub use_beta_sigmas: Option<bool>,
    pub final_sigmas_type: Option<String>,
    pub lower_order_final: Option<bool>,
    pub euler_at_final: Option<bool>,
    pub original_inference_steps: Option<usize>,
    pub timestep_scaling: Option<f64>,
    /// Every other key: none may change anything.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl SchedulerConfig {
    /// Reads the file. Python writes an infinity into it, the default of one key.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(&text.replace("-Infinity", "null"))
            .map_err(|error| unsupported(error.to_string()))
    }

    /// The sampler of the class that the file names, on the schedule that it asks for.
    pub fn default_sampler(&self) -> Result<SamplerName> {
        let class = self.class_name.as_deref().unwrap_or_default();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let value = |key: &str| match key {
            "use_karras_sigmas" => self.use_karras_sigmas.map(|asks| asks.to_string()),
            "use_exponential_sigmas" => self.use_exponential_sigmas.map(|asks| asks.to_string()),
            "use_beta_sigmas" => self.use_beta_sigmas.map(|asks| asks.to_string()),
            _ => self.rest.get(key).filter(|value| !value.is_null()).map(text),
        };
        let named = SamplerName::of_class(class, value);
        named.map_err(|reason| unsupported(format!("_class_name: {reason}")))
    }

    /// Takes DPM++ 2M as the class where that of the file is not known, or none is named, and says
    /// so: most of what a file of another class tells are the betas, which all have. Keys that only
    /// the unknown class has are dropped; of a known class those that no sampler of it has.
    ///
    /// # Errors
    /// [`Error::Config`] if the class is of models that are not trained on betas.
    pub fn replace_unknown_class(&mut self) -> Result<Option<String>> {
        let Err(error) = self.default_sampler() else { return Ok(None) };
        let class = self.class_name.clone().unwrap_or_default();
        if class.contains("FlowMatch") || class.contains("EDM") {
            return Err(error);
        }
        if ALGORITHMS.iter().any(|row| row.class == Some(&class)) {
            self.rest.retain(|key, _| !names_sampler(key));
            return Ok(Some(format!(
                "{error}; the default sampler is {}",
                self.default_sampler()?
            )));
        }
        self.class_name = Some("DPMSolverMultistepScheduler".into());
        self.rest.retain(|key, _| is_known(key) && !names_sampler(key));
        let named = match &*class {
            "" => "names no _class_name".to_owned(),
            class => format!("the class {class} is not known"),
        };
        let file = "scheduler/scheduler_config.json";
        Ok(Some(format!("{file}: {named}; the default sampler is {}", self.default_sampler()?)))
    }

    /// Refuses what a sampler's class would do and we do not.
    pub(super) fn check(&self, row: &Algorithm) -> Result<()> {
        if row.skip_prk_steps && self.skip_prk_steps != Some(true) {
            let reason = "skip_prk_steps must be true: there is no Runge-Kutta start";
            return Err(unsupported(reason.into()));
        }
        for (key, value) in self.rest.iter().filter(|(key, _)| !key.starts_with('_')) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let accepted = match row.supported(key) {
                Some(values) => values.contains(&text.as_str()),
                None => is_known(key) || matches!(text.as_str(), "null" | "false"),
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
        let train = self.num_train_timesteps.unwrap_or(1000);
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
        if row.rescale_betas_zero_snr && self.rescale_betas_zero_snr.unwrap_or(false) {
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

/// Keys that matter only where another key is set, which is not supported.
const WITHOUT_EFFECT: [&str; 5] = [
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "tensor_format",
];

/// Whether a key has no effect but in the classes of samplers that read it.
fn is_known(key: &str) -> bool {
    let reads = |row: &Algorithm| row.supported(key).is_some();
    WITHOUT_EFFECT.contains(&key) || names_sampler(key) || ALGORITHMS.iter().any(reads)
}

/// Whether a key tells the samplers of one class apart.
fn names_sampler(key: &str) -> bool {
    ALGORITHMS.iter().any(|row| row.class_keys.iter().any(|known| known.0 == key))
}

/// The value of a key whose values have names.
fn choose<T: Copy>(key: &str, value: Option<&str>, default: T, known: &[(&str, T)]) -> Result<T> {
    let Some(value) = value else { return Ok(default) };
    known.iter().find(|row| row.0 == value).map(|row| row.1).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|row| row.0).collect();
        unsupported(format!("{key} {value:?} is not supported: it may be {}", names.join(", ")))
    })
}

fn unsupported(reason: String) -> Error {
    Error::config("scheduler/scheduler_config.json", reason)
}

//! `scheduler/scheduler_config.json`, and what each class of diffusers reads in it.
//!
//! The reference is diffusers 0.42.1, `Class.from_config(config)`: a key that the file leaves out
//! takes the default of the class that is asked for, not of the class that wrote the file, and a
//! key that this class does not have is not read. What differs by class is in the rows of
//! [`super::table`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::algorithm::{Algorithm, LevelGrid, Orders, Sampler};
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
    ///
    /// # Errors
    /// [`Error::Config`] names the key whose value no sampler could run with.
    pub fn from_json(text: &str) -> Result<Self> {
        let file: Map<String, Value> = serde_json::from_str(&text.replace("-Infinity", "null"))
            .map_err(|error| unsupported(format!("is not an object in JSON: {error}")))?;
        for (key, value) in &file {
            let alone = Map::from_iter([(key.clone(), value.clone())]);
            if serde_json::from_value::<Self>(Value::Object(alone)).is_err() {
                return Err(unsupported(format!("{key} {value} is no value of this key")));
            }
        }
        let config: Self = serde_json::from_value(Value::Object(file))
            .map_err(|error| unsupported(error.to_string()))?;
        config.check_numbers()?;
        Ok(config)
    }

    /// Checks the numbers, whichever sampler reads them.
    fn check_numbers(&self) -> Result<()> {
        let train = self.num_train_timesteps.unwrap_or(DEFAULT_TRAIN_TIMESTEPS);
        if !(1..=MAX_TRAIN_TIMESTEPS).contains(&train) {
            let reason = format!("num_train_timesteps {train} must be 1 to {MAX_TRAIN_TIMESTEPS}");
            return Err(unsupported(reason));
        }
        let is_beta = |beta: f64| beta > 0.0 && beta < 1.0;
        for (key, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            if let Some(beta) = beta.filter(|beta| !is_beta(*beta)) {
                return Err(unsupported(format!("{key} {beta} must be between 0 and 1")));
            }
        }
        let mut trained = self.trained_betas.iter().flatten();
        if let Some(beta) = trained.find(|beta| !is_beta(f64::from(**beta))) {
            return Err(unsupported(format!("trained_betas: {beta} must be between 0 and 1")));
        }
        if let Some(offset) = self.steps_offset.filter(|offset| *offset as usize >= train) {
            let reason = format!("steps_offset {offset} must be less than {train} timesteps");
            return Err(unsupported(reason));
        }
        if self.original_inference_steps == Some(0) {
            return Err(unsupported("original_inference_steps must be at least 1".into()));
        }
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let scales = [
            ("timestep_scaling", self.timestep_scaling),
            ("clip_sample_range", self.clip_sample_range),
        ];
        for (key, value) in scales {
            if let Some(value) = value.filter(|value| !positive(*value)) {
                return Err(unsupported(format!("{key} {value} must be greater than 0")));
            }
        }
        ALGORITHMS.iter().try_for_each(|row| self.alphas_cumprod(row).map(drop))
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

    /// Checks that a sampler can run with what the file asks of its class.
    ///
    /// # Errors
    /// [`Error::Config`] names the key.
    pub fn check_sampler(&self, sampler: Sampler) -> Result<()> {
        self.check(sampler.algorithm())
    }

    /// Why samplers cannot run with what the file asks of their classes.
    pub fn unsuited(&self) -> Vec<(Sampler, String)> {
        let refused = |row: &Algorithm| Some((row.sampler, self.check(row).err()?.to_string()));
        ALGORITHMS.iter().filter_map(refused).collect()
    }

    /// The most steps: of the training, and out of a distillation.
    pub fn most_steps(&self) -> (usize, usize) {
        let train = self.num_train_timesteps.unwrap_or(1000);
        (train, self.original_inference_steps.unwrap_or(50).min(train))
    }

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

/// The timesteps of the training where the file does not tell them: diffusers' default.
const DEFAULT_TRAIN_TIMESTEPS: usize = 1000;

/// Maximum number of timesteps of a training: a table of them is made for each image.
const MAX_TRAIN_TIMESTEPS: usize = 100_000;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_sampler_runs_with_are_refused_at_load_by_their_key() {
        let cases = [
            (r#"{"num_train_timesteps":1000000000000}"#, "num_train_timesteps"),
            (r#"{"num_train_timesteps":0}"#, "num_train_timesteps"),
            (r#"{"num_train_timesteps":-1}"#, "num_train_timesteps -1"),
            (r#"{"beta_start":0}"#, "beta_start"),
            (r#"{"beta_end":1}"#, "beta_end"),
            (r#"{"beta_start":0.9,"beta_end":0.9}"#, "beta_start"),
            (r#"{"beta_end":1e-12,"beta_start":1e-12}"#, "beta_start"),
            (r#"{"beta_schedule":"sigmoid"}"#, "beta_schedule"),
            (r#"{"num_train_timesteps":2,"trained_betas":[0.1,-0.1]}"#, "trained_betas"),
            (r#"{"num_train_timesteps":3,"trained_betas":[0.1,0.1]}"#, "num_train_timesteps"),
            (r#"{"num_train_timesteps":1,"rescale_betas_zero_snr":true}"#, "rescale_betas"),
            (r#"{"steps_offset":1000}"#, "steps_offset"),
            (r#"{"original_inference_steps":0}"#, "original_inference_steps"),
            (r#"{"timestep_scaling":0}"#, "timestep_scaling"),
            (r#"{"clip_sample_range":-1}"#, "clip_sample_range"),
            (r#"{"clip_sample":"yes"}"#, "clip_sample \"yes\""),
            ("[]", "object"),
        ];
        for (file, key) in cases {
            let error = SchedulerConfig::from_json(file).expect_err(file).to_string();
            assert!(error.starts_with("scheduler/scheduler_config.json: "), "{error}");
            assert!(error.contains(key) && error.lines().count() == 1, "{file}: {error}");
        }
    }

    #[test]
    fn keys_hold_for_the_classes_that_have_them() {
        let unsuited = |file: &str| {
            let config = SchedulerConfig::from_json(file).expect("a file");
            config.unsuited().into_iter().map(|row| row.0).collect::<Vec<_>>()
        };
        let euler = r#"{"_class_name":"EulerDiscreteScheduler","new_key":3}"#;
        assert_eq!(unsuited(euler), [Sampler::Euler], "an unknown key of its own class");
        let lcm = unsuited(r#"{"_class_name":"LCMScheduler"}"#);
        assert!(lcm.is_empty(), "skip_prk_steps is not in its file: {lcm:?}");
        assert_eq!(unsuited(r#"{"_class_name":"PNDMScheduler"}"#), [Sampler::Pndm]);
        let sample = r#"{"_class_name":"DDIMScheduler","prediction_type":"sample"}"#;
        let sample = unsuited(sample);
        assert!(sample.contains(&Sampler::Pndm) && !sample.contains(&Sampler::Ddim));
    }
}

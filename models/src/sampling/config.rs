//! `scheduler/scheduler_config.json`: its keys, which of their values no sampler could run with, and
//! the sampler of its class. What a sampler reads in it is in [`super::class_config`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::algorithm::{Algorithm, Sampler};
use super::names::SamplerName;
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
            .map_err(|error| {
                let (line, column) = (error.line(), error.column());
                unsupported(format!("is no object in JSON, from line {line}, column {column} on"))
            })?;
        for (key, value) in &file {
            let alone = Map::from_iter([(key.clone(), value.clone())]);
            if serde_json::from_value::<Self>(Value::Object(alone)).is_err() {
                return Err(unsupported(format!("{key} {value} is no value of this key")));
            }
        }
        let config: Self = serde_json::from_value(Value::Object(file))
            .map_err(|_| unsupported("has values that do not go together".into()))?;
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
}

/// The timesteps of the training where the file does not tell them: diffusers' default.
pub(super) const DEFAULT_TRAIN_TIMESTEPS: usize = 1000;

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
pub(super) fn is_known(key: &str) -> bool {
    let reads = |row: &Algorithm| row.supported(key).is_some();
    WITHOUT_EFFECT.contains(&key) || names_sampler(key) || ALGORITHMS.iter().any(reads)
}

/// Whether a key tells the samplers of one class apart.
fn names_sampler(key: &str) -> bool {
    ALGORITHMS.iter().any(|row| row.class_keys.iter().any(|known| known.0 == key))
}

pub(super) fn unsupported(reason: String) -> Error {
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

//! `scheduler/scheduler_config.json`, and what each class of diffusers reads in it.
//!
//! The reference is diffusers 0.42.1, `Class.from_config(config)`: a key that the file leaves out
//! takes the default of the class that is asked for, not of the class that wrote the file, and a
//! key that this class does not have is not read.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::spec::Scheduler::{
    self, Ddim, Ddpm, Dpmpp2m, Dpmpp2mKarras, Euler, EulerAncestral, Heun, Lcm, Pndm, UniPc,
};

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
    pub final_sigmas_type: Option<String>,
    pub lower_order_final: Option<bool>,
    pub euler_at_final: Option<bool>,
    pub original_inference_steps: Option<usize>,
    pub timestep_scaling: Option<f64>,
    /// Every other key: none may change anything.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

const THRESHOLDING: &[Scheduler] = &[Ddim, Ddpm, Dpmpp2m, Dpmpp2mKarras, UniPc, Lcm];
const KARRAS: &[Scheduler] = &[Euler, Heun, Dpmpp2m, Dpmpp2mKarras, UniPc];
const SOLVERS: &[Scheduler] = &[Dpmpp2m, Dpmpp2mKarras, UniPc];
const DPM: &[Scheduler] = &[Dpmpp2m, Dpmpp2mKarras];

/// Keys that may mean one thing only: who reads them, and the values that mean it. A key that is
/// not here must be null or false.
const FIXED: [(&str, &[Scheduler], &[&str]); 25] = [
    ("thresholding", THRESHOLDING, &["false"]),
    ("variance_type", &[Ddpm], &["null", "fixed_small", "fixed_small_log"]),
    ("interpolation_type", &[Euler], &["linear"]),
    ("timestep_type", &[Euler], &["discrete"]),
    ("use_exponential_sigmas", KARRAS, &["null", "false"]),
    ("use_beta_sigmas", KARRAS, &["null", "false"]),
    ("sigma_min", KARRAS, &["null"]),
    ("sigma_max", KARRAS, &["null"]),
    ("use_lu_lambdas", DPM, &["null", "false"]),
    ("use_flow_sigmas", SOLVERS, &["null", "false"]),
    ("use_dynamic_shifting", SOLVERS, &["null", "false"]),
    ("solver_order", SOLVERS, &["2"]),
    ("solver_type", DPM, &["midpoint", "logrho", "bh1", "bh2"]),
    ("solver_type", &[UniPc], &["bh2", "midpoint", "heun", "logrho"]),
    ("algorithm_type", DPM, &["dpmsolver++", "deis"]),
    ("lambda_min_clipped", DPM, &["null"]),
    ("predict_x0", &[UniPc], &["true"]),
    ("disable_corrector", &[UniPc], &["[]"]),
    ("solver_p", &[UniPc], &["null"]),
    ("shift_terminal", &[UniPc], &["null"]),
    ("dynamic_thresholding_ratio", &[], &[]),
    ("sample_max_value", &[], &[]),
    ("flow_shift", &[], &[]),
    ("time_shift_type", &[], &[]),
    ("tensor_format", &[], &[]),
];

/// Where a run's timesteps lie (Lin et al. 2024, table 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

/// How the betas grow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Betas {
    Linear,
    ScaledLinear,
    Cosine,
}

impl SchedulerConfig {
    /// Reads the file. Python writes an infinity into it, the default of one key.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(&text.replace("-Infinity", "null"))
            .map_err(|error| unsupported(error.to_string()))
    }

    /// The sampler of the class that the file names.
    pub fn default_scheduler(&self) -> Result<Scheduler> {
        let name = self.class_name.as_deref().unwrap_or_default();
        let scheduler = name.parse().map_err(|error| unsupported(format!("_class_name: {error}")));
        match scheduler? {
            Dpmpp2m if self.use_karras_sigmas == Some(true) => Ok(Dpmpp2mKarras),
            scheduler => Ok(scheduler),
        }
    }

    /// Refuses what a sampler's class would do and we do not.
    pub(super) fn check(&self, scheduler: Scheduler) -> Result<()> {
        if scheduler == Pndm && self.skip_prk_steps != Some(true) {
            let reason = "skip_prk_steps must be true: there is no Runge-Kutta start";
            return Err(unsupported(reason.into()));
        }
        for (key, value) in self.rest.iter().filter(|(key, _)| !key.starts_with('_')) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let mut rows = FIXED.iter().filter(|row| row.0 == key).peekable();
            let known = rows.peek().is_some();
            let accepted = match rows.find(|row| row.1.contains(&scheduler)) {
                Some(row) => row.2.contains(&text.as_str()),
                None => known || matches!(text.as_str(), "null" | "false"),
            };
            if !accepted {
                return Err(unsupported(format!("{key} {text} is not supported by {scheduler}")));
            }
        }
        Ok(())
    }

    pub(super) fn spacing(&self, scheduler: Scheduler) -> Result<Spacing> {
        let default = if matches!(scheduler, Pndm | Ddim | Ddpm) { "leading" } else { "linspace" };
        let known = [
            ("leading", Spacing::Leading),
            ("trailing", Spacing::Trailing),
            ("linspace", Spacing::Linspace),
        ];
        choose("timestep_spacing", self.timestep_spacing.as_deref(), default, &known)
    }

    /// First and last beta, and what lies between.
    pub(super) fn betas(&self, scheduler: Scheduler) -> Result<(f64, f64, Betas)> {
        let (start, end, kind) = match scheduler {
            Lcm => (0.00085, 0.012, "scaled_linear"),
            Heun => (0.00085, 0.012, "linear"),
            _ => (0.0001, 0.02, "linear"),
        };
        let known = [
            ("linear", Betas::Linear),
            ("scaled_linear", Betas::ScaledLinear),
            ("squaredcos_cap_v2", Betas::Cosine),
        ];
        let kind = choose("beta_schedule", self.beta_schedule.as_deref(), kind, &known)?;
        Ok((self.beta_start.unwrap_or(start), self.beta_end.unwrap_or(end), kind))
    }

    /// Whether the last timestep is pure noise.
    pub(super) fn zero_snr(&self, scheduler: Scheduler) -> bool {
        self.rescale_betas_zero_snr.unwrap_or(false) && !matches!(scheduler, Pndm | Heun)
    }

    /// Whether the level after the last timestep is x0 itself, or else that of timestep 0.
    pub(super) fn alpha_to_one(&self, scheduler: Scheduler) -> bool {
        match scheduler {
            Pndm => self.set_alpha_to_one.unwrap_or(false),
            Ddim => self.set_alpha_to_one.unwrap_or(true),
            _ => true,
        }
    }

    /// Whether the sigmas are Karras'; of the two DPM-Solvers the name decides.
    pub(super) fn karras(&self, scheduler: Scheduler) -> bool {
        match scheduler {
            Dpmpp2mKarras => true,
            Euler | Heun | UniPc => self.use_karras_sigmas.unwrap_or(false),
            _ => false,
        }
    }

    /// Whether the last sigma is 0, or else the least of the training.
    pub(super) fn ends_at_zero(&self, scheduler: Scheduler) -> Result<bool> {
        let value = self.final_sigmas_type.as_deref();
        let value = value.filter(|_| !matches!(scheduler, EulerAncestral | Heun));
        choose("final_sigmas_type", value, "zero", &[("zero", true), ("sigma_min", false)])
    }

    /// Whether a multistep solver takes the last step of a run in first order.
    pub(super) fn ends_in_first_order(&self, scheduler: Scheduler, steps: usize) -> Result<bool> {
        let lower = self.lower_order_final.unwrap_or(true) && (scheduler == UniPc || steps < 15);
        Ok(lower || self.euler_at_final.unwrap_or(false) || self.ends_at_zero(scheduler)?)
    }
}

/// The value of a key whose values have names.
pub(crate) fn choose<T: Copy>(
    key: &str,
    value: Option<&str>,
    default: &str,
    known: &[(&str, T)],
) -> Result<T> {
    let value = value.unwrap_or(default);
    known.iter().find(|row| row.0 == value).map(|row| row.1).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|row| row.0).collect();
        unsupported(format!("{key} {value:?} is not supported: it may be {}", names.join(", ")))
    })
}

pub(super) fn unsupported(reason: String) -> Error {
    Error::config("scheduler/scheduler_config.json", reason)
}

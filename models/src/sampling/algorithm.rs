//! The samplers: one row each, with its names, the function of its step, the layout of its noise
//! levels, and what diffusers' class of it reads in a scheduler configuration.
//!
//! To add a sampler, write its function, its variant and its row. Nothing else in this crate asks
//! which sampler it has.

use std::fmt;
use std::str::FromStr;

use super::betas::Betas;
use super::sigmas::SigmaSchedule;
use super::spacing::Spacing;
use super::state::Advance;
use super::{ddpm, dpmpp, euler, lcm, pndm, unipc};
use crate::error::{Error, Result};

/// The samplers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Pseudo numerical methods (PLMS), the default of Stable Diffusion v1.4.
    Pndm,
    /// Denoising diffusion implicit models.
    Ddim,
    /// Denoising diffusion probabilistic models.
    Ddpm,
    /// Euler's method.
    Euler,
    /// Euler's method with ancestral noise.
    EulerAncestral,
    /// Heun's method, two evaluations a step.
    Heun,
    /// DPM-Solver++ of second order, multistep.
    Dpmpp2m,
    /// Unified predictor-corrector.
    UniPc,
    /// Latent consistency models.
    Lcm,
}

/// What is particular to one sampler. Defaults are those of diffusers' class; they hold where the
/// scheduler configuration leaves a key out.
#[derive(Debug)]
pub(super) struct Algorithm {
    pub(super) sampler: Sampler,
    /// The name in requests.
    pub(super) name: &'static str,
    /// AUTOMATIC1111's label, which infotext uses.
    title: &'static str,
    /// diffusers' class.
    class: &'static str,
    pub(super) advance: Advance,
    /// The schedules that a request may choose.
    schedules: &'static [SigmaSchedule],
    /// The schedule that AUTOMATIC1111's "Automatic" stands for.
    automatic: SigmaSchedule,
    pub(super) grid: LevelGrid,
    /// On timesteps: whether a step ends `train / steps` timesteps below its begin, and not at the
    /// next timestep of the run.
    pub(super) fixed_stride: bool,
    /// On timesteps: whether the second evaluation takes the first step again.
    pub(super) repeats_first: bool,
    /// The timesteps, where they are not spaced as the configuration has it.
    pub(super) timesteps: Option<Timesteps>,
    /// On sigmas: evaluations of every step but the last, which has one; 1 or 2.
    pub(super) evaluations: usize,
    /// A multistep solver takes its last step in first order in runs of fewer steps than this.
    pub(super) lower_order_below: usize,
    /// Whether the timesteps of given sigmas are truncated with cosine betas, not rounded.
    pub(super) truncates_with_cosine: bool,
    pub(super) spacing: Spacing,
    /// `beta_start`, `beta_end` and `beta_schedule`.
    pub(super) betas: (f64, f64, Betas),
    /// Whether `prediction_type` may be `sample`.
    pub(super) predicts_x0: bool,
    /// None where the class does not read the key and never clips.
    pub(super) clip_sample: Option<bool>,
    /// None where the class does not read the key: the last level is x0 itself.
    pub(super) set_alpha_to_one: Option<bool>,
    /// Whether the class reads these keys.
    pub(super) rescale_betas_zero_snr: bool,
    pub(super) use_karras_sigmas: bool,
    pub(super) final_sigmas_type: bool,
    /// Whether `skip_prk_steps` must be true.
    pub(super) skip_prk_steps: bool,
    /// Further keys that the class reads, of which only some values are supported.
    pub(super) restricted: &'static [&'static [Restricted]],
}

/// The timesteps of a run of `steps` steps, out of the `original` timesteps of a distillation
/// (`original_inference_steps`) and the `train` timesteps of the training.
type Timesteps = fn(steps: usize, original: usize, train: usize) -> Result<Vec<f64>>;

/// A key and the values, as JSON or bare strings, that are supported.
pub(super) type Restricted = (&'static str, &'static [&'static str]);

/// The layout of the noise levels of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LevelGrid {
    /// Whole timesteps of the training, x at unit variance.
    Timesteps,
    /// Sigmas at fractions of timesteps: x = x0 + sigma epsilon.
    Sigmas,
    /// Sigmas at whole timesteps, x scaled to unit variance: the multistep solvers.
    ScaledSigmas,
}

const THRESHOLDING: &[Restricted] = &[("thresholding", &["false"])];
const SIGMAS: &[Restricted] = &[
    ("use_exponential_sigmas", &["null", "false"]),
    ("use_beta_sigmas", &["null", "false"]),
    ("sigma_min", &["null"]),
    ("sigma_max", &["null"]),
];
const SOLVER: &[Restricted] = &[
    ("use_flow_sigmas", &["null", "false"]),
    ("use_dynamic_shifting", &["null", "false"]),
    ("solver_order", &["2"]),
];

/// Keys that matter only where another key is set, which is not supported.
const WITHOUT_EFFECT: [&str; 5] = [
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "tensor_format",
];

/// In the order of the documentation.
static ALGORITHMS: [Algorithm; 9] = [
    Algorithm {
        fixed_stride: true,
        repeats_first: true,
        predicts_x0: false,
        set_alpha_to_one: Some(false),
        rescale_betas_zero_snr: false,
        skip_prk_steps: true,
        ..on_timesteps(Sampler::Pndm, ["pndm", "PLMS", "PNDMScheduler"], pndm::pndm)
    },
    Algorithm {
        fixed_stride: true,
        clip_sample: Some(true),
        set_alpha_to_one: Some(true),
        restricted: &[THRESHOLDING],
        ..on_timesteps(Sampler::Ddim, ["ddim", "DDIM", "DDIMScheduler"], ddpm::ddim)
    },
    Algorithm {
        clip_sample: Some(true),
        restricted: &[
            THRESHOLDING,
            &[("variance_type", &["null", "fixed_small", "fixed_small_log"])],
        ],
        ..on_timesteps(Sampler::Ddpm, ["ddpm", "DDPM", "DDPMScheduler"], ddpm::ddpm)
    },
    Algorithm {
        restricted: &[
            SIGMAS,
            &[("interpolation_type", &["linear"]), ("timestep_type", &["discrete"])],
        ],
        ..on_sigmas(Sampler::Euler, ["euler", "Euler", "EulerDiscreteScheduler"], euler::euler)
    },
    Algorithm {
        predicts_x0: false,
        use_karras_sigmas: false,
        final_sigmas_type: false,
        ..on_sigmas(
            Sampler::EulerAncestral,
            ["euler_a", "Euler a", "EulerAncestralDiscreteScheduler"],
            euler::euler_ancestral,
        )
    },
    Algorithm {
        evaluations: 2,
        betas: (0.00085, 0.012, Betas::Linear),
        clip_sample: Some(false),
        rescale_betas_zero_snr: false,
        final_sigmas_type: false,
        restricted: &[SIGMAS],
        ..on_sigmas(Sampler::Heun, ["heun", "Heun", "HeunDiscreteScheduler"], euler::heun)
    },
    Algorithm {
        schedules: &[SigmaSchedule::Model, SigmaSchedule::Karras],
        automatic: SigmaSchedule::Karras,
        grid: LevelGrid::ScaledSigmas,
        truncates_with_cosine: true,
        // The schedule of the request decides.
        use_karras_sigmas: false,
        restricted: &[
            THRESHOLDING,
            SIGMAS,
            SOLVER,
            &[
                ("use_lu_lambdas", &["null", "false"]),
                ("solver_type", &["midpoint", "logrho", "bh1", "bh2"]),
                ("algorithm_type", &["dpmsolver++", "deis"]),
                ("lambda_min_clipped", &["null"]),
            ],
        ],
        ..on_sigmas(
            Sampler::Dpmpp2m,
            ["dpmpp_2m", "DPM++ 2M", "DPMSolverMultistepScheduler"],
            dpmpp::dpmpp_2m,
        )
    },
    Algorithm {
        grid: LevelGrid::ScaledSigmas,
        lower_order_below: usize::MAX,
        restricted: &[
            THRESHOLDING,
            SIGMAS,
            SOLVER,
            &[
                ("solver_type", &["bh2", "midpoint", "heun", "logrho"]),
                ("predict_x0", &["true"]),
                ("disable_corrector", &["[]"]),
                ("solver_p", &["null"]),
                ("shift_terminal", &["null"]),
            ],
        ],
        ..on_sigmas(Sampler::UniPc, ["unipc", "UniPC", "UniPCMultistepScheduler"], unipc::unipc)
    },
    Algorithm {
        timesteps: Some(lcm::timesteps),
        spacing: Spacing::Linspace,
        betas: (0.00085, 0.012, Betas::ScaledLinear),
        clip_sample: Some(false),
        restricted: &[THRESHOLDING],
        ..on_timesteps(Sampler::Lcm, ["lcm", "LCM", "LCMScheduler"], lcm::lcm)
    },
];

/// What the samplers on timesteps have in common; the names as in [`Algorithm`].
const fn on_timesteps(sampler: Sampler, names: [&'static str; 3], advance: Advance) -> Algorithm {
    let [name, title, class] = names;
    Algorithm {
        sampler,
        name,
        title,
        class,
        advance,
        schedules: &[SigmaSchedule::Model],
        automatic: SigmaSchedule::Model,
        grid: LevelGrid::Timesteps,
        fixed_stride: false,
        repeats_first: false,
        timesteps: None,
        evaluations: 1,
        lower_order_below: 15,
        truncates_with_cosine: false,
        spacing: Spacing::Leading,
        betas: (0.0001, 0.02, Betas::Linear),
        predicts_x0: true,
        clip_sample: None,
        set_alpha_to_one: None,
        rescale_betas_zero_snr: true,
        use_karras_sigmas: false,
        final_sigmas_type: false,
        skip_prk_steps: false,
        restricted: &[],
    }
}

/// What the samplers on sigmas have in common.
const fn on_sigmas(sampler: Sampler, names: [&'static str; 3], advance: Advance) -> Algorithm {
    Algorithm {
        grid: LevelGrid::Sigmas,
        spacing: Spacing::Linspace,
        use_karras_sigmas: true,
        final_sigmas_type: true,
        ..on_timesteps(sampler, names, advance)
    }
}

impl Algorithm {
    /// The supported values of a key, if the class reads it.
    pub(super) fn supported(&self, key: &str) -> Option<&'static [&'static str]> {
        let mut keys = self.restricted.iter().copied().flatten();
        keys.find(|restricted| restricted.0 == key).map(|restricted| restricted.1)
    }

    /// Whether a key has no effect but in the classes of samplers that restrict it.
    pub(super) fn is_known(key: &str) -> bool {
        let restricted = || ALGORITHMS.iter().any(|row| row.supported(key).is_some());
        WITHOUT_EFFECT.contains(&key) || restricted()
    }
}

impl Sampler {
    pub(super) fn algorithm(self) -> &'static Algorithm {
        let row = ALGORITHMS.iter().find(|row| row.sampler == self);
        row.expect("every variant has a row; a test walks them")
    }

    /// The name in requests: `euler_a`.
    pub fn name(self) -> &'static str {
        self.algorithm().name
    }

    /// The schedule that AUTOMATIC1111's "Automatic" stands for.
    pub fn automatic_schedule(self) -> SigmaSchedule {
        self.algorithm().automatic
    }

    /// Whether the sampler runs on a schedule.
    ///
    /// # Errors
    /// [`Error::Spec`] if it does not.
    pub fn check(self, schedule: SigmaSchedule) -> Result<()> {
        if self.algorithm().schedules.contains(&schedule) {
            return Ok(());
        }
        let reason = format!("{schedule} is not available for the sampler {self}");
        Err(Error::Spec { field: "schedule", reason })
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A sampler and its schedule under one name: `dpmpp_2m_karras` is `dpmpp_2m` on Karras' sigmas. A
/// name without an ending is the sampler on the model's own sigmas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SamplerName {
    /// The sampler.
    pub sampler: Sampler,
    /// Its schedule.
    pub schedule: SigmaSchedule,
}

impl SamplerName {
    /// Every sampler with every schedule that it runs on, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        let names = |row: &'static Algorithm| {
            row.schedules.iter().map(|&schedule| Self { sampler: row.sampler, schedule })
        };
        ALGORITHMS.iter().flat_map(names)
    }

    /// All names, separated by commas.
    pub fn list() -> String {
        Self::all().map(|name| name.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// AUTOMATIC1111's label, which infotext uses: `DPM++ 2M Karras`.
    pub fn title(self) -> String {
        let title = self.sampler.algorithm().title;
        match self.schedule {
            SigmaSchedule::Model => title.to_owned(),
            schedule => format!("{title} {}", schedule.title()),
        }
    }

    /// diffusers' class, whose own sigmas are the model's.
    fn class(self) -> Option<&'static str> {
        (self.schedule == SigmaSchedule::Model).then(|| self.sampler.algorithm().class)
    }
}

impl fmt::Display for SamplerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.schedule {
            SigmaSchedule::Model => write!(f, "{}", self.sampler),
            schedule => write!(f, "{}_{schedule}", self.sampler),
        }
    }
}

impl FromStr for SamplerName {
    type Err = String;

    /// The name in requests, AUTOMATIC1111's label or diffusers' class, in any case.
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        let matches = |known: &Self| {
            is(&known.to_string()) || is(&known.title()) || known.class().is_some_and(is)
        };
        Self::all()
            .find(matches)
            .ok_or_else(|| format!("{name:?} is unknown; known are {}", Self::list()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_sampler_finds_it() {
        for named in SamplerName::all() {
            assert_eq!(named.to_string().parse(), Ok(named));
            assert_eq!(named.title().to_uppercase().parse(), Ok(named));
            if let Some(class) = named.class() {
                assert_eq!(class.parse(), Ok(named));
            }
            named.sampler.check(named.schedule).unwrap();
        }
        let karras = SamplerName { sampler: Sampler::Dpmpp2m, schedule: SigmaSchedule::Karras };
        assert_eq!("dpmpp_2m_karras".parse(), Ok(karras));
        assert_eq!(karras.title(), "DPM++ 2M Karras");
        assert!("dpm_fast".parse::<SamplerName>().unwrap_err().contains("euler_a"));
        assert!("".parse::<SamplerName>().is_err());
    }

    #[test]
    fn a_schedule_that_a_sampler_does_not_run_on_is_refused() {
        let error = Sampler::Euler.check(SigmaSchedule::Karras).unwrap_err().to_string();
        assert_eq!(error, "schedule: karras is not available for the sampler euler");
    }
}

//! The samplers, and what is particular to one: the columns of the rows in [`super::table`].

use super::betas::Betas;
use super::schedule::NoiseLevel;
use super::sigmas::SigmaSchedule;
use super::spacing::Spacing;
use super::state::Advance;
use crate::error::Result;

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
    /// The linear multistep method of fourth order.
    Lms,
    /// DPM-Solver-2, two evaluations a step.
    Dpm2,
    /// DPM-Solver-2 with ancestral noise, two evaluations a step.
    Dpm2Ancestral,
    /// DPM-Solver++ of second order, multistep.
    Dpmpp2m,
    /// The same, of Heun's type.
    Dpmpp2mHeun,
    /// DPM-Solver++ of second order, multistep and stochastic.
    Dpmpp2mSde,
    /// The same, of Heun's type.
    Dpmpp2mSdeHeun,
    /// DPM-Solver++ of third order, multistep and stochastic.
    Dpmpp3mSde,
    /// DPM-Solver++ of second order on pairs of steps.
    Dpmpp2s,
    /// DPM-Solver++ of second order with ancestral noise, two evaluations a step.
    Dpmpp2sAncestral,
    /// DPM-Solver++, stochastic, two evaluations a step.
    DpmppSde,
    /// Diffusion exponential integrator sampler of second order.
    Deis,
    /// Unified predictor-corrector of second order, B2.
    UniPc,
    /// The same with B1.
    UniPcBh1,
    /// Unified predictor-corrector of third order, B2.
    UniPc3,
    /// Heun's method that goes back to more noise, two evaluations a step.
    Restart,
    /// Euler's method with CFG++ guidance.
    EulerCfgPp,
    /// DPM-Solver++ of second order, multistep, with CFG++ guidance.
    Dpmpp2mCfgPp,
    /// Denoising diffusion implicit models with CFG++ guidance.
    DdimCfgPp,
    /// Latent consistency models.
    Lcm,
    /// Trajectory consistency distillation.
    Tcd,
}

/// What is particular to one sampler. Defaults are those of diffusers' class; they hold where the
/// scheduler configuration leaves a key out.
pub(super) struct Algorithm {
    pub(super) sampler: Sampler,
    /// The name in requests.
    pub(super) name: &'static str,
    /// AUTOMATIC1111's label, which infotext uses.
    pub(super) title: &'static str,
    /// Other names: AUTOMATIC1111's aliases, ComfyUI's names.
    pub(super) aliases: &'static [&'static str],
    /// diffusers' class.
    pub(super) class: Option<&'static str>,
    /// The keys of the class that tell its samplers apart, with the values of this one. Where the
    /// key is left out, the class's first row holds.
    pub(super) class_keys: &'static [Restricted],
    pub(super) advance: Advance,
    /// The schedule that AUTOMATIC1111's "Automatic" stands for.
    pub(super) automatic: SigmaSchedule,
    pub(super) grid: LevelGrid,
    pub(super) noise: StepNoise,
    /// The default of `eta`; none if the sampler has none.
    pub(super) eta: Option<f64>,
    /// Whether `s_noise` scales its noise.
    pub(super) s_noise: bool,
    /// Whether noise can be added before steps.
    pub(super) churns: bool,
    /// Whether it draws noise whatever its options are.
    pub(super) always_draws: bool,
    /// Whether it needs the unguided output.
    pub(super) needs_unguided: bool,
    /// The share of the guidance scale by which it guides.
    pub(super) guidance_share: f64,
    /// On timesteps: whether a step ends `train / steps` timesteps below its begin, and not at the
    /// next timestep of the run.
    pub(super) fixed_stride: bool,
    /// On timesteps: whether the second evaluation takes the first step again.
    pub(super) repeats_first: bool,
    /// The timesteps, where they are not spaced as the configuration has it.
    pub(super) timesteps: Option<Timesteps>,
    /// On sigmas: the evaluations of a step.
    pub(super) stages: Stages,
    pub(super) orders: Orders,
    /// How timesteps of Karras' sigmas become whole, on scaled sigmas and of `dpm2`.
    pub(super) karras_timesteps: KarrasTimesteps,
    /// None where the class does not read `timestep_spacing`, which is this one.
    pub(super) fixed_spacing: Option<Spacing>,
    /// The default of `timestep_spacing`.
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
    pub(super) use_sigmas: bool,
    pub(super) final_sigmas_type: bool,
    /// Whether the last sigma is the least of the training.
    pub(super) ends_at_least: bool,
    /// Whether `skip_prk_steps` must be true.
    pub(super) skip_prk_steps: bool,
    /// Further keys that the class reads, of which only some values are supported.
    pub(super) restricted: &'static [&'static [Restricted]],
}

/// The timesteps of a run of `steps` steps, out of the first `levels` of a distillation, each of
/// which is `stride` timesteps of the training.
pub(super) type Timesteps = fn(steps: usize, levels: usize, stride: usize) -> Result<Vec<f64>>;

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

/// The evaluations of a step on sigmas. The last step, to sigma 0, has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stages {
    One,
    /// At the begin and at the end.
    Ends,
    /// The same, in runs that go back to more noise.
    Restarting,
    /// At the begin, and in the middle of the way to the level below the end.
    Middle,
    /// At the begin, and in the middle of the way to the end, which is reached with noise.
    NoisyMiddle,
}

/// The order of a multistep solver at the steps of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Orders {
    /// At most so much; in short runs, and to sigma 0, less at the end.
    Multistep(usize),
    /// At most so much, and at most the number of steps that are left.
    Falling(usize),
    /// 1 and 2 in turn.
    Pairs,
}

/// How timesteps of Karras' sigmas become whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KarrasTimesteps {
    Fractions,
    Rounded,
    /// Rounded, but truncated with cosine betas.
    TruncatedWithCosine,
}

/// How far below its end a step goes before noise takes it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StepNoise {
    None,
    /// k-diffusion's `get_ancestral_step`.
    Ancestral,
    /// Lu et al. 2022, appendix B: the noise of a stochastic differential equation.
    Sde,
    /// Song et al. 2021, equation 16.
    Ddim,
    /// Zheng et al. 2024: to the timestep that is the share 1 - gamma of the next.
    Tcd,
}

impl StepNoise {
    /// The level below the end of a step; that of TCD is found in its timesteps.
    pub(super) fn below(self, eta: f64, from: NoiseLevel, to: NoiseLevel) -> NoiseLevel {
        let sigma = match self {
            _ if to.sigma == 0.0 || eta == 0.0 => return to,
            Self::None | Self::Tcd => return to,
            Self::Ancestral => {
                let up = eta * to.sigma * (1.0 - (to.sigma / from.sigma).powi(2)).max(0.0).sqrt();
                (to.sigma.powi(2) - up.min(to.sigma).powi(2)).sqrt()
            }
            Self::Sde => to.sigma * (eta * (from.lambda() - to.lambda())).exp(),
            Self::Ddim => {
                let renewed = 1.0 - (from.alpha / to.alpha).powi(2);
                let up = eta * to.sigma / from.sigma * renewed.max(0.0).sqrt();
                (to.sigma.powi(2) - up.powi(2)).max(0.0).sqrt()
            }
        };
        NoiseLevel { alpha: to.alpha, sigma }
    }
}

impl Algorithm {
    /// The supported values of a key, if the class reads it.
    pub(super) fn supported(&self, key: &str) -> Option<&'static [&'static str]> {
        let mut keys = self.restricted.iter().copied().flatten();
        keys.find(|restricted| restricted.0 == key).map(|restricted| restricted.1)
    }
}

//! From a run, as a request asks for it, and a model's scheduler configuration to the state before
//! it: the timesteps and noise levels of every evaluation, as diffusers' class of the sampler has
//! them.
//!
//! In f64, but for the betas and sigmas, which are rounded to f32 where diffusers rounds them.

use std::sync::Arc;

use super::ahead::Ahead;
use super::algorithm::{Algorithm, KarrasTimesteps, LevelGrid, Sampler, Stages, StepNoise};
use super::betas::Betas;
use super::config::SchedulerConfig;
use super::options::SamplerOptions;
use super::restart;
use super::schedule::{Evaluation, NoiseLevel, Schedule, Step, Way};
use super::sigmas::{Levels, SigmaSchedule, interpolate, timestep_of};
use super::spacing::Spacing;
use super::state::SamplerState;
use crate::error::{Error, Result};

/// A run of a sampler.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// The sampler.
    pub sampler: Sampler,
    /// Its schedule.
    pub schedule: SigmaSchedule,
    /// Its random part.
    pub options: SamplerOptions,
    /// Steps of the whole run.
    pub steps: usize,
    /// How many of them are left out at the begin, because the latents begin as an image.
    pub skipped: usize,
    /// Of the samplers of distilled models: the share of the distillation's timesteps among which
    /// those of the run are, diffusers' `LCMScheduler.set_timesteps(strength=...)`. 1 is all.
    pub share: f64,
    /// Whether the model is Stable Diffusion XL, which has steps of its own in `align_your_steps`.
    pub is_xl: bool,
    /// The part of the training's timesteps in which the run is.
    pub span: Span,
}

/// A part of the training's timesteps, as shares from the last one down; the whole where there is
/// none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Span {
    /// Where it begins: diffusers' `denoising_start`. Then no steps are left out but these.
    pub start: Option<f64>,
    /// Where it ends: diffusers' `denoising_end`.
    pub end: Option<f64>,
}

impl Span {
    /// The timestep at a share of `train`, as diffusers rounds it.
    fn cutoff(share: f64, train: usize) -> f64 {
        let train = train as f64;
        (train - share * train).round_ties_even()
    }
}

impl SamplerState {
    /// The state before a run.
    ///
    /// # Errors
    /// [`Error::Spec`] if the sampler does not run on the schedule or in so many steps;
    /// [`Error::Config`] if the configuration asks the sampler for what is not supported.
    pub fn new(config: &SchedulerConfig, run: Run) -> Result<Self> {
        let Run { sampler, schedule, options, steps, skipped, share, is_xl, span } = run;
        sampler.check(schedule)?;
        let row = sampler.algorithm();
        config.check(row)?;
        let alphas_cumprod = config.alphas_cumprod(row)?;
        if steps == 0 || steps > alphas_cumprod.len() {
            return Err(out_of_range(format!("must be 1 to {}", alphas_cumprod.len())));
        }
        let schedule = config.schedule(row, schedule);
        let spacing = match schedule.levels(is_xl) {
            Levels::Trailing => Spacing::Trailing,
            _ => config.spacing(row)?,
        };
        let eta = options.eta.or(row.eta).unwrap_or(0.0);
        let mut plan = Plan {
            row,
            schedule,
            options,
            eta,
            config,
            steps,
            skipped,
            share,
            is_xl,
            spacing,
            alphas_cumprod,
        };
        if let Some(start) = span.start {
            plan.skipped = 0;
            plan.skipped = plan.before(start, &plan.table()?)?;
        }
        let mut schedule = plan.table()?;
        if let Some(end) = span.end {
            schedule.end = plan.end(end, &schedule);
        }
        Ok(Self {
            advance: row.advance,
            position: schedule.skipped,
            end: schedule.end,
            schedule: Arc::new(schedule),
            denoiser: config.denoiser(row)?,
            timestep_scaling: config.timestep_scaling.unwrap_or(10.0),
            s_noise: options.s_noise.filter(|_| row.s_noise || row.churns).unwrap_or(1.0),
            history: Vec::new(),
            anchor: None,
            ahead: Ahead::default(),
        })
    }
}

/// What the table of a run is made from.
struct Plan<'a> {
    row: &'static Algorithm,
    schedule: SigmaSchedule,
    options: SamplerOptions,
    eta: f64,
    config: &'a SchedulerConfig,
    steps: usize,
    skipped: usize,
    share: f64,
    is_xl: bool,
    spacing: Spacing,
    /// The product of the alphas up to each timestep of the training.
    alphas_cumprod: Vec<f32>,
}

impl Plan<'_> {
    fn table(&self) -> Result<Schedule> {
        match self.row.grid {
            LevelGrid::Timesteps => self.on_timesteps(),
            LevelGrid::Sigmas => self.on_sigmas(false),
            LevelGrid::ScaledSigmas => self.on_sigmas(true),
        }
    }

    /// The steps before a share of the timesteps, of a whole run: diffusers' `get_timesteps`. A step of
    /// two evaluations is taken whole.
    fn before(&self, share: f64, whole: &Schedule) -> Result<usize> {
        let cutoff = Span::cutoff(share, self.alphas_cumprod.len());
        let stages = if self.row.stages == Stages::One { 1 } else { 2 };
        let below = whole.steps.iter().filter(|step| step.evaluation.timestep < cutoff).count();
        if below == 0 {
            let reason = format!("of {share} is after the last of {} steps", self.steps);
            return Err(Error::Spec { field: "denoising_start", reason });
        }
        if self.row.stages == Stages::Restarting {
            // It goes back to more noise only further below.
            let first = whole.steps.iter().position(|step| step.evaluation.timestep < cutoff);
            return Ok(first.unwrap_or_default() / stages);
        }
        // The last step has one evaluation.
        let taken = if stages == 2 && below % 2 == 0 { below + 1 } else { below };
        Ok(whole.steps.len().saturating_sub(taken) / stages)
    }

    /// The index of the first step of a run that is below a share of the timesteps, which may be that
    /// with which it begins.
    fn end(&self, share: f64, schedule: &Schedule) -> usize {
        let cutoff = Span::cutoff(share, self.alphas_cumprod.len());
        let steps = &schedule.steps[schedule.skipped..];
        let taken = steps.iter().position(|step| step.evaluation.timestep < cutoff);
        schedule.skipped + taken.unwrap_or(steps.len())
    }

    /// The table of a sampler on timesteps; a timestep below 0 is after the last.
    fn on_timesteps(&self) -> Result<Schedule> {
        let train = self.alphas_cumprod.len();
        let (_, distilled) = self.config.most_steps();
        let times = match self.row.timesteps {
            Some(timesteps) => {
                timesteps(self.steps, share_of(distilled, self.share), train / distilled)?
            }
            None => self.timesteps(self.steps),
        };
        let mut times: Vec<i64> = times.into_iter().map(|t| t.round_ties_even() as i64).collect();
        if let (true, Some(&second)) = (self.row.repeats_first, times.get(1)) {
            times.insert(1, second);
        }
        times.drain(..self.skipped.min(times.len()));
        let to_one = self.config.alpha_to_one(self.row);
        let end = NoiseLevel::of_product(if to_one { 1.0 } else { self.alphas_cumprod[0] });
        let level = |t: i64| match usize::try_from(t) {
            Err(_) => Ok(end),
            Ok(t) => {
                self.alphas_cumprod.get(t).copied().map(NoiseLevel::of_product).ok_or_else(|| {
                    out_of_range(format!("{} would begin past the last timestep", self.steps))
                })
            }
        };
        let stride = (train / self.steps) as i64;
        let is_tcd = self.row.noise == StepNoise::Tcd;
        let last = if is_tcd { 0 } else { -1 };
        let mut steps = Vec::with_capacity(self.steps + 1);
        for (i, &t) in times.iter().enumerate() {
            let (from, to) = match self.row.fixed_stride {
                // The first step again, now that there is a slope at its end.
                true if self.row.repeats_first && i == 1 => (t + stride, t),
                true => (t, t - stride),
                false => (t, times.get(i + 1).copied().unwrap_or(last)),
            };
            let evaluation = Evaluation { timestep: t as f64, input_scale: 1.0 };
            let below = ((1.0 - self.eta) * to as f64).floor() as i64;
            let (at, from, to) = (level(t)?, level(from)?, level(to)?);
            let below =
                if is_tcd { level(below)? } else { self.row.noise.below(self.eta, from, to) };
            steps.push(Step { evaluation, at, from, to, below, raised_by: None, order: 1 });
        }
        Ok(Schedule { end: steps.len(), steps, skipped: 0, init_noise_sigma: 1.0 })
    }

    /// The table of a sampler on sigmas, with x scaled to unit variance or not.
    fn on_sigmas(&self, scaled: bool) -> Result<Schedule> {
        let table: Vec<f64> =
            self.alphas_cumprod.iter().map(|a| f64::from(((1.0 - a) / a).sqrt())).collect();
        let (mut times, mut sigmas) = self.levels(scaled, &table)?;
        sigmas.iter_mut().for_each(|sigma| *sigma = f64::from(*sigma as f32));
        let first = NoiseLevel::of_sigma(sigmas[0], scaled);
        let last = sigmas[sigmas.len() - 1];
        times.push(if last > 0.0 { timestep_of(&table, last) } else { 0.0 });
        let restarts = self.row.stages == Stages::Restarting;
        let ways: Vec<Way> = match restarts {
            true => restart::ways(&sigmas[self.skipped.min(sigmas.len() - 2)..], &table),
            false => times
                .windows(2)
                .zip(sigmas.windows(2))
                .map(|(times, sigmas)| Way {
                    times: [times[0], times[1]],
                    sigmas: [sigmas[0], sigmas[1]],
                    raised_by: None,
                })
                .collect(),
        };
        let skipped = if restarts { 0 } else { self.skipped };
        // diffusers lowers the order at the end of short runs, k-diffusion does not.
        const SHORT: usize = 15;
        let of_training = matches!(self.schedule.levels(self.is_xl), Levels::Training(_));
        let short = ways.len() < SHORT && !of_training;
        let mut table_of_run = Vec::with_capacity(2 * ways.len());
        let mut skipped_steps = 0;
        for (i, way) in ways.iter().enumerate() {
            if i == skipped {
                skipped_steps = table_of_run.len();
            }
            let order = self.config.order(self.row, (i, ways.len()), last == 0.0, short);
            let way = self.churned(*way, ways.len() - skipped);
            self.push(&mut table_of_run, way, scaled, order, &table);
        }
        let init_noise_sigma = match self.spacing {
            _ if scaled => 1.0,
            Spacing::Leading => first.norm(),
            Spacing::Trailing | Spacing::Linspace => first.sigma,
        };
        let (end, steps) = (table_of_run.len(), table_of_run);
        Ok(Schedule { steps, skipped: skipped_steps, end, init_noise_sigma })
    }

    /// A way in a run of `steps` steps, from the sigma to which added noise takes its begin.
    fn churned(&self, way: Way, steps: usize) -> Way {
        let churn = self.options.churn;
        if !self.row.churns || churn.amount <= 0.0 {
            return way;
        }
        let growth = churn.growth(way.sigmas[0], steps);
        let sigma = way.sigmas[0] * (1.0 + growth);
        let added = (sigma.powi(2) - way.sigmas[0].powi(2)).sqrt();
        Way { sigmas: [sigma, way.sigmas[1]], raised_by: Some(added), ..way }
    }

    /// Adds the evaluations of a way.
    fn push(&self, steps: &mut Vec<Step>, way: Way, scaled: bool, order: usize, table: &[f64]) {
        let level = |sigma: f64| NoiseLevel::of_sigma(sigma, scaled);
        let [from, to] = way.sigmas.map(level);
        let timestep = match way.raised_by {
            Some(_) => timestep_of(table, from.sigma),
            None => way.times[0],
        };
        let evaluation = |timestep: f64, at: NoiseLevel| Evaluation {
            timestep: f64::from(timestep as f32),
            input_scale: if scaled { 1.0 } else { 1.0 / at.norm() },
        };
        let below = self.row.noise.below(self.eta, from, to);
        let raised_by = way.raised_by;
        let whole = Step {
            evaluation: evaluation(timestep, from),
            at: from,
            from,
            to,
            below,
            raised_by,
            order,
        };
        let second = |timestep: f64, at: NoiseLevel| Step {
            evaluation: evaluation(timestep, at),
            at,
            raised_by: None,
            ..whole
        };
        match self.row.stages {
            _ if to.sigma == 0.0 => steps.push(whole),
            Stages::One => steps.push(whole),
            Stages::Ends | Stages::Restarting => {
                steps.extend([whole, second(way.times[1], to)]);
            }
            stages @ (Stages::Middle | Stages::NoisyMiddle) => {
                let noisy = stages == Stages::NoisyMiddle;
                let end = if noisy { to } else { below };
                let middle = level(middle(from.sigma, end.sigma));
                let below =
                    if noisy { self.row.noise.below(self.eta, from, middle) } else { middle };
                let second = second(timestep_of(table, middle.sigma), middle);
                steps.extend([Step { to: middle, below, ..whole }, second]);
            }
        }
    }

    /// The timesteps, which may be fractions, and the sigmas, of which there is one more: the end.
    fn levels(&self, scaled: bool, table: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
        let (least, most) = (table[0], table[table.len() - 1]);
        let times_of = |sigmas: &[f64]| -> Vec<f64> {
            sigmas.iter().map(|&sigma| timestep_of(table, sigma)).collect()
        };
        let (times, mut sigmas) = match self.schedule.levels(self.is_xl) {
            Levels::Training(levels) => {
                let mut sigmas = levels(table, self.steps);
                let end = sigmas.pop().unwrap_or_default();
                let times = times_of(&sigmas);
                sigmas.push(if self.row.ends_at_least { end.max(least) } else { end });
                return Ok((times, sigmas));
            }
            Levels::Between(levels) => {
                let ends = match scaled {
                    true => [most, least],
                    false => {
                        let times = self.timesteps(self.steps);
                        [times[0], times[times.len() - 1]].map(|t| interpolate(table, t))
                    }
                };
                let sigmas = levels(ends[0], ends[1], self.steps);
                let mut times = times_of(&sigmas);
                let whole = self.whole(scaled)?;
                times.iter_mut().for_each(|t| *t = whole(*t));
                (times, sigmas)
            }
            Levels::Timesteps | Levels::Trailing if scaled => {
                let times = self.whole_timesteps()?;
                let sigmas = times.iter().map(|&t| interpolate(table, t)).collect();
                (times, sigmas)
            }
            Levels::Timesteps | Levels::Trailing => {
                let times = self.timesteps(self.steps);
                let sigmas = times.iter().map(|&t| interpolate(table, t)).collect();
                (times, sigmas)
            }
        };
        sigmas.push(if self.config.ends_at_zero(self.row)? { 0.0 } else { least });
        Ok((times, sigmas))
    }

    /// How the timesteps of diffusers' sigmas become whole.
    fn whole(&self, scaled: bool) -> Result<fn(f64) -> f64> {
        let is_cosine = self.config.beta_schedule(self.row)? == Betas::Cosine;
        Ok(match (self.schedule, self.row.karras_timesteps) {
            (SigmaSchedule::Karras, KarrasTimesteps::Rounded) => f64::round_ties_even,
            (SigmaSchedule::Karras, KarrasTimesteps::TruncatedWithCosine) if !is_cosine => {
                f64::round_ties_even
            }
            _ if scaled => f64::trunc,
            _ => |t| t,
        })
    }

    /// The timesteps of the multistep solvers: whole, from a division into one step more, whose end
    /// the last sigma replaces.
    fn whole_timesteps(&self) -> Result<Vec<f64>> {
        let extra = usize::from(self.spacing != Spacing::Trailing);
        let mut times = self.timesteps(self.steps + extra);
        times.truncate(self.steps);
        times.iter_mut().for_each(|t| *t = t.round_ties_even());
        if times.windows(2).any(|pair| pair[0] <= pair[1]) {
            return Err(out_of_range(format!("{} are too many for whole timesteps", self.steps)));
        }
        Ok(times)
    }

    fn timesteps(&self, n: usize) -> Vec<f64> {
        let offset = self.config.steps_offset.unwrap_or(0);
        self.spacing.timesteps(n, self.alphas_cumprod.len(), offset)
    }
}

/// So many of `steps` steps as a share of them is: the int() of diffusers.
pub(crate) fn share_of(steps: usize, share: f64) -> usize {
    (steps as f64 * share) as usize
}

/// The middle of two sigmas in their logarithms, in f32 as in k-diffusion: what noise a Brownian
/// motion has there depends on its last digit.
fn middle(from: f64, to: f64) -> f64 {
    let (from, to) = ((from as f32).ln(), (to as f32).ln());
    f64::from((from + 0.5 * (to - from)).exp())
}

fn out_of_range(reason: String) -> Error {
    Error::Spec { field: "steps", reason }
}

//! From a sampler, a schedule and a model's scheduler configuration to the state of a run: the
//! timesteps and noise levels of every evaluation, as diffusers' class of the sampler has them.
//!
//! In f64, but for the betas and sigmas, which are rounded to f32 where diffusers rounds them.

use std::sync::Arc;

use super::algorithm::{Algorithm, LevelGrid, Sampler};
use super::betas::Betas;
use super::config::SchedulerConfig;
use super::schedule::{Evaluation, NoiseLevel, Schedule, Step};
use super::sigmas::{SigmaSchedule, interpolate, timestep_of};
use super::spacing::Spacing;
use super::state::SamplerState;
use crate::error::{Error, Result};

impl SamplerState {
    /// The state before a run of `steps` steps of which the first `skipped` are left out.
    ///
    /// # Errors
    /// [`Error::Spec`] if the sampler does not run on the schedule or in so many steps;
    /// [`Error::Config`] if the configuration asks the sampler for what is not supported.
    pub fn new(
        sampler: Sampler,
        schedule: SigmaSchedule,
        config: &SchedulerConfig,
        steps: usize,
        skipped: usize,
    ) -> Result<Self> {
        sampler.check(schedule)?;
        let row = sampler.algorithm();
        config.check(row)?;
        let alphas_cumprod = config.alphas_cumprod(row)?;
        if steps == 0 || steps > alphas_cumprod.len() {
            return Err(out_of_range(format!("must be 1 to {}", alphas_cumprod.len())));
        }
        let schedule = config.schedule(row, schedule);
        let spacing = config.spacing(row)?;
        let plan = Plan { row, schedule, config, steps, skipped, spacing, alphas_cumprod };
        let schedule = match row.grid {
            LevelGrid::Timesteps => plan.on_timesteps()?,
            LevelGrid::Sigmas => plan.on_sigmas(false)?,
            LevelGrid::ScaledSigmas => plan.on_sigmas(true)?,
        };
        Ok(Self {
            advance: row.advance,
            schedule: Arc::new(schedule),
            denoiser: config.denoiser(row)?,
            timestep_scaling: config.timestep_scaling.unwrap_or(10.0),
            completed: 0,
            history: Vec::new(),
            anchor: None,
        })
    }
}

/// What the table of a run is made from.
struct Plan<'a> {
    row: &'static Algorithm,
    schedule: SigmaSchedule,
    config: &'a SchedulerConfig,
    steps: usize,
    skipped: usize,
    spacing: Spacing,
    /// The product of the alphas up to each timestep of the training.
    alphas_cumprod: Vec<f32>,
}

impl Plan<'_> {
    /// The table of a sampler on timesteps; a timestep below 0 is after the last.
    fn on_timesteps(&self) -> Result<Schedule> {
        let train = self.alphas_cumprod.len();
        let original = self.config.original_inference_steps.unwrap_or(50);
        let times = match self.row.timesteps {
            Some(timesteps) => timesteps(self.steps, original, train)?,
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
        let mut steps = Vec::with_capacity(self.steps + 1);
        for (i, &t) in times.iter().enumerate() {
            let (from, to) = match self.row.fixed_stride {
                // The first step again, now that there is a slope at its end.
                true if self.row.repeats_first && i == 1 => (t + stride, t),
                true => (t, t - stride),
                false => (t, times.get(i + 1).copied().unwrap_or(-1)),
            };
            let evaluation = Evaluation { timestep: t as f64, input_scale: 1.0 };
            let (at, from, to) = (level(t)?, level(from)?, level(to)?);
            steps.push(Step { evaluation, at, from, to, order: 1 });
        }
        Ok(Schedule { steps, init_noise_sigma: 1.0 })
    }

    /// The table of a sampler on sigmas, with x scaled to unit variance or not.
    fn on_sigmas(&self, scaled: bool) -> Result<Schedule> {
        let table: Vec<f64> =
            self.alphas_cumprod.iter().map(|a| f64::from(((1.0 - a) / a).sqrt())).collect();
        let (times, mut sigmas) =
            if scaled { self.solver_sigmas(&table)? } else { self.sigmas(&table) };
        let zero = self.config.ends_at_zero(self.row)?;
        sigmas.push(if zero { 0.0 } else { table[0] });
        let level = |&sigma: &f64| NoiseLevel::of_sigma(f64::from(sigma as f32), scaled);
        let levels: Vec<NoiseLevel> = sigmas.iter().map(level).collect();
        let first_order_last = self.config.ends_in_first_order(self.row, self.steps)?;
        let mut steps = Vec::with_capacity(self.row.evaluations * self.steps);
        for (i, (&t, ends)) in times.iter().zip(levels.windows(2)).enumerate() {
            let (from, to) = (ends[0], ends[1]);
            let input_scale = if scaled { 1.0 } else { 1.0 / from.norm() };
            let evaluation = Evaluation { timestep: f64::from(t as f32), input_scale };
            if self.row.evaluations == 2 && i > 0 {
                // The slope at the end of the step before.
                steps.push(Step { evaluation, at: from, from, to: from, order: 1 });
            }
            let order = if first_order_last && i + 1 == self.steps { 1 } else { 2 };
            steps.push(Step { evaluation, at: from, from, to, order });
        }
        steps.drain(..(self.skipped * self.row.evaluations).min(steps.len()));
        let init_noise_sigma = match self.spacing {
            _ if scaled => 1.0,
            Spacing::Leading => levels[0].norm(),
            Spacing::Trailing | Spacing::Linspace => levels[0].sigma,
        };
        Ok(Schedule { steps, init_noise_sigma })
    }

    /// Timesteps, which may be fractions, and sigmas, between the first and the last timestep.
    fn sigmas(&self, table: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let times = self.timesteps(self.steps);
        let sigmas: Vec<f64> = times.iter().map(|&t| interpolate(table, t)).collect();
        let Some(between) = self.schedule.sigmas() else { return (times, sigmas) };
        let sigmas = between(sigmas[0], sigmas[sigmas.len() - 1], self.steps);
        (sigmas.iter().map(|&sigma| timestep_of(table, sigma)).collect(), sigmas)
    }

    /// Timesteps and sigmas of the multistep solvers: whole timesteps, from a division into one
    /// step more, whose end the last sigma replaces.
    fn solver_sigmas(&self, table: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
        if let Some(between) = self.schedule.sigmas() {
            let sigmas = between(table[table.len() - 1], table[0], self.steps);
            let cosine = self.config.beta_schedule(self.row)? == Betas::Cosine;
            let truncates = cosine && self.row.truncates_with_cosine;
            let whole = |t: f64| if truncates { t.trunc() } else { t.round_ties_even() };
            let times = sigmas.iter().map(|&sigma| whole(timestep_of(table, sigma))).collect();
            return Ok((times, sigmas));
        }
        let extra = usize::from(self.spacing != Spacing::Trailing);
        let mut times = self.timesteps(self.steps + extra);
        times.truncate(self.steps);
        times.iter_mut().for_each(|t| *t = t.round_ties_even());
        if times.windows(2).any(|pair| pair[0] <= pair[1]) {
            return Err(out_of_range(format!("{} are too many for whole timesteps", self.steps)));
        }
        let sigmas = times.iter().map(|&t| interpolate(table, t)).collect();
        Ok((times, sigmas))
    }

    fn timesteps(&self, n: usize) -> Vec<f64> {
        let offset = self.config.steps_offset.unwrap_or(0);
        self.spacing.timesteps(n, self.alphas_cumprod.len(), offset)
    }
}

fn out_of_range(reason: String) -> Error {
    Error::Spec { field: "steps", reason }
}

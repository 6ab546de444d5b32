//! The table of one run: for every evaluation of the UNet its timestep and the noise levels that
//! it leads between. Scalars only; what is done with a level is [`crate::sampler`]'s, what an
//! output means is [`crate::denoiser`]'s.
//!
//! In f64, but for the betas and sigmas, which are rounded to f32 where diffusers rounds them.

mod betas;
mod config;

use self::betas::alphas_cumprod;
pub use self::config::SchedulerConfig;
pub(crate) use self::config::choose;
use self::config::{Betas, Spacing};
use crate::error::{Error, Result};
use crate::spec::Scheduler::{
    self, Ddim, Ddpm, Dpmpp2m, Dpmpp2mKarras, Euler, EulerAncestral, Heun, Lcm, Pndm, UniPc,
};

/// A noise level: x = alpha x0 + sigma epsilon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Level {
    pub(crate) alpha: f64,
    pub(crate) sigma: f64,
}

impl Level {
    /// Of unit variance, from the product of the alphas (Ho et al. 2020, equation 4).
    fn of_product(bar: f32) -> Self {
        let bar = f64::from(bar);
        Self { alpha: bar.sqrt(), sigma: (1.0 - bar).sqrt() }
    }

    /// From a sigma of Karras et al. 2022: with x0 as it is, or scaled to unit variance.
    fn of_sigma(sigma: f64, unit_variance: bool) -> Self {
        let alpha = if unit_variance { 1.0 / sigma.hypot(1.0) } else { 1.0 };
        Self { alpha, sigma: sigma * alpha }
    }

    /// Standard deviation of x when that of x0 is 1.
    pub(crate) fn norm(self) -> f64 {
        self.alpha.hypot(self.sigma)
    }

    /// Half the logarithm of the signal-to-noise ratio; infinite where sigma is 0.
    pub(crate) fn lambda(self) -> f64 {
        (self.alpha / self.sigma).ln()
    }
}

/// What the UNet is asked: `unet(latents * input_scale, timestep)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// The timestep; a fraction for some samplers.
    pub timestep: f64,
    /// What brings the latents to unit variance.
    pub input_scale: f64,
}

/// One evaluation and where it leads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    pub(crate) evaluation: Evaluation,
    pub(crate) from: Level,
    pub(crate) to: Level,
    /// The highest order that a multistep solver may take here.
    pub(crate) order: usize,
}

/// The table of one run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Schedule {
    pub(crate) steps: Vec<Step>,
    pub(crate) init_noise_sigma: f64,
}

impl Schedule {
    /// The table of a sampler that goes from noise to a picture in `steps` steps, without the
    /// first `skipped` of them.
    pub(crate) fn new(
        scheduler: Scheduler,
        config: &SchedulerConfig,
        steps: usize,
        skipped: usize,
    ) -> Result<Self> {
        config.check(scheduler)?;
        let bars = alphas_cumprod(scheduler, config)?;
        if steps == 0 || steps > bars.len() {
            return Err(out_of_range(format!("must be 1 to {}", bars.len())));
        }
        let spacing = config.spacing(scheduler)?;
        let run = Run { scheduler, config, steps, skipped, spacing, bars };
        match scheduler {
            Pndm | Ddim | Ddpm | Lcm => run.on_timesteps(),
            Euler | EulerAncestral | Heun => run.on_sigmas(false),
            Dpmpp2m | Dpmpp2mKarras | UniPc => run.on_sigmas(true),
        }
    }
}

/// What a table is made from.
struct Run<'a> {
    scheduler: Scheduler,
    config: &'a SchedulerConfig,
    steps: usize,
    skipped: usize,
    spacing: Spacing,
    /// The product of the alphas up to each timestep of the training.
    bars: Vec<f32>,
}

impl Run<'_> {
    /// The samplers that count in timesteps of the training; below 0 is behind the last.
    fn on_timesteps(&self) -> Result<Schedule> {
        let times = match self.scheduler {
            Lcm => self.lcm_timesteps()?,
            _ => self.timesteps(self.steps),
        };
        let mut times: Vec<i64> = times.into_iter().map(|t| t.round_ties_even() as i64).collect();
        if let (Pndm, Some(&second)) = (self.scheduler, times.get(1)) {
            times.insert(1, second);
        }
        times.drain(..self.skipped.min(times.len()));
        let to_one = self.config.alpha_to_one(self.scheduler);
        let end = Level::of_product(if to_one { 1.0 } else { self.bars[0] });
        let level = |t: i64| match usize::try_from(t) {
            Err(_) => Ok(end),
            Ok(t) => self.bars.get(t).copied().map(Level::of_product).ok_or_else(|| {
                out_of_range(format!("{} would begin past the last timestep", self.steps))
            }),
        };
        let stride = (self.bars.len() / self.steps) as i64;
        let mut steps = Vec::with_capacity(self.steps + 1);
        for (i, &t) in times.iter().enumerate() {
            let evaluation = Evaluation { timestep: t as f64, input_scale: 1.0 };
            let mut push = |from, to| -> Result<()> {
                steps.push(Step { evaluation, from: level(from)?, to: level(to)?, order: 1 });
                Ok(())
            };
            match self.scheduler {
                // The first step again, now that there is a slope at its end.
                Pndm if i == 1 => push(t + stride, t)?,
                Pndm | Ddim => push(t, t - stride)?,
                _ => push(t, times.get(i + 1).copied().unwrap_or(-1))?,
            }
        }
        Ok(Schedule { steps, init_noise_sigma: 1.0 })
    }

    /// The samplers that count in sigmas. The solvers keep x at unit variance.
    fn on_sigmas(&self, solver: bool) -> Result<Schedule> {
        let table: Vec<f64> =
            self.bars.iter().map(|bar| f64::from(((1.0 - bar) / bar).sqrt())).collect();
        let (times, mut sigmas) =
            if solver { self.solver_sigmas(&table)? } else { self.sigmas(&table) };
        let zero = self.config.ends_at_zero(self.scheduler)?;
        sigmas.push(if zero { 0.0 } else { table[0] });
        let level = |&sigma: &f64| Level::of_sigma(f64::from(sigma as f32), solver);
        let levels: Vec<Level> = sigmas.iter().map(level).collect();
        let last_order = self.config.ends_in_first_order(self.scheduler, self.steps)?;
        let mut steps = Vec::with_capacity(2 * self.steps);
        for (i, (&t, ends)) in times.iter().zip(levels.windows(2)).enumerate() {
            let (from, to) = (ends[0], ends[1]);
            let input_scale = if solver { 1.0 } else { 1.0 / from.norm() };
            let evaluation = Evaluation { timestep: f64::from(t as f32), input_scale };
            if self.scheduler == Heun && i > 0 {
                // The slope at the end of the step before.
                steps.push(Step { evaluation, from, to: from, order: 1 });
            }
            let order = if last_order && i + 1 == self.steps { 1 } else { 2 };
            steps.push(Step { evaluation, from, to, order });
        }
        steps.drain(..(self.skipped * if self.scheduler == Heun { 2 } else { 1 }).min(steps.len()));
        let init_noise_sigma = match self.spacing {
            _ if solver => 1.0,
            Spacing::Leading => levels[0].norm(),
            Spacing::Trailing | Spacing::Linspace => levels[0].sigma,
        };
        Ok(Schedule { steps, init_noise_sigma })
    }

    /// Timesteps and sigmas of Euler's and Heun's methods: fractions.
    fn sigmas(&self, table: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let times = self.timesteps(self.steps);
        let sigmas: Vec<f64> = times.iter().map(|&t| interpolate(table, t)).collect();
        if !self.config.karras(self.scheduler) {
            return (times, sigmas);
        }
        let sigmas = karras(sigmas[0], sigmas[sigmas.len() - 1], self.steps);
        (sigmas.iter().map(|&sigma| timestep_of(table, sigma)).collect(), sigmas)
    }

    /// Timesteps and sigmas of the multistep solvers: whole timesteps, from a division into one
    /// step more, whose end the last sigma replaces.
    fn solver_sigmas(&self, table: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
        if self.config.karras(self.scheduler) {
            let sigmas = karras(table[table.len() - 1], table[0], self.steps);
            let cosine = self.config.betas(self.scheduler)?.2 == Betas::Cosine;
            let cut = cosine && self.scheduler != UniPc;
            let whole = |t: f64| if cut { t.trunc() } else { t.round_ties_even() };
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

    /// `n` timesteps, descending, not rounded (Lin et al. 2024, table 2).
    fn timesteps(&self, n: usize) -> Vec<f64> {
        let (train, parts) = (self.bars.len() as f64, n as f64);
        let offset = f64::from(self.config.steps_offset.unwrap_or(0));
        // numpy.arange takes the difference of its first two values.
        let difference = (train - train / parts) - train;
        let at = |i: usize| match self.spacing {
            Spacing::Linspace => (n - 1 - i) as f64 * ((train - 1.0) / (parts - 1.0).max(1.0)),
            Spacing::Leading => (n - 1 - i) as f64 * (train / parts).floor() + offset,
            Spacing::Trailing => (train + i as f64 * difference).round_ties_even() - 1.0,
        };
        (0..n).map(at).collect()
    }

    /// Evenly among the timesteps of the distillation (Luo et al. 2023, section 4.3).
    fn lcm_timesteps(&self) -> Result<Vec<f64>> {
        let (train, steps) = (self.bars.len(), self.steps);
        let original = self.config.original_inference_steps.unwrap_or(50).min(train);
        if steps > original {
            return Err(out_of_range(format!("must be 1 to {original} with lcm")));
        }
        let index = |i: usize| original - (i as f64 * (original as f64 / steps as f64)) as usize;
        Ok((0..steps).map(|i| (index(i) * (train / original) - 1) as f64).collect())
    }
}

/// `numpy.interp` in a table over 0, 1, 2, ...
fn interpolate(table: &[f64], at: f64) -> f64 {
    let low = (at.max(0.0) as usize).min(table.len() - 1);
    let high = (low + 1).min(table.len() - 1);
    table[low] + (table[high] - table[low]) * (at - low as f64).clamp(0.0, 1.0)
}

/// The inverse of [`interpolate`], along the logarithms of ascending sigmas.
fn timestep_of(table: &[f64], sigma: f64) -> f64 {
    let log = |sigma: f64| f64::from(sigma.ln() as f32);
    let below = table.iter().filter(|&&s| log(s) <= sigma.ln()).count();
    let low = below.saturating_sub(1).min(table.len().saturating_sub(2));
    let (from, to) = (log(table[low]), log(table[(low + 1).min(table.len() - 1)]));
    low as f64 + ((sigma.ln() - from) / (to - from)).clamp(0.0, 1.0)
}

/// Descending sigmas (Karras et al. 2022, equation 5, rho = 7).
fn karras(max: f64, min: f64, n: usize) -> Vec<f64> {
    let (max, min) = (max.powf(1.0 / 7.0), min.powf(1.0 / 7.0));
    let ramp = |i: usize| i as f64 / (n.max(2) - 1) as f64;
    (0..n).map(|i| (max + ramp(i) * (min - max)).powi(7)).collect()
}

fn out_of_range(reason: String) -> Error {
    Error::Spec { field: "steps", reason }
}

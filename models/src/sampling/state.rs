//! The state of one image's sampler between two evaluations of the UNet, and the helpers that the
//! algorithms share. The loop belongs to the caller: it asks [`SamplerState::next`] for the next
//! evaluation and gives the output to [`SamplerState::advance`], so images with different samplers
//! and step counts share a batch.
//!
//! x is x0 under noise: x = alpha x0 + sigma epsilon. The step from one noise level to the next is
//! a function for each algorithm, in the symbols of its paper, in the file of its family.

use std::sync::Arc;

use candle_core::Tensor;

use super::ahead::Ahead;
use super::denoiser::{Denoiser, linear_combination};
use super::noise::Noise;
use super::schedule::{Evaluation, NoiseLevel, Schedule, Step};
use crate::error::Result;

/// The step of an algorithm: the latents after an evaluation, from those before it and the UNet's
/// outputs, all (B, C, H, W) in f32.
pub(super) type Advance =
    fn(&mut SamplerState, Step, x: &Tensor, Outputs<'_>, &mut Noise) -> Result<Tensor>;

/// The outputs of an evaluation, (B, C, H, W) in f32.
#[derive(Debug, Clone, Copy)]
pub struct Outputs<'a> {
    /// The output after guidance.
    pub guided: &'a Tensor,
    /// That of the unconditional row; without guidance the same.
    pub unguided: &'a Tensor,
}

impl<'a> From<&'a Tensor> for Outputs<'a> {
    /// The output of an evaluation without guidance.
    fn from(output: &'a Tensor) -> Self {
        Self { guided: output, unguided: output }
    }
}

/// The state of one image's sampler between two evaluations. Cheap to clone: the table is shared.
#[derive(Debug, Clone)]
pub struct SamplerState {
    pub(super) advance: Advance,
    pub(super) schedule: Arc<Schedule>,
    pub(super) denoiser: Denoiser,
    /// Scales a timestep to the time of a consistency model.
    pub(super) timestep_scaling: f64,
    /// Scales the noise that is drawn.
    pub(super) s_noise: f64,
    /// The index of the next step.
    pub(super) position: usize,
    /// The index of the step before which it ends, or another model takes over.
    pub(super) end: usize,
    /// Results of earlier evaluations, the newest first: outputs, predicted x0 or slopes.
    pub(super) history: Vec<Tensor>,
    /// The latents from which the current step began, while it is not complete.
    pub(super) anchor: Option<Tensor>,
    /// Noise of later steps.
    pub(super) ahead: Ahead,
}

impl SamplerState {
    /// Standard deviation of the initial latents.
    pub fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma
    }

    /// Number of evaluations of the whole run.
    pub fn evaluations(&self) -> usize {
        self.end - self.schedule.skipped
    }

    /// The same, with those that are left out at its end or are another model's.
    pub(crate) fn whole(&self) -> usize {
        self.schedule.steps.len() - self.schedule.skipped
    }

    /// Number of completed evaluations.
    pub fn completed(&self) -> usize {
        self.position - self.schedule.skipped
    }

    /// The timesteps of the whole run's evaluations, whichever model takes them.
    pub(crate) fn timesteps(&self) -> impl Iterator<Item = f64> {
        let steps = &self.schedule.steps[self.schedule.skipped..self.schedule.end];
        steps.iter().map(|step| step.evaluation.timestep)
    }

    /// The next evaluation of the UNet; none when the latents are finished.
    pub fn next(&self) -> Option<Evaluation> {
        self.next_step().map(|step| step.evaluation)
    }

    fn next_step(&self) -> Option<&Step> {
        self.schedule.steps[..self.end].get(self.position)
    }

    /// Whether the next evaluation is the last of a run to the end.
    pub(super) fn is_last(&self) -> bool {
        self.position + 1 == self.schedule.steps.len()
    }

    /// The predicted x0 of the last evaluation, from the latents `x` given to it and its output
    /// after guidance, all (B, C, H, W) in f32. Before the first evaluation it is `x` itself.
    pub fn predicted_x0(&self, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        match self.completed() {
            0 => Ok(x.clone()),
            _ => {
                let step = self.schedule.steps[self.position - 1];
                self.denoiser.predicted_x0(x, output, step.at)
            }
        }
    }

    /// x0 under as much noise as the latents of the next evaluation have; x0 itself when the
    /// latents are finished. Both (B, C, H, W).
    pub fn noised(&self, x0: &Tensor, noise: &Tensor) -> Result<Tensor> {
        match self.next_step() {
            Some(Step { at, .. }) => linear_combination(&[(at.alpha, x0), (at.sigma, noise)]),
            None => Ok(x0.clone()),
        }
    }

    /// The first latents of a run: `drawn` noise, or x0 under it, and what the sampler adds before
    /// its first evaluation. All (B, C, H, W).
    pub fn begin(&self, x0: Option<&Tensor>, drawn: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        let Some(&Step { at, raised_by, .. }) = self.next_step() else {
            return Ok(x0.unwrap_or(drawn).clone());
        };
        let sigma = raised_by.map_or(at.sigma, |by| (at.sigma.powi(2) - by * by).sqrt());
        let x = match x0 {
            Some(x0) => linear_combination(&[(at.alpha, x0), (sigma, drawn)])?,
            None => linear_combination(&[(self.init_noise_sigma(), drawn)])?,
        };
        self.clone().raised(x, noise)
    }

    /// The latents after an evaluation, from those before it and the UNet's outputs, all
    /// (B, C, H, W) in f32.
    ///
    /// # Panics
    /// When there is nothing left to evaluate.
    pub fn advance<'a>(
        &mut self,
        x: &Tensor,
        outputs: impl Into<Outputs<'a>>,
        noise: &mut Noise,
    ) -> Result<Tensor> {
        let step = self.schedule.steps[self.position];
        let next = (self.advance)(self, step, x, outputs.into(), noise)?;
        self.position += 1;
        self.raised(next, noise)
    }

    /// The first latents of a run that goes on from those of another, or from x0 as if it were under
    /// noise: themselves, with the noise that is added before the next evaluation. (B, C, H, W).
    pub fn raised(&mut self, x: Tensor, noise: &mut Noise) -> Result<Tensor> {
        match self.next_step().and_then(|step| step.raised_by) {
            Some(by) => {
                let drawn = self.draw(&x, noise)?;
                linear_combination(&[(1.0, &x), (by * self.s_noise, &drawn)])
            }
            None => Ok(x),
        }
    }

    /// The same run from here to its end, of a model with the outputs of another run.
    pub fn resumed(&self, other: &Self) -> Self {
        let (denoiser, timestep_scaling) = (other.denoiser, other.timestep_scaling);
        Self { end: self.schedule.end, denoiser, timestep_scaling, ..self.clone() }
    }

    /// Noise of the shape of x: the next values of the image's stream.
    pub(super) fn draw(&mut self, x: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        Ok(self.ahead.next(x, || noise.normal(x.elem_count()))?)
    }

    /// Puts a result in front of the history, of which the first `most` are kept.
    pub(super) fn remember(&mut self, newest: Tensor, most: usize) {
        self.history.insert(0, newest);
        self.history.truncate(most);
    }

    /// The step before the next `back` ones: 1 is the last.
    pub(super) fn earlier(&self, back: usize) -> Step {
        self.schedule.steps[self.position - back]
    }

    /// The end of a step from `x` below it: noise takes x up to the step's level.
    pub(super) fn renoised(&mut self, x: Tensor, step: Step, noise: &mut Noise) -> Result<Tensor> {
        if step.noise() == 0.0 {
            return Ok(x);
        }
        let drawn = self.draw(&x, noise)?;
        self.with_noise(&x, step, &drawn)
    }

    /// The same with noise of unit variance that is drawn already.
    pub(super) fn with_noise(&self, x: &Tensor, step: Step, drawn: &Tensor) -> Result<Tensor> {
        let scale = step.to.alpha / step.below.alpha;
        linear_combination(&[(scale, x), (step.noise() * self.s_noise, drawn)])
    }
}

impl Step {
    /// Standard deviation of the noise between `below` and `to`.
    pub(super) fn noise(self) -> f64 {
        if self.below == self.to {
            return 0.0;
        }
        let kept = self.below.sigma * self.to.alpha / self.below.alpha;
        (self.to.sigma.powi(2) - kept.powi(2)).max(0.0).sqrt()
    }
}

/// The exact step from level to level while x0 is constant: DDIM's (Song et al. 2021, equation
/// 13), Euler's on sigmas, and DPM-Solver++'s of first order.
pub(super) fn first_order(
    x: &Tensor,
    x0: &Tensor,
    from: NoiseLevel,
    to: NoiseLevel,
) -> Result<Tensor> {
    let scale = to.sigma / from.sigma;
    linear_combination(&[(scale, x), (to.alpha - from.alpha * scale, x0)])
}

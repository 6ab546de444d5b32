//! The state of one image's sampler between two evaluations of the UNet, and the helpers that the
//! algorithms share. The loop belongs to the caller: it asks [`SamplerState::next`] for the next
//! evaluation and gives the output to [`SamplerState::advance`], so images with different samplers
//! and step counts share a batch.
//!
//! x is x0 under noise: x = alpha x0 + sigma epsilon. The step from one noise level to the next is
//! a function for each algorithm, in the symbols of its paper, in the file of its family.

use std::sync::Arc;

use candle_core::Tensor;

use super::denoiser::{Denoiser, linear_combination};
use super::noise::Noise;
use super::schedule::{Evaluation, NoiseLevel, Schedule, Step};
use crate::error::Result;

/// The step of an algorithm: the latents after an evaluation, from those before it and the UNet's
/// output after guidance, all (B, C, H, W) in f32.
pub(super) type Advance =
    fn(&mut SamplerState, Step, x: &Tensor, output: &Tensor, &mut Noise) -> Result<Tensor>;

/// The state of one image's sampler between two evaluations. Cheap to clone: the table is shared.
#[derive(Debug, Clone)]
pub struct SamplerState {
    pub(super) advance: Advance,
    pub(super) schedule: Arc<Schedule>,
    pub(super) denoiser: Denoiser,
    /// Scales a timestep to the time of a consistency model.
    pub(super) timestep_scaling: f64,
    pub(super) completed: usize,
    /// Results of earlier evaluations, the newest first: outputs, predicted x0 or slopes.
    pub(super) history: Vec<Tensor>,
    /// The latents from which the current step began, while it is not complete.
    pub(super) anchor: Option<Tensor>,
}

impl SamplerState {
    /// Standard deviation of the initial latents.
    pub fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma
    }

    /// Number of evaluations of the whole run.
    pub fn evaluations(&self) -> usize {
        self.schedule.steps.len()
    }

    /// Number of completed evaluations.
    pub fn completed(&self) -> usize {
        self.completed
    }

    /// The timesteps of the whole run's evaluations.
    pub(crate) fn timesteps(&self) -> impl Iterator<Item = f64> {
        self.schedule.steps.iter().map(|step| step.evaluation.timestep)
    }

    /// The next evaluation of the UNet; none when the latents are finished.
    pub fn next(&self) -> Option<Evaluation> {
        self.schedule.steps.get(self.completed).map(|step| step.evaluation)
    }

    /// The predicted x0 of the last evaluation, from the latents `x` given to it and its output
    /// after guidance, all (B, C, H, W) in f32. Before the first evaluation it is `x` itself.
    pub fn predicted_x0(&self, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let steps = &self.schedule.steps;
        match self.completed {
            0 => Ok(x.clone()),
            1 => self.denoiser.predicted_x0(x, output, steps[0].from),
            // `from` of the last step is not the level of `x` where PNDM takes a step again.
            k => self.denoiser.predicted_x0(x, output, steps[k - 2].to),
        }
    }

    /// x0 under as much noise as the latents of the next evaluation have; x0 itself when the
    /// latents are finished. Both (B, C, H, W).
    pub fn noised(&self, x0: &Tensor, noise: &Tensor) -> Result<Tensor> {
        match self.schedule.steps.get(self.completed) {
            Some(Step { at, .. }) => linear_combination(&[(at.alpha, x0), (at.sigma, noise)]),
            None => Ok(x0.clone()),
        }
    }

    /// The latents after an evaluation, from those before it and the UNet's output after
    /// guidance, all (B, C, H, W) in f32.
    ///
    /// # Panics
    /// When there is nothing left to evaluate.
    pub fn advance(&mut self, x: &Tensor, output: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        let step = self.schedule.steps[self.completed];
        let next = (self.advance)(self, step, x, output, noise)?;
        self.completed += 1;
        Ok(next)
    }

    /// Puts a result in front of the history, of which the first `most` are kept.
    pub(super) fn remember(&mut self, newest: Tensor, most: usize) {
        self.history.insert(0, newest);
        self.history.truncate(most);
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

/// Noise of the shape of x: the next values of the image's stream.
pub(super) fn draw(x: &Tensor, noise: &mut Noise) -> Result<Tensor> {
    let values = noise.normal(x.elem_count());
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}

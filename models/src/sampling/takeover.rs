//! Where another model takes a run over.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/sd_samplers_common.py` `apply_refiner`, whose
//! sampler goes on as it is. diffusers has two runs instead, each with its own
//! [`super::plan::Span`].

use super::algorithm::{LevelGrid, Sampler};
use super::config::SchedulerConfig;
use super::schedule::Step;
use super::state::SamplerState;
use crate::error::Result;

/// Timesteps of the training, and the last of them, whatever the model's are.
const TIMESTEPS: f64 = 1000.0;
const LAST: f64 = 999.0;

impl SamplerState {
    /// Ends the run before the first evaluation at or after a share of the timesteps, until it is
    /// [`Self::resumed`].
    pub fn pause_at(
        &mut self,
        share: f64,
        (config, sampler): (&SchedulerConfig, Sampler),
    ) -> Result<()> {
        let row = sampler.algorithm();
        let sigma = |alpha: &f32| f64::from(((1.0 - alpha) / alpha).sqrt());
        let table: Vec<f64> = config.alphas_cumprod(row)?.iter().map(sigma).collect();
        let timestep = |step: &Step| match row.grid {
            LevelGrid::Timesteps => step.evaluation.timestep,
            LevelGrid::Sigmas | LevelGrid::ScaledSigmas => {
                nearest(&table, step.at.sigma / step.at.alpha) as f64
            }
        };
        let is_after = |step: &Step| (LAST - timestep(step)) / TIMESTEPS >= share;
        let steps = &self.schedule.steps[self.schedule.skipped..self.schedule.end];
        let taken = steps.iter().position(is_after).unwrap_or(steps.len());
        self.end = self.schedule.skipped + taken;
        Ok(())
    }
}

/// The index of the number in a table that is closest to another.
fn nearest(table: &[f64], sigma: f64) -> usize {
    let distance = |i: usize| (table[i] - sigma).abs();
    let closest = (0..table.len()).min_by(|a, b| distance(*a).total_cmp(&distance(*b)));
    closest.unwrap_or_default()
}

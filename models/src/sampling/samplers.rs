//! What callers ask of a sampler, from its row: names, schedules, cost, options.

use std::fmt;

use super::algorithm::{Algorithm, LevelGrid, Sampler, Stages, StepNoise};
use super::options::SamplerOptions;
use super::sigmas::{Levels, SigmaSchedule};
use super::table::ALGORITHMS;
use crate::error::{Error, Result};

impl Sampler {
    /// Every sampler, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        ALGORITHMS.iter().map(|row| row.sampler)
    }

    pub(super) fn algorithm(self) -> &'static Algorithm {
        let row = ALGORITHMS.iter().find(|row| row.sampler == self);
        row.expect("every variant has a row; a test walks them")
    }

    /// The name in requests: `euler_a`.
    pub fn name(self) -> &'static str {
        self.algorithm().name
    }

    /// AUTOMATIC1111's label: `Euler a`.
    pub fn title(self) -> &'static str {
        self.algorithm().title
    }

    /// AUTOMATIC1111's aliases and other names.
    pub fn aliases(self) -> &'static [&'static str] {
        self.algorithm().aliases
    }

    /// The schedule that AUTOMATIC1111's "Automatic" stands for.
    pub fn automatic_schedule(self) -> SigmaSchedule {
        self.algorithm().automatic
    }

    /// The schedules that the sampler runs on.
    pub fn schedules(self) -> impl Iterator<Item = SigmaSchedule> {
        SigmaSchedule::all().filter(move |schedule| self.runs_on(*schedule))
    }

    /// A sampler on timesteps has no sigmas to choose, and that of a distilled model no timesteps.
    pub(super) fn runs_on(self, schedule: SigmaSchedule) -> bool {
        let row = self.algorithm();
        // The same of all models.
        match schedule.levels(false) {
            Levels::Timesteps => true,
            Levels::Trailing => row.timesteps.is_none(),
            Levels::Between(_) | Levels::Training(_) => row.grid != LevelGrid::Timesteps,
        }
    }

    /// Whether the sampler runs on a schedule.
    ///
    /// # Errors
    /// [`Error::Spec`] if it does not.
    pub fn check(self, schedule: SigmaSchedule) -> Result<()> {
        if self.runs_on(schedule) {
            return Ok(());
        }
        let reason = format!("{schedule} is not available for the sampler {self}");
        Err(Error::Spec { field: "schedule", reason })
    }

    /// Whether it is of distilled models, whose timesteps are those of the distillation.
    pub fn is_distilled(self) -> bool {
        self.algorithm().timesteps.is_some()
    }

    /// Whether the unconditional row is computed at every guidance scale.
    pub fn needs_unguided(self) -> bool {
        self.algorithm().needs_unguided
    }

    /// The share of the guidance scale by which it guides; but for one it is 1.
    pub fn guidance_share(self) -> f64 {
        self.algorithm().guidance_share
    }

    /// The number of UNet calls of a run of so many steps; it may have one more.
    pub fn evaluations(self, schedule: SigmaSchedule, steps: usize) -> usize {
        self.evaluations_of_a_step() * schedule.steps(steps)
    }

    /// The number of UNet calls of a step, but for the last to no noise, which takes one.
    pub fn evaluations_of_a_step(self) -> usize {
        if self.algorithm().stages == Stages::One { 1 } else { 2 }
    }

    /// Whether its steps draw noise from the image's stream, with these options. Not so do the
    /// stochastic solvers, which have a Brownian motion in AUTOMATIC1111.
    pub fn draws_noise(self, options: &SamplerOptions) -> bool {
        let row = self.algorithm();
        let by_eta = match row.noise {
            StepNoise::Ancestral => row.stages != Stages::NoisyMiddle,
            StepNoise::Ddim | StepNoise::Tcd => true,
            StepNoise::Sde | StepNoise::None => false,
        };
        let eta = options.eta.or(row.eta).unwrap_or(0.0);
        row.always_draws || by_eta && eta > 0.0 || row.churns && options.churn.amount > 0.0
    }

    /// Which options have no effect on the sampler, as sentences for the user. A value that holds
    /// anyway asks for nothing.
    pub fn without_effect(self, options: &SamplerOptions) -> Vec<String> {
        let idle = self.idle(options);
        idle.map(|name| format!("{name} has no effect on the sampler {self}")).collect()
    }

    /// The names of the options that have no effect on the sampler.
    pub(crate) fn idle(
        self,
        options: &SamplerOptions,
    ) -> impl Iterator<Item = &'static str> + use<> {
        let row = self.algorithm();
        let churns = row.churns && options.churn.amount > 0.0;
        let asked = [
            ("eta", row.eta.is_none() && options.eta.is_some_and(|eta| eta != 0.0)),
            (
                "s_noise",
                !(row.s_noise || churns) && options.s_noise.is_some_and(|scale| scale != 1.0),
            ),
            ("s_churn", !row.churns && options.churn.amount > 0.0),
        ];
        asked.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name)
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::Churn;
    use super::*;

    #[test]
    fn a_schedule_that_a_sampler_does_not_run_on_is_refused() {
        for (sampler, schedule) in [
            (Sampler::Ddim, SigmaSchedule::Karras),
            (Sampler::Pndm, SigmaSchedule::Beta),
            (Sampler::Lcm, SigmaSchedule::SgmUniform),
            (Sampler::Tcd, SigmaSchedule::Karras),
        ] {
            let error = sampler.check(schedule).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("schedule: {schedule} is not available for the sampler {sampler}")
            );
        }
        for sampler in [Sampler::Ddim, Sampler::Pndm, Sampler::Ddpm] {
            sampler.check(SigmaSchedule::SgmUniform).unwrap();
        }
        assert_eq!(Sampler::EulerAncestral.schedules().count(), SigmaSchedule::all().count());
    }

    #[test]
    fn options_without_effect_are_named() {
        let churn = |amount| Churn { amount, ..Churn::default() };
        let all = SamplerOptions { eta: Some(0.5), s_noise: Some(0.9), churn: churn(1.0) };
        assert_eq!(Sampler::Lms.without_effect(&all).len(), 3);
        assert_eq!(Sampler::Euler.without_effect(&all).len(), 1);
        assert_eq!(Sampler::EulerAncestral.without_effect(&all).len(), 1);
        let none = SamplerOptions { eta: Some(0.0), s_noise: Some(1.0), churn: churn(0.0) };
        for sampler in Sampler::all() {
            assert_eq!(sampler.without_effect(&none), [""; 0], "{sampler}");
        }
    }
}

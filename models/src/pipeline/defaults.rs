//! The defaults of a request: what the author of a model means by a bare prompt. They come from
//! `sd-server.json` beside the model, else from its own configuration, else from its name.

use super::few_steps::FewSteps;
use super::spec::MAX_STEPS;
use crate::error::{Error, Result};
use crate::files::{Keys, Source};
use crate::networks::UNetConfig;
use crate::picture::Size;
use crate::sampling::{Sampler, SamplerName, SchedulerConfig, SigmaSchedule};

/// The file of the defaults that the owner of a model has chosen.
const FILE: &str = "sd-server.json";

/// Defaults of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// The size that the UNet was trained on.
    pub size: Size,
    /// Sampler steps; 50 as in diffusers, unless the model was distilled to few.
    pub steps: usize,
    /// Guidance scale; 7.5 as in diffusers, unless the model was distilled to do without.
    pub guidance_scale: f64,
    /// The sampler of the model's scheduler configuration, or of its kind.
    pub sampler: Sampler,
    /// The sigma schedule of that configuration.
    pub schedule: SigmaSchedule,
    /// Layers of the text encoder that are skipped.
    pub clip_skip: usize,
    /// Share of the rescaled guidance.
    pub guidance_rescale: f64,
}

impl Defaults {
    /// Sampler and schedule under one name.
    pub fn sampler_name(&self) -> SamplerName {
        SamplerName { sampler: self.sampler, schedule: self.schedule }
    }

    /// The defaults of a model. `scale` is pixels per latent pixel.
    pub(super) fn read(
        source: &Source,
        name: &str,
        (unet, scale): (&UNetConfig, usize),
        scheduler: &SchedulerConfig,
    ) -> Result<Self> {
        let side = unet.sample_size * scale;
        let size = Size::new(side, side).ok_or_else(|| {
            Error::config("unet/config.json", format!("sample_size: {side} pixels a side"))
        })?;
        let SamplerName { sampler, schedule } = scheduler.default_sampler()?;
        let mut defaults = Self {
            size,
            steps: 50,
            guidance_scale: 7.5,
            sampler,
            schedule,
            clip_skip: 0,
            guidance_rescale: 0.0,
        };
        let embeds_guidance = unet.time_cond_proj_dim.is_some();
        if let Some(few) = FewSteps::of_model(name, embeds_guidance, scheduler) {
            defaults.steps = few.steps;
            defaults.guidance_scale = few.guidance_scale;
            if let Some(SamplerName { sampler, schedule }) = few.sampler {
                (defaults.sampler, defaults.schedule) = (sampler, schedule);
            }
        }
        match source.read(FILE)? {
            Some(_) => defaults.overridden(Keys::read(source, FILE)?),
            None => Ok(defaults),
        }
    }

    /// With the values of the file in their places.
    fn overridden(mut self, mut keys: Keys) -> Result<Self> {
        self.steps = keys.take("steps", self.steps)?;
        if !(1..=MAX_STEPS).contains(&self.steps) {
            return Err(keys.invalid("steps", format!("must be from 1 to {MAX_STEPS}")));
        }
        self.guidance_scale = keys.take("guidance_scale", self.guidance_scale)?;
        if !(0.0..=100.0).contains(&self.guidance_scale) {
            return Err(keys.invalid("guidance_scale", "must be from 0 to 100"));
        }
        self.guidance_rescale = keys.take("guidance_rescale", self.guidance_rescale)?;
        if !(0.0..=1.0).contains(&self.guidance_rescale) {
            return Err(keys.invalid("guidance_rescale", "must be from 0 to 1"));
        }
        self.clip_skip = keys.take("clip_skip", self.clip_skip)?;
        let (width, height) = (self.size.width(), self.size.height());
        let sides = (keys.take("width", width)?, keys.take("height", height)?);
        let fits = |side: usize| side > 0 && side.is_multiple_of(8);
        self.size = Size::new(sides.0, sides.1)
            .filter(|_| fits(sides.0) && fits(sides.1))
            .ok_or_else(|| keys.invalid("width", "width and height must be multiples of 8"))?;
        let name: Option<String> = keys.take("scheduler", None)?;
        if let Some(name) = name {
            let parsed = name.parse::<SamplerName>();
            let parsed = parsed.map_err(|reason| keys.invalid("scheduler", reason))?;
            (self.sampler, self.schedule) = (parsed.sampler, parsed.schedule);
        }
        keys.finish()?;
        Ok(self)
    }
}

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
        let side = unet.sample_size.saturating_mul(scale);
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
            defaults.take(&few);
        }
        if source.read(FILE)?.is_some() {
            defaults = defaults.overridden(Keys::read(source, FILE)?)?;
        }
        scheduler.check_sampler(defaults.sampler)?;
        Ok(defaults)
    }

    /// Those of an image with LoRAs of these names, and what the first of them was distilled to, if
    /// one was.
    pub fn with_loras<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Option<(Self, String)> {
        let (name, few) =
            names.into_iter().find_map(|name| FewSteps::of_lora(name).map(|few| (name, few)))?;
        let mut defaults = *self;
        defaults.take(&few);
        Some((defaults, format!("the LoRA {name:?} is of the kind {}", few.title)))
    }

    fn take(&mut self, few: &FewSteps) {
        self.steps = few.steps;
        self.guidance_scale = few.guidance_scale;
        if let Some(SamplerName { sampler, schedule }) = few.sampler {
            (self.sampler, self.schedule) = (sampler, schedule);
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
        let name = name.map(|name| name.parse::<SamplerName>()).transpose();
        let name = name.map_err(|reason| keys.invalid("scheduler", reason))?;
        let asked: Option<String> = keys.take("schedule", None)?;
        let asked = asked.map(|name| name.parse::<SigmaSchedule>()).transpose();
        let asked = asked.map_err(|reason| keys.invalid("schedule", reason))?;
        let own = name.unwrap_or(self.sampler_name());
        (self.sampler, self.schedule) = (own.sampler, asked.unwrap_or(own.schedule));
        if let Some(name) = name
            && ![self.schedule, SigmaSchedule::Model].contains(&name.schedule)
        {
            return Err(keys.invalid("schedule", format!("is another than that of {name}")));
        }
        let runs = self.sampler.check(self.schedule);
        runs.map_err(|error| keys.invalid("scheduler", error))?;
        keys.finish()?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The defaults of the built-in model with a file of its owner's.
    fn with(file: &str) -> Result<Defaults> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(FILE), file).expect("written");
        let unet = UNetConfig::read(&Source::Demo)?;
        let json = r#"{"_class_name":"DDIMScheduler"}"#;
        let scheduler = SchedulerConfig::from_json(json)?;
        Defaults::read(&Source::Directory(folder.path().into()), "any", (&unet, 8), &scheduler)
    }

    #[test]
    fn a_file_beside_the_model_overrides_what_it_names() {
        let plain = with("{}").expect("defaults");
        assert_eq!((plain.steps, plain.guidance_scale, plain.sampler), (50, 7.5, Sampler::Ddim));
        let own = with(
            r#"{"steps":6,"guidance_scale":2,"scheduler":"dpmpp_2m","schedule":"karras",
                "width":192,"clip_skip":1,"guidance_rescale":0.7}"#,
        );
        let own = own.expect("defaults");
        assert_eq!((own.steps, own.guidance_scale, own.clip_skip), (6, 2.0, 1));
        assert_eq!(own.sampler_name().to_string(), "dpmpp_2m_karras");
        assert_eq!((own.size.width(), own.size.height()), (192, plain.size.height()));
        assert!((own.guidance_rescale - 0.7).abs() < 1e-9);
        let named = with(r#"{"scheduler":"Euler a Karras"}"#).expect("defaults").sampler_name();
        assert_eq!(named.to_string(), "euler_a_karras");
        for (file, named) in [
            (r#"{"stepz":6}"#, "stepz"),
            (r#"{"steps":0}"#, "steps"),
            (r#"{"steps":"six"}"#, "steps"),
            (r#"{"guidance_scale":-1}"#, "guidance_scale"),
            (r#"{"guidance_rescale":2}"#, "guidance_rescale"),
            (r#"{"scheduler":"best"}"#, "scheduler"),
            (r#"{"scheduler":"ddim","schedule":"karras"}"#, "scheduler"),
            (r#"{"schedule":"best"}"#, "schedule"),
            (r#"{"scheduler":"dpmpp_2m_karras","schedule":"beta"}"#, "schedule"),
            (r#"{"height":100}"#, "width"),
            ("[]", FILE),
        ] {
            let error = with(file).expect_err("refused").to_string();
            assert!(error.starts_with(FILE) && error.contains(named), "{file}: {error}");
        }
    }
}

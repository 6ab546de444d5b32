//! The defaults of a request: what the author of a model means by a bare prompt. They come from
//! `sd-server.json` beside the model, else from its own configuration, else from its name.

use super::few_steps::FewSteps;
use super::spec::MAX_STEPS;
use crate::error::{Error, Result};
use crate::files::{Keys, Source};
use crate::networks::UNetConfig;
use crate::picture::Size;
use crate::sampling::{
    Run, Sampler, SamplerName, SamplerOptions, SamplerState, SchedulerConfig, SigmaSchedule, Span,
};

/// The file of the defaults that the owner of a model has chosen.
const FILE: &str = "sd-server.json";

/// Defaults of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// The size that the UNet was trained on.
    pub size: Size,
    /// Sampler steps; 50 as in diffusers, unless the model was distilled to few.
    pub steps: usize,
    /// Guidance scale; 7.5 as in diffusers, and 5 of Stable Diffusion XL, unless the model was distilled to do without.
    pub guidance_scale: f64,
    /// The same of inpainting: 7.5 of Stable Diffusion XL, too.
    pub inpainting_guidance_scale: f64,
    /// The sampler of the model's scheduler configuration, or of its kind.
    pub sampler: Sampler,
    /// The sigma schedule of that configuration.
    pub schedule: SigmaSchedule,
    /// Layers of the text encoder that are skipped.
    pub clip_skip: usize,
    /// Share of the rescaled guidance.
    pub guidance_rescale: f64,
    /// What the sampler draws anew at each step, where it is not the sampler's own default.
    pub eta: Option<f64>,
    /// What of it the owner of the model has chosen.
    pub chosen: Chosen,
}

/// Which defaults the owner of the model has chosen: a LoRA replaces none of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The steps.
    pub steps: bool,
    /// The width or the height.
    pub size: bool,
    /// The guidance scale.
    pub guidance_scale: bool,
    /// The sampler or its schedule.
    pub sampler: bool,
}

impl Defaults {
    /// Sampler and schedule under one name.
    pub fn sampler_name(&self) -> SamplerName {
        SamplerName { sampler: self.sampler, schedule: self.schedule }
    }

    /// The guidance scale of inpainting, or of other images.
    pub fn guidance_scale(&self, inpaints: bool) -> f64 {
        if inpaints { self.inpainting_guidance_scale } else { self.guidance_scale }
    }

    /// The defaults of a model, and what of them is only told by its name. `scale` is pixels per
    /// latent pixel, `layers` those of the text encoder.
    pub(super) fn read(
        source: &Source,
        name: &str,
        (unet, scale, layers): (&UNetConfig, usize, usize),
        scheduler: &SchedulerConfig,
    ) -> Result<(Self, Option<String>)> {
        let side = unet.sample_size.saturating_mul(scale);
        let size = Size::new(side, side).ok_or_else(|| {
            Error::config("unet/config.json", format!("sample_size: {side} pixels a side"))
        })?;
        let SamplerName { sampler, schedule } = scheduler.default_sampler()?;
        let mut defaults = Self {
            size,
            steps: 50,
            guidance_scale: if unet.added.is_some() { 5.0 } else { 7.5 },
            inpainting_guidance_scale: 7.5,
            sampler,
            schedule,
            clip_skip: 0,
            guidance_rescale: 0.0,
            eta: None,
            chosen: Chosen::default(),
        };
        let told = FewSteps::of_model(unet, scheduler);
        let named = if told.is_none() { FewSteps::named(name) } else { None };
        if let Some(few) = told.as_ref().or(named.as_ref()) {
            defaults.take(few);
        }
        // The shapes of a single file do not tell its size, which is taken for that of its family.
        const OF_FAMILY: usize = 128;
        let is_open = matches!(source, Source::Checkpoint(_)) && unet.sample_size == OF_FAMILY;
        let side = named.as_ref().and_then(|few| few.side).filter(|_| is_open);
        let own_size = side.and_then(|side| Size::new(side, side));
        defaults.size = own_size.unwrap_or(defaults.size);
        let warning = named.map(|few| {
            let FewSteps { title, steps, guidance_scale, .. } = few;
            let size = own_size.map_or_else(String::new, |size| format!(", {size} pixels"));
            format!(
                "the name {name:?} is of the kind {title}: its defaults are {steps} steps, guidance \
                 scale {guidance_scale}, the sampler {}{size}; {FILE} overrides them",
                defaults.sampler_name()
            )
        });
        let file = source.own_name(FILE);
        if source.read(&file)?.is_some() {
            let keys = Keys::read(source, &file)?;
            defaults = defaults.overridden(keys, scale.max(8), layers)?;
            let SamplerName { sampler, schedule } = defaults.sampler_name();
            let (options, steps) = (SamplerOptions::default(), defaults.steps);
            let (skipped, share, is_xl, span) = (0, 1.0, false, Span::default());
            let run = Run { sampler, schedule, options, steps, skipped, share, is_xl, span };
            if let Err(Error::Spec { reason, .. }) = SamplerState::new(scheduler, run) {
                return Err(Error::config(file, format!("steps: {reason}")));
            }
        }
        scheduler.check_sampler(defaults.sampler)?;
        Ok((defaults, warning))
    }

    /// Those of an image with LoRAs of these names, and what the first of them was distilled to, if
    /// one was.
    pub fn with_loras<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Option<(Self, String)> {
        let (name, few) =
            names.into_iter().find_map(|name| FewSteps::named(name).map(|few| (name, few)))?;
        let mut defaults = *self;
        defaults.take(&few);
        Some((defaults, format!("the LoRA {name:?} is of the kind {}", few.title)))
    }

    fn take(&mut self, few: &FewSteps) {
        if !self.chosen.steps {
            self.steps = few.steps;
        }
        if !self.chosen.guidance_scale {
            self.guidance_scale = few.guidance_scale;
            self.inpainting_guidance_scale = few.guidance_scale;
        }
        if let Some(SamplerName { sampler, schedule }) = few.sampler
            && !self.chosen.sampler
        {
            (self.sampler, self.schedule, self.eta) = (sampler, schedule, few.eta);
        }
    }

    /// With the values of the file in their places.
    fn overridden(mut self, mut keys: Keys, multiple: usize, layers: usize) -> Result<Self> {
        self.chosen = Chosen {
            steps: keys.has("steps"),
            size: keys.has("width") || keys.has("height"),
            guidance_scale: keys.has("guidance_scale"),
            sampler: keys.has("scheduler") || keys.has("schedule"),
        };
        if self.chosen.sampler {
            self.eta = None;
        }
        self.steps = keys.take("steps", self.steps)?;
        if !(1..=MAX_STEPS).contains(&self.steps) {
            return Err(keys.invalid("steps", format!("must be from 1 to {MAX_STEPS}")));
        }
        if self.chosen.guidance_scale {
            self.guidance_scale = keys.take("guidance_scale", self.guidance_scale)?;
            self.inpainting_guidance_scale = self.guidance_scale;
        }
        if !(0.0..=100.0).contains(&self.guidance_scale) {
            return Err(keys.invalid("guidance_scale", "must be from 0 to 100"));
        }
        self.guidance_rescale = keys.take("guidance_rescale", self.guidance_rescale)?;
        if !(0.0..=1.0).contains(&self.guidance_rescale) {
            return Err(keys.invalid("guidance_rescale", "must be from 0 to 1"));
        }
        self.clip_skip = keys.take("clip_skip", self.clip_skip)?;
        if self.clip_skip > layers {
            return Err(keys.invalid("clip_skip", format!("must be from 0 to {layers}")));
        }
        let (width, height) = (self.size.width(), self.size.height());
        let sides = (keys.take("width", width)?, keys.take("height", height)?);
        for (key, side) in [("width", sides.0), ("height", sides.1)] {
            if side == 0 || !side.is_multiple_of(multiple) {
                return Err(keys.invalid(key, format!("must be a multiple of {multiple}")));
            }
        }
        self.size = Size::new(sides.0, sides.1)
            .ok_or_else(|| keys.invalid("width", "and height have too many pixels"))?;
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
        let source = Source::Directory(folder.path().into());
        Defaults::read(&source, "any", (&unet, 8, 2), &scheduler).map(|(defaults, _)| defaults)
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
            (r#"{"height":100}"#, "height"),
            (r#"{"clip_skip":3}"#, "clip_skip"),
            (r#"{"scheduler":"lcm","steps":51}"#, "steps"),
            (r#"{"steps":4,"steps":5}"#, "steps"),
            ("[]", FILE),
        ] {
            let error = with(file).expect_err("refused").to_string();
            assert!(error.starts_with(FILE) && error.contains(named), "{file}: {error}");
        }
    }
    #[test]
    fn a_lora_replaces_nothing_that_the_owner_has_chosen() {
        let own = with(r#"{"steps":6,"scheduler":"dpmpp_2m"}"#).expect("defaults");
        let (with_lora, _) = own.with_loras(["art", "my-lcm"]).expect("a kind");
        assert_eq!((with_lora.steps, with_lora.guidance_scale), (6, 1.0));
        assert_eq!(with_lora.sampler_name().to_string(), "dpmpp_2m");
    }
}

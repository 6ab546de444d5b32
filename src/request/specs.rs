//! The validation of a request: past it, everything is a [`Spec`].

use std::sync::Arc;

use sd_models::{
    Defaults, LoraUse, ModelInfo, PromptRole, PromptSyntax, SamplerName, SamplerOptions, Size,
    Spec, Variation, unread,
};

use super::controls::own_size;
use super::draw::{DrawRequest, Lora};
use super::error::ValidationError;
use super::input::Input;
use super::limits::Limits;
use super::xl::another;
use crate::image::{Format, Overlay};

/// So many images, of which the first is this.
fn numbered(first: &Spec, count: usize) -> Vec<Spec> {
    let image = |k: u64| {
        let mut image = first.clone();
        image.set_number(first, k);
        image
    };
    (0..count as u64).map(image).collect()
}

impl DrawRequest {
    /// One spec for each image. Omitted values come from the model, an omitted seed from
    /// `random_seed`. Not for async threads: the input images are decoded and resized.
    pub fn specs(
        &mut self,
        limits: &Limits,
        model: &ModelInfo,
        random_seed: u64,
    ) -> Result<Vec<Spec>, ValidationError> {
        let prompt = self.checked_prompt(limits)?;
        let syntax = self.choice::<PromptSyntax>("prompt_syntax", self.prompt_syntax.as_ref())?;
        let syntax = syntax.unwrap_or_default();
        let loras: Vec<_> = self.loras.iter().flatten().map(used).collect();
        // What is wrong with them is found below.
        let named = syntax.text(&prompt).map_or_else(|_| Vec::new(), |(_, named)| named);
        let (defaults, mut warnings) = self.defaults(model, loras.iter().chain(&named));
        self.warn_of_unread(syntax);
        let input = self.input(limits, model)?;
        let decoded = self.controls(limits)?;
        let ip_adapters = self.ip_adapters(limits)?;
        let own = own_size(input.as_ref(), &decoded, limits, model).unwrap_or(defaults.size);
        let size = self.size(own, input.as_ref(), limits, &mut warnings)?;
        let fields = [("scheduler", &self.scheduler), ("schedule", &self.schedule)];
        let name = self.sampler_of(fields, defaults.sampler_name())?;
        let SamplerName { sampler, schedule } = name;
        let most = limits.max_steps.min(model.most_steps(sampler));
        let (takes_all, share) = self.share_of_steps(input.as_ref(), model, sampler);
        let steps = match self.num_inference_steps {
            Some(steps) => steps,
            None => self.raised(defaults.steps, ("strength", share), most, &mut warnings)?,
        };
        let count = self.num_images_per_prompt.unwrap_or(1);
        self.within("num_images_per_prompt", count, 1..=limits.max_images)?;
        let usual_guidance = defaults.guidance_scale(input.as_ref().is_some_and(Input::has_mask));
        let guidance_scale = self.scale(usual_guidance, syntax, model);
        let guided = syntax.guides_at(guidance_scale) && !model.embeds_guidance;
        let own_eta = defaults.eta.filter(|_| sampler == defaults.sampler);
        let hires = self.hires((size, steps, name), limits, model, &mut warnings)?;
        let img2img = input.map(|input| Arc::new(self.img2img(input, size, takes_all)));
        let refiner = self.refiner(model, &mut warnings)?;
        let hires_size = hires.as_ref().map(|hires| hires.size);
        let controls = self.sized(decoded, size, hires_size, limits)?;
        let spec = Spec {
            controls,
            prompt,
            prompt_syntax: syntax,
            negative_prompt: self.negative_prompt.clone().unwrap_or_default(),
            loras,
            size,
            steps,
            guidance_scale,
            seed: self.seed.unwrap_or(random_seed),
            sampler,
            schedule,
            sampler_options: SamplerOptions {
                eta: self.eta.or(own_eta),
                s_noise: self.s_noise,
                churn: self.churn,
            },
            embeds_guidance: model.embeds_guidance,
            clip_skip: self.clip_skip.unwrap_or(defaults.clip_skip),
            guidance_rescale: self.rescale(&defaults, guided),
            variation: self.variation(random_seed)?,
            eta_noise_seed_delta: self.eta_noise_seed_delta.unwrap_or(0),
            xl: self.xl()?,
            span: self.span(),
            refiner,
            warnings,
            hires,
            tiling: self.tiling.unwrap_or(false),
            vae_tiling: self.vae_tiling,
            ip_adapters,
            enlarge: None,
            img2img,
        };
        model.check(&spec).map_err(|error| self.refused(error))?;
        self.warn_of_no_tiles(&spec, model);
        self.check_loras(&spec, limits)?;
        Ok(numbered(&spec, count))
    }

    /// The size of the images; without sides, the model's or an input's own.
    fn size(
        &self,
        own: Size,
        input: Option<&Input>,
        limits: &Limits,
        warnings: &mut Vec<String>,
    ) -> Result<Size, ValidationError> {
        let sides = [self.width.unwrap_or(own.width()), self.height.unwrap_or(own.height())];
        let size = self.sides(["width", "height"], sides, limits)?;
        if let (None, None, Some(input)) = (self.width, self.height, input) {
            warnings.extend(input.rounded(self.names.of("image"), size));
        }
        Ok(size)
    }

    /// The prompt, once the lengths of all prompts are checked.
    fn checked_prompt(&self, limits: &Limits) -> Result<String, ValidationError> {
        let texts = [
            ("prompt", &self.prompt),
            ("negative_prompt", &self.negative_prompt),
            ("hires_prompt", &self.hires_prompt),
            ("hires_negative_prompt", &self.hires_negative_prompt),
            ("prompt_2", &self.prompt_2),
            ("negative_prompt_2", &self.negative_prompt_2),
        ];
        for (name, text) in texts {
            let bytes = text.as_ref().map_or(0, String::len);
            if bytes > limits.max_prompt_bytes {
                let max = limits.max_prompt_bytes;
                let reason = format!("has {bytes} bytes; at most {max} are allowed");
                return Err(self.range(name, reason));
            }
        }
        let required = || ValidationError::malformed(self.names.of("prompt"), "is required");
        self.prompt.clone().ok_or_else(required)
    }

    /// Checks that the files which the request's specs name exist. Blocks, on a network folder for as
    /// long as that does.
    pub fn check_files(&self, specs: &[Spec], model: &ModelInfo) -> Result<(), ValidationError> {
        let check = |spec: &Spec| model.check_files(spec).map_err(|error| self.refused(error));
        specs.iter().try_for_each(check)
    }

    /// Rejects an image that a file of this format cannot hold.
    pub fn check_format(&self, spec: &Spec, format: Format) -> Result<(), ValidationError> {
        let names = match &spec.hires {
            Some(_) => ["hires_width", "hires_height"],
            None => ["width", "height"],
        };
        let (size, max) = (spec.final_size(), format.max_side());
        let sides = [size.width(), size.height()];
        let sides = self.overlay.as_ref().map_or(sides, Overlay::sides);
        let sides = names.into_iter().zip(sides);
        match sides.into_iter().find(|(_, side)| *side > max) {
            Some((name, side)) => {
                let format = format.name();
                let reason = format!(
                    "gives a side of {side} pixels; a {format} file has at most {max}, request png"
                );
                Err(self.range(name, reason))
            }
            None => Ok(()),
        }
    }

    /// Warns of tiles of the VAE that are asked for and that there are none of.
    fn warn_of_no_tiles(&mut self, spec: &Spec, model: &ModelInfo) {
        if self.vae_tiling == Some(true) && !model.has_tiles(spec) {
            let (name, tile) = (self.names.of("vae_tiling"), model.memory.tile.unwrap_or_default());
            let why = format!("the image is no larger than a tile of {tile} pixels");
            self.warnings.push(format!("{name} has no effect: {why}"));
        }
    }

    /// Warns of syntax in the prompts that is drawn as words.
    fn warn_of_unread(&mut self, syntax: PromptSyntax) {
        use PromptRole::{A1111, A1111Negative, A1111Second, Plain};
        let second = another(&self.prompt_2, &self.prompt);
        let negative_second = another(&self.negative_prompt_2, &self.negative_prompt);
        let texts = [
            ("prompt", self.prompt.as_ref(), A1111),
            ("negative_prompt", self.negative_prompt.as_ref(), A1111Negative),
            ("hires_prompt", self.hires_prompt.as_ref(), A1111),
            ("hires_negative_prompt", self.hires_negative_prompt.as_ref(), A1111Negative),
            ("prompt_2", second, A1111Second),
            ("negative_prompt_2", negative_second, A1111Second),
        ];
        let warnings = texts.map(|(name, text, role)| {
            let role = if syntax == PromptSyntax::Plain { Plain } else { role };
            let unread = unread(text?, role);
            unread.map(|what| format!("{} {what}", self.names.of(name)))
        });
        self.warnings.extend(warnings.into_iter().flatten());
    }

    /// The defaults: those of a LoRA that was distilled to few steps before the model's. A warning
    /// says what of them the image gets.
    fn defaults<'a>(
        &self,
        model: &ModelInfo,
        loras: impl Iterator<Item = &'a LoraUse>,
    ) -> (Defaults, Vec<String>) {
        let own = model.defaults;
        let used = loras.filter(|lora| lora.scale > 0.0);
        let few = own.with_loras(used.map(|lora| lora.name.as_str()));
        let Some((few, why)) = few.filter(|_| !model.embeds_guidance) else {
            return (own, Vec::new());
        };
        let (steps, scale, sampler) = (few.steps, few.guidance_scale, few.sampler_name());
        let taken = [
            (self.num_inference_steps.is_none(), steps != own.steps, format!("{steps} steps")),
            (
                self.guidance_scale.is_none(),
                scale != own.guidance_scale,
                format!("guidance scale {scale}"),
            ),
            (
                self.scheduler.is_none() && self.schedule.is_none(),
                sampler != own.sampler_name(),
                format!("the sampler {sampler}"),
            ),
        ];
        let taken = taken.into_iter().filter(|(is_open, differs, _)| *is_open && *differs);
        let taken: Vec<_> = taken.map(|(.., what)| what).collect();
        let warning = (!taken.is_empty())
            .then(|| format!("{why}: its defaults were taken, {}", taken.join(", ")));
        // A schedule that is asked for is one of the model's own sampler.
        let own_sampler = self.scheduler.is_none() && self.schedule.is_some();
        let Defaults { sampler, schedule, eta, .. } = if own_sampler { own } else { few };
        (Defaults { sampler, schedule, eta, ..few }, warning.into_iter().collect())
    }

    /// The variation, unless it would change nothing.
    fn variation(&self, random_seed: u64) -> Result<Option<Variation>, ValidationError> {
        let Some(strength) = self.variation_strength else {
            let dependent = [("variation_seed", self.variation_seed.is_some())];
            return self.reject_without("variation_strength", dependent);
        };
        // Other than the seed, which may be random too; of 32 bits as well.
        let seed = self.variation_seed.unwrap_or(random_seed ^ u64::from(u32::MAX));
        Ok((strength > 0.0).then_some(Variation { seed, strength }))
    }

    /// The error of a spec that the model refuses.
    fn refused(&self, error: sd_models::Error) -> ValidationError {
        match error {
            sd_models::Error::Spec { field, reason } => self.range(field, reason),
            other => ValidationError::body(other.to_string()),
        }
    }

    /// The guidance scale. A default below 1, such as 0, switches guidance off, which is 1 in
    /// AUTOMATIC1111's syntax.
    fn scale(&self, usual: f64, syntax: PromptSyntax, model: &ModelInfo) -> f64 {
        let scale = self.guidance_scale.unwrap_or(usual);
        let is_off = scale == usual && usual < 1.0 && !model.embeds_guidance;
        if is_off && syntax == PromptSyntax::A1111 { 1.0 } else { scale }
    }

    /// The guidance rescale. Without guidance there is nothing that the default could scale back.
    fn rescale(&self, defaults: &Defaults, guided: bool) -> f64 {
        let default = if guided { defaults.guidance_rescale } else { 0.0 };
        self.guidance_rescale.unwrap_or(default)
    }

    /// Checks the number of LoRAs: of the field, and of each prompt.
    fn check_loras(&self, spec: &Spec, limits: &Limits) -> Result<(), ValidationError> {
        for pass in spec.passes() {
            let named = pass.text().map_or(0, |(_, named)| named.len());
            if spec.loras.len() + named > limits.max_loras {
                let most = limits.max_loras;
                let reason = format!("names too many LoRAs; at most {most} are allowed");
                let field = if named == 0 { "loras" } else { pass.field("prompt") };
                return Err(self.range(field, reason));
            }
        }
        Ok(())
    }
}

/// A LoRA of a request as the spec has it.
fn used(lora: &Lora) -> LoraUse {
    let scale = lora.scale.unwrap_or(1.0);
    let text_encoder_scale = lora.text_encoder_scale.unwrap_or(scale);
    LoraUse { name: lora.name.clone(), scale, text_encoder_scale }
}

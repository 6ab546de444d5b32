//! A request for images in native fields, and its validation: past it, everything is a [`Spec`].
//! The requests of all APIs become a [`DrawRequest`]; `http` reads their bodies.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;

use ::image::DynamicImage;
use schemars::JsonSchema;
use sd_models::{
    Churn, Defaults, Hires, Img2Img, LoraUse, MaskedStart, ModelInfo, PromptSyntax, SamplerName,
    SamplerOptions, SigmaSchedule, Size, Spec, Upscaler, Variation, unread,
};
use serde::Deserialize;
use serde_json::Value;

use super::error::ValidationError;
use super::fields::{Fields, Names};
use super::images::{ImageFile, MaskArea, Transparency};
use super::limits::Limits;
use crate::image::{self, Fit, Format, InpaintOptions, Inpainting, Overlay};

/// Minimum side of an image, in pixels.
pub(crate) const MIN_SIDE: usize = 8;

/// Maximum side of an image, in pixels. Larger sides are rejected before they are multiplied.
pub(crate) const MAX_SIDE: usize = 65_536;

/// Maximum guidance scale. More only burns the image.
pub(crate) const MAX_GUIDANCE: u32 = 100;

/// Maximum scale of a LoRA. More only burns the image.
const MAX_LORA_SCALE: i32 = 100;

/// Denoising strength of image-to-image, as in diffusers.
const DEFAULT_STRENGTH: f64 = 0.8;

/// Denoising strength of the hires pass, as in AUTOMATIC1111.
const DEFAULT_HIRES_STRENGTH: f64 = 0.75;

/// A request for images. What is omitted is the model's default.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DrawRequest {
    /// Text that describes the images.
    #[schemars(required)]
    pub(crate) prompt: Option<String>,
    /// Text that describes what the images should not show. It has an effect only if the guidance
    /// scale is above 1.
    pub(crate) negative_prompt: Option<String>,
    /// LoRAs of the server's directory.
    #[schemars(extend("maxItems" = Limits::LORAS))]
    pub(crate) loras: Option<Vec<Lora>>,
    /// Input image of image-to-image, in base64 or as a data URL. Its size is the default size.
    #[schemars(extend("x-aliases" = ["init_image"]))]
    pub(crate) image: Option<ImageFile>,
    /// Mask of inpainting: white areas are inpainted, black areas are preserved.
    #[schemars(extend("x-aliases" = ["mask_image"]))]
    pub(crate) mask: Option<ImageFile>,
    /// Denoising strength of image-to-image. Higher values change more. Default: 0.8.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) strength: Option<f64>,
    /// Width in pixels, a multiple of 8.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
    pub(crate) width: Option<usize>,
    /// Height in pixels, a multiple of 8.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
    pub(crate) height: Option<usize>,
    /// Number of sampler steps.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::STEPS, "x-aliases" = ["steps"]))]
    pub(crate) num_inference_steps: Option<usize>,
    /// Classifier-free guidance scale: how closely the images follow the prompt.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_GUIDANCE, "x-aliases" = ["cfg_scale"]))]
    pub(crate) guidance_scale: Option<f64>,
    /// Number of images. Each has the seed of the one before plus one.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::IMAGES, "x-aliases" = ["n"]))]
    pub(crate) num_images_per_prompt: Option<usize>,
    /// Seed of the noise. The same seed gives the same image. Default, and at -1: random.
    #[schemars(extend("minimum" = -1, "maximum" = u64::MAX))]
    pub(crate) seed: Option<u64>,
    /// Sampler, by the name here, in diffusers or in AUTOMATIC1111.
    #[schemars(extend("x-aliases" = ["sampler"]))]
    pub(crate) scheduler: Option<String>,
    /// Schedule: the spacing of the noise levels. `model` and `automatic`: the model's own.
    pub(crate) schedule: Option<String>,
    /// The share of its noise that the sampler draws anew at each step; for samplers that have one.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) eta: Option<f64>,
    /// Scale of the noise that the sampler draws. Default: 1.
    #[schemars(extend("minimum" = 0, "maximum" = sd_models::MAX_NOISE_SCALE))]
    pub(crate) s_noise: Option<f64>,
    /// Layers of the text encoder to skip at its end: 1 is AUTOMATIC1111's clip skip 2. Of the
    /// prompt only, as in diffusers; with the syntax a1111 of both prompts. Default: 0.
    #[schemars(extend("minimum" = 0))]
    pub(crate) clip_skip: Option<usize>,
    /// How far guidance is scaled back to the contrast of the prompt alone, against overexposure.
    /// Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) guidance_rescale: Option<f64>,
    /// Seed of a second noise that is mixed into the first noise. With several images it is this
    /// seed that grows by one. Default, and at -1: random.
    #[schemars(extend("minimum" = -1, "maximum" = u64::MAX))]
    pub(crate) variation_seed: Option<u64>,
    /// Share of the second noise: 0 is the image of the seed, 1 that of the variation seed.
    /// Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) variation_strength: Option<f64>,
    /// Width of the hires pass in pixels, which is the width of the images. Default: in the
    /// proportions of the base pass.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
    pub(crate) hires_width: Option<usize>,
    /// Height of the hires pass in pixels, which is the height of the images. Default: in the
    /// proportions of the base pass.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
    pub(crate) hires_height: Option<usize>,
    /// Number of sampler steps of the hires pass, of which `hires_strength` is the share that is
    /// taken. Default: as the base pass.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::STEPS))]
    pub(crate) hires_steps: Option<usize>,
    /// Denoising strength of the hires pass. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) hires_strength: Option<f64>,
    /// Upscaler of the latents: Latent, Latent (nearest), and others of AUTOMATIC1111's family.
    pub(crate) hires_upscaler: Option<String>,
    /// `plain`: prompts are read as by diffusers. `a1111`: as by AUTOMATIC1111, with (emphasis:1.3),
    /// [less], BREAK.
    pub(crate) prompt_syntax: Option<String>,
    /// Format of the image files: png, jpeg or webp.
    pub(crate) output_format: Option<String>,
    /// Whether the response is a stream of server-sent events. Default: false.
    pub(crate) stream: Option<bool>,
    /// Whether the events include live previews. Default: false.
    pub(crate) preview: Option<bool>,
    /// Noise that is added before steps.
    #[serde(skip)]
    pub(crate) churn: Churn,
    /// The pixels of the mask that are inpainted.
    #[serde(skip)]
    pub(crate) mask_area: MaskArea,
    /// How the input image fills a size of other proportions.
    #[serde(skip)]
    pub(crate) fit: Fit,
    /// How a mask is used, where the result keeps what is not masked.
    #[serde(skip)]
    pub(crate) inpaint: Option<InpaintOptions>,
    /// What the masked area begins as.
    #[serde(skip)]
    pub(crate) masked_start: MaskedStart,
    /// What is laid over the images, known with their specs.
    #[serde(skip)]
    pub(crate) overlay: Option<Overlay>,
    /// What transparent pixels of the input image are.
    #[serde(skip)]
    pub(crate) transparency: Transparency,
    /// What the reply says of fields that are not followed.
    #[serde(skip)]
    pub(crate) warnings: Vec<String>,
    /// Whether `hires_steps` are the steps that the hires pass takes, as in AUTOMATIC1111, and not
    /// those of which the strength is the share that is taken.
    #[serde(skip)]
    pub(crate) hires_counts_taken: bool,
    /// The client's names of the fields.
    #[serde(skip)]
    pub(crate) names: Names,
}

/// A LoRA of a request.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lora {
    /// Name of the file without its extension.
    name: String,
    /// Scale of the LoRA. Default: 1.
    #[schemars(extend("minimum" = -MAX_LORA_SCALE, "maximum" = MAX_LORA_SCALE))]
    scale: Option<f64>,
    /// Its scale in the text encoder. Default: the scale.
    #[schemars(extend("minimum" = -MAX_LORA_SCALE, "maximum" = MAX_LORA_SCALE))]
    text_encoder_scale: Option<f64>,
}

/// The input image and mask of a request.
struct Input {
    image: DynamicImage,
    mask: Option<DynamicImage>,
    strength: f64,
}

impl DrawRequest {
    /// Reads a request that has native fields only.
    pub fn read(fields: Fields, limits: &Limits) -> Result<Self, ValidationError> {
        let (request, unknown) = Self::read_known(fields, limits)?;
        match unknown.first() {
            None => Ok(request),
            Some(name) => Err(ValidationError::unknown(name)),
        }
    }

    /// The same, with the client's names of the fields that are unknown.
    pub(crate) fn read_known(
        mut fields: Fields,
        limits: &Limits,
    ) -> Result<(Self, Vec<String>), ValidationError> {
        for name in ["seed", "variation_seed"] {
            fields.drop_if(name, |seed| match seed {
                Value::String(text) => text.trim().parse() == Ok(-1.0),
                seed => seed.as_f64() == Some(-1.0),
            });
        }
        let request: Self = fields.read(limits).map_err(ValidationError::of_field)?;
        let (names, unknown) = fields.into_names();
        Ok((Self { names, ..request }, unknown))
    }

    /// Memory that [`Self::specs`] takes for decoded input images, in bytes.
    pub fn weigh(&mut self, limits: &Limits) -> usize {
        let images = [&mut self.image, &mut self.mask].into_iter().flatten();
        images.map(|image| image.weigh(limits.max_input_pixels)).sum()
    }

    /// One spec for each image. Omitted values come from the model, an omitted seed from
    /// `random_seed`. Not for async threads: the input images are decoded and resized.
    pub fn specs(
        &mut self,
        limits: &Limits,
        model: &ModelInfo,
        random_seed: u64,
    ) -> Result<Vec<Spec>, ValidationError> {
        for (name, text) in [("prompt", &self.prompt), ("negative_prompt", &self.negative_prompt)] {
            let bytes = text.as_ref().map_or(0, String::len);
            if bytes > limits.max_prompt_bytes {
                let max = limits.max_prompt_bytes;
                let reason = format!("has {bytes} bytes; at most {max} are allowed");
                return Err(self.range(name, reason));
            }
        }
        let required = || ValidationError::malformed(self.names.of("prompt"), "is required");
        let prompt = self.prompt.clone().ok_or_else(required)?;
        let syntax = self.choice::<PromptSyntax>("prompt_syntax", self.prompt_syntax.as_ref())?;
        let syntax = syntax.unwrap_or_default();
        let lora = |lora: &Lora| {
            let scale = lora.scale.unwrap_or(1.0);
            let text_encoder_scale = lora.text_encoder_scale.unwrap_or(scale);
            LoraUse { name: lora.name.clone(), scale, text_encoder_scale }
        };
        let loras: Vec<_> = self.loras.iter().flatten().map(lora).collect();
        // What is wrong with them is found below.
        let named = syntax.text(&prompt).map_or_else(|_| Vec::new(), |(_, named)| named);
        let (defaults, mut warnings) = self.defaults(model, loras.iter().chain(&named));
        self.warn_of_unread(&prompt, syntax);
        let input = self.input(limits)?;
        let size = input.as_ref().map_or(defaults.size, |input| input.size(limits, model));
        let sides = [self.width.unwrap_or(size.width()), self.height.unwrap_or(size.height())];
        let size = self.sides(["width", "height"], sides, limits)?;
        let SamplerName { sampler, schedule } = self.sampler_name(&defaults)?;
        let most = limits.max_steps.min(model.most_steps(sampler));
        let strength = ("strength", input.as_ref().map_or(1.0, |input| input.strength));
        let steps = match self.num_inference_steps {
            Some(steps) => steps,
            None => self.raised(defaults.steps, strength, most, &mut warnings)?,
        };
        let count = self.num_images_per_prompt.unwrap_or(1);
        self.within("num_images_per_prompt", count, 1..=limits.max_images)?;
        let guidance_scale = self.guidance_scale.unwrap_or(defaults.guidance_scale);
        let guided = guidance_scale > 1.0 && !model.embeds_guidance;
        let own_eta = defaults.eta.filter(|_| sampler == defaults.sampler);
        let hires = self.hires((size, steps), limits, model, most, &mut warnings)?;
        let spec = Spec {
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
            warnings,
            hires,
            img2img: input.map(|input| Arc::new(self.img2img(input, size))),
        };
        model.check(&spec).map_err(|error| self.refused(error))?;
        self.check_loras((spec.loras.len(), named.len()), limits)?;
        let numbered = |k: u64| {
            let mut image = spec.clone();
            image.set_number(&spec, k);
            image
        };
        Ok((0..count as u64).map(numbered).collect())
    }

    /// Warns of syntax in the prompts that is drawn as words.
    fn warn_of_unread(&mut self, prompt: &str, syntax: PromptSyntax) {
        let negative = self.negative_prompt.as_deref().unwrap_or_default();
        let texts = [("prompt", prompt), ("negative_prompt", negative)];
        let warnings = texts.map(|(name, text)| {
            let unread = unread(text, syntax == PromptSyntax::A1111);
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

    /// Checks that the files which the request's specs name exist. Blocks, on a network folder for as
    /// long as that does.
    pub fn check_files(&self, specs: &[Spec], model: &ModelInfo) -> Result<(), ValidationError> {
        let check = |spec| model.check_files(spec).map_err(|error| self.refused(error));
        specs.iter().try_for_each(check)
    }

    /// The error of a spec that the model refuses.
    fn refused(&self, error: sd_models::Error) -> ValidationError {
        match error {
            sd_models::Error::Spec { field, reason } => self.range(field, reason),
            other => ValidationError::body(other.to_string()),
        }
    }

    /// The format of the image files, if the request names one.
    pub fn format(&self) -> Result<Option<Format>, ValidationError> {
        self.choice("output_format", self.output_format.as_ref())
    }

    /// Rejects an image that a file of this format cannot hold.
    pub fn check_format(&self, spec: &Spec, format: Format) -> Result<(), ValidationError> {
        let names = match spec.hires {
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

    /// A named value.
    fn choice<T: FromStr<Err = String>>(
        &self,
        field: &str,
        name: Option<&String>,
    ) -> Result<Option<T>, ValidationError> {
        let parsed = name.map(|name| name.parse()).transpose();
        parsed.map_err(|reason| self.range(field, reason))
    }

    /// The sampler and its schedule. A name that has a schedule allows no other.
    fn sampler_name(&self, defaults: &Defaults) -> Result<SamplerName, ValidationError> {
        let named = self.choice::<SamplerName>("scheduler", self.scheduler.as_ref())?;
        let asked = self.schedule.as_ref().filter(|name| !name.eq_ignore_ascii_case("automatic"));
        let asked = self.choice::<SigmaSchedule>("schedule", asked)?;
        let Some(named) = named else {
            let own = defaults.sampler_name();
            return Ok(SamplerName { schedule: asked.unwrap_or(own.schedule), ..own });
        };
        let schedule = asked.unwrap_or(named.schedule);
        if ![schedule, SigmaSchedule::Model].contains(&named.schedule) {
            let reason = format!("{schedule} is another than that of the sampler {named}");
            return Err(self.range("schedule", reason));
        }
        Ok(SamplerName { schedule, ..named })
    }

    /// Decodes the input image and its mask.
    fn input(&mut self, limits: &Limits) -> Result<Option<Input>, ValidationError> {
        let Some(image) = &self.image else {
            let dependent = [("mask", self.mask.is_some()), ("strength", self.strength.is_some())];
            return self.reject_without("image", dependent);
        };
        let max_pixels = limits.max_input_pixels;
        let image = image.decode(self.names.of("image"), max_pixels)?;
        if let Some(InpaintOptions { only_masked: Some(_), .. }) = self.inpaint
            && image.width() as usize * image.height() as usize > limits.max_pixels
        {
            let (width, height, most) = (image.width(), image.height(), limits.max_pixels);
            let reason = format!(
                "is {width}x{height}, the size of the result with inpaint_full_res; at most {most} \
                 pixels are generated"
            );
            return Err(self.range("image", reason));
        }
        let name = self.names.of("mask");
        let mask = self.mask.as_ref().map(|mask| mask.decode(name, max_pixels)).transpose()?;
        if self.inpaint.is_none()
            && matches!(self.mask_area, MaskArea::White)
            && mask.as_ref().is_some_and(image::is_transparent)
        {
            let warning =
                format!("{name} is transparent in places: their hidden colours were used");
            self.warnings.push(warning);
        }
        let mask = if self.inpaint.is_some() { mask.map(image::opaque_mask) } else { mask };
        let mask = self.mask_area.mask(name, mask, &image)?;
        let is_mask = matches!(self.mask_area, MaskArea::Transparent);
        let image = match self.transparency {
            Transparency::White => image::on_white(image),
            Transparency::Ignored => {
                if !is_mask && image::is_transparent(&image) {
                    let name = self.names.of("image");
                    let warning =
                        format!("{name} is transparent in places: their hidden colours were used");
                    self.warnings.push(warning);
                }
                image
            }
        };
        let strength = match (self.mask_area, &mask) {
            // The pixels below transparency are no part of the image.
            (MaskArea::Transparent, Some(_)) => 1.0,
            _ => DEFAULT_STRENGTH,
        };
        Ok(Some(Input { image, mask, strength: self.strength.unwrap_or(strength) }))
    }

    /// The input image and mask in the size of the images.
    fn img2img(&mut self, Input { image, mask, strength }: Input, size: Size) -> Img2Img {
        let (fit, masked_start) = (self.fit, self.masked_start);
        let inpainting = mask
            .as_ref()
            .zip(self.inpaint)
            .map(|(mask, options)| Inpainting::new(&image, &mask.to_luma8(), size, fit, options));
        match inpainting {
            Some(Some(Inpainting { picture, mask, overlay })) => {
                self.overlay = Some(overlay);
                Img2Img { picture, strength, mask: Some(mask), masked_start }
            }
            Some(None) => {
                self.warnings.push("nothing is masked: the whole image was generated".into());
                let picture = image::resize_to(&image, size, fit);
                Img2Img { picture, strength, mask: None, masked_start: MaskedStart::Picture }
            }
            None => {
                let picture = image::resize_to(&image, size, fit);
                let mask = mask.map(|mask| image::fit_mask(&mask, size, fit));
                let has_mask = mask.is_some();
                let start = if has_mask { masked_start } else { MaskedStart::Picture };
                Img2Img { picture, strength, mask, masked_start: start }
            }
        }
    }

    /// Without the field `missing`, rejects the fields that have no effect without it.
    fn reject_without<T, const N: usize>(
        &self,
        missing: &str,
        dependent: [(&str, bool); N],
    ) -> Result<Option<T>, ValidationError> {
        let Some((name, _)) = dependent.iter().find(|(_, given)| *given) else { return Ok(None) };
        Err(ValidationError::malformed(
            self.names.of(name),
            format!("requires {}", self.names.of(missing)),
        ))
    }

    /// Checks a number that an API may have computed.
    fn within(
        &self,
        name: &str,
        value: usize,
        range: RangeInclusive<usize>,
    ) -> Result<(), ValidationError> {
        if range.contains(&value) {
            return Ok(());
        }
        let reason = format!("must be from {} to {}, not {value}", range.start(), range.end());
        Err(self.range(name, reason))
    }

    /// The error of a value that is out of range.
    fn range(&self, name: &str, reason: impl fmt::Display) -> ValidationError {
        ValidationError::range(self.names.of(name), reason)
    }

    /// The guidance rescale. Without guidance there is nothing that the default could scale back.
    fn rescale(&self, defaults: &Defaults, guided: bool) -> f64 {
        let default = if guided { defaults.guidance_rescale } else { 0.0 };
        self.guidance_rescale.unwrap_or(default)
    }

    /// Checks the number of LoRAs: of the field, and of the prompt.
    fn check_loras(
        &self,
        (listed, named): (usize, usize),
        limits: &Limits,
    ) -> Result<(), ValidationError> {
        if listed + named <= limits.max_loras {
            return Ok(());
        }
        let reason = format!("names too many LoRAs; at most {} are allowed", limits.max_loras);
        Err(self.range(if named == 0 { "loras" } else { "prompt" }, reason))
    }

    /// So many steps that a strength leaves one, with a warning where these are more.
    fn raised(
        &self,
        steps: usize,
        (field, strength): (&str, f64),
        most: usize,
        warnings: &mut Vec<String>,
    ) -> Result<usize, ValidationError> {
        let least = (1.0 / strength).ceil() as usize;
        if least > most {
            let reason =
                format!("of {strength} takes less than one of {most} steps, the most there can be");
            return Err(self.range(field, reason));
        }
        if least > steps {
            let field = self.names.of(field);
            warnings.push(format!(
                "{field} {strength} takes less than one of {steps} steps: there are {least}"
            ));
        }
        Ok(steps.max(least))
    }

    /// The steps of a hires pass of which the strength leaves those that are asked for, or as many
    /// as a schedule of at most `most` steps has, with a warning.
    fn hires_schedule(
        &self,
        taken: usize,
        strength: f64,
        most: usize,
        warnings: &mut Vec<String>,
    ) -> Result<usize, ValidationError> {
        let steps = (taken as f64 / strength).ceil() as usize;
        let left = (most as f64 * strength) as usize;
        if left == 0 {
            let reason =
                format!("of {strength} takes less than one of {most} steps, the most there can be");
            return Err(self.range("hires_strength", reason));
        }
        if steps > most {
            let field = self.names.of("hires_strength");
            warnings.push(format!(
                "the hires pass takes {left} of {taken} steps: at a {field} of {strength} a schedule \
                 of {most} steps, the most there can be, has no more"
            ));
        }
        Ok(steps.clamp(1, most))
    }

    /// The hires pass, in the proportions of the base pass if only one of its sides is given. A
    /// schedule has at most `most` steps.
    fn hires(
        &self,
        (base, steps): (Size, usize),
        limits: &Limits,
        model: &ModelInfo,
        most: usize,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Hires>, ValidationError> {
        let scaled = |side: usize, by: usize, of: usize| {
            (side * by / of / model.multiple).max(1) * model.multiple
        };
        let (w, h) = (base.width(), base.height());
        let sides = match (self.hires_width, self.hires_height) {
            (Some(width), Some(height)) => [width, height],
            (Some(width), None) => [width, scaled(width, h, w)],
            (None, Some(height)) => [scaled(height, w, h), height],
            (None, None) => {
                let dependent = [
                    ("hires_steps", self.hires_steps.is_some()),
                    ("hires_strength", self.hires_strength.is_some()),
                    ("hires_upscaler", self.hires_upscaler.is_some()),
                ];
                return self.reject_without("hires_width", dependent);
            }
        };
        let upscaler = self.choice::<Upscaler>("hires_upscaler", self.hires_upscaler.as_ref())?;
        let strength = self.hires_strength.unwrap_or(DEFAULT_HIRES_STRENGTH);
        Ok(Some(Hires {
            size: self.sides(["hires_width", "hires_height"], sides, limits)?,
            steps: match self.hires_steps {
                taken if self.hires_counts_taken => {
                    self.hires_schedule(taken.unwrap_or(steps), strength, most, warnings)?
                }
                Some(steps) => steps,
                None => self.raised(steps, ("hires_strength", strength), most, warnings)?,
            },
            strength,
            upscaler: upscaler.unwrap_or_default(),
        }))
    }

    /// A size of these sides.
    fn sides(
        &self,
        names: [&str; 2],
        [width, height]: [usize; 2],
        limits: &Limits,
    ) -> Result<Size, ValidationError> {
        for (name, side) in names.iter().zip([width, height]) {
            self.within(name, side, MIN_SIDE..=MAX_SIDE)?;
            if side % 8 != 0 {
                let reason = format!("must be a multiple of 8, not {side}");
                return Err(self.range(name, reason));
            }
        }
        let max = limits.max_pixels;
        let size = Size::new(width, height).filter(|size| size.pixels() <= max);
        size.ok_or_else(|| {
            let larger = if width >= height { names[0] } else { names[1] };
            let reason = format!("is too large: {width}x{height} exceeds {max} pixels");
            self.range(larger, reason)
        })
    }
}

impl Input {
    /// The image's own size in whole multiples of what the model can generate, downscaled in its
    /// proportions if it is too large.
    fn size(&self, limits: &Limits, model: &ModelInfo) -> Size {
        let (width, height) = (f64::from(self.image.width()), f64::from(self.image.height()));
        let scale = (limits.max_pixels as f64 / (width * height)).sqrt().min(1.0);
        let side = |side: f64| ((side * scale) as usize / model.multiple).max(1) * model.multiple;
        Size::new(side(width), side(height)).unwrap_or(model.defaults.size)
    }
}

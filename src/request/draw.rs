//! A request for images in native fields. The requests of all APIs become a [`DrawRequest`]; `http`
//! reads their bodies.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use schemars::JsonSchema;
use sd_models::{Churn, MaskedStart, Source};
use serde::Deserialize;
use serde_json::Value;

use super::controlnet::{ControlMaps, ControlNet};
use super::error::ValidationError;
use super::fields::{Fields, Names};
use super::images::{ImageFile, MaskArea, Transparency};
use super::ip_adapter::{IpAdapterFields, MAX_IP_ADAPTERS, OneOrMany};
use super::limits::Limits;
use crate::image::{Fit, Format, InpaintOptions, Overlay};

/// Minimum side of an image, in pixels.
pub(crate) const MIN_SIDE: usize = 8;

/// Maximum side of an image, in pixels. Larger sides are rejected before they are multiplied.
pub(crate) const MAX_SIDE: usize = 65_536;

/// Maximum guidance scale. More only burns the image.
pub(crate) const MAX_GUIDANCE: u32 = 100;

/// Maximum blur of a mask, in pixels.
const MAX_MASK_BLUR: u32 = 64;

/// Maximum number of pixels around the masked area that are generated with it.
const MAX_MASK_PADDING: u32 = 256;

/// Maximum difference of seeds. Seeds are of 32 bits to torch's generator.
pub(crate) const MAX_SEED_DELTA: i64 = 1 << 32;

/// Maximum of the scores of a refiner, which was trained on scores up to 10.
pub(crate) const MAX_SCORE: u32 = 100;

/// Maximum scale of a LoRA. More only burns the image.
const MAX_LORA_SCALE: i32 = 100;

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
    /// Prompt of the second text encoder of Stable Diffusion XL. Default: the prompt.
    pub(crate) prompt_2: Option<String>,
    /// Negative prompt of its second text encoder. Default: the negative prompt.
    pub(crate) negative_prompt_2: Option<String>,
    /// Height and width in pixels of the picture that an image of Stable Diffusion XL is to look as
    /// if made from. Default: those of the image.
    #[schemars(extend("maxItems" = 2))]
    pub(crate) original_size: Option<Vec<usize>>,
    /// Top and left in pixels of the part of that picture that the image is to look as if it were.
    /// Default: 0, 0.
    #[schemars(extend("maxItems" = 2, "x-aliases" = ["crops_coords_top_left"]))]
    pub(crate) crop: Option<Vec<usize>>,
    /// Height and width in pixels for which Stable Diffusion XL is to take the image. Default: those
    /// of the image.
    #[schemars(extend("maxItems" = 2))]
    pub(crate) target_size: Option<Vec<usize>>,
    /// How beautiful a refiner of Stable Diffusion XL is to take the image for. Default: 6.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SCORE))]
    pub(crate) aesthetic_score: Option<f64>,
    /// The same of the negative prompt. Default: 2.5.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SCORE))]
    pub(crate) negative_aesthetic_score: Option<f64>,
    /// Another model of the server, such as the refiner of Stable Diffusion XL, that takes the image
    /// over on its way. With a hires pass it does so in that.
    pub(crate) refiner: Option<String>,
    /// The share of the noise levels after which the refiner takes over. Default: 0.8.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) refiner_switch_at: Option<f64>,
    /// The share of the noise levels at which the image begins, from the input image as if that were
    /// under noise already; the strength has no effect then.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) denoising_start: Option<f64>,
    /// The share of the noise levels after which the image ends, with the noise that is left.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub(crate) denoising_end: Option<f64>,
    /// LoRAs of the server's directory.
    #[schemars(extend("maxItems" = Limits::LORAS))]
    pub(crate) loras: Option<Vec<Lora>>,
    /// ControlNets of the server's directory, each with the picture by which it steers.
    #[schemars(extend("maxItems" = Limits::CONTROLNETS))]
    pub(crate) controlnets: Option<Vec<ControlNet>>,
    /// IP-Adapter of the server's directory, with the picture that the images are to look like; or a
    /// list of them.
    pub(crate) ip_adapter: Option<OneOrMany<IpAdapterFields, MAX_IP_ADAPTERS>>,
    /// Input image of image-to-image, in base64 or as a data URL. Its size is the default size.
    #[schemars(extend("x-aliases" = ["init_image"]))]
    pub(crate) image: Option<ImageFile>,
    /// Mask of inpainting: white areas are inpainted, black areas are preserved.
    #[schemars(extend("x-aliases" = ["mask_image"]))]
    pub(crate) mask: Option<ImageFile>,
    /// Blur of the mask in pixels. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_MASK_BLUR))]
    pub(crate) mask_blur: Option<f64>,
    /// Generates the masked area alone, in the size of the request, with so many pixels around it,
    /// and puts it back into the input image.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_MASK_PADDING))]
    pub(crate) mask_padding: Option<u32>,
    /// What the masked area begins as: original, fill (the colours around it), noise or nothing.
    /// Default: original.
    pub(crate) mask_fill: Option<String>,
    /// Whether black areas are inpainted and white areas are preserved. Default: false.
    pub(crate) mask_invert: Option<bool>,
    /// Denoising strength of image-to-image. Higher values change more. Default: 0.8; of Stable
    /// Diffusion XL 0.3, and 0.9999 with a mask.
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
    /// What is added to the seed for the noise that the sampler draws at its steps. Default: 0.
    #[schemars(extend("minimum" = -MAX_SEED_DELTA, "maximum" = MAX_SEED_DELTA))]
    pub(crate) eta_noise_seed_delta: Option<i64>,
    /// Whether the opposite edges of the images meet, so that an image can be laid beside itself.
    /// Default: false.
    pub(crate) tiling: Option<bool>,
    /// Whether the VAE encodes and decodes in tiles what is larger than one, which takes less memory
    /// and changes the image a little. Default: the server's, and where the whole would not fit its
    /// memory budget.
    pub(crate) vae_tiling: Option<bool>,
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
    /// Upscaler: of the latents Latent, Latent (nearest) and others of AUTOMATIC1111's family; of the
    /// picture Lanczos, Nearest, None, or the name of a file of the server's directory.
    pub(crate) hires_upscaler: Option<String>,
    /// Prompt of the hires pass. Default: as the base pass.
    pub(crate) hires_prompt: Option<String>,
    /// Negative prompt of the hires pass. Default: as the base pass.
    pub(crate) hires_negative_prompt: Option<String>,
    /// Guidance scale of the hires pass. Default: as the base pass.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_GUIDANCE))]
    pub(crate) hires_guidance_scale: Option<f64>,
    /// Sampler of the hires pass. Default: as the base pass.
    pub(crate) hires_scheduler: Option<String>,
    /// Schedule of the hires pass. Default: as the base pass, and with a `hires_scheduler` the
    /// model's own.
    pub(crate) hires_schedule: Option<String>,
    /// `plain`: prompts are read as by diffusers. `a1111`: as by AUTOMATIC1111, with (emphasis:1.3),
    /// [less], BREAK, [from:to:0.5], [one|another], AND.
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
    /// What became of the control pictures, known with the specs.
    #[serde(skip)]
    pub(crate) control_maps: ControlMaps,
    /// What transparent pixels of the input image are.
    #[serde(skip)]
    pub(crate) transparency: Transparency,
    /// The files of the refiner, known before the specs.
    #[serde(skip)]
    pub(crate) refiner_files: Option<Source>,
    /// How the input files were prepared, by AUTOMATIC1111's names, known with the specs.
    #[serde(skip)]
    pub(crate) parameters: Vec<(&'static str, String)>,
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
    pub(super) name: String,
    /// Scale of the LoRA. Default: 1.
    #[schemars(extend("minimum" = -MAX_LORA_SCALE, "maximum" = MAX_LORA_SCALE))]
    pub(super) scale: Option<f64>,
    /// Its scale in the text encoder. Default: the scale.
    #[schemars(extend("minimum" = -MAX_LORA_SCALE, "maximum" = MAX_LORA_SCALE))]
    pub(super) text_encoder_scale: Option<f64>,
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
        let images = images.map(|image| image.weigh(limits.max_input_pixels));
        let images = images.fold(0, usize::saturating_add);
        let (nets, input) = (self.controlnets.iter_mut().flatten(), self.image.as_ref());
        let nets = nets.map(|net| net.weigh(limits, input)).fold(images, usize::saturating_add);
        nets.saturating_add(self.weigh_ip_pictures(limits))
    }

    /// The format of the image files, if the request names one.
    pub fn format(&self) -> Result<Option<Format>, ValidationError> {
        self.choice("output_format", self.output_format.as_ref())
    }

    /// A named value.
    pub(super) fn choice<T: FromStr<Err = String>>(
        &self,
        field: &str,
        name: Option<&String>,
    ) -> Result<Option<T>, ValidationError> {
        let parsed = name.map(|name| name.parse()).transpose();
        parsed.map_err(|reason| self.range(field, reason))
    }

    /// Without the field `missing`, rejects the fields that have no effect without it.
    pub(super) fn reject_without<T, const N: usize>(
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
    pub(super) fn within(
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
    pub(super) fn range(&self, name: &str, reason: impl fmt::Display) -> ValidationError {
        ValidationError::range(self.names.of(name), reason)
    }
}

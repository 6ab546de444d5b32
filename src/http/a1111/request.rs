//! The requests of AUTOMATIC1111's API and their translation. As there, unknown fields are ignored.
//! Fields that would change the image and are not supported are rejected by name.

use schemars::JsonSchema;
use sd_models::{Churn, MAX_NOISE_SCALE, ModelInfo};
use serde::Deserialize;
use serde_json::Value;

use super::hires::HiresPass;
use super::init_image::InitImage;
use super::nothing::is_off;
use super::sampler::SamplerFields;
use crate::request::{
    DrawRequest, Fields, Limits, MAX_GUIDANCE, MAX_SCORE, MAX_SEED_DELTA, MAX_SIDE, Names, Object,
    ValidationError,
};

/// Fields that would change the image. Clients send most of them with values that have no effect.
const REJECTED: [&str; 9] = [
    "restore_faces",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "styles",
    "script_name",
    "s_min_uncond",
    "disable_extra_networks",
    "firstpass_image",
    "latent_mask",
];

/// Pixels of a latent along one side.
const LATENT: usize = 8;

/// Maximum of the parameters of added noise; the sigmas of the training are smaller.
const MAX_CHURN: u32 = 1000;

/// The fields of both routes.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Common {
    /// Text that describes the images, in AUTOMATIC1111's syntax. Default: empty.
    prompt: Option<String>,
    /// Text that describes what the images should not show.
    negative_prompt: Option<String>,
    /// Width in pixels, rounded down to a multiple of 8. Default, and at 0: the model's.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    width: Option<usize>,
    /// Height in pixels, rounded down to a multiple of 8. Default, and at 0: the model's.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    height: Option<usize>,
    /// Number of sampler steps.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::STEPS))]
    steps: Option<usize>,
    /// Classifier-free guidance scale.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_GUIDANCE))]
    cfg_scale: Option<f64>,
    /// Seed of the first image. Random if it is negative.
    #[schemars(extend("minimum" = -1, "maximum" = u64::MAX))]
    seed: Option<u64>,
    /// Seed of a variation. Random if it is negative. With several images it is this seed that
    /// grows by one.
    #[schemars(extend("minimum" = -1, "maximum" = u64::MAX))]
    subseed: Option<u64>,
    /// Share of the variation's noise. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    subseed_strength: Option<f64>,
    /// Clip skip, where `override_settings` has no `CLIP_stop_at_last_layers`. Default: 1.
    #[schemars(extend("minimum" = 0))]
    clip_skip: Option<usize>,
    /// What is added to the seed for the noise that the sampler draws at its steps, where
    /// `override_settings` does not have it. Default: 0.
    #[schemars(extend("minimum" = -MAX_SEED_DELTA, "maximum" = MAX_SEED_DELTA))]
    eta_noise_seed_delta: Option<i64>,
    /// Sampler.
    #[schemars(extend("maxLength" = 64))]
    sampler_name: Option<String>,
    /// Older name of `sampler_name`.
    #[schemars(extend("maxLength" = 64))]
    sampler_index: Option<String>,
    /// Schedule. Default: automatic.
    #[schemars(extend("maxLength" = 64))]
    scheduler: Option<String>,
    /// The share of its noise that the sampler draws anew at each step.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    eta: Option<f64>,
    /// Scale of the noise that the sampler draws.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_NOISE_SCALE))]
    s_noise: Option<f64>,
    /// Noise that is added before the steps of Euler, Heun and DPM2.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_CHURN))]
    s_churn: Option<f64>,
    /// The smallest sigma at which noise is added.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_CHURN))]
    s_tmin: Option<f64>,
    /// The largest sigma at which noise is added. No limit at 0.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_CHURN))]
    s_tmax: Option<f64>,
    /// Whether the opposite edges of the images meet. Default: false.
    tiling: Option<bool>,
    /// Number of images, multiplied by `n_iter`.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::IMAGES))]
    pub(crate) batch_size: Option<usize>,
    /// Number of images, multiplied by `batch_size`.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::IMAGES))]
    pub(crate) n_iter: Option<usize>,
    /// Title of the model that takes the image over on its way.
    #[schemars(extend("maxLength" = 512))]
    pub(super) refiner_checkpoint: Option<String>,
    /// Share of the noise levels after which it does. Default: from the first step on.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    refiner_switch_at: Option<f64>,
    /// Whether there is a hires pass. Only for txt2img.
    enable_hr: Option<Value>,
    /// Options of this request only.
    pub(crate) override_settings: Option<Overrides>,
    /// Identifier of this request for `/internal/progress`.
    #[schemars(extend("maxLength" = 256))]
    pub(crate) force_task_id: Option<String>,
    /// Whether the response holds the images. Default: true.
    pub(crate) send_images: Option<bool>,
    /// Generation parameters as text, for fields that the request does not have.
    #[expect(dead_code, reason = "it has become fields before")]
    infotext: Option<String>,
}

/// Options of one request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Overrides {
    /// The model.
    pub(crate) sd_model_checkpoint: Option<String>,
    /// Format of the image files: png, jpg or webp.
    samples_format: Option<String>,
    /// Clip skip: 1 is the whole text encoder, 2 skips its last layer. Default: 1.
    #[schemars(extend("minimum" = 0))]
    #[serde(rename = "CLIP_stop_at_last_layers")]
    clip_skip: Option<usize>,
    /// What is added to the seed for the noise that the sampler draws at its steps. Default: 0.
    #[schemars(extend("minimum" = -MAX_SEED_DELTA, "maximum" = MAX_SEED_DELTA))]
    eta_noise_seed_delta: Option<i64>,
    /// How beautiful a refiner is to take the image for. Default: 6.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SCORE))]
    sdxl_refiner_high_aesthetic_score: Option<f64>,
    /// The same of the negative prompt. Default: 2.5.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SCORE))]
    sdxl_refiner_low_aesthetic_score: Option<f64>,
    /// Options that must be as they are.
    #[serde(flatten)]
    pub(crate) others: Object,
}

/// The fields of txt2img.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Txt2Img {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    hires: HiresPass,
}

/// The fields of img2img.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Img2Img {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    init: InitImage,
}

impl Common {
    /// Takes the common fields out, and rejects fields that are not supported.
    pub(crate) fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ValidationError> {
        for name in REJECTED {
            if let Some((name, value)) = fields.take(&[name])?
                && !is_off(&value)
            {
                return Err(ValidationError::range(&name, "is not supported"));
            }
        }
        let number = |value: &Value| match value {
            Value::String(text) => text.trim().parse().ok(),
            other => other.as_f64(),
        };
        fields.drop_if("refiner_checkpoint", is_off);
        fields.drop_if("initial_noise_multiplier", |value| number(value) == Some(1.0));
        if let Some((name, _)) = fields.take(&["initial_noise_multiplier"])? {
            return Err(ValidationError::range(&name, "is not supported: it may be 1"));
        }
        for name in ["seed", "subseed"] {
            let is_random = |seed: &Value| number(seed).is_some_and(|n| n < 0.0);
            fields.drop_if(name, is_random);
        }
        for name in ["width", "height"] {
            fields.drop_if(name, |side| number(side) == Some(0.0));
        }
        for name in ["subseed_strength", "clip_skip"] {
            let is_negative = |value: &Value| number(value).is_some_and(|number| number < 0.0);
            fields.drop_if(name, |value| is_off(value) && !is_negative(value));
        }
        fields.read(limits)
    }

    /// Whether there is a hires pass.
    pub(crate) fn has_hires(&self) -> bool {
        self.enable_hr.as_ref().is_some_and(|enabled| !is_off(enabled))
    }

    /// The request in native fields.
    pub(crate) fn into_draw(self) -> Result<DrawRequest, ValidationError> {
        let (scheduler, schedule) = self.sampler().names(["sampler_name", "scheduler"])?;
        let (name, clip_skip) = match self.override_settings.as_ref().and_then(|o| o.clip_skip) {
            Some(layers) => ("override_settings.CLIP_stop_at_last_layers", Some(layers)),
            None => ("clip_skip", self.clip_skip),
        };
        let options = self.override_settings.as_ref();
        let delta = options.and_then(|options| options.eta_noise_seed_delta);
        // Clients that send all options have the defaults, whatever the model is.
        let of_options = |of: fn(&Overrides) -> Option<f64>, usual| {
            options.and_then(of).filter(|score| *score != usual)
        };
        let aesthetic_score = of_options(|all| all.sdxl_refiner_high_aesthetic_score, 6.0);
        let negative_aesthetic_score = of_options(|all| all.sdxl_refiner_low_aesthetic_score, 2.5);
        let mut warnings = Vec::new();
        let [width, height] = [("width", self.width), ("height", self.height)]
            .map(|(name, side)| side.map(|side| rounded(name, side, &mut warnings)));
        Ok(DrawRequest {
            warnings,
            aesthetic_score,
            negative_aesthetic_score,
            eta_noise_seed_delta: delta.or(self.eta_noise_seed_delta),
            prompt: Some(self.prompt.unwrap_or_default()),
            prompt_syntax: Some("a1111".into()),
            // Of Stable Diffusion XL an empty one is no prompt there.
            negative_prompt: self.negative_prompt.filter(|text| !text.is_empty()),
            width,
            height,
            num_inference_steps: self.steps,
            guidance_scale: self.cfg_scale,
            num_images_per_prompt: Some(self.batch_size.unwrap_or(1) * self.n_iter.unwrap_or(1)),
            seed: self.seed,
            // There 1 is the last layer.
            clip_skip: clip_skip.map(|layers| layers.saturating_sub(1)),
            // Clients send a seed whether there is a variation or not.
            variation_seed: self.subseed.filter(|_| self.subseed_strength.is_some()),
            variation_strength: self.subseed_strength,
            tiling: self.tiling,
            // Clients send it whether there is a refiner or not.
            refiner_switch_at: self
                .refiner_checkpoint
                .as_ref()
                .map(|_| self.refiner_switch_at.unwrap_or(0.0)),
            refiner: self.refiner_checkpoint,
            scheduler,
            schedule,
            eta: self.eta,
            s_noise: self.s_noise,
            churn: Churn {
                amount: self.s_churn.unwrap_or(0.0),
                from: self.s_tmin.unwrap_or(0.0),
                to: self.s_tmax.filter(|to| *to > 0.0).unwrap_or(f64::INFINITY),
            },
            output_format: self.override_settings.and_then(|options| options.samples_format),
            names: names(name),
            ..DrawRequest::default()
        })
    }

    /// The fields of the sampler. Older versions of AUTOMATIC1111 had one for it and its schedule.
    pub(crate) fn sampler(&self) -> SamplerFields {
        let names = [&self.sampler_name, &self.sampler_index];
        // Names of no sampler, as some clients' menus have them.
        let is_none = |name: &str| {
            ["", "none", "default", "automatic"].contains(&&*name.trim().to_ascii_lowercase())
        };
        let sampler = names.into_iter().flatten().find(|name| !is_none(name)).cloned();
        let is_named = |name: &&String| {
            !name.trim().is_empty() && !name.trim().eq_ignore_ascii_case("automatic")
        };
        SamplerFields { sampler, scheduler: self.scheduler.as_ref().filter(is_named).cloned() }
    }
}

/// This API's names of the native fields; that of the skipped layers depends on where they are given.
fn names(clip_skip: &str) -> Names {
    Names::from([
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("num_images_per_prompt", "batch_size x n_iter"),
        ("clip_skip", clip_skip),
        ("variation_strength", "subseed_strength"),
        ("scheduler", "sampler_name"),
        ("schedule", "scheduler"),
        ("refiner", "refiner_checkpoint"),
        ("aesthetic_score", "override_settings.sdxl_refiner_high_aesthetic_score"),
        ("negative_aesthetic_score", "override_settings.sdxl_refiner_low_aesthetic_score"),
        ("output_format", "override_settings.samples_format"),
        ("image", "init_images"),
        ("mask_padding", "inpaint_full_res"),
        ("strength", "denoising_strength"),
        ("hires_strength", "denoising_strength"),
        ("hires_steps", "hr_second_pass_steps"),
        ("hires_upscaler", "hr_upscaler"),
        ("controlnets", "alwayson_scripts.controlnet.args"),
        ("ip_adapter", "alwayson_scripts.controlnet.args"),
        ("hires_prompt", "hr_prompt"),
        ("hires_negative_prompt", "hr_negative_prompt"),
        ("hires_guidance_scale", "hr_cfg"),
        ("hires_scheduler", "hr_sampler_name"),
        ("hires_schedule", "hr_scheduler"),
    ])
}

/// A side that AUTOMATIC1111 draws: a whole number of latents. Its page asks for no less than
/// `MIN_ROUNDED`; a smaller multiple of 8 is meant.
fn rounded(name: &str, side: usize, warnings: &mut Vec<String>) -> usize {
    /// The least side of AUTOMATIC1111's page.
    const MIN_ROUNDED: usize = 64;
    if side.is_multiple_of(LATENT) {
        return side;
    }
    let drawn = (side / LATENT * LATENT).max(MIN_ROUNDED);
    warnings.push(format!("{name} {side} is no multiple of {LATENT}: it is {drawn}"));
    drawn
}

/// Checks the skipped layers of the text encoder against the model's. As there, OpenCLIP's skips
/// none.
pub(crate) fn check_clip_skip(
    draw: &mut DrawRequest,
    model: &ModelInfo,
) -> Result<(), ValidationError> {
    /// Width of OpenCLIP's text encoder.
    const OPEN_CLIP: usize = 1024;
    let name = draw.names.of("clip_skip");
    match draw.clip_skip {
        // There 1 is the last layer.
        Some(skipped) if skipped > model.text_layers => {
            let (most, given) = (model.text_layers + 1, skipped + 1);
            Err(ValidationError::range(name, format!("must be from 1 to {most}, not {given}")))
        }
        Some(skipped) if skipped > 0 && (model.is_xl || model.text_width == OPEN_CLIP) => {
            let why = match model.is_xl {
                true => "the model is of Stable Diffusion XL",
                false => "the model's text encoder is OpenCLIP",
            };
            draw.warnings.push(format!("{name} has no effect, as in AUTOMATIC1111: {why}"));
            draw.clip_skip = None;
            Ok(())
        }
        _ => Ok(()),
    }
}

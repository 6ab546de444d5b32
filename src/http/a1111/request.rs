//! The requests of AUTOMATIC1111's API and their translation. As there, unknown fields are ignored.
//! Fields that would change the image and are not supported are rejected by name.

use schemars::JsonSchema;
use sd_models::{Churn, MAX_NOISE_SCALE, MaskedStart, ModelInfo, SamplerName, SigmaSchedule};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::image::{Fit, InpaintOptions};
use crate::request::{
    DrawRequest, Fields, ImageFile, Limits, MAX_GUIDANCE, MAX_SIDE, MIN_SIDE, MaskArea, Names,
    Transparency, ValidationError,
};

/// Fields that would change the image. Clients send most of them with values that have no effect.
const REJECTED: [&str; 9] = [
    "restore_faces",
    "tiling",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "styles",
    "script_name",
    "refiner_checkpoint",
    "infotext",
    "s_min_uncond",
];

/// Fields of the hires pass that must be as in the base pass, the value that means it, and the
/// field of the base pass.
const MUST_MATCH_BASE_PASS: [(&str, &str, &str); 7] = [
    ("hr_prompt", "", "prompt"),
    ("hr_negative_prompt", "", "negative_prompt"),
    ("hr_checkpoint_name", "Use same checkpoint", "sd_model_checkpoint"),
    ("hr_sampler_name", "Use same sampler", "sampler_name"),
    ("hr_scheduler", "Use same scheduler", "scheduler"),
    ("hr_cfg", "", "cfg_scale"),
    ("hr_additional_modules", "Use same choices", ""),
];

/// Default denoising strength.
const DEFAULT_STRENGTH: f64 = 0.75;

/// Default blur of a mask, in pixels.
const DEFAULT_MASK_BLUR: f64 = 4.0;

/// Maximum of the parameters of added noise; the sigmas of the training are smaller.
const MAX_CHURN: u32 = 1000;

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// The fields of both routes.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Common {
    /// Text that describes the images, in AUTOMATIC1111's syntax. Default: empty.
    prompt: Option<String>,
    /// Text that describes what the images should not show.
    negative_prompt: Option<String>,
    /// Width in pixels, a multiple of 8.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
    width: Option<usize>,
    /// Height in pixels, a multiple of 8.
    #[schemars(extend("minimum" = MIN_SIDE, "maximum" = MAX_SIDE))]
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
    /// Number of images, multiplied by `n_iter`.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::IMAGES))]
    batch_size: Option<usize>,
    /// Number of images, multiplied by `batch_size`.
    #[schemars(extend("minimum" = 1, "maximum" = Limits::IMAGES))]
    n_iter: Option<usize>,
    /// Whether there is a hires pass. Only for txt2img.
    enable_hr: Option<Value>,
    /// Options of this request only.
    pub(crate) override_settings: Option<Overrides>,
    /// Identifier of this request for `/internal/progress`.
    #[schemars(extend("maxLength" = 256))]
    pub(crate) force_task_id: Option<String>,
    /// Whether the response holds the images. Default: true.
    pub(crate) send_images: Option<bool>,
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
    /// Options that must be as they are.
    #[serde(flatten)]
    pub(crate) others: Object,
}

/// The fields of the hires pass.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct HiresPass {
    /// Scale of the sides. Default: 2.
    #[schemars(extend("minimum" = 0.1, "maximum" = 16))]
    hr_scale: Option<f64>,
    /// Width in pixels, instead of `hr_scale`.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    hr_resize_x: Option<usize>,
    /// Height in pixels, instead of `hr_scale`.
    #[schemars(extend("minimum" = 0, "maximum" = MAX_SIDE))]
    hr_resize_y: Option<usize>,
    /// Number of steps that are taken. Default, and at 0: as in the base pass.
    #[schemars(extend("minimum" = 0, "maximum" = Limits::STEPS))]
    hr_second_pass_steps: Option<usize>,
    /// Upscaler of the latents: Latent, Latent (nearest), and others of its family.
    hr_upscaler: Option<String>,
    /// Denoising strength of the hires pass. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    denoising_strength: Option<f64>,
}

/// The fields of image-to-image.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct InitImage {
    /// The input image, in base64 or as a data URL.
    #[schemars(required, extend("minItems" = 1, "maxItems" = 1))]
    init_images: Option<Vec<ImageFile>>,
    /// Mask of inpainting: white areas are inpainted, black areas are preserved.
    mask: Option<ImageFile>,
    /// Whether black areas are inpainted and white areas are preserved.
    inpainting_mask_invert: Option<Value>,
    /// Denoising strength. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    denoising_strength: Option<f64>,
    /// Whether only the masked area is generated, in the size of the request, and put back into the
    /// input image. Default: true.
    inpaint_full_res: Option<Value>,
    /// Pixels around the masked area that are generated with it. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 256))]
    inpaint_full_res_padding: Option<u32>,
    /// Blur of the mask in pixels. Default: 4.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur: Option<f64>,
    /// The same in one direction; both must be alike.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur_x: Option<f64>,
    /// The same in the other direction.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur_y: Option<f64>,
    /// What the masked area begins as: 0 the colours around it, 1 the input image, 2 noise, 3
    /// nothing. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 3))]
    inpainting_fill: Option<u8>,
    /// How the input image fills the size: 0 stretched, 1 cropped, 2 with continued edges.
    #[schemars(extend("minimum" = 0, "maximum" = 2))]
    resize_mode: Option<u8>,
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
        fields.drop_if("initial_noise_multiplier", |value| number(value) == Some(1.0));
        if let Some((name, _)) = fields.take(&["initial_noise_multiplier"])? {
            return Err(ValidationError::range(&name, "is not supported: it may be 1"));
        }
        for name in ["seed", "subseed"] {
            let is_random = |seed: &Value| number(seed).is_some_and(|n| n < 0.0);
            fields.drop_if(name, is_random);
        }
        for name in ["subseed_strength", "clip_skip"] {
            fields.drop_if(name, is_off);
        }
        fields.read(limits)
    }

    /// Whether there is a hires pass.
    pub(crate) fn has_hires(&self) -> bool {
        self.enable_hr.as_ref().is_some_and(|enabled| !is_off(enabled))
    }

    /// The request in native fields.
    pub(crate) fn into_draw(self) -> Result<DrawRequest, ValidationError> {
        let (scheduler, schedule) = self.sampler()?;
        let (name, clip_skip) = match self.override_settings.as_ref().and_then(|o| o.clip_skip) {
            Some(layers) => ("override_settings.CLIP_stop_at_last_layers", Some(layers)),
            None => ("clip_skip", self.clip_skip),
        };
        Ok(DrawRequest {
            prompt: Some(self.prompt.unwrap_or_default()),
            prompt_syntax: Some("a1111".into()),
            negative_prompt: self.negative_prompt,
            width: self.width,
            height: self.height,
            num_inference_steps: self.steps,
            guidance_scale: self.cfg_scale,
            num_images_per_prompt: Some(self.batch_size.unwrap_or(1) * self.n_iter.unwrap_or(1)),
            seed: self.seed,
            // There 1 is the last layer.
            clip_skip: clip_skip.map(|layers| layers.saturating_sub(1)),
            // Clients send a seed whether there is a variation or not.
            variation_seed: self.subseed.filter(|_| self.subseed_strength.is_some()),
            variation_strength: self.subseed_strength,
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
            names: Names::from([
                ("num_inference_steps", "steps"),
                ("guidance_scale", "cfg_scale"),
                ("num_images_per_prompt", "batch_size x n_iter"),
                ("clip_skip", name),
                ("variation_strength", "subseed_strength"),
                ("scheduler", "sampler_name"),
                ("schedule", "scheduler"),
                ("output_format", "override_settings.samples_format"),
                ("image", "init_images"),
                ("strength", "denoising_strength"),
                ("hires_strength", "denoising_strength"),
                ("hires_steps", "hr_second_pass_steps"),
                ("hires_upscaler", "hr_upscaler"),
            ]),
            ..DrawRequest::default()
        })
    }

    /// The names of the sampler and its schedule. AUTOMATIC1111 has two fields for them, and in
    /// older versions one. An automatic schedule is the one that the sampler prefers there.
    fn sampler(&self) -> Result<(Option<String>, Option<String>), ValidationError> {
        let asked = self.scheduler.as_ref().filter(|name| {
            !name.trim().is_empty() && !name.trim().eq_ignore_ascii_case("automatic")
        });
        let asked = asked.map(|name| name.parse::<SigmaSchedule>()).transpose();
        let asked = asked.map_err(|reason| ValidationError::range("scheduler", reason))?;
        let names = [&self.sampler_name, &self.sampler_index];
        let Some(name) = names.into_iter().flatten().find(|name| !name.is_empty()) else {
            return Ok((None, asked.map(|schedule| schedule.to_string())));
        };
        let unknown = |reason: String| ValidationError::range("sampler_name", reason);
        let named: SamplerName = name.parse().map_err(unknown)?;
        let schedule = match (asked, named.schedule) {
            (Some(asked), _) => asked,
            (None, SigmaSchedule::Model) => named.sampler.automatic_schedule(),
            (None, named) => named,
        };
        Ok((Some(named.to_string()), Some(schedule.to_string())))
    }
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
        Some(skipped) if skipped > 0 && model.text_width == OPEN_CLIP => {
            let why = "has no effect, as in AUTOMATIC1111: the model's text encoder is OpenCLIP";
            draw.warnings.push(format!("{name} {why}"));
            draw.clip_skip = None;
            Ok(())
        }
        _ => Ok(()),
    }
}

impl HiresPass {
    /// Takes the fields of the hires pass out, given all fields of the request.
    pub(crate) fn read(
        fields: &mut Fields,
        base: &Object,
        limits: &Limits,
    ) -> Result<Self, ValidationError> {
        for (name, same, field) in MUST_MATCH_BASE_PASS {
            if let Some((name, value)) = fields.take(&[name])?
                && !is_noop(&value)
                && value != same
                && value != json!([same])
                && !is_same(&value, base.get(field))
            {
                return Err(ValidationError::range(&name, "must be the same as in the base pass"));
            }
        }
        fields.read(limits)
    }

    /// Adds the hires pass to a request. As there, it is omitted where nothing would be upscaled.
    pub(crate) fn add_to(self, draw: &mut DrawRequest, model: &ModelInfo) {
        let base = model.defaults.size;
        let width = draw.width.unwrap_or(base.width());
        let height = draw.height.unwrap_or(base.height());
        let (x, y) = (self.hr_resize_x.unwrap_or(0), self.hr_resize_y.unwrap_or(0));
        let (name, target) = match (x, y) {
            (0, 0) => {
                let scale = self.hr_scale.unwrap_or(2.0);
                ("hr_scale", [width, height].map(|side| (side as f64 * scale) as usize))
            }
            (x, 0) => ("hr_resize_x", [x, x * height / width]),
            (0, y) => ("hr_resize_y", [y * width / height, y]),
            (x, y) => ("hr_resize_x", [x, y]),
        };
        // Latents have whole pixels.
        let [wide, high] = target.map(|side| (side / model.multiple).max(1) * model.multiple);
        if (wide, high) == (width, height) {
            return;
        }
        draw.names.insert("hires_width", name);
        draw.names.insert("hires_height", name);
        (draw.hires_width, draw.hires_height) = (Some(wide), Some(high));
        draw.hires_strength = Some(self.denoising_strength.unwrap_or(DEFAULT_STRENGTH));
        draw.hires_steps = self.hr_second_pass_steps.filter(|steps| *steps > 0);
        draw.hires_counts_taken = true;
        draw.hires_upscaler = self.hr_upscaler.filter(|name| !name.is_empty());
    }
}

impl InitImage {
    /// Takes the fields of image-to-image out.
    pub(crate) fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ValidationError> {
        fields.drop_if("mask", is_noop);
        fields.read(limits)
    }

    /// Adds the input image and its mask to a request.
    pub(crate) fn add_to(self, draw: &mut DrawRequest) -> Result<(), ValidationError> {
        let image = self.init_images.and_then(|mut images| images.pop());
        let missing =
            || ValidationError::malformed("init_images", "must contain an image in base64");
        draw.image = Some(image.ok_or_else(missing)?);
        draw.strength = Some(self.denoising_strength.unwrap_or(DEFAULT_STRENGTH));
        draw.transparency = Transparency::White;
        draw.mask = self.mask;
        if self.inpainting_mask_invert.is_some_and(|value| !is_off(&value)) {
            draw.mask_area = MaskArea::Black;
        }
        draw.fit = match self.resize_mode {
            None | Some(0) => Fit::Stretch,
            Some(1) => Fit::Crop,
            Some(_) => Fit::Pad,
        };
        draw.masked_start = match self.inpainting_fill {
            Some(2) => MaskedStart::Noise,
            Some(3) => MaskedStart::Zero,
            _ => MaskedStart::Picture,
        };
        let both = self.mask_blur.unwrap_or(DEFAULT_MASK_BLUR);
        let [x, y] = [self.mask_blur_x, self.mask_blur_y].map(|blur| blur.unwrap_or(both));
        if x != y {
            return Err(ValidationError::range("mask_blur_x", "must be the same as mask_blur_y"));
        }
        let only_masked = self.inpaint_full_res.is_none_or(|value| !is_off(&value));
        draw.inpaint = draw.mask.is_some().then_some(InpaintOptions {
            blur: x,
            only_masked: only_masked.then_some(self.inpaint_full_res_padding.unwrap_or(0)),
            fill: self.inpainting_fill != Some(1),
        });
        Ok(())
    }
}

/// Whether a value of the hires pass is that of the base pass, if it has one.
fn is_same(value: &Value, base: Option<&Value>) -> bool {
    let text = |value: &Value| match value {
        Value::String(text) => text.trim().to_lowercase(),
        value => value.to_string(),
    };
    let value = text(value);
    let Some(base) = base.map(text).filter(|base| !base.is_empty()) else {
        return value == "automatic";
    };
    let number = |text: &str| text.parse::<f64>().ok();
    value == base || number(&value).is_some() && number(&value) == number(&base)
}

/// Whether the value of a switch, or of a field that is not supported, asks for nothing. Clients
/// send numbers and booleans as text, too.
pub(super) fn is_off(value: &Value) -> bool {
    let text = match value {
        Value::String(text) => text,
        Value::Array(values) => return values.iter().all(is_off),
        other => return is_noop(other),
    };
    let text = text.trim().to_ascii_lowercase();
    let is_zero = || text.parse::<f64>().is_ok_and(|number| number <= 0.0);
    ["", "none", "null", "false", "off", "no"].contains(&&*text) || is_zero()
}

/// Whether a value has no effect.
pub(crate) fn is_noop(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_set) => !is_set,
        Value::Number(number) => number.as_f64().is_some_and(|number| number <= 0.0),
        Value::String(text) => ["", "None"].contains(&text.as_str()),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_base_pass_has_is_the_same_in_the_hires_pass() {
        let read = |body: Value| {
            let mut fields = Fields::json(&body.to_string()).expect("an object");
            let base = fields.object();
            let limits = Limits {
                max_pixels: 1 << 20,
                max_steps: 50,
                max_images: 4,
                max_prompt_bytes: 100,
                max_input_pixels: 1 << 20,
                max_loras: 2,
            };
            HiresPass::read(&mut fields, &base, &limits)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        for body in [
            json!({ "prompt": "a", "hr_prompt": "a", "hr_negative_prompt": "" }),
            json!({ "sampler_name": "Euler a", "hr_sampler_name": "euler a", "hr_scheduler": "Automatic" }),
            json!({ "cfg_scale": 7, "hr_cfg": "7.0", "scheduler": "Karras", "hr_scheduler": "karras" }),
            json!({ "hr_sampler_name": "Use same sampler", "hr_additional_modules": ["Use same choices"] }),
        ] {
            assert_eq!(read(body.clone()), Ok(()), "{body}");
        }
        for (name, value) in [("hr_prompt", "b"), ("hr_sampler_name", "DDIM"), ("hr_cfg", "8")] {
            let body = json!({ "prompt": "a", "cfg_scale": 7, name: value });
            let reason = format!("{name} must be the same as in the base pass");
            assert_eq!(read(body), Err(reason));
        }
    }
}

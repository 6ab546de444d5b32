//! The fields of a request and their translation into specs. This is the only validation; past it
//! everything is a [`Spec`]. How the fields came over the wire (JSON, a form, a bare prompt) is
//! the business of `http`.

mod error;
mod fields;

use std::sync::Arc;

use ::image::DynamicImage;
use sd_models::{
    Hires, Img2Img, Loras, MAX_STEPS, ModelInfo, PromptSyntax, SamplerName, Size, Spec, Upscaler,
};
use serde_json::{Value, json};

use crate::image::{self, Format};
use crate::options::min;
pub use error::ValidationError;
pub use fields::Fields;
pub(crate) use fields::{Described, file, kind};

/// Sides above this are refused before they are multiplied.
const MAX_SIDE: u64 = 65_536;

/// Guidance beyond this only burns the picture.
const MAX_GUIDANCE: f64 = 100.0;

/// So does a LoRA that counts for more.
const MAX_LORA_SCALE: f64 = 100.0;

/// How much of a picture that comes in is painted anew, as in diffusers.
const DEFAULT_STRENGTH: f64 = 0.8;

/// How much of a picture's latents is painted anew when they have been enlarged, as in AUTOMATIC1111.
const DEFAULT_HIRES_STRENGTH: f64 = 0.75;

/// Maximum values of one request, set by the operator.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Maximum width x height of an image; memory and time grow with it
    #[arg(long, env = "SD_MAX_PIXELS", default_value = "1048576", value_parser = min::<64>)]
    pub max_pixels: usize,
    /// Maximum number of sampler steps of an image
    #[arg(long, env = "SD_MAX_STEPS", default_value = "150", value_parser = steps)]
    pub max_steps: usize,
    /// Maximum number of images per request
    #[arg(long, env = "SD_MAX_IMAGES", default_value = "8", value_parser = min::<1>)]
    pub max_images: usize,
    /// Maximum length of a prompt, in bytes. The model reads 77 tokens of it, or eight times as
    /// many with the a1111 syntax
    #[arg(long, env = "SD_MAX_PROMPT_BYTES", default_value = "16384", value_parser = min::<1>)]
    pub max_prompt_bytes: usize,
    /// Maximum width x height of an input image or mask, which is decoded before it is resized
    #[arg(long, env = "SD_MAX_INPUT_PIXELS", default_value = "33554432", value_parser = min::<64>)]
    pub max_input_pixels: usize,
    /// Maximum number of LoRAs per image; each costs time
    #[arg(long, env = "SD_MAX_LORAS", default_value = "8", value_parser = min::<0>)]
    pub max_loras: usize,
}

/// No sampler takes more than [`MAX_STEPS`].
fn steps(text: &str) -> Result<usize, String> {
    Ok(min::<1>(text)?.min(MAX_STEPS))
}

/// A valid request.
#[derive(Debug)]
pub struct Draw {
    /// The first picture; the others differ in their seed.
    spec: Spec,
    count: usize,
    /// The image format that the body asked for.
    pub format: Option<Format>,
    /// Whether the body asked for events.
    pub stream: bool,
    /// Whether these should hold previews.
    pub preview: bool,
}

impl Draw {
    /// Reads the native fields. What is absent comes from the model, the seed from `dice`. Not for
    /// async threads: pictures that come in are decoded and resized here.
    pub fn read(
        mut fields: Fields,
        limits: &Limits,
        model: &ModelInfo,
        dice: impl FnOnce() -> u64,
    ) -> Result<Self, ValidationError> {
        let defaults = &model.defaults;
        let max_prompt = limits.max_prompt_bytes;
        let Some(prompt) = fields.text(&["prompt"], max_prompt)? else {
            return Err(ValidationError::malformed("prompt", "is required"));
        };
        let negative_prompt = fields.text(&["negative_prompt"], max_prompt)?.unwrap_or_default();
        let pictures = fields.pictures(limits.max_input_pixels)?;
        let own = pictures.as_ref().map(|pictures| pictures.size(limits.max_pixels, model));
        let loras = fields.loras(limits.max_loras)?;
        let prompt_syntax = fields.choice::<PromptSyntax>(&["prompt_syntax"])?.unwrap_or_default();
        let size = fields.size(own.unwrap_or(defaults.size), limits.max_pixels)?;
        let steps = ["num_inference_steps", "steps"];
        let steps = fields.whole(&steps, 1..=limits.max_steps as u64)?;
        let steps = steps.map_or(defaults.steps, |steps| steps as usize);
        let hires = fields.hires(size, steps, limits, model)?;
        let guidance = fields.number(&["guidance_scale", "cfg_scale"], 0.0..=MAX_GUIDANCE)?;
        let count = ["num_images_per_prompt", "n"];
        let count = fields.whole(&count, 1..=limits.max_images as u64)?.unwrap_or(1);
        let seed = fields.whole(&["seed"], 0..=u64::MAX)?;
        let name = fields.choice::<SamplerName>(&["scheduler", "sampler"])?;
        let SamplerName { sampler, schedule } = name.unwrap_or(defaults.sampler_name());
        let format = fields.choice::<Format>(&["output_format"])?;
        let stream = fields.flag(&["stream"])?.unwrap_or(false);
        let preview = fields.flag(&["preview"])?.unwrap_or(false);
        fields.finish()?;
        let spec = Spec {
            prompt,
            prompt_syntax,
            negative_prompt,
            loras,
            size,
            steps,
            guidance_scale: guidance.unwrap_or(defaults.guidance_scale),
            seed: seed.unwrap_or_else(dice),
            sampler,
            schedule,
            img2img: pictures.map(|pictures| Arc::new(pictures.start(size))),
            hires,
        };
        if let Err(error) = model.check(&spec) {
            return Err(match error {
                sd_models::Error::Spec { field, reason } => ValidationError::range(field, reason),
                other => ValidationError::body(other.to_string()),
            });
        }
        let named = spec.text().map_or(0, |(_, named)| named.len());
        if spec.loras.len() + named > limits.max_loras {
            let reason = format!("names too many LoRAs: {} are allowed", limits.max_loras);
            return Err(ValidationError::range("prompt", reason));
        }
        Ok(Self { spec, count: count as usize, format, stream, preview })
    }

    /// How many pictures.
    pub fn count(&self) -> usize {
        self.count
    }

    /// One spec for each picture: the seeds count up.
    pub fn specs(&self) -> Vec<Spec> {
        let seed = |k: u64| self.spec.seed.wrapping_add(k);
        (0..self.count as u64).map(|k| Spec { seed: seed(k), ..self.spec.clone() }).collect()
    }
}

/// Images that came in with a request.
#[derive(Debug)]
struct InputImages {
    image: DynamicImage,
    mask: Option<DynamicImage>,
    strength: f64,
}

impl InputImages {
    /// The picture's own size in whole multiples of what the model can draw; what is larger than
    /// `max_pixels` is made smaller in its shape.
    fn size(&self, max_pixels: usize, model: &ModelInfo) -> Size {
        let (width, height) = (f64::from(self.image.width()), f64::from(self.image.height()));
        let scale = (max_pixels as f64 / (width * height)).sqrt().min(1.0);
        let side = |side: f64| ((side * scale) as usize / model.multiple).max(1) * model.multiple;
        Size::new(side(width), side(height)).unwrap_or(model.defaults.size)
    }

    fn start(&self, size: Size) -> Img2Img {
        Img2Img {
            picture: image::resize_to(&self.image, size),
            strength: self.strength,
            mask: self.mask.as_ref().map(|mask| image::fit_mask(mask, size)),
        }
    }
}

impl Fields {
    /// A list of LoRAs, each with its name and how much it counts; in a form the JSON text of one.
    fn loras(&mut self, max: usize) -> Result<Loras, ValidationError> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Lora {
            name: String,
            scale: Option<f64>,
        }
        self.note(&["loras"], || {
            let scale = json!({ "type": ["number", "null"], "minimum": -MAX_LORA_SCALE, "maximum": MAX_LORA_SCALE });
            let item = json!({
                "type": "object", "properties": { "name": { "type": "string" }, "scale": scale },
                "required": ["name"], "additionalProperties": false,
            });
            json!({ "type": "array", "items": item, "maxItems": max })
        });
        let Some((field, value)) = self.take(&["loras"])? else { return Ok(Vec::new()) };
        let list = match value {
            Value::String(text) if !self.typed => serde_json::from_str::<Vec<Lora>>(&text),
            value => serde_json::from_value(value),
        };
        let form = r#"must be a list such as [{"name": "a", "scale": 0.8}]"#;
        let list =
            list.map_err(|error| ValidationError::malformed(&field, format!("{form}: {error}")))?;
        if list.len() > max {
            let reason = format!("has {} entries; at most {max} are allowed", list.len());
            return Err(ValidationError::range(&field, reason));
        }
        list.into_iter()
            .map(|Lora { name, scale }| {
                let scale = scale.unwrap_or(1.0);
                let fits = (-MAX_LORA_SCALE..=MAX_LORA_SCALE).contains(&scale);
                let reason = || {
                    let most = MAX_LORA_SCALE;
                    format!("of {name:?} must have a scale from -{most} to {most}, not {scale}")
                };
                if fits { Ok((name, scale)) } else { Err(ValidationError::range(&field, reason())) }
            })
            .collect()
    }

    /// The picture to begin with and what belongs to it.
    fn pictures(&mut self, max_pixels: usize) -> Result<Option<InputImages>, ValidationError> {
        let image = self.picture(&["image", "init_image"], max_pixels)?;
        let mask = self.picture(&["mask", "mask_image"], max_pixels)?;
        let strength = self.number(&["strength"], 0.0..=1.0)?;
        let Some(image) = image else {
            let idle = mask.map(|_| "mask").or(strength.map(|_| "strength"));
            let lonely =
                |field| Err(ValidationError::malformed(field, "is of no use without image"));
            return idle.map_or(Ok(None), lonely);
        };
        Ok(Some(InputImages { image, mask, strength: strength.unwrap_or(DEFAULT_STRENGTH) }))
    }

    /// A picture file in base64, bare or as a data URL.
    fn picture(
        &mut self,
        names: &[&'static str],
        max_pixels: usize,
    ) -> Result<Option<DynamicImage>, ValidationError> {
        self.note(names, || json!({ "type": "string", "contentEncoding": "base64" }));
        let (name, text) = match self.take(names)? {
            None => return Ok(None),
            Some((name, Value::String(text))) => (name, text),
            Some((name, other)) => {
                let reason = format!("must be a string of base64, not {}", kind(&other));
                return Err(ValidationError::malformed(&name, reason));
            }
        };
        let image = image::decode(&file(&name, text)?, max_pixels);
        image.map(Some).map_err(|reason| ValidationError::range(&name, reason))
    }

    fn size(&mut self, default: Size, max_pixels: usize) -> Result<Size, ValidationError> {
        let names = ["width", "height"].map(|name| self.spelt(name));
        let width = self.whole(&["width"], 8..=MAX_SIDE)?.unwrap_or(default.width() as u64);
        let height = self.whole(&["height"], 8..=MAX_SIDE)?.unwrap_or(default.height() as u64);
        size(&names, [width, height], max_pixels)
    }

    /// A second pass, where a size is given for it; in the shape of the first where only one side is.
    fn hires(
        &mut self,
        first: Size,
        steps: usize,
        limits: &Limits,
        model: &ModelInfo,
    ) -> Result<Option<Hires>, ValidationError> {
        let names = ["hires_width", "hires_height"].map(|name| self.spelt(name));
        let width = self.whole(&["hires_width"], 8..=MAX_SIDE)?;
        let height = self.whole(&["hires_height"], 8..=MAX_SIDE)?;
        let own_steps = self.whole(&["hires_steps"], 1..=limits.max_steps as u64)?;
        let strength = self.number(&["hires_strength"], 0.0..=1.0)?;
        let upscaler = self.choice::<Upscaler>(&["hires_upscaler"])?;
        let shaped = |side: u64, by: usize, of: usize| {
            let multiple = model.multiple as u64;
            (side * by as u64 / of as u64 / multiple).max(1) * multiple
        };
        let (w, h) = (first.width(), first.height());
        let sides = match (width, height) {
            (Some(width), Some(height)) => [width, height],
            (Some(width), None) => [width, shaped(width, h, w)],
            (None, Some(height)) => [shaped(height, w, h), height],
            (None, None) => {
                let idle = own_steps.map(|_| "hires_steps");
                let idle = idle.or(strength.map(|_| "hires_strength"));
                let idle = idle.or(upscaler.map(|_| "hires_upscaler"));
                let lonely = |field| {
                    Err(ValidationError::malformed(field, "is of no use without hires_width"))
                };
                return idle.map_or(Ok(None), lonely);
            }
        };
        Ok(Some(Hires {
            size: size(&names, sides, limits.max_pixels)?,
            steps: own_steps.map_or(steps, |steps| steps as usize),
            strength: strength.unwrap_or(DEFAULT_HIRES_STRENGTH),
            upscaler: upscaler.unwrap_or_default(),
        }))
    }
}

/// A size of these sides, whose names are the client's.
fn size(
    names: &[String; 2],
    [width, height]: [u64; 2],
    max_pixels: usize,
) -> Result<Size, ValidationError> {
    for (name, side) in names.iter().zip([width, height]) {
        if side % 8 != 0 {
            let reason = format!("must be a multiple of 8, not {side}");
            return Err(ValidationError::range(name, reason));
        }
    }
    let param = if width >= height { &names[0] } else { &names[1] };
    Size::new(width as usize, height as usize)
        .filter(|size| size.pixels() <= max_pixels)
        .ok_or_else(|| {
            let size = format!("{width}x{height}");
            ValidationError::range(
                param,
                format!("is too large: {size} exceeds {max_pixels} pixels"),
            )
        })
}

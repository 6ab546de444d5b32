//! Wire types: the fields of a request and their translation into specs. This is the only
//! validation; past it everything is a [`Spec`]. How the fields came over the wire (JSON, a form,
//! a bare prompt) is the business of `http`.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use ::image::DynamicImage;
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use sd_models::{Hires, Img2Img, Loras, ModelInfo, PromptSyntax, Scheduler, Size, Spec, Upscaler};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use crate::image::{self, Format};

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
/// Of an error, which may quote the client.
const MAX_MESSAGE_BYTES: usize = 600;
/// Fields of one request, known or not.
const MAX_FIELDS: usize = 256;
/// Clients differ in whether they pad.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a request may ask for; the operator's limits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Width times height.
    pub max_pixels: usize,
    /// Sampler steps.
    pub max_steps: usize,
    /// Pictures of one request.
    pub max_images: usize,
    /// Length of each prompt in bytes.
    pub max_prompt_bytes: usize,
    /// Width times height of a picture that comes in, before it is resized.
    pub max_input_pixels: usize,
    /// LoRAs of a picture.
    pub max_loras: usize,
}

/// A request that cannot be honoured as it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// It does not say what it should: a missing, unknown, repeated or wrongly typed field.
    #[error("{message}")]
    Malformed {
        /// The field, as the client spelt it.
        param: Option<String>,
        /// One sentence.
        message: String,
    },
    /// It says something that is out of range.
    #[error("{message}")]
    OutOfRange {
        /// The field, as the client spelt it.
        param: String,
        /// One sentence.
        message: String,
    },
}

/// A picture's file out of base64, bare or as a data URL, in lines or in one.
pub(crate) fn file(name: &str, mut text: String) -> Result<Vec<u8>, Invalid> {
    if let Some(comma) = text.starts_with("data:").then(|| text.find(',')).flatten() {
        text.drain(..=comma);
    }
    text.retain(|c| !c.is_ascii_whitespace());
    let broken = |error| Invalid::malformed(name, format!("is not base64: {error}"));
    BASE64.decode(text).map_err(broken)
}

impl Invalid {
    /// A body that is not even a list of fields.
    pub fn body(message: impl Into<String>) -> Self {
        Self::Malformed { param: None, message: brief(message.into()) }
    }

    /// A field that is not what it should be.
    pub(crate) fn malformed(param: &str, reason: impl fmt::Display) -> Self {
        Self::Malformed { param: Some(brief(param.into())), message: sentence(param, reason) }
    }

    /// A field whose value cannot be had.
    pub(crate) fn range(param: &str, reason: impl fmt::Display) -> Self {
        Self::OutOfRange { param: brief(param.into()), message: sentence(param, reason) }
    }
}

fn sentence(param: &str, reason: impl fmt::Display) -> String {
    brief(format!("{param} {reason}"))
}

/// What quotes a client is as long as the client likes; SageMaker passes on 2048 characters.
fn brief(mut text: String) -> String {
    if text.len() > MAX_MESSAGE_BYTES {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE_BYTES));
        text.push('…');
    }
    text
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
    ) -> Result<Self, Invalid> {
        let defaults = &model.defaults;
        let max_prompt = limits.max_prompt_bytes;
        let Some(prompt) = fields.text(&["prompt"], max_prompt)? else {
            return Err(Invalid::malformed("prompt", "is required"));
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
        let scheduler = fields.choice::<Scheduler>(&["scheduler", "sampler"])?;
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
            scheduler: scheduler.unwrap_or(defaults.scheduler),
            img2img: pictures.map(|pictures| Arc::new(pictures.start(size))),
            hires,
        };
        if let Err(error) = model.check(&spec) {
            return Err(match error {
                sd_models::Error::Spec { field, reason } => Invalid::range(field, reason),
                other => Invalid::body(other.to_string()),
            });
        }
        let named = spec.text().map_or(0, |(_, named)| named.len());
        if spec.loras.len() + named > limits.max_loras {
            let reason = format!("names too many LoRAs: {} are allowed", limits.max_loras);
            return Err(Invalid::range("prompt", reason));
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

/// Pictures that came in with a request.
#[derive(Debug)]
struct Pictures {
    image: DynamicImage,
    mask: Option<DynamicImage>,
    strength: f64,
}

impl Pictures {
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
            picture: image::fit(&self.image, size),
            strength: self.strength,
            mask: self.mask.as_ref().map(|mask| image::fit_mask(mask, size)),
        }
    }
}

/// The fields of a request as they came, in order and with repetitions.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    values: Vec<Field>,
    /// Whether values carry their type (JSON) or are all text (a form).
    typed: bool,
    /// Notes what is asked of the fields, when that is what is wanted.
    record: Option<Arc<Mutex<Vec<Described>>>>,
}

/// A field as it is read: its name, its other names, and the JSON schema of its values.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) names: Vec<&'static str>,
    pub(crate) schema: Value,
}

#[derive(Debug, Clone)]
struct Field {
    /// The native name.
    key: String,
    /// The client's name for it, in which errors speak.
    spelt: String,
    value: Value,
}

impl Field {
    fn new((key, value): (String, Value)) -> Self {
        Self { spelt: key.clone(), key, value }
    }
}

impl Fields {
    /// A bare prompt.
    pub fn prompt(prompt: impl Into<String>) -> Self {
        let prompt = Field::new(("prompt".into(), Value::String(prompt.into())));
        Self { values: vec![prompt], typed: true, record: None }
    }

    /// The fields of a form. An empty one was left blank, except that a prompt may be empty.
    pub fn form(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let filled = |(name, value): &(String, String)| !value.is_empty() || name == "prompt";
        let values = pairs.into_iter().filter(filled);
        let values = values.map(|(name, value)| Field::new((name, Value::String(value))));
        Self { values: values.collect(), typed: false, record: None }
    }

    /// A JSON object.
    pub fn json(text: &str) -> Result<Self, Invalid> {
        // serde_json would quote a string that stands there, and so what a user typed.
        if !text.trim_ascii_start().starts_with('{') {
            return Err(Invalid::body("the body is not a JSON object"));
        }
        let mut reader = serde_json::Deserializer::from_str(text);
        let values = reader.deserialize_map(Pairs).and_then(|values| {
            reader.end()?;
            Ok(values)
        });
        match values {
            Ok(values) => Ok(Self {
                values: values.into_iter().map(Field::new).collect(),
                typed: true,
                record: None,
            }),
            Err(error) => Err(Invalid::body(format!("the body is not a JSON object: {error}"))),
        }
    }

    /// What `read` asks of the fields: so a description cannot say anything else than the code.
    pub(crate) fn described(read: impl FnOnce(Self)) -> Vec<Described> {
        let record = Arc::default();
        let mut fields = Self::prompt("");
        fields.record = Some(Arc::clone(&record));
        read(fields);
        record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, names: &[&'static str], schema: impl FnOnce() -> Value) {
        if let Some(record) = &self.record {
            let described = Described { names: names.into(), schema: schema() };
            record.lock().unwrap_or_else(PoisonError::into_inner).push(described);
        }
    }

    /// Whether there is a field of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.values.iter().any(|field| field.key == name)
    }

    /// Whether the field of this name is a list.
    pub(crate) fn is_list(&self, name: &str) -> bool {
        self.values.iter().any(|field| field.key == name && field.value.is_array())
    }

    /// The client's name for a native field.
    fn spelt(&self, name: &str) -> String {
        let field = self.values.iter().find(|field| field.key == name);
        field.map_or(name, |field| &field.spelt).to_owned()
    }

    /// The whole number of this name, if it is one.
    pub(crate) fn peek(&self, name: &str) -> Option<u64> {
        self.values.iter().find(|field| field.key == name)?.value.as_u64()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Understands a field of another dialect as a native one.
    pub(crate) fn rename(&mut self, theirs: &str, native: &str) {
        for field in self.values.iter_mut().filter(|field| field.key == theirs) {
            native.clone_into(&mut field.key);
        }
    }

    /// Adds a native field that the client spelt otherwise.
    pub(crate) fn add(&mut self, native: &str, spelt: &str, value: impl Into<Value>) {
        let (key, spelt, value) = (native.to_owned(), spelt.to_owned(), value.into());
        self.values.push(Field { key, spelt, value });
    }

    /// Takes a field out under the name that the client used. JSON's null means absent.
    pub(crate) fn take(&mut self, names: &[&str]) -> Result<Option<(String, Value)>, Invalid> {
        let mut taken = None;
        for name in names {
            for field in self.values.extract_if(.., |field| field.key == *name) {
                if taken.is_some() {
                    return Err(Invalid::malformed(&field.spelt, "is given twice"));
                }
                taken = Some((field.spelt, field.value));
            }
        }
        Ok(taken.filter(|(_, value)| !value.is_null()))
    }

    /// A string of at most `max` bytes.
    pub(crate) fn text(
        &mut self,
        names: &[&'static str],
        max: usize,
    ) -> Result<Option<String>, Invalid> {
        self.note(names, || json!({ "type": "string" }));
        match self.take(names)? {
            None => Ok(None),
            Some((name, Value::String(text))) if text.len() > max => {
                let bytes = text.len();
                Err(Invalid::range(&name, format!("has {bytes} bytes; at most {max} are allowed")))
            }
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, other)) => {
                Err(Invalid::malformed(&name, format!("must be a string, not {}", kind(&other))))
            }
        }
    }

    pub(crate) fn whole(
        &mut self,
        names: &[&'static str],
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, Invalid> {
        self.note(
            names,
            || json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() }),
        );
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        let value = self.numeral(&name, value, "a whole number")?;
        let in_range = value.as_u64().filter(|whole| range.contains(whole));
        if value.as_f64().is_some_and(|value| value.fract() != 0.0) {
            return Err(Invalid::malformed(&name, format!("must be a whole number, not {value}")));
        }
        in_range.map(Some).ok_or_else(|| {
            let (low, high) = range.into_inner();
            Invalid::range(&name, format!("must be from {low} to {high}, not {value}"))
        })
    }

    pub(crate) fn number(
        &mut self,
        names: &[&'static str],
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, Invalid> {
        self.note(
            names,
            || json!({ "type": "number", "minimum": range.start(), "maximum": range.end() }),
        );
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        let value = self.numeral(&name, value, "a number")?;
        value.as_f64().filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
            let (low, high) = range.into_inner();
            Invalid::range(&name, format!("must be from {low} to {high}, not {value}"))
        })
    }

    /// A JSON number, or the text of one in a form.
    fn numeral(
        &self,
        name: &str,
        value: Value,
        wanted: &str,
    ) -> Result<serde_json::Number, Invalid> {
        match value {
            Value::Number(number) => Ok(number),
            Value::String(text) if !self.typed => serde_json::from_str(text.trim())
                .map_err(|_| Invalid::malformed(name, format!("must be {wanted}, not {text:?}"))),
            other => {
                Err(Invalid::malformed(name, format!("must be {wanted}, not {}", kind(&other))))
            }
        }
    }

    /// A list of LoRAs, each with its name and how much it counts; in a form the JSON text of one.
    fn loras(&mut self, max: usize) -> Result<Loras, Invalid> {
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
        let list = list.map_err(|error| Invalid::malformed(&field, format!("{form}: {error}")))?;
        if list.len() > max {
            let reason = format!("has {} entries; at most {max} are allowed", list.len());
            return Err(Invalid::range(&field, reason));
        }
        list.into_iter()
            .map(|Lora { name, scale }| {
                let scale = scale.unwrap_or(1.0);
                let fits = (-MAX_LORA_SCALE..=MAX_LORA_SCALE).contains(&scale);
                let reason = || {
                    let most = MAX_LORA_SCALE;
                    format!("of {name:?} must have a scale from -{most} to {most}, not {scale}")
                };
                if fits { Ok((name, scale)) } else { Err(Invalid::range(&field, reason())) }
            })
            .collect()
    }

    /// The picture to begin with and what belongs to it.
    fn pictures(&mut self, max_pixels: usize) -> Result<Option<Pictures>, Invalid> {
        let image = self.picture(&["image", "init_image"], max_pixels)?;
        let mask = self.picture(&["mask", "mask_image"], max_pixels)?;
        let strength = self.number(&["strength"], 0.0..=1.0)?;
        let Some(image) = image else {
            let idle = mask.map(|_| "mask").or(strength.map(|_| "strength"));
            let lonely = |field| Err(Invalid::malformed(field, "is of no use without image"));
            return idle.map_or(Ok(None), lonely);
        };
        Ok(Some(Pictures { image, mask, strength: strength.unwrap_or(DEFAULT_STRENGTH) }))
    }

    /// A picture file in base64, bare or as a data URL.
    fn picture(
        &mut self,
        names: &[&'static str],
        max_pixels: usize,
    ) -> Result<Option<DynamicImage>, Invalid> {
        self.note(names, || json!({ "type": "string", "contentEncoding": "base64" }));
        let (name, text) = match self.take(names)? {
            None => return Ok(None),
            Some((name, Value::String(text))) => (name, text),
            Some((name, other)) => {
                let reason = format!("must be a string of base64, not {}", kind(&other));
                return Err(Invalid::malformed(&name, reason));
            }
        };
        let image = image::decode(&file(&name, text)?, max_pixels);
        image.map(Some).map_err(|reason| Invalid::range(&name, reason))
    }

    fn size(&mut self, default: Size, max_pixels: usize) -> Result<Size, Invalid> {
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
    ) -> Result<Option<Hires>, Invalid> {
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
                let lonely =
                    |field| Err(Invalid::malformed(field, "is of no use without hires_width"));
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

    pub(crate) fn flag(&mut self, names: &[&'static str]) -> Result<Option<bool>, Invalid> {
        self.note(names, || json!({ "type": "boolean" }));
        match self.take(names)? {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(flag)),
            Some((name, Value::String(text))) if !self.typed => {
                let flag = text.trim().parse().map_err(|_| {
                    Invalid::malformed(&name, format!("must be true or false, not {text:?}"))
                })?;
                Ok(Some(flag))
            }
            Some((name, other)) => {
                let found = kind(&other);
                Err(Invalid::malformed(&name, format!("must be true or false, not {found}")))
            }
        }
    }

    fn choice<T: std::str::FromStr<Err = String>>(
        &mut self,
        names: &[&'static str],
    ) -> Result<Option<T>, Invalid> {
        self.note(names, || json!({ "type": "string" }));
        match self.take(names)? {
            None => Ok(None),
            Some((name, Value::String(text))) => text
                .parse()
                .map(Some)
                .map_err(|reason| Invalid::range(&name, format!("is an {reason}"))),
            Some((name, other)) => {
                Err(Invalid::malformed(&name, format!("must be a string, not {}", kind(&other))))
            }
        }
    }

    /// One of a few words.
    pub(crate) fn one_of(
        &mut self,
        names: &[&'static str],
        words: &[&'static str],
    ) -> Result<Option<&'static str>, Invalid> {
        self.note(names, || json!({ "type": "string", "enum": words }));
        let Some((name, value)) = self.take(names)? else { return Ok(None) };
        words.iter().find(|word| value == **word).map(|word| Some(*word)).ok_or_else(|| {
            Invalid::range(&name, format!("must be one of {}, not {value}", words.join(", ")))
        })
    }

    /// What nobody took is a mistake that the client should hear of.
    fn finish(self) -> Result<(), Invalid> {
        match self.values.into_iter().next() {
            None => Ok(()),
            Some(Field { spelt, .. }) => {
                let name: String = spelt.chars().take(64).collect();
                let message = format!("unknown field {name:?}");
                Err(Invalid::Malformed { param: Some(name), message })
            }
        }
    }
}

/// A size of these sides, whose names are the client's.
fn size(
    names: &[String; 2],
    [width, height]: [u64; 2],
    max_pixels: usize,
) -> Result<Size, Invalid> {
    for (name, side) in names.iter().zip([width, height]) {
        if side % 8 != 0 {
            let reason = format!("must be a multiple of 8, not {side}");
            return Err(Invalid::range(name, reason));
        }
    }
    let param = if width >= height { &names[0] } else { &names[1] };
    Size::new(width as usize, height as usize)
        .filter(|size| size.pixels() <= max_pixels)
        .ok_or_else(|| {
            let size = format!("{width}x{height}");
            Invalid::range(param, format!("is too large: {size} exceeds {max_pixels} pixels"))
        })
}

/// The type of a value, for people.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Reads a JSON object without losing repeated keys, as a map would.
struct Pairs;

impl<'de> Visitor<'de> for Pairs {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            if pairs.len() == MAX_FIELDS {
                return Err(serde::de::Error::custom(format!("more than {MAX_FIELDS} fields")));
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }
}

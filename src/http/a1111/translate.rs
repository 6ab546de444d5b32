//! AUTOMATIC1111's fields in native words.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{SamplerName, SigmaSchedule};
use serde_json::{Map, Value, json};

use crate::http::admission::RequestSlot;
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::image;
use crate::request::{self, Fields, ValidationError};

/// Fields with the same meaning here; ours are on the right.
pub(crate) const SAME_FIELDS: [(&str, &str); 6] = [
    ("prompt", "prompt"),
    ("negative_prompt", "negative_prompt"),
    ("width", "width"),
    ("height", "height"),
    ("steps", "num_inference_steps"),
    ("cfg_scale", "guidance_scale"),
];

/// What would change the picture if it were done. Clients send most of these in their idle state.
const REFUSED: [&str; 12] = [
    "resize_mode",
    "restore_faces",
    "tiling",
    "subseed_strength",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "styles",
    "script_name",
    "alwayson_scripts",
    "refiner_checkpoint",
    "infotext",
    "s_churn",
];

/// What the second pass could have of its own and has not, and the word for that.
const MUST_MATCH_FIRST_PASS: [(&str, &str); 7] = [
    ("hr_prompt", ""),
    ("hr_negative_prompt", ""),
    ("hr_checkpoint_name", "Use same checkpoint"),
    ("hr_sampler_name", "Use same sampler"),
    ("hr_scheduler", "Use same scheduler"),
    ("hr_cfg", ""),
    ("hr_additional_modules", "Use same choices"),
];

/// How much of a picture is painted over, where nothing is said.
const DEFAULT_STRENGTH: f64 = 0.75;

/// A strength below this takes no step at all.
const MIN_STRENGTH: f64 = 1e-3;

/// A side beyond this is no size.
const MAX_SIDE: u64 = 65_536;

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// The settings of one request, and the model that they name.
pub(crate) fn overrides(theirs: &mut Fields) -> Result<(Object, Option<String>), ValidationError> {
    let Some((name, settings)) = theirs.take(&["override_settings"])? else {
        return Ok(Default::default());
    };
    let Value::Object(mut settings) = settings else {
        return Err(ValidationError::malformed(&name, "must be an object"));
    };
    let model = settings.remove("sd_model_checkpoint");
    let model = model.and_then(|model| model.as_str().map(str::to_owned));
    Ok((settings, model.filter(|name| !name.is_empty())))
}

/// Their fields in our words.
pub(crate) fn translate(
    state: &AppState,
    mut theirs: Fields,
    from_picture: bool,
) -> Result<Fields, ApiError> {
    for name in REFUSED {
        if let Some((name, value)) = theirs.take(&[name])?
            && !is_noop(&value)
        {
            return Err(ValidationError::range(&name, "is not supported").into());
        }
    }
    let mut ours = Fields::default();
    for (name, native) in SAME_FIELDS {
        if let Some((name, value)) = theirs.take(&[name])? {
            ours.add(native, &name, value);
        }
    }
    if theirs.take(&["enable_hr"])?.is_some_and(|(_, enabled)| !is_noop(&enabled)) {
        if from_picture {
            return Err(ValidationError::range("enable_hr", "is supported for txt2img only").into());
        }
        hires(state, &mut theirs, &mut ours)?;
    }
    if !ours.has("prompt") {
        ours.add("prompt", "prompt", "");
    }
    ours.add("prompt_syntax", "prompt", "a1111");
    // Any negative number, and a field left blank, mean chance.
    if let Some((name, seed)) = theirs.take(&["seed"])?
        && seed != ""
        && seed.as_f64().is_none_or(|seed| seed >= 0.0)
    {
        ours.add("seed", &name, seed);
    }
    let most = 1..=state.settings.limits.max_images as u64;
    let batch = theirs.whole(&["batch_size"], most.clone())?.unwrap_or(1);
    ours.add("n", "batch_size x n_iter", batch * theirs.whole(&["n_iter"], most)?.unwrap_or(1));
    if let Some(scheduler) = scheduler(&mut theirs)? {
        ours.add("scheduler", "sampler_name", scheduler.to_string());
    }
    Ok(ours)
}

/// Puts a second pass into our words.
fn hires(state: &AppState, theirs: &mut Fields, ours: &mut Fields) -> Result<(), ApiError> {
    for (name, same) in MUST_MATCH_FIRST_PASS {
        if let Some((name, value)) = theirs.take(&[name])?
            && !is_noop(&value)
            && value != same
            && value != json!([same])
        {
            return Err(
                ValidationError::range(&name, "must be the same as in the base pass").into()
            );
        }
    }
    let model = state.engine.model()?;
    let first = model.defaults.size;
    // What is no size is refused when it is read.
    let side = |name, first: usize| ours.peek(name).unwrap_or(first as u64).clamp(1, MAX_SIDE);
    let (width, height) = (side("width", first.width()), side("height", first.height()));
    let scale = theirs.number(&["hr_scale"], 0.1..=16.0)?.unwrap_or(2.0);
    let x = theirs.whole(&["hr_resize_x"], 0..=MAX_SIDE)?.unwrap_or(0);
    let y = theirs.whole(&["hr_resize_y"], 0..=MAX_SIDE)?.unwrap_or(0);
    let (spelt, target) = match (x, y) {
        (0, 0) => {
            let scaled = |side: u64| (side as f64 * scale) as u64;
            ("hr_scale", [scaled(width), scaled(height)])
        }
        (x, 0) => ("hr_resize_x", [x, x * height / width]),
        (0, y) => ("hr_resize_y", [y * width / height, y]),
        (x, y) => ("hr_resize_x", [x, y]),
    };
    // Latents have whole pixels.
    let multiple = model.multiple as u64;
    let [wide, high] = target.map(|side| (side / multiple).max(1) * multiple);
    if (wide, high) == (width, height) {
        // As there, nothing is done where nothing would be enlarged.
        return Ok(());
    }
    ours.add("hires_width", spelt, wide);
    ours.add("hires_height", spelt, high);
    let most = state.settings.limits.max_steps as u64;
    let strength = theirs.number(&["denoising_strength"], 0.0..=1.0)?;
    let strength = strength.unwrap_or(DEFAULT_STRENGTH);
    ours.add("hires_strength", "denoising_strength", strength);
    let steps = theirs.whole(&["hr_second_pass_steps"], 0..=most)?.filter(|steps| *steps > 0);
    let steps = steps.or(ours.peek("num_inference_steps"));
    let steps = steps.unwrap_or(model.defaults.steps as u64) as f64;
    // There the steps are those that are taken, here those of which a share is: more, as far as
    // may be.
    let whole = (steps / strength.max(MIN_STRENGTH)).ceil() as u64;
    ours.add("hires_steps", "hr_second_pass_steps", whole.clamp(1, most));
    if let Some((name, value)) = theirs.take(&["hr_upscaler"])?
        && value != ""
    {
        ours.add("hires_upscaler", &name, value);
    }
    Ok(())
}

/// The picture to begin with.
pub(crate) struct InitImage {
    image: Value,
    mask: Option<Value>,
    /// Whether it is the dark of the mask that is painted anew.
    inverted: bool,
    strength: f64,
}

impl InitImage {
    /// Takes the fields of img2img out. What is done otherwise than asked goes into the notes:
    /// clients send their defaults for it whether they mean them or not.
    pub(crate) fn take(
        theirs: &mut Fields,
        notes: &mut Vec<String>,
    ) -> Result<Self, ValidationError> {
        let missing =
            || ValidationError::malformed("init_images", "must contain an image in base64");
        let image = match theirs.take(&["init_images"])? {
            Some((_, Value::Array(images))) if images.len() > 1 => {
                return Err(ValidationError::range(
                    "init_images",
                    "must contain exactly one image",
                ));
            }
            Some((_, Value::Array(mut images))) => images.pop().ok_or_else(missing)?,
            _ => return Err(missing()),
        };
        let mask = theirs.take(&["mask"])?.map(|(_, mask)| mask).filter(|mask| !is_noop(mask));
        let inverted = theirs.take(&["inpainting_mask_invert"])?;
        let inverted = inverted.is_some_and(|(_, value)| !is_noop(&value));
        let strength = theirs.number(&["denoising_strength"], 0.0..=1.0)?;
        if mask.is_some() {
            let asks = |field: Option<(String, Value)>, plain: fn(&Value) -> bool| {
                field.is_some_and(|(_, value)| !plain(&value))
            };
            if asks(theirs.take(&["inpaint_full_res"])?, is_noop) {
                notes.push(
                    "inpaint_full_res is not supported: the whole image was generated".into(),
                );
            }
            if asks(theirs.take(&["mask_blur"])?, is_noop) {
                notes.push(
                    "mask_blur is not supported: the mask was applied with hard edges".into(),
                );
            }
            if asks(theirs.take(&["inpainting_fill"])?, |fill| *fill == 1) {
                notes.push("inpainting_fill is not supported: the masked area started from the input image".into());
            }
        }
        Ok(Self { image, mask, inverted, strength: strength.unwrap_or(DEFAULT_STRENGTH) })
    }

    /// Puts it into our words.
    pub(crate) async fn write_into(
        self,
        state: &AppState,
        slot: &RequestSlot,
        ours: &mut Fields,
    ) -> Result<(), ApiError> {
        ours.add("image", "init_images", self.image);
        ours.add("strength", "denoising_strength", self.strength);
        let Some(mask) = self.mask else { return Ok(()) };
        let Some(text) = mask.as_str().filter(|_| self.inverted) else {
            ours.add("mask", "mask", mask);
            return Ok(());
        };
        let (file, most) =
            (request::file("mask", text.to_owned())?, state.settings.limits.max_input_pixels);
        let turned = slot.decode(state, move || image::mask(&file, most, image::inverted)).await;
        let turned = turned.map_err(|_| ValidationError::malformed("mask", "cannot be read"))?;
        let turned = turned.map_err(|reason| ValidationError::range("mask", reason))?;
        ours.add("mask", "mask", BASE64_STANDARD.encode(turned.unwrap_or_default()));
        Ok(())
    }
}

/// A value that asks for nothing.
pub(crate) fn is_noop(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|number| number <= 0.0),
        Value::String(text) => ["", "None"].contains(&text.as_str()),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::Bool(true) => false,
    }
}

/// The sampler and its schedule. AUTOMATIC1111 has two fields for them, and in older versions one.
fn scheduler(theirs: &mut Fields) -> Result<Option<SamplerName>, ValidationError> {
    let name = theirs.text(&["sampler_name"], 64)?.filter(|name| !name.is_empty());
    let older = theirs.text(&["sampler_index"], 64)?.filter(|name| !name.is_empty());
    let schedule = theirs.text(&["scheduler"], 64)?.unwrap_or_default().to_lowercase();
    let schedule = if schedule.is_empty() { "automatic" } else { schedule.as_str() };
    let Some(name) = name.or(older) else { return Ok(None) };
    let SamplerName { sampler, schedule: named } = name
        .parse()
        .map_err(|reason| ValidationError::range("sampler_name", format!("is an {reason}")))?;
    let asked = match (schedule, named) {
        ("automatic", SigmaSchedule::Model) => Some(sampler.automatic_schedule()),
        ("automatic", named) => Some(named),
        ("normal", _) => Some(SigmaSchedule::Model),
        (other, _) => SigmaSchedule::all().find(|schedule| schedule.a1111_name() == other),
    };
    // A label that names its schedule allows no other.
    let agrees = |asked| named == SigmaSchedule::Model || named == asked;
    match asked.filter(|asked| agrees(*asked) && sampler.check(*asked).is_ok()) {
        Some(schedule) => Ok(Some(SamplerName { sampler, schedule })),
        None => {
            let reason = format!("{schedule:?} is not available for the sampler {name}");
            Err(ValidationError::range("scheduler", reason))
        }
    }
}

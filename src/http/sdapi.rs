//! AUTOMATIC1111's API, for the clients that were written for it. A request is put into native
//! words and read like any other. As there, fields that nobody knows are ignored; fields that would
//! change the picture and cannot be honoured are refused by name. Where AUTOMATIC1111 has one
//! progress and one interrupt for all, here each client has its own.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::extract::{Query, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{ModelInfo, Scheduler, Spec, Upscaler};
use serde_json::{Map, Value, json};

use super::accept::Reply;
use super::asked::Asked;
use super::body::Speech;
use super::error::{self, ApiError, Reason};
use super::intake::{self, Intake};
use super::underway::Begun;
use super::{State, models, openai};
use crate::api::{self, Fields, Invalid};
use crate::engine::{Drawn, Failure};
use crate::image::{self, Format, infotext};

/// Fields with the same meaning here; ours are on the right.
pub(super) const SAME: [(&str, &str); 6] = [
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
const SHARED: [(&str, &str); 7] = [
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

/// Samplers that AUTOMATIC1111 runs on Karras' sigmas unless told otherwise, on those, and on the
/// model's own.
const KARRAS: [(Scheduler, Scheduler); 1] = [(Scheduler::Dpmpp2m, Scheduler::Dpmpp2mKarras)];

/// What AUTOMATIC1111 calls a schedule: its name and its label.
const SCHEDULES: [(&str, &str); 3] =
    [("automatic", "Automatic"), ("uniform", "Uniform"), ("karras", "Karras")];

/// A JSON object.
type Object = Map<String, Value>;

/// `POST /sdapi/v1/txt2img`.
pub(super) async fn txt2img(state: State, request: Request) -> Result<Response, ApiError> {
    draw(state, request, false).await
}

/// `POST /sdapi/v1/img2img`.
pub(super) async fn img2img(state: State, request: Request) -> Result<Response, ApiError> {
    draw(state, request, true).await
}

/// Draws and answers as AUTOMATIC1111 does.
async fn draw(state: State, request: Request, from_picture: bool) -> Result<Response, ApiError> {
    let Intake { body, client, deadline, permit: _permit, .. } =
        intake::take(&state, request).await?;
    let text = std::str::from_utf8(&body)
        .map_err(|error| Invalid::body(format!("the body is not UTF-8: {error}")))?;
    let mut theirs = Fields::json(text)?;
    let mut echo: Object = serde_json::from_str(text).unwrap_or_default();
    drop(body);
    let send_images = theirs.flag(&["send_images"])?.unwrap_or(true);
    let task = theirs.text(&["force_task_id"], 256)?;
    let mut notes = Vec::new();
    let start = match from_picture {
        true => Some(Start::take(&mut theirs, &mut notes)?),
        false => None,
    };
    let (mut settings, model) = overrides(&mut theirs)?;
    let state = match model.or_else(|| state.checkpoint.get()) {
        Some(model) => models::choose(&state, &model).await?,
        None => state,
    };
    let format = settings.remove("samples_format");
    check(&state, &settings)?;
    let mut fields = translate(&state, theirs, from_picture)?;
    if let Some(format) = format {
        fields.add("output_format", "override_settings.samples_format", format);
    }
    if let Some(start) = start {
        // As there, pictures do not go back to where they came from.
        echo.retain(|name, _| !["init_images", "mask"].contains(&name.as_str()));
        start.put(&state, &mut fields).await?;
    }
    let mut asked = Asked::read(&state, fields, Speech::Json, |wish| {
        Ok(Reply::Json(wish.format.unwrap_or(Format::Png)))
    })
    .await?;
    asked.preview = true;
    let ticket = asked.submit(&client, Some(deadline))?;
    let begun = Begun::new(&state.engine, &ticket, client, task, &asked.specs);
    let _underway = state.underway.enter(begun);
    let pictures = ticket.wait().await?;
    // As there, an interrupted request is answered with what there is, and with 200 if there is
    // nothing: clients take any other status for a failure of the server.
    if pictures.is_empty() {
        notes.push("interrupted before there was anything to see".into());
        asked.specs.truncate(1);
    } else {
        asked.specs = pictures.iter().map(|drawn| asked.specs[drawn.index].clone()).collect();
    }
    let dress = move |asked: &Asked, pictures: &[Drawn], files: Vec<Vec<u8>>| {
        let images: Vec<String> = files.iter().map(|file| BASE64_STANDARD.encode(file)).collect();
        json!({
            "images": if send_images { images } else { Vec::new() },
            "parameters": echo,
            "info": info(asked, pictures, notes).to_string(),
        })
    };
    Ok(Json(asked.encode(pictures, dress).await?).into_response())
}

/// The model that is asked what there is beside it; none where none is chosen, and none is loaded
/// for that.
fn artist(state: &State) -> Result<Option<Arc<ModelInfo>>, ApiError> {
    let chosen = state.checkpoint.get().and_then(|name| state.models.get(&name).ok());
    match chosen.as_ref().map_or(&state.engine, |chosen| &chosen.engine).model() {
        Ok(model) => Ok(Some(model)),
        Err(Failure::Absent) => Ok(None),
        Err(failure) => Err(failure.into()),
    }
}

/// The settings of one request, and the model that they name.
fn overrides(theirs: &mut Fields) -> Result<(Object, Option<String>), Invalid> {
    let Some((name, settings)) = theirs.take(&["override_settings"])? else {
        return Ok(Default::default());
    };
    let Value::Object(mut settings) = settings else {
        return Err(Invalid::malformed(&name, "must be an object"));
    };
    let model = settings.remove("sd_model_checkpoint");
    let model = model.and_then(|model| model.as_str().map(str::to_owned));
    Ok((settings, model.filter(|name| !name.is_empty())))
}

/// Their fields in our words.
fn translate(state: &State, mut theirs: Fields, from_picture: bool) -> Result<Fields, ApiError> {
    for name in REFUSED {
        if let Some((name, value)) = theirs.take(&[name])?
            && !idle(&value)
        {
            return Err(Invalid::range(&name, "asks for what this server does not do").into());
        }
    }
    let mut ours = Fields::default();
    for (name, native) in SAME {
        if let Some((name, value)) = theirs.take(&[name])? {
            ours.add(native, &name, value);
        }
    }
    if theirs.take(&["enable_hr"])?.is_some_and(|(_, enabled)| !idle(&enabled)) {
        if from_picture {
            return Err(Invalid::range("enable_hr", "is for txt2img").into());
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
        ours.add("scheduler", "sampler_name", scheduler.name());
    }
    Ok(ours)
}

/// Puts a second pass into our words.
fn hires(state: &State, theirs: &mut Fields, ours: &mut Fields) -> Result<(), ApiError> {
    for (name, same) in SHARED {
        if let Some((name, value)) = theirs.take(&[name])?
            && !idle(&value)
            && value != same
            && value != json!([same])
        {
            return Err(Invalid::range(&name, "must be that of the first pass").into());
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
struct Start {
    image: Value,
    mask: Option<Value>,
    /// Whether it is the dark of the mask that is painted anew.
    inverted: bool,
    strength: f64,
}

impl Start {
    /// Takes the fields of img2img out. What is done otherwise than asked goes into the notes:
    /// clients send their defaults for it whether they mean them or not.
    fn take(theirs: &mut Fields, notes: &mut Vec<String>) -> Result<Self, Invalid> {
        let missing = || Invalid::malformed("init_images", "must hold a picture in base64");
        let image = match theirs.take(&["init_images"])? {
            Some((_, Value::Array(images))) if images.len() > 1 => {
                return Err(Invalid::range("init_images", "may hold one picture only"));
            }
            Some((_, Value::Array(mut images))) => images.pop().ok_or_else(missing)?,
            _ => return Err(missing()),
        };
        let mask = theirs.take(&["mask"])?.map(|(_, mask)| mask).filter(|mask| !idle(mask));
        let inverted = theirs.take(&["inpainting_mask_invert"])?;
        let inverted = inverted.is_some_and(|(_, value)| !idle(&value));
        let strength = theirs.number(&["denoising_strength"], 0.0..=1.0)?;
        if mask.is_some() {
            let asks = |field: Option<(String, Value)>, plain: fn(&Value) -> bool| {
                field.is_some_and(|(_, value)| !plain(&value))
            };
            if asks(theirs.take(&["inpaint_full_res"])?, idle) {
                notes.push("inpaint_full_res: the whole picture was drawn, not a part".into());
            }
            if asks(theirs.take(&["mask_blur"])?, idle) {
                notes.push("mask_blur: the edge of the mask is hard".into());
            }
            if asks(theirs.take(&["inpainting_fill"])?, |fill| *fill == 1) {
                notes.push("inpainting_fill: the masked part began as it was".into());
            }
        }
        Ok(Self { image, mask, inverted, strength: strength.unwrap_or(DEFAULT_STRENGTH) })
    }

    /// Puts it into our words.
    async fn put(self, state: &State, ours: &mut Fields) -> Result<(), ApiError> {
        ours.add("image", "init_images", self.image);
        ours.add("strength", "denoising_strength", self.strength);
        let Some(mask) = self.mask else { return Ok(()) };
        let Some(text) = mask.as_str().filter(|_| self.inverted) else {
            ours.add("mask", "mask", mask);
            return Ok(());
        };
        let (file, most) =
            (api::file("mask", text.to_owned())?, state.settings.limits.max_input_pixels);
        let _turn = state.readers.acquire().await;
        let turned = move || image::mask(&file, most, image::inverted);
        let turned = tokio::task::spawn_blocking(turned).await;
        let turned = turned.map_err(|_| Invalid::malformed("mask", "cannot be read"))?;
        let turned = turned.map_err(|reason| Invalid::range("mask", reason))?;
        ours.add("mask", "mask", BASE64_STANDARD.encode(turned.unwrap_or_default()));
        Ok(())
    }
}

/// A value that asks for nothing.
fn idle(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|number| number <= 0.0),
        Value::String(text) => ["", "None"].contains(&text.as_str()),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::Bool(true) => false,
    }
}

/// A sampler and the schedule that it runs on: one word here, two there, and once one there too.
fn scheduler(theirs: &mut Fields) -> Result<Option<Scheduler>, Invalid> {
    let name = theirs.text(&["sampler_name"], 64)?.filter(|name| !name.is_empty());
    let older = theirs.text(&["sampler_index"], 64)?.filter(|name| !name.is_empty());
    let schedule = theirs.text(&["scheduler"], 64)?.unwrap_or_default().to_lowercase();
    let schedule = if schedule.is_empty() { "automatic" } else { schedule.as_str() };
    let Some(name) = name.or(older) else { return Ok(None) };
    let sampler: Scheduler =
        name.parse().map_err(|reason| Invalid::range("sampler_name", format!("is an {reason}")))?;
    let karras = KARRAS.iter().find(|(plain, _)| *plain == sampler).map(|(_, karras)| *karras);
    let is_karras = KARRAS.iter().any(|(_, karras)| *karras == sampler);
    match schedule {
        "automatic" => Ok(Some(karras.unwrap_or(sampler))),
        "karras" if karras.is_some() || is_karras => Ok(Some(karras.unwrap_or(sampler))),
        "uniform" | "normal" if !is_karras => Ok(Some(sampler)),
        other => {
            let reason = format!("{other:?} is not available for the sampler {name}");
            Err(Invalid::range("scheduler", reason))
        }
    }
}

/// What AUTOMATIC1111 tells of its pictures.
fn info(asked: &Asked, pictures: &[Drawn], notes: Vec<String>) -> Value {
    let (specs, model) = (&asked.specs, &asked.model().name);
    let Some(first) = specs.first() else { return Value::Null };
    let loras = asked.loras(first);
    let all = |of: fn(&Spec) -> Value| specs.iter().map(of).collect::<Vec<_>>();
    let infotexts: Vec<_> = specs.iter().map(|spec| image::infotext(spec, model, &loras)).collect();
    let mut warnings = notes;
    for warning in pictures.iter().flat_map(|picture| &picture.warnings) {
        if !warnings.contains(warning) {
            warnings.push(warning.clone());
        }
    }
    let nsfw: Option<Vec<bool>> = pictures.iter().map(|picture| picture.nsfw).collect();
    let parameters = first.hires.iter().flat_map(|hires| image::hires_parameters(first, hires));
    let hashes = (!loras.is_empty()).then_some((image::LORA_HASHES, loras));
    let parameters = parameters.chain(hashes);
    let parameters: Map<String, Value> =
        parameters.map(|(name, value)| (name.to_owned(), value.into())).collect();
    json!({
        "prompt": first.prompt,
        "all_prompts": all(|spec| spec.prompt.as_str().into()),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": all(|spec| spec.negative_prompt.as_str().into()),
        "seed": first.seed,
        "all_seeds": all(|spec| spec.seed.into()),
        "subseed": 0,
        "all_subseeds": all(|_| 0.into()),
        "subseed_strength": 0,
        "width": first.size.width(),
        "height": first.size.height(),
        "sampler_name": first.scheduler.title(),
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": specs.len(),
        "restore_faces": false,
        "face_restoration_model": null,
        "sd_model_name": model,
        "sd_model_hash": null,
        "sd_vae_name": null,
        "sd_vae_hash": null,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength(),
        "extra_generation_params": parameters,
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": "0",
        "clip_skip": 1,
        "is_using_inpainting_conditioning": false,
        "version": concat!("sd-server ", env!("CARGO_PKG_VERSION")),
        "warnings": warnings,
        "all_nsfw": nsfw,
    })
}

/// What may be asked of progress.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Look {
    #[serde(default)]
    skip_current_image: bool,
}

/// `GET /sdapi/v1/progress`: of the client's oldest request.
pub(super) async fn progress(
    state: State,
    look: Result<Query<Look>, axum::extract::rejection::QueryRejection>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let Query(look) = look.map_err(|error| Invalid::body(error.body_text()))?;
    let client = intake::client(&request);
    let begun = state.underway.of(&client);
    let Some(first) = begun.first() else {
        return Ok(Json(json!({
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": job(0, 0, 0),
            "current_image": null,
            "textinfo": null,
        })));
    };
    let outlook = first.outlook();
    let preview = if look.skip_current_image { None } else { first.preview().await };
    let step = (first.share() * first.steps as f64) as usize;
    Ok(Json(json!({
        "progress": first.share(),
        "eta_relative": outlook.left.map_or(0.0, |left| left.as_secs_f64()),
        "state": job(begun.len(), step, first.steps),
        "current_image": preview.map(|file| BASE64_STANDARD.encode(file)),
        "textinfo": outlook.position.map(|ahead| format!("{ahead} pictures ahead")),
    })))
}

fn job(count: usize, step: usize, steps: usize) -> Value {
    json!({
        "skipped": false,
        "interrupted": false,
        "stopping_generation": false,
        "job": if count == 0 { "" } else { "txt2img" },
        "job_count": count,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    })
}

/// `POST /internal/progress`: of the request with this `force_task_id`.
pub(super) async fn task(state: State, request: Request) -> Result<Json<Value>, ApiError> {
    let client = intake::client(&request);
    let mut fields = read(&state, request).await?;
    let id = fields.text(&["id_task"], 256)?;
    let wants_preview = fields.flag(&["live_preview"])?.unwrap_or(true);
    let begun = state.underway.of(&client);
    let Some(begun) = begun.iter().find(|begun| begun.task.is_some() && begun.task == id) else {
        return Ok(Json(json!({ "active": false, "queued": false, "completed": false })));
    };
    let outlook = begun.outlook();
    let preview = if wants_preview { begun.preview().await } else { None };
    let data = |file| format!("data:image/png;base64,{}", BASE64_STANDARD.encode(file));
    Ok(Json(json!({
        "active": outlook.position.is_none(),
        "queued": outlook.position.is_some(),
        "completed": false,
        "progress": begun.share(),
        "eta": outlook.left.map(|left| left.as_secs_f64()),
        "live_preview": preview.map(data),
        "id_live_preview": begun.made(),
        "textinfo": outlook.position.map(|ahead| format!("{ahead} pictures ahead")),
    })))
}

/// `POST /sdapi/v1/interrupt`: ends all that the client has under way with what there is of it.
pub(super) async fn interrupt(state: State, request: Request) -> Json<Value> {
    for begun in state.underway.of(&intake::client(&request)) {
        begun.interrupt();
    }
    Json(json!({}))
}

/// The model that was chosen for requests that name none; without it, the one that is there.
#[derive(Debug, Default, Clone)]
pub(super) struct Checkpoint(Arc<Mutex<Option<String>>>);

impl Checkpoint {
    fn slot(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> Option<String> {
        self.slot().clone()
    }
}

/// What there is to set, and what it is set to.
fn options(state: &State) -> Result<Object, ApiError> {
    let model = match (state.checkpoint.get(), state.engine.model()) {
        (Some(name), _) => name,
        (None, Ok(model)) => model.name.clone(),
        (None, Err(Failure::Absent)) => String::new(),
        (None, Err(failure)) => return Err(failure.into()),
    };
    let options = json!({
        "sd_model_checkpoint": model,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "randn_source": "CPU",
        "eta_noise_seed_delta": 0,
    });
    Ok(options.as_object().cloned().unwrap_or_default())
}

/// Accepts settings that are so already; there is nothing to change but the model.
fn check(state: &State, wanted: &Object) -> Result<(), ApiError> {
    for (name, is) in options(state)? {
        let Some(wanted) = wanted.get(&name).filter(|value| !idle(value)) else { continue };
        if *wanted != is && name != "sd_model_checkpoint" {
            let reason = format!("cannot be set to {wanted}; it is {is}");
            return Err(Invalid::range(&name, reason).into());
        }
    }
    Ok(())
}

/// `GET /sdapi/v1/options`.
pub(super) async fn get_options(state: State) -> Result<Json<Value>, ApiError> {
    Ok(Json(options(&state)?.into()))
}

/// `POST /sdapi/v1/options`: clients send back all that they have got, with a change in it. The model
/// is loaded before this is answered, and is that of every request of this API that names none.
pub(super) async fn set_options(state: State, request: Request) -> Result<Json<Value>, ApiError> {
    let body = intake::take(&state, request).await?.body;
    let wanted: Object = serde_json::from_slice(&body)
        .map_err(|error| Invalid::body(format!("the body is not a JSON object: {error}")))?;
    check(&state, &wanted)?;
    let is = options(&state)?;
    let name = wanted.get("sd_model_checkpoint").and_then(Value::as_str);
    if let Some(name) = name.filter(|name| !name.is_empty() && is["sd_model_checkpoint"] != **name)
    {
        models::choose(&state, name).await?;
        *state.checkpoint.slot() = Some(name.to_owned());
    }
    Ok(Json(Value::Null))
}

/// `GET /sdapi/v1/samplers`.
pub(super) async fn samplers() -> Json<Value> {
    let sampler = |scheduler: Scheduler| {
        let (title, name) = (scheduler.title(), scheduler.name());
        json!({ "name": title, "aliases": [name], "options": {} })
    };
    Json(Scheduler::all().map(sampler).collect())
}

/// `GET /sdapi/v1/schedulers`.
pub(super) async fn schedulers() -> Json<Value> {
    let schedule = |(name, label): (&str, &str)| {
        json!({
            "name": name, "label": label, "aliases": null, "default_rho": -1.0,
            "need_inner_model": false,
        })
    };
    Json(SCHEDULES.into_iter().map(schedule).collect())
}

/// `GET /sdapi/v1/sd-models`.
pub(super) async fn models(state: State) -> Result<Json<Value>, ApiError> {
    let model = |name: &String| {
        json!({
            "title": name, "model_name": name, "hash": null, "sha256": null, "filename": name,
            "config": null,
        })
    };
    Ok(Json(openai::names(&state).await?.iter().map(model).collect()))
}

/// `GET /sdapi/v1/loras`: what `<lora:name:1>` in a prompt can name.
pub(super) async fn loras(state: State) -> Result<Json<Value>, ApiError> {
    let Some(model) = artist(&state)? else { return Ok(nothing().await) };
    let list = tokio::task::spawn_blocking(move || model.add_ons.loras.list()).await;
    let lora = |(name, path): (String, PathBuf)| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        json!({ "name": name, "alias": name, "path": file, "metadata": {} })
    };
    Ok(Json(list.unwrap_or_default().into_iter().map(lora).collect()))
}

/// The lists of what there is none of, which clients ask for before anything else.
pub(super) async fn nothing() -> Json<Value> {
    Json(json!([]))
}

/// `GET /sdapi/v1/latent-upscale-modes`.
pub(super) async fn upscalers() -> Json<Value> {
    Json(Upscaler::all().map(|upscaler| json!({ "name": upscaler.title() })).collect())
}

/// `GET /sdapi/v1/embeddings`: words that prompts can hold beside those of every model.
pub(super) async fn embeddings(state: State) -> Result<Json<Value>, ApiError> {
    let Some(model) = artist(&state)? else {
        return Ok(Json(json!({ "loaded": {}, "skipped": {} })));
    };
    let item = |vectors, reason: Option<&str>| {
        let shape = model.embeddings.width;
        json!({
            "step": null, "sd_checkpoint": null, "sd_checkpoint_name": null, "shape": shape,
            "vectors": vectors, "reason": reason,
        })
    };
    let learned = &model.embeddings;
    let loaded: Map<String, Value> =
        learned.words.iter().map(|word| (word.word.clone(), item(word.count, None))).collect();
    let skipped: Map<String, Value> =
        learned.skipped.iter().map(|(name, why)| (name.clone(), item(0, Some(why)))).collect();
    Ok(Json(json!({ "loaded": loaded, "skipped": skipped })))
}

/// `GET /sdapi/v1/scripts`.
pub(super) async fn scripts() -> Json<Value> {
    Json(json!({ "txt2img": [], "img2img": [] }))
}

/// `POST /sdapi/v1/png-info`: the parameters in a picture's file, as text and one by one.
pub(super) async fn png_info(state: State, request: Request) -> Result<Json<Value>, ApiError> {
    let mut fields = read(&state, request).await?;
    let image = fields.text(&["image"], usize::MAX)?;
    let image = image.ok_or_else(|| Invalid::malformed("image", "is required"))?;
    let file = api::file("image", image)?;
    let found = tokio::task::spawn_blocking(move || infotext::find(&file));
    let found = found.await.map_err(|_| Invalid::malformed("image", "cannot be read"))?;
    let text = found.map_err(|reason| Invalid::malformed("image", reason))?.unwrap_or_default();
    let parameters: Object =
        infotext::parse(&text).into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(Json(json!({ "info": text, "items": { "parameters": text }, "parameters": parameters })))
}

/// The fields of a small request.
async fn read(state: &State, request: Request) -> Result<Fields, ApiError> {
    let body = intake::take(state, request).await?.body;
    let text = std::str::from_utf8(&body)
        .map_err(|error| Invalid::body(format!("the body is not UTF-8: {error}")))?;
    Ok(Fields::json(text)?)
}

/// Puts errors into AUTOMATIC1111's words, whoever made them.
pub(super) async fn errors(response: Response) -> Response {
    error::rephrase(
        response,
        |_: StatusCode, Reason { code, message, .. }| json!({ "error": code, "detail": message, "body": "", "errors": message }),
    )
}

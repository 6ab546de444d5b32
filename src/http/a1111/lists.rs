//! The lists that clients request when they start.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use sd_models::{
    AddOns, LatentUpscaler, ModelInfo, PictureUpscaler, REAL_ESRGAN, Sampler, SigmaSchedule,
    Upscaler,
};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::http::deadline::Timeout;
use crate::http::error::Result;
use crate::http::state::{AppState, model_of};
use crate::image::short_hash;

/// The selected model or the default one, if it is loaded.
pub(super) fn current_model(state: &AppState) -> Result<Option<Arc<ModelInfo>>> {
    let chosen = state.checkpoint.get().and_then(|name| state.models.get(&name).ok());
    model_of(chosen.as_ref().map_or(&state.engine, |chosen| &chosen.engine))
}

/// `GET /sdapi/v1/samplers`.
pub(crate) async fn samplers(State(state): State<AppState>) -> Json<Vec<Value>> {
    let model = current_model(&state).ok().flatten();
    let runs = |sampler: &Sampler| {
        model.as_ref().is_none_or(|model| model.unsuited_to(*sampler).is_none())
    };
    let sampler = |sampler: Sampler| {
        let aliases = std::iter::once(sampler.name()).chain(sampler.aliases().iter().copied());
        let options = match sampler.automatic_schedule() {
            SigmaSchedule::Model => json!({}),
            schedule => json!({ "scheduler": schedule.a1111_name() }),
        };
        json!({
            "name": sampler.title(), "aliases": aliases.collect::<Vec<_>>(), "options": options,
        })
    };
    Json(Sampler::all().filter(runs).map(sampler).collect())
}

/// `GET /sdapi/v1/schedulers`.
pub(crate) async fn schedulers() -> Json<Vec<Value>> {
    let schedule = |(name, label)| {
        json!({
            "name": name, "label": label, "aliases": null, "default_rho": -1.0,
            "need_inner_model": false,
        })
    };
    let own = SigmaSchedule::all().map(|schedule| (schedule.a1111_name(), schedule.title()));
    Json(std::iter::once(("automatic", "Automatic")).chain(own).map(schedule).collect())
}

/// `GET /sdapi/v1/sd-models`. As there, the hash is that of a file that was hashed for an image.
pub(crate) async fn models(State(state): State<AppState>) -> Result<Json<Vec<Value>>> {
    let loaded = state.models.engines();
    let loaded: Vec<_> = loaded.iter().filter_map(|engine| engine.model().ok()).collect();
    let model = |name: &String| {
        let info = loaded.iter().find(|model| model.name == *name);
        let file = info.and_then(|model| model.files.checkpoint.as_ref());
        let hash = file.and_then(|file| state.hashes.known(file));
        json!({
            "title": name,
            "model_name": name,
            "hash": hash.as_deref().map(short_hash),
            "sha256": hash,
            "filename": file.map_or(name, |file| &file.name),
            "config": null,
        })
    };
    Ok(Json(state.model_names().await?.iter().map(model).collect()))
}

/// `GET /sdapi/v1/sd-vae`: the file of `--vae`.
pub(crate) async fn vaes(State(state): State<AppState>) -> Result<Json<Vec<Value>>> {
    let model = current_model(&state)?;
    let file = model.as_ref().and_then(|model| model.files.vae.as_ref());
    let vae = file.map(|file| json!({ "model_name": file.name, "filename": file.name }));
    Ok(Json(vae.into_iter().collect()))
}

/// `GET /sdapi/v1/loras`: what `<lora:name:1>` in a prompt can name.
pub(crate) async fn loras(State(state): State<AppState>) -> Result<Json<Vec<Value>>> {
    let list = |add_ons: &AddOns| {
        let lora = |(name, path): (String, PathBuf)| {
            let file = path.file_name().map(file_text);
            let alias = add_ons.loras.alias(&path).unwrap_or_else(|| name.clone());
            json!({ "name": name, "alias": alias, "path": file, "metadata": {} })
        };
        add_ons.loras.list().into_iter().map(lora).collect()
    };
    look_up(&state, list).await
}

/// Lists that are always empty. Clients require them when they start.
pub(crate) async fn empty_list() -> Json<Vec<Value>> {
    Json(Vec::new())
}

/// What needs no refresh, since it is looked for at each request.
pub(crate) async fn refresh() -> Json<Value> {
    Json(Value::Null)
}

/// `GET /sdapi/v1/upscalers`: of pictures. The scale of a file is known when it is read, and null
/// here.
pub(crate) async fn upscalers(State(state): State<AppState>) -> Result<Json<Vec<Value>>> {
    let item = |name: &str, path: Option<String>| {
        json!({
            "name": name, "model_name": null, "model_path": path, "model_url": null,
            // As there, any that is asked for.
            "scale": path.is_none().then_some(4),
        })
    };
    let list = move |add_ons: &AddOns| {
        let built_in = PictureUpscaler::BUILT_IN;
        let built_in = built_in.iter().map(|upscaler| item(upscaler.title(), None));
        let files = add_ons.upscalers.list().into_iter();
        let files = files.map(|(name, path)| {
            let file = path.file_name().map(file_text);
            // A file of a built-in name is selected by its name with the ending.
            let is_built_in = Upscaler::built_in().any(|own| own.eq_ignore_ascii_case(&name));
            let name = file.clone().filter(|_| is_built_in).unwrap_or(name);
            item(title(&name).unwrap_or(&name), file)
        });
        built_in.chain(files).collect()
    };
    look_up(&state, list).await
}

/// `GET /sdapi/v1/realesrgan-models`: the files of Real-ESRGAN's own networks, by their names there.
pub(crate) async fn realesrgan_models(State(state): State<AppState>) -> Result<Json<Vec<Value>>> {
    let list = |add_ons: &AddOns| {
        let item = |(name, path): (String, PathBuf)| {
            let (title, file) = (title(&name)?, path.file_name().map(file_text));
            let scale = if title == "R-ESRGAN 2x+" { 2 } else { 4 };
            Some(json!({ "name": title, "path": file, "scale": scale }))
        };
        add_ons.upscalers.list().into_iter().filter_map(item).collect()
    };
    look_up(&state, list).await
}

/// AUTOMATIC1111's name of a file of Real-ESRGAN.
fn title(file: &str) -> Option<&'static str> {
    let known = REAL_ESRGAN.iter().find(|(_, known)| known.eq_ignore_ascii_case(file));
    known.map(|(title, _)| *title)
}

fn file_text(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

/// A list of what there is to add to the selected model.
async fn look_up(
    state: &AppState,
    list: impl FnOnce(&AddOns) -> Vec<Value> + Send + 'static,
) -> Result<Json<Vec<Value>>> {
    let model = current_model(state)?;
    let add_ons = model.map_or_else(|| state.models.add_ons(), |model| model.add_ons.clone());
    let most = state.settings.request_timeout;
    let timeout = Timeout::within(most, "--request-timeout-ms", most);
    let deadline = timeout.after(Instant::now());
    let listed = state.reader.look_up(deadline, (), move || Ok(list(&add_ons))).await?;
    Ok(Json(listed))
}

/// `GET /sdapi/v1/latent-upscale-modes`.
pub(crate) async fn latent_upscalers() -> Json<Vec<Value>> {
    Json(LatentUpscaler::all().map(|upscaler| json!({ "name": upscaler.title() })).collect())
}

/// `GET /sdapi/v1/embeddings`: the textual inversion embeddings that prompts can name.
pub(crate) async fn embeddings(State(state): State<AppState>) -> Result<Json<Value>> {
    let Some(model) = current_model(&state)? else {
        return Ok(Json(json!({ "loaded": {}, "skipped": {} })));
    };
    let embeddings = &model.embeddings;
    let item = |vectors, reason: Option<&str>| {
        let shape = embeddings.width;
        json!({
            "step": null, "sd_checkpoint": null, "sd_checkpoint_name": null, "shape": shape,
            "vectors": vectors, "reason": reason,
        })
    };
    let loaded: Map<String, Value> =
        embeddings.words.iter().map(|word| (word.word.clone(), item(word.count, None))).collect();
    let skipped: Map<String, Value> =
        embeddings.skipped.iter().map(|(name, why)| (name.clone(), item(0, Some(why)))).collect();
    Ok(Json(json!({ "loaded": loaded, "skipped": skipped })))
}

/// `GET /sdapi/v1/scripts`: by it clients know whether there is the extension for ControlNets.
pub(crate) async fn scripts(State(state): State<AppState>) -> Result<Json<Value>> {
    let model = current_model(&state)?;
    let add_ons = model.map_or_else(|| state.models.add_ons(), |model| model.add_ons.clone());
    let has_nets = add_ons.controlnets.directory.is_some();
    let names: Vec<_> = has_nets.then_some("controlnet").into_iter().collect();
    Ok(Json(json!({ "txt2img": names, "img2img": names })))
}

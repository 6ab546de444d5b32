//! `/ping` and `/health/ready`; and `/info`: the server, its model and its limits.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use sd_models::{ModelInfo, Preprocessor, Sampler, SigmaSchedule};
use serde_json::{Value, json};

use crate::engine::{Engine, EngineState};
use crate::http::state::AppState;

/// Readiness probe: 200 if images can be generated or models loaded, else 503. It never waits.
pub(crate) async fn ready(State(state): State<AppState>) -> StatusCode {
    match state.models.state() {
        EngineState::Ready(_) | EngineState::Absent => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// What is odd about the files of a model and did not keep it from being loaded, a sentence each.
fn warnings(model: &ModelInfo) -> Vec<String> {
    let skipped = model.embeddings.skipped.iter();
    let skipped = skipped.map(|(_, reason)| format!("an embedding is left out: {reason}"));
    model.warnings.iter().cloned().chain(skipped).collect()
}

/// A model and its defaults.
fn of_model(model: &ModelInfo, engine: &Engine) -> Value {
    let defaults = &model.defaults;
    json!({
        "name": model.name,
        "device": model.device,
        "dtype": model.precision,
        "is_xl": model.is_xl,
        "loaded": engine.is_loaded(),
        "safety_checker": model.checked.then(|| engine.safety().name()),
        "defaults": {
            "width": defaults.size.width(),
            "height": defaults.size.height(),
            "num_inference_steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale,
            "scheduler": defaults.sampler.name(),
            "schedule": defaults.schedule.name(),
            "clip_skip": defaults.clip_skip,
            "guidance_rescale": defaults.guidance_rescale,
        },
        "warnings": warnings(model),
    })
}

/// The server, its model and its limits.
pub(crate) async fn info(State(state): State<AppState>) -> Json<Value> {
    let (phase, model) = match state.engine.state() {
        EngineState::Absent => ("ready", None),
        EngineState::Loading => ("loading", None),
        EngineState::Ready(model) => ("ready", Some(model)),
        EngineState::Draining | EngineState::Stopped => ("stopping", None),
        EngineState::DeviceLost | EngineState::Dead(_) => ("failed", None),
    };
    let runs = {
        let model = model.clone();
        move |sampler: &Sampler| {
            model.as_ref().is_none_or(|model| model.unsuited_to(*sampler).is_none())
        }
    };
    let model = model.map(|model| of_model(&model, &state.engine));
    let schedulers = Sampler::all().filter(runs).map(|sampler| {
        let schedules: Vec<_> = sampler.schedules().map(SigmaSchedule::name).collect();
        json!({ "name": sampler.name(), "title": sampler.title(), "schedules": schedules })
    });
    let schedules = SigmaSchedule::all().map(|schedule| {
        let title = match schedule {
            SigmaSchedule::Model => "Model's own",
            schedule => schedule.title(),
        };
        json!({ "name": schedule.name(), "title": title })
    });
    let preprocessors: Vec<_> = Preprocessor::names().collect();
    let settings = &state.settings;
    let limits = &settings.limits;
    Json(json!({
        "name": "sd-server",
        "version": env!("CARGO_PKG_VERSION"),
        "phase": phase,
        "model": model,
        "schedulers": schedulers.collect::<Value>(),
        "schedules": schedules.collect::<Value>(),
        "preprocessors": preprocessors,
        "limits": {
            "max_pixels": limits.max_pixels,
            "max_steps": limits.max_steps,
            "max_images": limits.max_images,
            "max_loras": limits.max_loras,
            "max_controlnets": limits.max_controlnets,
            "max_prompt_bytes": limits.max_prompt_bytes,
            "max_body_bytes": settings.max_body_bytes,
            "max_requests": settings.max_requests,
            "request_timeout_ms": settings.request_timeout.as_millis() as u64,
        },
    }))
}

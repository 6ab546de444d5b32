//! What the server says about itself: `/info` for people and programs, `/metrics` for Prometheus.
//! Both on the main port and open to everyone, as SageMaker's scraper wants it.

use axum::Json;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use sd_models::Scheduler;
use serde_json::{Value, json};

use super::State;
use crate::engine::Phase;
use crate::telemetry::Id;

/// The Prometheus text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Every metric, with the gauges as they are now.
pub(super) async fn metrics(state: State) -> impl IntoResponse {
    let metrics = state.engine.metrics();
    let (engine, engines) = (state.engine.clone(), state.models.engines());
    // A driver may take its time; a gauge that could not be read keeps its value.
    let _ = tokio::task::spawn_blocking(move || engine.gauge_with(&engines)).await;
    let in_service = state.settings.max_requests - state.gate.available_permits();
    metrics.set(Id::RequestsInService, &[], in_service as f64);
    let [running, ended] = state.jobs.count();
    metrics.set(Id::Jobs, &["running"], running as f64);
    metrics.set(Id::Jobs, &["ended"], ended as f64);
    metrics.set(Id::Build, &[env!("CARGO_PKG_VERSION")], 1.0);
    ([(CONTENT_TYPE, TEXT)], metrics.to_string())
}

/// The server, its model and its limits.
pub(super) async fn info(state: State) -> Json<Value> {
    let (phase, model) = match state.engine.phase() {
        Phase::Absent => ("ready", None),
        Phase::Loading => ("loading", None),
        Phase::Ready(model) => ("ready", Some(model)),
        Phase::Draining | Phase::Stopped => ("stopping", None),
        Phase::DeviceLost | Phase::Dead(_) => ("failed", None),
    };
    let model = model.map(|model| {
        let defaults = &model.defaults;
        json!({
            "name": model.name,
            "device": model.device,
            "precision": model.precision,
            "safety_checker": model.checked.then(|| state.engine.safety().name()),
            "defaults": {
                "width": defaults.size.width(),
                "height": defaults.size.height(),
                "num_inference_steps": defaults.steps,
                "guidance_scale": defaults.guidance_scale,
                "scheduler": defaults.scheduler.name(),
            },
        })
    });
    let schedulers = Scheduler::all()
        .map(|scheduler| json!({ "name": scheduler.name(), "title": scheduler.title() }));
    let settings = &state.settings;
    let limits = &settings.limits;
    Json(json!({
        "name": "sd-server",
        "version": env!("CARGO_PKG_VERSION"),
        "phase": phase,
        "model": model,
        "schedulers": schedulers.collect::<Value>(),
        "limits": {
            "max_pixels": limits.max_pixels,
            "max_steps": limits.max_steps,
            "max_images": limits.max_images,
            "max_prompt_bytes": limits.max_prompt_bytes,
            "max_body_bytes": settings.max_body_bytes,
            "max_requests": settings.max_requests,
            "request_timeout_ms": settings.request_timeout.as_millis() as u64,
        },
    }))
}

//! The server's memory and flags, and what AUTOMATIC1111 has and this server does not.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::host::{gpu, memory};
use crate::http::deadline::{Deadline, Timeout};
use crate::http::error::Result;
use crate::http::headers::warnings_header;
use crate::http::state::{AppState, model_of};
use crate::request::ValidationError;

/// `GET /sdapi/v1/memory`: of the host and of the model's GPU, in bytes.
pub(crate) async fn memory_use(State(state): State<AppState>) -> Json<Value> {
    let used = memory::resident().unwrap_or(0);
    let total = memory::total().unwrap_or(used);
    let ram = json!({ "free": total.saturating_sub(used), "used": used, "total": total });
    // Reading takes milliseconds, and half a second where a driver hangs.
    let gpus = tokio::task::spawn_blocking(gpu::read).await.unwrap_or_default();
    let model = model_of(&state.engine).ok().flatten();
    let number = model.and_then(|model| model.device.strip_prefix("cuda:")?.parse::<usize>().ok());
    let gpu = number.and_then(|number| gpus.get(number));
    let cuda = gpu.and_then(|gpu| Some((gpu.memory_used_bytes?, gpu.memory_bytes?)));
    let cuda = match cuda {
        Some((used, total)) => json!({
            "system": { "free": total.saturating_sub(used), "used": used, "total": total },
        }),
        None => json!({ "error": "unavailable" }),
    };
    Json(json!({ "ram": ram, "cuda": cuda }))
}

/// `GET /sdapi/v1/cmd-flags`: those of AUTOMATIC1111's flags that say something of this server.
pub(crate) async fn flags(State(state): State<AppState>) -> Json<Value> {
    let settings = &state.settings;
    let model = model_of(&state.engine).ok().flatten();
    let precision = model.as_ref().map_or("", |model| model.precision.as_str());
    let on_cpu = model.as_ref().is_some_and(|model| model.device == "cpu");
    Json(json!({
        "api": true,
        "nowebui": true,
        "api_log": true,
        "api_server_stop": false,
        "api_auth": null,
        "no_half": precision == "f32",
        "no_half_vae": precision == "f32",
        "precision": if precision == "f32" { "full" } else { "autocast" },
        "use_cpu": if on_cpu { vec!["all"] } else { Vec::new() },
        "disable_nan_check": true,
        "share": false,
        "log_prompts": settings.log_prompts,
        "max_pixels": settings.limits.max_pixels,
        "max_steps": settings.limits.max_steps,
        "max_images": settings.limits.max_images,
    }))
}

/// `POST /sdapi/v1/unload-checkpoint`: unloads the selected model, once its images have ended. The
/// next request loads it again.
pub(crate) async fn unload(State(state): State<AppState>) -> Result<Json<Value>> {
    let unload = async {
        match selected(&state) {
            None => state.engine.unload().await,
            // One that is not loaded is unloaded.
            Some(name) => drop(state.models.unload(&name).await),
        }
    };
    deadline(&state).wait(unload).await?;
    Ok(Json(json!({})))
}

/// `POST /sdapi/v1/reload-checkpoint`: loads the selected model, if it is not loaded.
pub(crate) async fn reload(State(state): State<AppState>) -> Result<Json<Value>> {
    let deadline = deadline(&state);
    match selected(&state) {
        None => deadline.wait(state.engine.reload()).await??,
        Some(name) => drop(state.choose(&name, deadline).await?),
    }
    Ok(Json(json!({})))
}

/// The selected model, if it is not the default one.
fn selected(state: &AppState) -> Option<String> {
    let default = model_of(&state.engine).ok().flatten();
    state.checkpoint.get().filter(|name| default.is_none_or(|model| model.name != *name))
}

/// When a request that is made now must have been answered.
fn deadline(state: &AppState) -> Deadline {
    let most = state.settings.request_timeout;
    Timeout::within(most, "--request-timeout-ms", most).after(Instant::now())
}

/// `POST /sdapi/v1/interrogate`.
pub(crate) async fn interrogate() -> Result<Json<Value>> {
    refuse("interrogate", "there is no model that describes images")
}

/// `POST /sdapi/v1/create/embedding` and its neighbours.
pub(crate) async fn train() -> Result<Json<Value>> {
    refuse("training", "embeddings and hypernetworks are neither created nor trained")
}

fn refuse(what: &str, why: &str) -> Result<Json<Value>> {
    Err(ValidationError::range(what, format!("is not supported: {why}")).into())
}

/// `POST /sdapi/v1/refresh-embeddings`: they are read with the model.
pub(crate) async fn refresh_embeddings() -> Response {
    let advice = "embeddings are read with the model: unload-checkpoint and reload-checkpoint read \
                  them again";
    (warnings_header(&[advice]), Json(Value::Null)).into_response()
}

/// `GET /internal/ping`.
pub(crate) async fn ping() -> Json<Value> {
    Json(json!({}))
}

//! Progress and interruption of a client's requests.

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::timestamp::timestamp;
use crate::http::admission::{AdmittedSmall, ClientId};
use crate::http::drawing::encode_preview;
use crate::http::error::Result;
use crate::http::extract::QueryFields;
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::Format;

/// The query of a request for progress.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ProgressQuery {
    /// Whether the response omits the live preview. Default: false.
    #[serde(default)]
    skip_current_image: bool,
}

/// A request for the progress of a task.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TaskQuery {
    /// The `force_task_id` of the request.
    #[schemars(extend("maxLength" = 256))]
    id_task: Option<String>,
    /// Whether the response holds a live preview. Default: true.
    live_preview: Option<bool>,
}

/// `GET /sdapi/v1/progress`: the progress of the client's oldest request.
pub(crate) async fn progress(
    State(state): State<AppState>,
    QueryFields(query): QueryFields<ProgressQuery>,
    ClientId(client): ClientId,
) -> Result<Json<Value>> {
    let requests = state.in_flight.of(&client);
    let Some(first) = requests.first() else {
        return Ok(Json(json!({
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": idle(),
            "current_image": null,
            "textinfo": null,
        })));
    };
    let estimate = first.monitor.estimate();
    let preview = if query.skip_current_image { None } else { preview(first).await };
    Ok(Json(json!({
        "progress": first.progress(),
        "eta_relative": estimate.left.map_or(0.0, |left| left.as_secs_f64()),
        "state": job(first),
        "current_image": preview,
        "textinfo": estimate.position.map(|ahead| format!("{ahead} images ahead")),
    })))
}

/// The latest preview, as PNG.
async fn preview(request: &InFlightRequest) -> Option<String> {
    encode_preview(request.monitor.preview()?.rgb, Format::Png, None).await
}

/// The state of a client without a request.
fn idle() -> Value {
    json!({
        "skipped": false,
        "interrupted": false,
        "stopping_generation": false,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    })
}

/// The state of a request. There batches and passes are jobs, one after the other. Here the images
/// are generated together, so that all jobs have the progress of the whole.
fn job(request: &InFlightRequest) -> Value {
    let InFlightRequest { batches, passes, monitor, .. } = request;
    let count = (batches * passes.len()).max(1);
    let done = request.progress() * count as f64;
    let number = (done as usize).min(count - 1);
    let steps = passes.get(number % passes.len().max(1)).copied().unwrap_or_default();
    let step = ((done - number as f64) * steps as f64).round() as usize;
    let name = match batches {
        1 if request.is_img2img => "scripts_img2img".into(),
        1 => "scripts_txt2img".into(),
        batches => format!("Batch {} out of {batches}", number / passes.len().max(1) + 1),
    };
    json!({
        "skipped": monitor.skipped(),
        "interrupted": monitor.interrupted(),
        "stopping_generation": false,
        "job": name,
        "job_count": count,
        "job_timestamp": timestamp(request.began),
        "job_no": number,
        "sampling_step": step,
        "sampling_steps": steps,
    })
}

/// `POST /internal/progress`: the progress of the request with this `force_task_id`.
pub(crate) async fn task(
    State(state): State<AppState>,
    AdmittedSmall(mut admitted): AdmittedSmall,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let TaskQuery { id_task, live_preview } = fields.read(&state.settings.limits)?;
    let requests = state.in_flight.of(&admitted.client);
    let found = requests.iter().find(|request| request.task.is_some() && request.task == id_task);
    let Some(request) = found else {
        return Ok(Json(json!({ "active": false, "queued": false, "completed": false })));
    };
    let estimate = request.monitor.estimate();
    let preview = if live_preview.unwrap_or(true) { preview(request).await } else { None };
    let data = |file| format!("data:image/png;base64,{file}");
    Ok(Json(json!({
        "active": estimate.position.is_none(),
        "queued": estimate.position.is_some(),
        "completed": false,
        "progress": request.progress(),
        "eta": estimate.left.map(|left| left.as_secs_f64()),
        "live_preview": preview.map(data),
        "id_live_preview": request.monitor.current().completed,
        "textinfo": estimate.position.map(|ahead| format!("{ahead} images ahead")),
    })))
}

/// `POST /sdapi/v1/skip`: ends the images of the client's oldest request that run. It responds with
/// them as they are, once the others are finished.
pub(crate) async fn skip(State(state): State<AppState>, ClientId(client): ClientId) -> Json<Value> {
    if let Some(oldest) = state.in_flight.of(&client).first() {
        oldest.monitor.skip();
    }
    Json(Value::Null)
}

/// `GET /internal/pending-tasks`: the client's requests that have a `force_task_id`.
pub(crate) async fn pending(
    State(state): State<AppState>,
    ClientId(client): ClientId,
) -> Json<Value> {
    let requests = state.in_flight.of(&client);
    let tasks: Vec<_> = requests.iter().filter_map(|request| request.task.as_deref()).collect();
    Json(json!({ "size": tasks.len(), "tasks": tasks }))
}

/// `POST /sdapi/v1/interrupt`: interrupts the client's requests, which respond with what they have.
pub(crate) async fn interrupt(
    State(state): State<AppState>,
    ClientId(client): ClientId,
) -> Json<Value> {
    for request in state.in_flight.of(&client) {
        request.monitor.interrupt();
    }
    Json(json!({}))
}

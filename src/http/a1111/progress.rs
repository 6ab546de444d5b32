//! Progress and interruption of a client's requests.

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::admission::{AdmittedSmall, ClientId};
use crate::http::drawing::encode_preview;
use crate::http::error::Result;
use crate::http::extract::QueryFields;
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::{Format, JPEG_QUALITY};

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
            "state": job(0, 0, 0),
            "current_image": null,
            "textinfo": null,
        })));
    };
    let estimate = first.monitor.estimate();
    let preview = if query.skip_current_image { None } else { preview(first).await };
    let step = (first.progress() * first.steps as f64) as usize;
    Ok(Json(json!({
        "progress": first.progress(),
        "eta_relative": estimate.left.map_or(0.0, |left| left.as_secs_f64()),
        "state": job(requests.len(), step, first.steps),
        "current_image": preview,
        "textinfo": estimate.position.map(|ahead| format!("{ahead} images ahead")),
    })))
}

/// The latest preview, as PNG.
async fn preview(request: &InFlightRequest) -> Option<String> {
    encode_preview(request.monitor.preview()?.rgb, Format::Png, JPEG_QUALITY).await
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

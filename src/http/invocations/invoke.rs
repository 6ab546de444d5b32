//! `/invocations`: requests whose response is the finished images, or a stream of events.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest as _, Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::{body, detect, events, lines};
use crate::http::admission::Admitted;
use crate::http::drawing::ReplyFormat;
use crate::http::error::Result;
use crate::http::extract::PathName;
use crate::http::state::AppState;

/// Maximum payload of a record, in MB: SageMaker's default.
const PAYLOAD_MB: usize = 6;

/// Maximum number of concurrent transforms: SageMaker allows 100 MB of payloads in total.
const MAX_TRANSFORMS: usize = 100 / PAYLOAD_MB;

/// Generates the images of a request. If the client disconnects, this future is dropped with its
/// ticket, which cancels the job.
pub(crate) async fn invocations(
    State(state): State<AppState>,
    admitted: Admitted,
) -> Result<Response> {
    if lines::are_declared(&admitted.headers) {
        return lines::respond(state, admitted);
    }
    let Admitted { headers, body, client, stream_deadline, mut slot, .. } = admitted;
    let invocation = detect::read(&state, &mut slot, &headers, body, body::read).await?;
    if let ReplyFormat::Events(_) = invocation.drawing.reply {
        let ticket = invocation.drawing.submit(&client, stream_deadline)?;
        return Ok(events::stream(invocation, ticket, stream_deadline, slot));
    }
    let images = invocation.drawing.submit(&client, slot.deadline)?.wait().await;
    let images = images.map_err(|error| invocation.drawing.failed(error, slot.deadline))?;
    Ok(invocation.respond(images).await?.map(Body::from))
}

/// `POST /models/{name}/invoke`: `/invocations` of that model.
pub(crate) async fn loaded(
    State(state): State<AppState>,
    PathName(name): PathName,
    request: Request,
) -> Result<Response> {
    let state = state.on(state.models.get(&name)?);
    let admitted = Admitted::from_request(request, &state).await?;
    invocations(State(state), admitted).await
}

/// `POST /models/{owner}/{name}`, which Hugging Face's clients call.
pub(crate) async fn named(
    State(state): State<AppState>,
    PathName(name): PathName,
    admitted: Admitted,
) -> Result<Response> {
    let state = state.choose(&name, admitted.slot.deadline).await?;
    invocations(State(state), admitted).await
}

/// `GET /execution-parameters`, which SageMaker's batch transform requests first. One record per
/// request bounds its time, and one request per batch row keeps the batch full.
pub(crate) async fn execution_parameters(State(state): State<AppState>) -> Json<Value> {
    Json(json!({
        "MaxConcurrentTransforms": state.engine.max_batch_rows().min(MAX_TRANSFORMS),
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": PAYLOAD_MB,
    }))
}

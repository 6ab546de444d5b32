//! The native dialect, which is SageMaker's contract: `/ping` and `/invocations`.

use axum::Json;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::accept::{self, Reply};
use super::asked::Asked;
use super::error::ApiError;
use super::intake::{self, Intake};
use super::{State, body, dialect, events, lines};
use crate::engine::Phase;

/// SageMaker's default, and its bound on concurrent transforms of that size: 100 MB in all.
const PAYLOAD_MB: usize = 6;
const MAX_TRANSFORMS: usize = 100 / PAYLOAD_MB;

/// 200 when pictures can be drawn or models be loaded, else 503. Looks at flags, waits for nothing.
pub(super) async fn ping(state: State) -> StatusCode {
    match state.models.phase() {
        Phase::Ready(_) | Phase::Absent => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Draws what the body asks for. When the client leaves, this future is dropped, and with it the
/// ticket, which withdraws the job.
pub(super) async fn invocations(state: State, request: Request) -> Result<Response, ApiError> {
    let intake = intake::take(&state, request).await?;
    if lines::are_declared(&intake.headers) {
        return lines::answer(state, intake);
    }
    let Intake { headers, body, client, deadline, stream_deadline, permit, .. } = intake;
    let (fields, speech) = body::read(&headers, &body)?;
    drop(body);
    let heard = dialect::hear(&headers, fields, speech, state.settings.limits.max_images)?;
    let asked = Asked::understand(&state, heard, |wish| accept::choose(&headers, wish)).await?;
    let stream = matches!(asked.reply, Reply::Events(_));
    let ticket = asked.submit(&client, Some(if stream { stream_deadline } else { deadline }))?;
    if stream {
        return Ok(events::stream(&state.engine, asked, ticket, permit));
    }
    let pictures = ticket.wait().await?;
    Ok(asked.answer(pictures).await?.into_response())
}

/// What SageMaker's batch transform asks first. One record a request keeps its time bounded, and
/// as many requests as there are rows keep the batch full.
pub(super) async fn execution_parameters(state: State) -> Json<Value> {
    Json(json!({
        "MaxConcurrentTransforms": state.engine.max_batch_rows().min(MAX_TRANSFORMS),
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": PAYLOAD_MB,
    }))
}

//! A request that is answered when its pictures are drawn.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest as _, Path, Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::render::Invocation;
use super::{body, detect, events, lines};
use crate::http::admission::Admitted;
use crate::http::drawing::ReplyFormat;
use crate::http::error::Result;
use crate::http::state::AppState;

/// SageMaker's default, and its bound on concurrent transforms of that size: 100 MB in all.
const PAYLOAD_MB: usize = 6;

const MAX_TRANSFORMS: usize = 100 / PAYLOAD_MB;

/// Draws what the body asks for. When the client leaves, this future is dropped, and with it the
/// ticket, which withdraws the job.
pub(crate) async fn invocations(
    State(state): State<AppState>,
    admitted: Admitted,
) -> Result<Response> {
    if lines::are_declared(&admitted.headers) {
        return lines::answer(state, admitted);
    }
    let Admitted { headers, body, client, deadline, stream_deadline, slot, .. } = admitted;
    let (fields, kind) = body::read(&headers, &body)?;
    drop(body);
    let parsed = detect::parse(&headers, fields, kind, &state.settings.limits)?;
    let invocation = Invocation::read(&state, &slot, parsed, &headers).await?;
    let stream = matches!(invocation.drawing.reply, ReplyFormat::Events(_));
    let ticket = invocation
        .drawing
        .submit(&client, Some(if stream { stream_deadline } else { deadline }))?;
    if stream {
        return Ok(events::stream(&state.engine, invocation, ticket, slot));
    }
    let pictures = ticket.wait().await?;
    Ok(invocation.answer(pictures).await?.map(Body::from))
}

/// `POST /models/{name}/invoke`: `/invocations` of that model.
pub(crate) async fn loaded(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response> {
    let state = state.on(state.models.get(&name)?);
    let admitted = Admitted::from_request(request, &state).await?;
    invocations(State(state), admitted).await
}

/// `POST /models/{owner}/{name}`, as Hugging Face's clients call a model that has an address.
pub(crate) async fn named(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response> {
    let state = state.choose(&name).await?;
    let admitted = Admitted::from_request(request, &state).await?;
    invocations(State(state), admitted).await
}

/// What SageMaker's batch transform asks first. One record a request keeps its time bounded, and
/// as many requests as there are rows keep the batch full.
pub(crate) async fn execution_parameters(State(state): State<AppState>) -> Json<Value> {
    Json(json!({
        "MaxConcurrentTransforms": state.engine.max_batch_rows().min(MAX_TRANSFORMS),
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": PAYLOAD_MB,
    }))
}

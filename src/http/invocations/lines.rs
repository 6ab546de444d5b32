//! `application/jsonlines`: a request on each line, an answer on each line, in order. The lines
//! are drawn together, and a line that is wrong or fails is answered with an error object in its
//! place. The answer is sent as it grows, so its length is bounded by nobody's memory.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, StreamExt as _};
use tokio::time::Instant;

use super::body::{BodyKind, essence};
use super::detect;
use super::render::Invocation;
use crate::engine::{Client, JobError};
use crate::http::admission::{Admitted, RequestSlot};
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::{Fields, ValidationError};

/// The names under which JSON lines go.
const TYPES: [&str; 5] = [
    "application/jsonlines",
    "application/x-jsonlines",
    "application/jsonl",
    "application/x-ndjson",
    "application/ndjson",
];

/// Whether a body is lines by its declared type.
pub(crate) fn are_declared(headers: &HeaderMap) -> bool {
    essence(headers).is_some_and(|essence| TYPES.contains(&essence.as_str()))
}

/// Answers every line. Each has the request's time for itself, from when it is looked at.
pub(crate) fn answer(state: AppState, admitted: Admitted) -> Result<Response> {
    let Admitted { body, client, timeout, slot, .. } = admitted;
    let body = Bytes::from(body);
    let text = body.strip_suffix(b"\n").unwrap_or(&body);
    if text.is_empty() {
        return Err(
            ValidationError::body("the body is empty; send a JSON object on each line").into()
        );
    }
    let mut rest = Some(body.slice_ref(text));
    let lines = std::iter::from_fn(move || {
        let text = rest.as_mut()?;
        let Some(end) = text.iter().position(|byte| *byte == b'\n') else { return rest.take() };
        let line = text.split_to(end);
        drop(text.split_to(1));
        Some(line)
    });
    // A picture takes a row or two: so many keep the rows full and leave the queue to others.
    let together = state.engine.max_batch_rows();
    let answers = stream::iter(lines)
        .map(move |line| {
            let (state, slot, client) = (state.clone(), slot.clone(), client.clone());
            async move {
                let answer = draw(&state, &slot, &client, timeout, &line).await;
                let mut line = answer.unwrap_or_else(|error| error.json().to_string().into());
                line.push(b'\n');
                // Bodies are streams of results; this one has no errors of its own.
                Ok::<_, Infallible>(line)
            }
        })
        .buffered(together);
    Ok(([(CONTENT_TYPE, TYPES[0])], Body::from_stream(answers)).into_response())
}

/// One line's answer.
async fn draw(
    state: &AppState,
    slot: &RequestSlot,
    client: &Client,
    timeout: Duration,
    line: &[u8],
) -> Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let text = std::str::from_utf8(line)
        .map_err(|error| ValidationError::body(format!("the line is not UTF-8: {error}")))?;
    if !text.trim_start().starts_with('{') {
        return Err(ValidationError::body("the line is not a JSON object").into());
    }
    // A line has no headers: no `Accept` means JSON for JSON.
    let headers = HeaderMap::new();
    let parsed =
        detect::parse(&headers, Fields::json(text)?, BodyKind::Json, &state.settings.limits)?;
    let mut invocation = Invocation::read(state, slot, parsed, &headers).await?;
    // A line has no events either, whatever it asks for.
    invocation.drawing.preview = false;
    let pictures = loop {
        // A line is part of a larger work, which a full queue only delays.
        match invocation.drawing.submit_with_retry(client, deadline).await?.wait().await {
            Err(JobError::Full { .. }) => {}
            pictures => break pictures?,
        }
    };
    Ok(invocation.answer(pictures).await?.into_body().into())
}

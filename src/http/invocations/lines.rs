//! JSON Lines: a request on each line of the body, a response on each line of the response, in
//! order. Lines are generated together. A line that is invalid or fails gets an error object in its
//! place. The response is sent as it grows, so memory does not bound its length.

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
use crate::engine::{Client, JobError};
use crate::http::admission::{Admitted, RequestSlot};
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::{Fields, ValidationError};

/// The media types of JSON Lines.
const TYPES: [&str; 5] = [
    "application/jsonlines",
    "application/x-jsonlines",
    "application/jsonl",
    "application/x-ndjson",
    "application/ndjson",
];

/// Whether the declared media type of a body is JSON Lines.
pub(crate) fn are_declared(headers: &HeaderMap) -> bool {
    essence(headers).is_some_and(|essence| TYPES.contains(&essence.as_str()))
}

/// Responds to every line. Each has the request's timeout for itself, from when it is read.
pub(crate) fn respond(state: AppState, admitted: Admitted) -> Result<Response> {
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
    // An image takes a row or two: so many keep the rows full and leave the queue to others.
    let together = state.engine.max_batch_rows();
    let responses = stream::iter(lines)
        .map(move |line| {
            let (state, slot, client) = (state.clone(), slot.clone(), client.clone());
            async move {
                let response = generate(&state, &slot, &client, timeout, line).await;
                let mut line = response.unwrap_or_else(|error| error.json().to_string().into());
                line.push(b'\n');
                // Bodies are streams of results; this one has no errors of its own.
                Ok::<_, Infallible>(line)
            }
        })
        .buffered(together);
    Ok(([(CONTENT_TYPE, TYPES[0])], Body::from_stream(responses)).into_response())
}

/// The response of one line.
async fn generate(
    state: &AppState,
    slot: &RequestSlot,
    client: &Client,
    timeout: Duration,
    line: Bytes,
) -> Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    // A line has no headers: no `Accept` means JSON for JSON.
    let headers = HeaderMap::new();
    let mut invocation = detect::read(state, slot, &headers, line, |_, line| object(line)).await?;
    // A line has no events either, even if it requests them.
    invocation.drawing.preview = false;
    let images = loop {
        // A full queue delays a record but does not fail it.
        match invocation.drawing.submit_with_retry(client, deadline).await?.wait().await {
            Err(JobError::Full { .. }) => {}
            images => break images?,
        }
    };
    Ok(invocation.respond(images).await?.into_body().into())
}

/// The fields of a line.
fn object(line: &[u8]) -> Result<(Fields, BodyKind)> {
    let text = std::str::from_utf8(line)
        .map_err(|error| ValidationError::body(format!("the line is not UTF-8: {error}")))?;
    if !text.trim_start().starts_with('{') {
        return Err(ValidationError::body("the line is not a JSON object").into());
    }
    Ok((Fields::json(text)?, BodyKind::Json))
}

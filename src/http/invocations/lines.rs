//! JSON Lines: a request on each line of the body, a response on each line of the response, in
//! order. Lines are generated together. A line that is invalid or fails gets an error object in its
//! place. The response is sent as it grows, so memory does not bound its length.

use std::sync::Arc;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::body::{BodyKind, essence};
use super::detect;
use crate::engine::{Client, JobError, Previews};
use crate::http::admission::{Admitted, RequestSlot};
use crate::http::deadline::Timeout;
use crate::http::error::{ApiError, Result};
use crate::http::slots::Share;
use crate::http::state::AppState;
use crate::http::streaming::produced;
use crate::request::{Fields, ValidationError};

/// The media types of JSON Lines.
const TYPES: [&str; 5] = [
    "application/jsonlines",
    "application/x-jsonlines",
    "application/jsonl",
    "application/x-ndjson",
    "application/ndjson",
];

/// Maximum number of lines in a body.
const MAX_LINES: usize = 10_000;

/// Number of lines with errors of the client after which the rest is not read. An error is longer
/// than the line may be.
const MAX_BAD_LINES: usize = 1_000;

/// Whether the declared media type of a body is JSON Lines.
pub(crate) fn are_declared(headers: &HeaderMap) -> bool {
    essence(headers).is_some_and(|essence| TYPES.contains(&essence.as_str()))
}

/// Responds to every line. Each has the request's timeout for itself, from when it is read, and so
/// has the client to take its response.
pub(crate) fn respond(state: AppState, admitted: Admitted) -> Result<Response> {
    let Admitted { mut body, client, timeout, mut slot, .. } = admitted;
    body.pop_if(|last| *last == b'\n');
    if body.is_empty() {
        return Err(
            ValidationError::body("the body is empty; send a JSON object on each line").into()
        );
    }
    if body.iter().filter(|byte| **byte == b'\n').count() >= MAX_LINES {
        let reason = format!("the body has more than {MAX_LINES} lines");
        return Err(ValidationError::body(reason).into());
    }
    let room = slot.take_body();
    let lines = Lines { body: Some(body), start: 0, room };
    let respond = move |sender| respond_to(lines, state, slot, client, timeout, sender);
    let (responses, end) = produced(respond, error_line);
    let mut response = ([(CONTENT_TYPE, TYPES[0])], Body::from_stream(responses)).into_response();
    response.extensions_mut().insert(end);
    Ok(response)
}

/// Sends the response of each line.
async fn respond_to(
    lines: Lines,
    state: AppState,
    slot: RequestSlot,
    client: Client,
    timeout: Timeout,
    sender: mpsc::Sender<Vec<u8>>,
) -> Result<()> {
    // An image takes a row or two: so many keep the rows full and leave the queue to others.
    let together = state.engine.max_batch_rows();
    let mut responses = stream::iter(lines)
        .map(move |line| {
            let (state, slot, client) = (state.clone(), slot.clone(), client.clone());
            let work = async move { generate(&state, slot, &client, timeout, line).await };
            // A task, because lines go on while the client takes nothing.
            AbortOnDropHandle::new(tokio::spawn(work.in_current_span()))
        })
        .buffered(together);
    let mut bad = 0;
    while let Some(response) = responses.next().await {
        // A task that has panicked.
        let response = response.unwrap_or_else(|_| Err(JobError::Model.into()));
        bad += usize::from(response.as_ref().is_err_and(|error| error.status().is_client_error()));
        let line = response.unwrap_or_else(|error| error_line(&error));
        let deadline = timeout.after(Instant::now());
        if deadline.wait(sender.send(line)).await?.is_err() {
            // The client has disconnected.
            return Ok(());
        }
        if bad == MAX_BAD_LINES {
            let reason = format!("{MAX_BAD_LINES} lines failed; the rest is not read");
            return Err(ValidationError::body(reason).into());
        }
    }
    Ok(())
}

/// The response of a line with an error.
fn error_line(error: &ApiError) -> Vec<u8> {
    format!("{}\n", error.json()).into()
}

/// The lines of a body, which is freed as they are read.
struct Lines {
    /// None after the last line.
    body: Option<Vec<u8>>,
    /// The end of what has been read.
    start: usize,
    room: Option<Arc<Share>>,
}

impl Iterator for Lines {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let body = self.body.as_mut()?;
        let rest = &body[self.start..];
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
            let last = rest.to_vec();
            (self.body, self.room) = (None, None);
            return Some(last);
        };
        let line = rest[..length].to_vec();
        self.start += length + 1;
        // Moves each byte once on average.
        if self.start * 2 >= body.len() {
            *body = body.split_off(self.start);
            self.start = 0;
            if let Some(room) = &self.room {
                room.shrink_to(body.len());
            }
        }
        Some(line)
    }
}

/// The response of one line, which ends with a line feed.
async fn generate(
    state: &AppState,
    mut slot: RequestSlot,
    client: &Client,
    timeout: Timeout,
    line: Vec<u8>,
) -> Result<Vec<u8>> {
    let deadline = timeout.after(Instant::now());
    // A line has no headers: no `Accept` means JSON for JSON.
    let headers = HeaderMap::new();
    (slot.deadline, slot.is_patient) = (deadline, true);
    let slot = &mut slot;
    let mut invocation = detect::read(state, slot, &headers, line, |_, line| object(line)).await?;
    // A line has no events either, even if it requests them.
    invocation.drawing.previews = Previews::None;
    let images = loop {
        // A full queue delays a record but does not fail it.
        match invocation.drawing.submit_with_retry(client, deadline).await?.wait().await {
            Err(JobError::Full { .. }) => {}
            images => {
                break images.map_err(|error| invocation.drawing.failed(error, deadline))?;
            }
        }
    };
    let mut line = Vec::from(invocation.respond(images).await?.into_body());
    line.push(b'\n');
    Ok(line)
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

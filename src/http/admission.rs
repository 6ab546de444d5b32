//! Admission: what every request for images passes before anything is generated. It takes one of
//! the request slots, starts the request's clock and reads the body.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Request};
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap};
use futures_util::StreamExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::error::{ApiError, Result};
use super::state::{AppState, model_of};
use crate::engine::{Client, JobError};
use crate::request::{Fields, ValidationError};

/// Header with the client's timeout in milliseconds. It cannot exceed the server's.
const TIMEOUT: &str = "x-request-timeout-ms";

/// A body that is too large is read and discarded up to this multiple of the limit, since many
/// clients read no response before they have sent everything.
const OVERSIZE: usize = 4;

/// An admitted request: its headers, its whole body, its client, deadlines and slot.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) client: Client,
    pub(crate) timeout: Duration,
    pub(crate) deadline: Instant,
    /// Deadline of a response that is a stream.
    pub(crate) stream_deadline: Instant,
    pub(crate) slot: RequestSlot,
}

/// One of `--max-requests` slots, which only admission creates. Work for the request on another
/// thread holds a clone, so that the slot is free when the last of the work has ended, not when the
/// client has disconnected.
#[derive(Debug, Clone)]
pub(crate) struct RequestSlot {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// The client of a request: its API key, else its address.
#[derive(Debug)]
pub(crate) struct ClientId(pub(crate) Client);

impl FromRequest<AppState> for Admitted {
    type Rejection = ApiError;

    /// Rejects before the body is read if there is no slot or the model is not ready.
    async fn from_request(request: Request, state: &AppState) -> Result<Self> {
        let arrived = Instant::now();
        let permit = Arc::clone(&state.request_slots).try_acquire_owned();
        let permit =
            permit.map_err(|_| ApiError::Crowded { retry_after_s: state.engine.retry_after() })?;
        let slot = RequestSlot { _permit: Arc::new(permit) };
        // If there is no model, the body may name one.
        model_of(&state.engine)?;
        let headers = request.headers().clone();
        let timeout = timeout(&headers, state.settings.request_timeout)?;
        let deadline = arrived + timeout;
        let stream_deadline = arrived + self::timeout(&headers, state.settings.stream_timeout)?;
        let client = client(request.extensions());
        let body = timeout_at(deadline, receive(state.settings.max_body_bytes, request)).await;
        let body = body.map_err(|_| ApiError::SlowBody)??;
        Ok(Self { headers, body, client, timeout, deadline, stream_deadline, slot })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ClientId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(client(&parts.extensions)))
    }
}

fn client(extensions: &Extensions) -> Client {
    let address = || Some(Client::at(extensions.get::<ConnectInfo<SocketAddr>>()?.0.ip()));
    extensions.get::<Client>().cloned().or_else(address).unwrap_or_default()
}

impl Admitted {
    /// Takes the body out, and its fields out of that. It is JSON whatever its declared type.
    pub(crate) async fn json(&mut self, state: &AppState) -> Result<Fields> {
        let body = std::mem::take(&mut self.body);
        let json = |body: &[u8]| Ok(Fields::json(text(body)?)?);
        state.reader.parse(self.slot.clone(), body, json).await
    }
}

/// A body as text.
pub(crate) fn text(body: &[u8]) -> Result<&str, ValidationError> {
    std::str::from_utf8(body)
        .map_err(|error| ValidationError::body(format!("the body is not UTF-8: {error}")))
}

impl RequestSlot {
    /// A slot for a job that was accepted by an earlier process; waits until one is free.
    pub(crate) async fn wait(state: &AppState) -> Result<Self> {
        let permit = Arc::clone(&state.request_slots).acquire_owned().await;
        let permit = permit.map_err(|_| JobError::Stopping)?;
        Ok(Self { _permit: Arc::new(permit) })
    }
}

/// The client's timeout, if it is less than `most`.
pub(crate) fn timeout(headers: &HeaderMap, most: Duration) -> Result<Duration> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(most) };
    let millis = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    match millis {
        Some(millis @ 1..) => Ok(Duration::from_millis(millis).min(most)),
        _ => {
            let reason = "must be a whole number of at least 1";
            Err(ValidationError::malformed(TIMEOUT, reason).into())
        }
    }
}

/// Reads the whole body, of at most `limit` bytes.
async fn receive(limit: usize, request: Request) -> Result<Vec<u8>> {
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let declared: usize = declared.and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut parts = request.into_body().into_data_stream();
    let mut body = Vec::new();
    let mut length = 0;
    while let Some(part) = parts.next().await {
        match part {
            Ok(part) if declared.max(length + part.len()) <= limit => {
                body.extend_from_slice(&part);
                length += part.len();
            }
            Ok(part) if length < OVERSIZE * limit => {
                body = Vec::new();
                length += part.len();
            }
            Err(_) if declared <= limit => {
                let message = "the body ended before its declared length";
                return Err(ValidationError::body(message).into());
            }
            _ => break,
        }
    }
    if declared.max(length) > limit { Err(ApiError::TooLarge(limit)) } else { Ok(body) }
}

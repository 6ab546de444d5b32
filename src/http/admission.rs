//! What every request for pictures passes first: the gate, the clock, and the reading of its body.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::{ConnectInfo, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_LENGTH;
use futures_util::StreamExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use super::state::AppState;
use crate::engine::{Client, JobError};
use crate::request::{Fields, ValidationError};

/// How long the client will wait, in milliseconds; never longer than the operator's limit.
const TIMEOUT: &str = "x-request-timeout-ms";

/// A body is thrown away up to this many times the limit before the client is cut off.
const OVERSIZE: usize = 4;

/// A request that has arrived as a whole.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) client: Client,
    pub(crate) timeout: Duration,
    pub(crate) deadline: Instant,
    /// Of an answer that is a stream.
    pub(crate) stream_deadline: Instant,
    /// Held as long as the request or what it started takes memory.
    pub(crate) permit: OwnedSemaphorePermit,
}

impl Admitted {
    /// The fields of a body that is JSON, whatever its declared type.
    pub(crate) fn json(&self) -> Result<Fields, ValidationError> {
        let text = std::str::from_utf8(&self.body)
            .map_err(|error| ValidationError::body(format!("the body is not UTF-8: {error}")))?;
        Fields::json(text)
    }
}

/// Takes a request in, or refuses it unread.
pub(crate) async fn take(state: &AppState, request: Request) -> Result<Admitted, ApiError> {
    let arrived = Instant::now();
    let permit = state.request_slots.clone().try_acquire_owned();
    let permit =
        permit.map_err(|_| ApiError::Crowded { retry_after_s: state.engine.retry_after() })?;
    match state.engine.model() {
        // The body may name a model.
        Ok(_) | Err(JobError::Absent) => {}
        Err(failure) => return Err(failure.into()),
    }
    let headers = request.headers().clone();
    let timeout = timeout(&headers, state.settings.request_timeout)?;
    let deadline = arrived + timeout;
    let stream_deadline = arrived + self::timeout(&headers, state.settings.stream_timeout)?;
    let client = client(&request);
    let body = timeout_at(deadline, receive(state.settings.max_body_bytes, request)).await;
    let body = body.map_err(|_| ApiError::SlowBody)??;
    Ok(Admitted { headers, body, client, timeout, deadline, stream_deadline, permit })
}

/// The key that a client came in with, or else its address.
pub(crate) fn client(request: &Request) -> Client {
    let named = request.extensions().get::<Client>().cloned();
    let peer = || Some(Client::at(request.extensions().get::<ConnectInfo<SocketAddr>>()?.0.ip()));
    named.or_else(peer).unwrap_or_default()
}

/// The time that the client gives the request, if that is less than the most it may have.
pub(crate) fn timeout(headers: &HeaderMap, most: Duration) -> Result<Duration, ApiError> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(most) };
    let millis = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    match millis {
        Some(millis @ 1..) => Ok(Duration::from_millis(millis).min(most)),
        _ => Err(ValidationError::Malformed {
            param: Some(TIMEOUT.into()),
            message: format!("{TIMEOUT} must be a whole number of at least 1"),
        }
        .into()),
    }
}

/// The whole body. What is too long is read on for a while and thrown away: many clients do not
/// look for an answer before they have sent everything.
async fn receive(limit: usize, request: Request) -> Result<Vec<u8>, ApiError> {
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
                return Err(
                    ValidationError::body("the body ended before its declared length").into()
                );
            }
            _ => break,
        }
    }
    if declared.max(length) > limit { Err(ApiError::TooLarge(limit)) } else { Ok(body) }
}

//! How long a request may take, and which limit says so.

use std::time::Duration;

use axum::http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use super::error::{ApiError, Result};
use crate::engine::JobError;
use crate::registry::RegistryError;
use crate::request::ValidationError;

/// Header with the client's timeout in milliseconds. It cannot exceed the server's.
const HEADER: &str = "x-request-timeout-ms";

/// The time for a request or a job, and the option or header that sets it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeout {
    pub(crate) time: Duration,
    pub(crate) limit: &'static str,
}

/// When a request or a job must have ended, and the option or header that sets it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) limit: &'static str,
}

impl Timeout {
    /// `time`, which cannot exceed that of an option; if it is less, the client has asked for it.
    pub(crate) fn within(time: Duration, option: &'static str, most: Duration) -> Self {
        Self { time: time.min(most), limit: if time < most { HEADER } else { option } }
    }

    /// The time of an option, or the client's own if that is less.
    pub(crate) fn of(headers: &HeaderMap, option: &'static str, most: Duration) -> Result<Self> {
        let Some(value) = headers.get(HEADER) else { return Ok(Self::within(most, option, most)) };
        let millis = value.to_str().ok().and_then(|value| value.trim().parse().ok());
        match millis {
            Some(millis @ 1..) => Ok(Self::within(Duration::from_millis(millis), option, most)),
            _ => {
                let reason = "must be a whole number of at least 1";
                Err(ValidationError::malformed(HEADER, reason).into())
            }
        }
    }

    pub(crate) fn after(self, begin: Instant) -> Deadline {
        Deadline { at: begin + self.time, limit: self.limit }
    }
}

impl Deadline {
    pub(crate) fn missed(self) -> ApiError {
        ApiError::Deadline(self.limit)
    }

    /// Waits until then, at most.
    pub(crate) async fn wait<T>(self, work: impl Future<Output = T>) -> Result<T> {
        timeout_at(self.at, work).await.map_err(|_| self.missed())
    }

    /// Names the limit in the error of work that was given this deadline.
    pub(crate) fn name(self, error: impl Into<ApiError>) -> ApiError {
        match error.into() {
            ApiError::Job(JobError::Deadline) | ApiError::Registry(RegistryError::Deadline) => {
                self.missed()
            }
            other => other,
        }
    }
}

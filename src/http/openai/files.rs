//! The images of responses with URLs.

use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse as _, Response};

use crate::http::error::{ApiError, Result};
use crate::http::extract::PathName;
use crate::http::state::AppState;

/// `GET /files/{name}`.
pub(crate) async fn file(
    State(state): State<AppState>,
    PathName(name): PathName,
) -> Result<Response> {
    let (format, data, left) = state.urls.get(&name).ok_or(ApiError::NoFile)?;
    let headers = [
        (CONTENT_TYPE, format.media_type().to_owned()),
        (CACHE_CONTROL, format!("private, max-age={}, immutable", left.as_secs())),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, data).into_response())
}

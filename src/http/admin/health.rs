//! `/ping` and `/health/ready`.

use axum::extract::State;
use axum::http::StatusCode;

use crate::engine::EngineState;
use crate::http::state::AppState;

/// Readiness probe: 200 if images can be generated or models loaded, else 503. It never waits.
pub(crate) async fn ready(State(state): State<AppState>) -> StatusCode {
    match state.models.state() {
        EngineState::Ready(_) | EngineState::Absent => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

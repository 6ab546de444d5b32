//! `/ping` and `/health/ready`.

use axum::extract::State;
use axum::http::StatusCode;

use crate::engine::EngineState;
use crate::http::state::AppState;

/// 200 when pictures can be drawn or models be loaded, else 503. Looks at flags, waits for nothing.
pub(crate) async fn ready(State(state): State<AppState>) -> StatusCode {
    match state.models.state() {
        EngineState::Ready(_) | EngineState::Absent => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

//! Routes that describe or manage the server.

mod health;
mod info;
mod metrics;
mod multi_model;
mod openapi;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

use super::state::AppState;

/// Public routes that describe the server.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/openapi.json", get(openapi::document))
        .route("/ping", get(health::ready).post(health::ready))
        .route("/health/live", get(async || StatusCode::OK))
        .route("/health/ready", get(health::ready))
        .route("/info", get(info::info))
        .route("/metrics", get(metrics::metrics))
}

/// SageMaker's routes to load and unload models.
pub(crate) fn multi_model_routes() -> Router<AppState> {
    Router::new()
        .route("/models", get(multi_model::list).post(multi_model::load))
        .route("/models/{name}", get(multi_model::show).delete(multi_model::unload))
}

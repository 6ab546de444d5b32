//! Routes that describe or manage the server.

mod info;
mod metrics;
mod multi_model;
mod openapi;

use aide::axum::ApiRouter;
use aide::axum::routing::get_with;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get, post};

use super::docs::{self, Docs};
use super::error::ErrorBody;
use super::state::AppState;
pub(crate) use openapi::with_document;

/// Public routes that describe the server.
pub(crate) fn routes() -> ApiRouter<AppState> {
    let ready = || Docs::of("Readiness probe").gives(200, &[], &[]).describe();
    let live = Docs::of("Liveness probe").gives(200, &[], &[]).describe();
    let info = Docs::of("Server, model and limits").gives(200, &["phase", "limits"], &[]);
    let metrics = Docs::of("Prometheus metrics").gives(200, &[], &["text/plain"]).describe();
    let routes = ApiRouter::new()
        .api_route("/ping", get_with(info::ready, ready()).merge(post(info::ready)))
        .api_route("/health/live", get_with(async || StatusCode::OK, live))
        .api_route("/health/ready", get_with(info::ready, ready()))
        .api_route("/info", get_with(info::info, info.describe()))
        .api_route("/metrics", get_with(metrics::metrics, metrics));
    docs::group::<ErrorBody>(routes, "server")
}

/// SageMaker's routes to load and unload models.
pub(crate) fn multi_model_routes() -> Router<AppState> {
    Router::new()
        .route("/models", get(multi_model::list).post(multi_model::load))
        .route("/models/{name}", get(multi_model::show).delete(multi_model::unload))
}

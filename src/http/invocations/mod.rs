//! `/invocations`, which is SageMaker's contract, in the native form and in those of SageMaker's
//! other containers; and the same in the background: `/v1/jobs`.

mod accept;
mod body;
mod detect;
mod events;
mod huggingface;
mod invoke;
mod jobs;
mod jumpstart;
mod lines;
mod render;
mod stability;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;

/// SageMaker's own, which need no key.
pub(crate) fn open_routes() -> Router<AppState> {
    Router::new()
        .route("/invocations", post(invoke::invocations))
        .route("/execution-parameters", get(invoke::execution_parameters))
}

/// The same for everyone else.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/v1/invocations", post(invoke::invocations))
        .route("/", post(invoke::invocations))
        .route("/v1/jobs", post(jobs::create))
        .route("/v1/jobs/{id}", get(jobs::state).delete(jobs::delete))
        .route("/v1/jobs/{id}/result", get(jobs::result))
}

/// A model that SageMaker has loaded.
pub(crate) fn loaded_model_routes() -> Router<AppState> {
    Router::new().route("/models/{name}/invoke", post(invoke::loaded))
}

/// A model by its name, as Hugging Face's clients call one that has an address.
pub(crate) fn named_model_routes() -> Router<AppState> {
    Router::new().route("/models/{*id}", post(invoke::named))
}

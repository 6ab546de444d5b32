//! OpenAI's Images API and list of models, as its official clients speak it. A request is put into
//! native words and read like any other, so the native fields (`seed`, `steps`, `guidance_scale`,
//! `negative_prompt`, `scheduler`) may stand beside OpenAI's own. What OpenAI's models can be told
//! and ours cannot (`quality`, `style`, `moderation`) is accepted and changes nothing; what would
//! change the picture (a transparent background, SVG) is refused.

mod error;
mod files;
mod form;
mod images;
mod models;
mod render;
mod stream;
mod translate;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;
pub(crate) use error::errors;
pub(crate) use translate::translate;

/// The routes of OpenAI's API.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/v1/images/generations", post(images::generations))
        .route("/v1/images/edits", post(images::edits))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{*id}", get(models::model))
}

/// Where the URLs in answers lead. The name of a file is its protection: an `<img>` tag has no key.
pub(crate) fn files() -> Router<AppState> {
    Router::new().route("/files/{name}", get(files::file))
}

//! AUTOMATIC1111's API, for the clients that were written for it. A request is put into native
//! words and read like any other. As there, fields that nobody knows are ignored; fields that would
//! change the picture and cannot be honoured are refused by name. Where AUTOMATIC1111 has one
//! progress and one interrupt for all, here each client has its own.

mod error;
mod info;
mod lists;
mod options;
mod png_info;
mod progress;
mod translate;
mod txt2img;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;
pub(crate) use error::errors;
pub(crate) use translate::SAME_FIELDS;

/// The routes of AUTOMATIC1111's API.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/sdapi/v1/txt2img", post(txt2img::txt2img))
        .route("/sdapi/v1/img2img", post(txt2img::img2img))
        .route("/sdapi/v1/progress", get(progress::progress))
        .route("/sdapi/v1/interrupt", post(progress::interrupt))
        .route("/sdapi/v1/options", get(options::get_options).post(options::set_options))
        .route("/sdapi/v1/samplers", get(lists::samplers))
        .route("/sdapi/v1/schedulers", get(lists::schedulers))
        .route("/sdapi/v1/sd-models", get(lists::models))
        .route("/sdapi/v1/sd-vae", get(lists::empty_list))
        .route("/sdapi/v1/upscalers", get(lists::empty_list))
        .route("/sdapi/v1/latent-upscale-modes", get(lists::upscalers))
        .route("/sdapi/v1/loras", get(lists::loras))
        .route("/sdapi/v1/embeddings", get(lists::embeddings))
        .route("/sdapi/v1/scripts", get(lists::scripts))
        .route("/sdapi/v1/png-info", post(png_info::png_info))
        .route("/internal/progress", post(progress::task))
}

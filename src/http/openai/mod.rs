//! OpenAI's Images API and list of models, for its official clients. Native fields (`seed`, `steps`,
//! `guidance_scale`, ...) may stand beside OpenAI's own. What has no effect here (`quality`, `style`,
//! a transparent background, unknown fields) is told of in the response's warnings, as clients send
//! more than they mean. Whatever is wrong with a field is 400, as there.

mod error;
mod files;
mod form;
mod images;
mod models;
mod render;
mod request;
mod stream;
mod usage;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with};

use super::docs::{self, Docs};
use super::error::ErrorBody;
use super::state::AppState;
pub(crate) use error::errors;

/// The routes of OpenAI's API.
pub(crate) fn routes() -> ApiRouter<AppState> {
    const IMAGES: [&str; 3] = ["created", "data", "usage"];
    let generate = Docs::of("Generate images").takes::<request::Generation>();
    let generate = generate.gives(200, &IMAGES, &docs::EVENTS).describe();
    let edit = docs::schema::<request::Edit>();
    let edit = Docs::of("Edit an image").takes_as("multipart/form-data", edit);
    let edit = edit.gives(200, &IMAGES, &docs::EVENTS).describe();
    let vary = docs::schema::<request::Variation>();
    let vary = Docs::of("Vary an image").takes_as("multipart/form-data", vary);
    let vary = vary.gives(200, &IMAGES, &docs::EVENTS).describe();
    let list = Docs::of("List of models").gives(200, &["data"], &[]).describe();
    let model = Docs::of("Model object").gives(200, &["id", "object"], &[]).describe();
    let routes = ApiRouter::new()
        .api_route("/v1/images/generations", post_with(images::generations, generate))
        .api_route("/v1/images/edits", post_with(images::edits, edit))
        .api_route("/v1/images/variations", post_with(images::variations, vary))
        .api_route("/v1/models", get_with(models::models, list))
        .api_route("/v1/models/{*id}", get_with(models::model, model));
    docs::keyed::<ErrorBody>(routes, "OpenAI")
}

/// The image files of responses with URLs. They need no key, since an `<img>` tag has none: their
/// names are random.
pub(crate) fn files() -> ApiRouter<AppState> {
    let file = Docs::of("Image of a response with URLs").gives(200, &[], &docs::IMAGES);
    let file = get_with(files::file, file.describe());
    docs::group::<ErrorBody>(ApiRouter::new().api_route("/files/{name}", file), "server")
}

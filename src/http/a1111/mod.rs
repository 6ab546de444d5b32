//! AUTOMATIC1111's API, for clients that were written for it. As there, unknown fields are ignored,
//! here with a warning. Fields that would change the image and are not supported are rejected by name. AUTOMATIC1111 has
//! one progress and one interrupt for all; here each client has its own.

mod controlnet;
mod extras;
mod extras_fields;
mod hires;
mod info;
mod infotext;
mod init_image;
mod lists;
mod nothing;
mod options;
mod png_info;
mod progress;
mod request;
mod sampler;
mod scripts;
mod system;
mod timestamp;
mod txt2img;
mod units;
mod unread;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with};
use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use super::docs::{self, Docs};
use super::error::{ErrorDetail, map_error_body};
use super::state::AppState;
use crate::request::Object;

/// The routes of AUTOMATIC1111's API.
pub(crate) fn routes() -> ApiRouter<AppState> {
    const IMAGES: [&str; 3] = ["images", "parameters", "info"];
    let txt2img = Docs::of("Text-to-image").takes::<request::Txt2Img>().gives(200, &IMAGES, &[]);
    let img2img = Docs::of("Image-to-image").takes::<request::Img2Img>().gives(200, &IMAGES, &[]);
    let progress = Docs::of("Progress of the client's oldest request");
    let progress = progress.gives(200, &["progress", "state"], &[]).describe();
    let task = Docs::of("Progress of a request").takes::<progress::TaskQuery>();
    let task = task.gives(200, &["active"], &[]).describe();
    let set_options = Docs::of("Select the model").takes::<Object>();
    let set_options = set_options.gives(200, &[], &["application/json"]).describe();
    let options = get_with(options::get_options, Docs::of("Options").describe());
    let png_info = Docs::of("Generation parameters of an image file").takes::<png_info::PngInfo>();
    let png_info = png_info.gives(200, &["info"], &[]).describe();
    let extra = Docs::of("Upscale an image").takes::<extras::ExtraSingleImage>();
    let extra = extra.gives(200, &["html_info", "image"], &[]).describe();
    let extras = Docs::of("Upscale images").takes::<extras::ExtraBatchImages>();
    let extras = extras.gives(200, &["html_info", "images"], &[]).describe();
    let interrupt = Docs::of("Interrupt the client's requests").describe();
    let list = |summary| Docs::of(summary).describe();
    let routes = ApiRouter::new()
        .api_route("/sdapi/v1/txt2img", post_with(txt2img::txt2img, txt2img.describe()))
        .api_route("/sdapi/v1/img2img", post_with(txt2img::img2img, img2img.describe()))
        .api_route("/sdapi/v1/progress", get_with(progress::progress, progress))
        .api_route("/sdapi/v1/interrupt", post_with(progress::interrupt, interrupt))
        .api_route(
            "/sdapi/v1/skip",
            post_with(progress::skip, list("End the running images of the oldest request")),
        )
        .api_route("/sdapi/v1/options", options.post_with(options::set_options, set_options))
        .api_route("/sdapi/v1/extra-single-image", post_with(extras::single, extra))
        .api_route("/sdapi/v1/extra-batch-images", post_with(extras::batch, extras))
        .api_route("/sdapi/v1/png-info", post_with(png_info::png_info, png_info))
        .api_route("/internal/progress", post_with(progress::task, task))
        .api_route(
            "/internal/pending-tasks",
            get_with(progress::pending, list("The client's requests that have a force_task_id")),
        );
    let routes = add_controlnet(add_lists(add_system(routes)));
    docs::keyed::<A1111Error<'_>>(routes, "AUTOMATIC1111")
}

/// Adds the lists, by which clients know what there is.
fn add_lists(mut routes: ApiRouter<AppState>) -> ApiRouter<AppState> {
    let list = |summary| Docs::of(summary).describe();
    for (path, summary) in [
        ("/sdapi/v1/hypernetworks", "Hypernetworks: none"),
        ("/sdapi/v1/face-restorers", "Face restorers: none"),
        ("/sdapi/v1/prompt-styles", "Styles: none"),
        ("/sdapi/v1/script-info", "Scripts in detail: none"),
        ("/sdapi/v1/extensions", "Extensions: none"),
    ] {
        routes = routes.api_route(path, get_with(lists::empty_list, list(summary)));
    }
    for (path, summary) in [
        ("/sdapi/v1/refresh-checkpoints", "Nothing: models are looked for at each request"),
        ("/sdapi/v1/refresh-loras", "Nothing: LoRAs are looked for at each request"),
        ("/sdapi/v1/refresh-vae", "Nothing: the VAE is an option of the server"),
    ] {
        routes = routes.api_route(path, post_with(lists::refresh, list(summary)));
    }
    routes
        .api_route("/sdapi/v1/samplers", get_with(lists::samplers, list("Samplers")))
        .api_route("/sdapi/v1/schedulers", get_with(lists::schedulers, list("Schedules")))
        .api_route("/sdapi/v1/sd-models", get_with(lists::models, list("Models")))
        .api_route("/sdapi/v1/sd-vae", get_with(lists::vaes, list("VAEs")))
        .api_route(
            "/sdapi/v1/realesrgan-models",
            get_with(lists::realesrgan_models, list("Upscalers of Real-ESRGAN")),
        )
        .api_route("/sdapi/v1/upscalers", get_with(lists::upscalers, list("Upscalers")))
        .api_route(
            "/sdapi/v1/latent-upscale-modes",
            get_with(lists::latent_upscalers, list("Latent upscalers")),
        )
        .api_route("/sdapi/v1/loras", get_with(lists::loras, list("LoRAs")))
        .api_route("/sdapi/v1/embeddings", get_with(lists::embeddings, list("Embeddings")))
        .api_route("/sdapi/v1/scripts", get_with(lists::scripts, list("Scripts")))
}

/// Adds what is about the server, and what is refused.
fn add_system(mut routes: ApiRouter<AppState>) -> ApiRouter<AppState> {
    let about = |summary| Docs::of(summary).describe();
    for path in ["create/embedding", "create/hypernetwork", "train/embedding", "train/hypernetwork"]
    {
        let refused = post_with(system::train, about("Refused: nothing is trained here"));
        routes = routes.api_route(&format!("/sdapi/v1/{path}"), refused);
    }
    let refused = about("Refused: there is no model that describes images");
    routes
        .api_route("/sdapi/v1/interrogate", post_with(system::interrogate, refused))
        .api_route(
            "/sdapi/v1/unload-checkpoint",
            post_with(system::unload, about("Unload the model until it is needed")),
        )
        .api_route(
            "/sdapi/v1/reload-checkpoint",
            post_with(system::reload, about("Load the model that was unloaded")),
        )
        .api_route("/sdapi/v1/memory", get_with(system::memory_use, about("Memory")))
        .api_route("/sdapi/v1/cmd-flags", get_with(system::flags, about("Flags")))
        .api_route(
            "/sdapi/v1/refresh-embeddings",
            post_with(
                system::refresh_embeddings,
                Docs::of("Nothing: embeddings are read with the model")
                    .gives(200, &[], &["application/json"])
                    .describe(),
            ),
        )
        .api_route("/internal/ping", get_with(system::ping, about("Whether there is a server")))
}

/// Adds the routes of the extension sd-webui-controlnet.
fn add_controlnet(routes: ApiRouter<AppState>) -> ApiRouter<AppState> {
    let list = |summary| Docs::of(summary).describe();
    let detect = Docs::of("What a preprocessor makes of pictures").takes::<controlnet::Detect>();
    let detect = detect.gives(200, &["info", "images"], &[]).describe();
    routes
        .api_route("/controlnet/version", get_with(controlnet::version, list("Version")))
        .api_route("/controlnet/settings", get_with(controlnet::settings, list("Settings")))
        .api_route("/controlnet/model_list", get_with(controlnet::model_list, list("ControlNets")))
        .api_route(
            "/controlnet/module_list",
            get_with(controlnet::module_list, list("Preprocessors")),
        )
        .api_route(
            "/controlnet/control_types",
            get_with(controlnet::control_types, list("ControlNets and preprocessors by kind")),
        )
        .api_route("/controlnet/detect", post_with(controlnet::detect, detect))
}

/// The body of an error.
#[derive(Serialize, JsonSchema)]
struct A1111Error<'a> {
    error: &'a str,
    detail: &'a str,
    body: &'a str,
    errors: &'a str,
}

/// Renders the errors of handlers and middleware in AUTOMATIC1111's format.
pub(crate) fn errors(response: Response) -> Response {
    map_error_body(response, |_: StatusCode, ErrorDetail { code, message, .. }| {
        json!(A1111Error { error: code, detail: message, body: "", errors: message })
    })
}

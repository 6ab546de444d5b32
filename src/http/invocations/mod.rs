//! `/invocations`, SageMaker's contract, in the native format and those of SageMaker's other
//! containers; and background jobs, `/v1/jobs`.

mod accept;
mod body;
mod detect;
mod events;
mod huggingface;
mod invoke;
mod job_request;
mod job_runner;
mod job_state;
mod jobs;
mod jumpstart;
mod lines;
mod render;
mod stability;
mod webhook;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with};
use schemars::{Schema, json_schema};

use super::docs::{self, Docs};
use super::error::ErrorBody;
use super::state::AppState;
pub(crate) use job_runner::resume;

/// The routes below `/v1` whose errors are native, not OpenAI's.
pub(crate) const ROUTES: [&str; 2] = ["/v1/invocations", "/v1/jobs"];

/// The route that SageMaker's batch transform requests first.
pub(crate) fn open_routes() -> ApiRouter<AppState> {
    let parameters = Docs::of("Parameters of SageMaker's batch transform").describe();
    let parameters = get_with(invoke::execution_parameters, parameters);
    let routes = ApiRouter::new().api_route("/execution-parameters", parameters);
    docs::group::<ErrorBody>(routes, "native")
}

/// The route of SageMaker's requests, which needs a key only with `--lock-invocations`.
pub(crate) fn sagemaker_routes(locked: bool) -> ApiRouter<AppState> {
    let generate = "Generate images; accepts the requests of SageMaker's other containers too";
    let generate = gives_images(takes_prompt(generate)).describe();
    let routes =
        ApiRouter::new().api_route("/invocations", post_with(invoke::invocations, generate));
    let group = if locked { docs::keyed::<ErrorBody> } else { docs::group::<ErrorBody> };
    group(routes, "native")
}

/// The routes of other clients, which need a key where keys are configured.
pub(crate) fn routes() -> ApiRouter<AppState> {
    const JOB: [&str; 2] = ["id", "state"];
    let generate = || gives_images(takes_prompt("Generate images")).describe();
    let create = Docs::of("Generate images in the background").takes::<job_request::JobRequest>();
    let create = create.takes_as("text/plain", prompt()).gives(202, &JOB, &[]);
    let list = Docs::of("The jobs of an API key").gives(200, &["jobs", "next"], &[]);
    let state = Docs::of("Job status").gives(200, &JOB, &[]);
    let delete = Docs::of("Cancel and delete a job").gives(204, &[], &[]);
    let result = gives_images(Docs::of("Response of a job")).gives(202, &JOB, &[]);
    let job = get_with(jobs::state, state.describe());
    let routes = ApiRouter::new()
        .api_route("/v1/invocations", post_with(invoke::invocations, generate()))
        .api_route("/", post_with(invoke::invocations, generate()))
        .api_route(
            "/v1/jobs",
            post_with(jobs::create, create.describe()).get_with(jobs::list, list.describe()),
        )
        .api_route("/v1/jobs/{id}", job.delete_with(jobs::delete, delete.describe()))
        .api_route("/v1/jobs/{id}/result", get_with(jobs::result, result.describe()));
    docs::keyed::<ErrorBody>(routes, "native")
}

/// An operation that takes native fields or a bare prompt.
fn takes_prompt(summary: &'static str) -> Docs {
    Docs::of(summary).takes::<detect::Native>().takes_as("text/plain", prompt())
}

fn prompt() -> Schema {
    json_schema!({ "type": "string", "minLength": 1 })
}

fn gives_images(docs: Docs) -> Docs {
    let media_types = [&docs::IMAGES[..], &docs::EVENTS].concat();
    docs.gives(200, &["prompt", "content_type"], &media_types)
}

/// The route of a model that SageMaker has loaded.
pub(crate) fn loaded_model_routes() -> ApiRouter<AppState> {
    let generate = gives_images(takes_prompt("Generate images with a loaded model")).describe();
    let routes =
        ApiRouter::new().api_route("/models/{name}/invoke", post_with(invoke::loaded, generate));
    docs::group::<ErrorBody>(routes, "native")
}

/// The route of a model by its name, which Hugging Face's clients call.
pub(crate) fn named_model_routes() -> ApiRouter<AppState> {
    let generate = gives_images(takes_prompt("Generate images with a model by its name"));
    let routes = ApiRouter::new()
        .api_route("/models/{*name}", post_with(invoke::named, generate.describe()));
    docs::keyed::<ErrorBody>(routes, "native")
}

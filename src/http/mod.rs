//! The HTTP side: the route table, what every handler shares, and the one layer around them.
//! Each dialect has a file of its own; `sagemaker` is the native one.

mod accept;
mod asked;
mod body;
mod dialect;
mod error;
mod events;
mod huggingface;
mod intake;
mod jobs;
mod jumpstart;
mod keys;
mod lines;
mod listen;
mod models;
mod openai;
mod openapi;
mod page;
mod route;
mod sagemaker;
mod sdapi;
mod shelf;
mod stability;
mod status;
mod underway;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use tower::util::option_layer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tracing::{Instrument, debug, error, info, info_span};

use crate::api::Limits;
use crate::engine::Engine;
use crate::image;
use crate::models::{Chosen, Models};
use crate::telemetry::Id;
use error::{ApiError, Reason};
pub use keys::Key;
pub use listen::listen;

/// SageMaker's name for a request, and everyone else's.
const REQUEST_IDS: [&str; 2] = ["x-amzn-sagemaker-inference-id", "x-request-id"];

/// Asked every few seconds by machines: not worth a line in the log.
const WATCHED: [&str; 4] = ["/ping", "/health/live", "/health/ready", "/metrics"];

/// The bounds of the HTTP side.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What one request may ask for.
    pub limits: Limits,
    /// Length of a body.
    pub max_body_bytes: usize,
    /// Requests served at the same time, waiting ones included.
    pub max_requests: usize,
    /// From the head of a request to its answer.
    pub request_timeout: Duration,
    /// The same for an answer that is a stream.
    pub stream_timeout: Duration,
    /// Jobs that are kept, those with a result included.
    pub max_jobs: usize,
    /// From the acceptance of a job to its result.
    pub job_timeout: Duration,
    /// How long the result of a job is kept.
    pub job_retention: Duration,
    /// How long a picture that was answered with a URL is kept.
    pub url_retention: Duration,
    /// Size of all pictures that are kept for their URL.
    pub max_url_bytes: usize,
    /// From the opening of a connection, or the last answer on it, to the head of a request.
    pub idle_timeout: Duration,
    /// Open connections.
    pub max_connections: usize,
    /// Whether prompts may appear in the log.
    pub log_prompts: bool,
    /// Who may come in; everyone when there are none.
    pub api_keys: Vec<Key>,
    /// The web pages that may call from a browser; `*` stands for all.
    pub cors_origins: Vec<HeaderValue>,
}

/// What the handlers share.
#[derive(Debug, Clone)]
struct Shared {
    /// The model that the request means.
    engine: Engine,
    _chosen: Option<Chosen>,
    models: Models,
    settings: Settings,
    /// A permit for each request in service: bodies and pictures take memory.
    gate: Arc<Semaphore>,
    /// A permit for each request whose fields are being read.
    readers: Arc<Semaphore>,
    jobs: Arc<jobs::Store>,
    shelf: Arc<shelf::Shelf>,
    underway: underway::Underway,
    checkpoint: sdapi::Checkpoint,
    hashes: image::Hashes,
}

impl Shared {
    /// The same for a request that means another model.
    fn on(&self, chosen: Chosen) -> State {
        let engine = chosen.engine.clone();
        axum::extract::State(Arc::new(Self { engine, _chosen: Some(chosen), ..self.clone() }))
    }
}

type State = axum::extract::State<Arc<Shared>>;

/// Every route of the server. Those behind the lock need a key where keys are configured.
pub fn router(models: Models, settings: Settings) -> Router {
    let engine = models.first().clone();
    let gate = Arc::new(Semaphore::new(settings.max_requests));
    let readers = thread::available_parallelism().map_or(1, usize::from);
    let readers = Arc::new(Semaphore::new(readers));
    let keys: Arc<[Key]> = settings.api_keys.as_slice().into();
    let lock = || middleware::from_fn_with_state(Arc::clone(&keys), keys::require);
    let openai = Router::new()
        .route("/v1/images/generations", post(openai::generations))
        .route("/v1/images/edits", post(openai::edits))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route_layer(lock())
        .route_layer(middleware::map_response(openai::errors));
    let sdapi =
        sdapi_routes().route_layer(lock()).route_layer(middleware::map_response(sdapi::errors));
    let (multi_model, named) = match models.multi_model() {
        true => (multi_model(), Router::new()),
        false => (Router::new(), Router::new().route("/models/{*id}", post(models::named))),
    };
    let locked = Router::new()
        .route("/v1/invocations", post(sagemaker::invocations))
        .route("/", post(sagemaker::invocations))
        .merge(named)
        .route("/v1/jobs", post(jobs::create))
        .route("/v1/jobs/{id}", get(jobs::state).delete(jobs::delete))
        .route("/v1/jobs/{id}/result", get(jobs::result))
        .route_layer(lock());
    let router = Router::new()
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/docs", get(page::docs))
        .route("/docs.js", get(page::docs_script))
        .route("/openapi.json", get(openapi::document))
        .route("/ping", get(sagemaker::ping).post(sagemaker::ping))
        .route("/invocations", post(sagemaker::invocations))
        .route("/execution-parameters", get(sagemaker::execution_parameters))
        .route("/health/live", get(async || StatusCode::OK))
        .route("/health/ready", get(sagemaker::ping))
        .route("/info", get(status::info))
        .route("/metrics", get(status::metrics))
        .route("/files/{name}", get(shelf::file))
        .merge(multi_model)
        .merge(locked)
        .merge(openai)
        .merge(sdapi)
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(other_method)
        .layer(option_layer(cors(&settings.cors_origins)))
        .layer(middleware::from_fn_with_state(engine.clone(), observe));
    let (jobs, shelf, underway, checkpoint, hashes) = Default::default();
    let _chosen = None;
    let shared = Shared {
        engine,
        _chosen,
        models,
        settings,
        gate,
        readers,
        jobs,
        shelf,
        underway,
        checkpoint,
        hashes,
    };
    let state = Arc::new(shared);
    route::by_attribute(router.with_state(state))
}

/// A method that a route does not take. To ask what it takes is no error: the answer is the header
/// `Allow`, and SillyTavern finds out in this way whether there is a server.
async fn other_method(method: Method) -> Result<StatusCode, ApiError> {
    if method == Method::OPTIONS { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::Method) }
}

/// SageMaker's routes to load, unload and use many models.
fn multi_model() -> Router<Arc<Shared>> {
    Router::new()
        .route("/models", get(models::list).post(models::load))
        .route("/models/{name}", get(models::show).delete(models::unload))
        .route("/models/{name}/invoke", post(models::invoke))
}

/// The routes of AUTOMATIC1111's API.
fn sdapi_routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/sdapi/v1/txt2img", post(sdapi::txt2img))
        .route("/sdapi/v1/img2img", post(sdapi::img2img))
        .route("/sdapi/v1/progress", get(sdapi::progress))
        .route("/sdapi/v1/interrupt", post(sdapi::interrupt))
        .route("/sdapi/v1/options", get(sdapi::get_options).post(sdapi::set_options))
        .route("/sdapi/v1/samplers", get(sdapi::samplers))
        .route("/sdapi/v1/schedulers", get(sdapi::schedulers))
        .route("/sdapi/v1/sd-models", get(sdapi::models))
        .route("/sdapi/v1/sd-vae", get(sdapi::nothing))
        .route("/sdapi/v1/upscalers", get(sdapi::nothing))
        .route("/sdapi/v1/latent-upscale-modes", get(sdapi::upscalers))
        .route("/sdapi/v1/loras", get(sdapi::loras))
        .route("/sdapi/v1/embeddings", get(sdapi::embeddings))
        .route("/sdapi/v1/scripts", get(sdapi::scripts))
        .route("/sdapi/v1/png-info", post(sdapi::png_info))
        .route("/internal/progress", post(sdapi::task))
}

/// What browsers must hear before a page of another origin may call. Nothing, unless configured.
fn cors(origins: &[HeaderValue]) -> Option<CorsLayer> {
    let origin = match origins {
        [] => return None,
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().cloned()),
    };
    let layer = CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            RETRY_AFTER,
            asked::SEED,
            asked::NSFW,
            HeaderName::from_static(REQUEST_IDS[1]),
        ])
        .max_age(Duration::from_secs(3600));
    Some(layer)
}

/// The routes that are measured by their name; others are `other`, since clients make them up.
const ROUTES: [&str; 42] = [
    "/",
    "/page.css",
    "/page.js",
    "/docs",
    "/docs.js",
    "/openapi.json",
    "/ping",
    "/invocations",
    "/v1/invocations",
    "/execution-parameters",
    "/models",
    "/models/{name}",
    "/models/{name}/invoke",
    "/models/{*id}",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/models",
    "/v1/models/{*id}",
    "/files/{name}",
    "/v1/jobs",
    "/v1/jobs/{id}",
    "/v1/jobs/{id}/result",
    "/health/live",
    "/health/ready",
    "/info",
    "/metrics",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/progress",
    "/sdapi/v1/interrupt",
    "/sdapi/v1/options",
    "/sdapi/v1/samplers",
    "/sdapi/v1/schedulers",
    "/sdapi/v1/sd-models",
    "/sdapi/v1/sd-vae",
    "/sdapi/v1/upscalers",
    "/sdapi/v1/latent-upscale-modes",
    "/sdapi/v1/loras",
    "/sdapi/v1/embeddings",
    "/sdapi/v1/scripts",
    "/sdapi/v1/png-info",
    "/internal/progress",
];

/// Counts a request once: with its outcome, or as gone when the client left before it had one.
struct Tally {
    engine: Engine,
    route: &'static str,
    outcome: &'static str,
    began: Instant,
}

impl Drop for Tally {
    fn drop(&mut self) {
        let metrics = self.engine.metrics();
        metrics.count(Id::Requests, &[self.route, self.outcome]);
        metrics.time(Id::RequestSeconds, &[self.route], self.began.elapsed());
    }
}

/// Names the request, echoes the name, counts the request and writes its one log line.
async fn observe(
    axum::extract::State(engine): axum::extract::State<Engine>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = ROUTES.into_iter().find(|route| Some(*route) == matched).unwrap_or("other");
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let mut tally = Tally { engine, route, outcome: "gone", began: Instant::now() };
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(HeaderName::from_static(REQUEST_IDS[1]), id);

    let _inside = span.enter();
    let status = response.status();
    let reason = response.extensions().get::<Reason>();
    tally.outcome = match reason {
        Some(reason) => reason.code,
        None if status.is_success() => "ok",
        None => "not_ready",
    };
    // A failure of ours, as against a state that clients are told to expect.
    let fault = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
    let duration_ms = tally.began.elapsed().as_millis() as u64;
    let (status, reason) = (status.as_u16(), reason.map(|reason| reason.message.as_str()));
    if fault {
        error!(%method, path, status, duration_ms, reason);
    } else if WATCHED.contains(&route) {
        debug!(%method, path, status, duration_ms);
    } else {
        info!(%method, path, status, duration_ms, reason);
    }
    response
}

/// The client's name for the request when it is fit for a header and a log, or else a random one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fit = |value: &&HeaderValue| {
        (1..=128).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let theirs = REQUEST_IDS.iter().filter_map(|name| headers.get(*name)).find(fit);
    let random = || format!("{:016x}", getrandom::u64().unwrap_or_default());
    theirs.cloned().or_else(|| random().try_into().ok()).unwrap_or(HeaderValue::from_static("-"))
}

/// Too many to guess one.
fn random() -> u128 {
    let half = || u128::from(getrandom::u64().unwrap_or_default());
    half() << 64 | half()
}

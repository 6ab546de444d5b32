//! The HTTP side: the route table, what every handler shares, and the one layer around them.
//! Each dialect has a file of its own; `sagemaker` is the native one.

mod accept;
mod body;
mod error;
mod sagemaker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use tracing::{Instrument, debug, error, info, info_span};

use crate::api::Limits;
use crate::engine::Engine;
use error::{ApiError, Reason};

/// SageMaker's name for a request, and everyone else's.
const REQUEST_IDS: [&str; 2] = ["x-amzn-sagemaker-inference-id", "x-request-id"];

/// The bounds of the HTTP side.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// What one request may ask for.
    pub limits: Limits,
    /// Length of a body.
    pub max_body_bytes: usize,
    /// Requests served at the same time, waiting ones included.
    pub max_requests: usize,
    /// From the head of a request to its answer.
    pub request_timeout: Duration,
    /// Whether prompts may appear in the log.
    pub log_prompts: bool,
}

/// What the handlers share.
#[derive(Debug)]
struct Shared {
    engine: Engine,
    settings: Settings,
    /// A permit for each request in service: bodies and pictures take memory.
    gate: Semaphore,
}

type State = axum::extract::State<Arc<Shared>>;

/// Every route of the server.
pub fn router(engine: Engine, settings: Settings) -> Router {
    let gate = Semaphore::new(settings.max_requests);
    Router::new()
        .route("/ping", get(sagemaker::ping).post(sagemaker::ping))
        .route("/invocations", post(sagemaker::invocations))
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::Method)
        .layer(middleware::from_fn(observe))
        .with_state(Arc::new(Shared { engine, settings, gate }))
}

/// Names the request, echoes the name, and writes the one log line of the request.
async fn observe(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let began = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(HeaderName::from_static(REQUEST_IDS[1]), id);

    let _inside = span.enter();
    let status = response.status();
    // A failure of ours, as against a state that clients are told to expect.
    let fault = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
    let duration_ms = began.elapsed().as_millis() as u64;
    let reason = response.extensions().get::<Reason>().map(|reason| reason.0.as_str());
    let status = status.as_u16();
    if path == "/ping" {
        debug!(%method, path, status, duration_ms);
    } else if fault {
        error!(%method, path, status, duration_ms, reason);
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

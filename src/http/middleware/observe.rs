//! Request ids, metrics, and one log line per request.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tracing::{Instrument, debug, error, info, info_span};

use crate::engine::Engine;
use crate::http::error::ErrorDetail;
use crate::http::headers::{INFERENCE_ID, REQUEST_ID};
use crate::telemetry::MetricId;

/// Routes that machines poll. Their requests are logged at `debug` only.
const PROBE_ROUTES: [&str; 4] = ["/ping", "/health/live", "/health/ready", "/metrics"];

/// The routes with a label of their own in metrics; unknown paths are `other`.
pub(crate) const ROUTES: [&str; 42] = [
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

/// Counts a request once: with its outcome, or as `client_closed` if the client disconnected first.
struct RequestMetricsGuard {
    engine: Engine,
    route: &'static str,
    outcome: &'static str,
    began: Instant,
}

impl Drop for RequestMetricsGuard {
    fn drop(&mut self) {
        let metrics = self.engine.metrics();
        metrics.count(MetricId::Requests, &[self.route, self.outcome]);
        metrics.time(MetricId::RequestDuration, &[self.route], self.began.elapsed());
    }
}

/// Sets the request id, counts the request and logs it.
pub(crate) async fn observe(
    State(engine): State<Engine>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = ROUTES.into_iter().find(|route| Some(*route) == matched).unwrap_or("other");
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let mut tally =
        RequestMetricsGuard { engine, route, outcome: "client_closed", began: Instant::now() };
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(REQUEST_ID, id);

    let _inside = span.enter();
    let status = response.status();
    let reason = response.extensions().get::<ErrorDetail>();
    tally.outcome = match reason {
        Some(reason) => reason.code,
        None if status.is_success() => "ok",
        None => "not_ready",
    };
    // An error of the server, in contrast to a state that clients should expect.
    let fault = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
    let duration_ms = tally.began.elapsed().as_millis() as u64;
    let (status, reason) = (status.as_u16(), reason.map(|reason| reason.message.as_str()));
    if fault {
        error!(%method, path, status, duration_ms, reason);
    } else if PROBE_ROUTES.contains(&route) {
        debug!(%method, path, status, duration_ms);
    } else {
        info!(%method, path, status, duration_ms, reason);
    }
    response
}

/// The client's request id if it is valid in a header and a log, else a random one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fit = |value: &&HeaderValue| {
        (1..=128).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let theirs = [INFERENCE_ID, REQUEST_ID].iter().filter_map(|name| headers.get(name)).find(fit);
    let random = || format!("{:016x}", getrandom::u64().unwrap_or_default());
    theirs.cloned().or_else(|| random().try_into().ok()).unwrap_or(HeaderValue::from_static("-"))
}

//! Request ids, metrics, and one log line per request.

use std::borrow::Cow;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tracing::{Instrument, debug, error, info, info_span};

use crate::engine::Engine;
use crate::http::error::ErrorDetail;
use crate::http::headers::{INFERENCE_ID, REQUEST_ID};

/// Routes that machines poll. Their requests are logged at `debug` only.
const PROBE_ROUTES: [&str; 4] = ["/ping", "/health/live", "/health/ready", "/metrics"];

/// Counts a request once: with its outcome, or as `client_closed` if the client disconnected first.
struct RequestMetricsGuard {
    engine: Engine,
    /// The template of the matched route, or `other`: clients choose paths, not routes.
    route: String,
    outcome: Cow<'static, str>,
    began: Instant,
}

impl Drop for RequestMetricsGuard {
    fn drop(&mut self) {
        let metrics = self.engine.metrics();
        metrics.requests.with([&self.route, &self.outcome]).inc();
        metrics.request_duration.time([&self.route], self.began.elapsed());
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
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str);
    let route = route.to_owned();
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let mut tally = RequestMetricsGuard {
        engine,
        route,
        outcome: "client_closed".into(),
        began: Instant::now(),
    };
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(REQUEST_ID, id);

    let _inside = span.enter();
    let status = response.status();
    let reason = response.extensions().get::<ErrorDetail>();
    tally.outcome = match reason {
        Some(reason) => reason.code.clone(),
        None if status.is_success() => "ok".into(),
        None => "not_ready".into(),
    };
    // An error of the server, in contrast to a state that clients should expect.
    let fault = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
    let duration_ms = tally.began.elapsed().as_millis() as u64;
    let (status, reason) = (status.as_u16(), reason.map(|reason| reason.message.as_str()));
    if fault {
        error!(%method, path, status, duration_ms, reason);
    } else if PROBE_ROUTES.contains(&tally.route.as_str()) {
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
    let given = [INFERENCE_ID, REQUEST_ID].iter().filter_map(|name| headers.get(name)).find(fit);
    let random = || format!("{:016x}", getrandom::u64().unwrap_or_default());
    given.cloned().or_else(|| random().try_into().ok()).unwrap_or(HeaderValue::from_static("-"))
}

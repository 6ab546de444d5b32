//! `/metrics` for Prometheus, on the main port, which SageMaker scrapes.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};

use crate::http::state::AppState;

const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Every metric, with the gauges as they are now: in OpenMetrics if the client names it, else in
/// the Prometheus text format.
pub(crate) async fn metrics(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let metrics = state.engine.metrics();
    let (engine, engines) = (state.engine.clone(), state.models.engines());
    // The GPU driver may be slow. A gauge that cannot be read keeps its value.
    let _ = tokio::task::spawn_blocking(move || engine.gauge_with(&engines)).await;
    let held = state.slots.held();
    metrics.requests_in_flight.with([]).set(held.requests as i64);
    metrics.body_bytes_in_flight.with([]).set(held.bytes as i64);
    if let Ok([running, finished]) = state.jobs.count().await {
        metrics.jobs.with(["running"]).set(running);
        metrics.jobs.with(["finished"]).set(finished);
    }
    metrics.build.with([env!("CARGO_PKG_VERSION")]).set(1);
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accept.contains("application/openmetrics-text") {
        ([(CONTENT_TYPE, OPEN_METRICS)], metrics.open_metrics()).into_response()
    } else {
        ([(CONTENT_TYPE, PROMETHEUS)], metrics.to_string()).into_response()
    }
}

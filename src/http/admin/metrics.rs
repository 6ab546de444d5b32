//! `/metrics` for Prometheus, on the main port, which SageMaker scrapes.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;

use crate::http::state::AppState;
use crate::telemetry::MetricId;

/// The Prometheus text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics, with up-to-date gauges.
pub(crate) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let metrics = state.engine.metrics();
    let (engine, engines) = (state.engine.clone(), state.models.engines());
    // The GPU driver may be slow. A gauge that cannot be read keeps its value.
    let _ = tokio::task::spawn_blocking(move || engine.gauge_with(&engines)).await;
    let in_flight = state.settings.max_requests - state.request_slots.available_permits();
    metrics.set(MetricId::RequestsInFlight, &[], in_flight as f64);
    let [running, finished] = state.jobs.count();
    metrics.set(MetricId::Jobs, &["running"], running as f64);
    metrics.set(MetricId::Jobs, &["finished"], finished as f64);
    metrics.set(MetricId::Build, &[env!("CARGO_PKG_VERSION")], 1.0);
    ([(CONTENT_TYPE, TEXT)], metrics.to_string())
}

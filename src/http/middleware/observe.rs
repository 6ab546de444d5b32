//! Request ids, metrics, and one log line per request, which has nothing of what the client has
//! typed.

use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt as _;
use tracing::field::display;
use tracing::{Instrument as _, Span, debug, error, info, info_span};

use super::forwarded::ClientAddress;
use crate::engine::Engine;
use crate::http::error::{ErrorDetail, Result, StreamEnd};
use crate::http::headers::{INFERENCE_ID, REQUEST_ID};
use crate::http::ids;
use crate::request::brief;

/// Routes that machines poll. Their requests are logged at `debug` only.
const PROBE_ROUTES: [&str; 4] = ["/ping", "/health/live", "/health/ready", "/metrics"];

/// Methods that are logged. Clients may choose any word as the method.
const METHODS: [Method; 7] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::PATCH,
    Method::DELETE,
    Method::OPTIONS,
];

/// One request, which is counted and logged when this is dropped: with its outcome, or as
/// `client_closed` if the client disconnected before the response had ended.
struct ObservedRequest {
    engine: Engine,
    /// What is logged as method and path: what was typed only if messages are logged too.
    method: String,
    path: String,
    /// The template of the matched route, or `other`: clients choose paths, not routes.
    route: String,
    client: Option<ClientAddress>,
    span: Span,
    began: Instant,
    /// Whether messages about requests are logged, which may repeat words of them.
    log_messages: bool,
    answer: Option<Answer>,
}

/// What is known when the headers of a response are sent.
struct Answer {
    status: StatusCode,
    error: Option<ErrorDetail>,
    /// Of a response that is sent while it is produced.
    end: Option<StreamEnd>,
}

impl ObservedRequest {
    /// The outcome, and the error of a failed request.
    fn outcome(&self) -> (&str, Option<&ErrorDetail>) {
        let Some(Answer { status, error, end }) = &self.answer else {
            return ("client_closed", None);
        };
        match (error, end.as_ref().map(StreamEnd::get)) {
            (Some(error), _) | (None, Some(Some(Err(error)))) => (&error.code, Some(error)),
            (None, Some(None)) => ("client_closed", None),
            (None, None | Some(Some(Ok(())))) if status.is_success() => ("ok", None),
            (None, _) if *status == StatusCode::SERVICE_UNAVAILABLE => ("not_ready", None),
            (None, _) => ("other", None),
        }
    }

    fn count_duration(&self) {
        self.engine.metrics().request_duration.time([&self.route], self.began.elapsed());
    }
}

impl Drop for ObservedRequest {
    fn drop(&mut self) {
        if self.answer.is_none() {
            self.count_duration();
        }
        let (outcome, error) = self.outcome();
        self.engine.metrics().requests.with([&self.route, outcome]).inc();
        let _inside = self.span.enter();
        let (method, path) = (&*brief(&self.method), &*brief(&self.path));
        let client = self.client.map(|client| display(client.0));
        let duration_ms = self.began.elapsed().as_millis() as u64;
        let status = self.answer.as_ref().map(|answer| answer.status);
        // An error of the server, in contrast to a state that clients should expect.
        let is_fault = |status: &StatusCode| {
            status.is_server_error() && *status != StatusCode::SERVICE_UNAVAILABLE
        };
        let (fault, status) = (status.as_ref().is_some_and(is_fault), status.map(|s| s.as_u16()));
        let reason = error.filter(|_| fault || self.log_messages).map(|error| &error.message);
        let param = error.filter(|error| error.is_known).and_then(|error| error.param.as_ref());
        if fault {
            error!(%method, path, status, outcome, duration_ms, client, param, reason);
        } else if PROBE_ROUTES.contains(&self.route.as_str()) {
            debug!(%method, path, status, outcome, duration_ms, client);
        } else {
            info!(%method, path, status, outcome, duration_ms, client, param, reason);
        }
    }
}

/// Sets the request id, counts the request and logs it.
pub(crate) async fn observe(
    State((engine, log_messages)): State<(Engine, bool)>,
    request: Request,
    next: Next,
) -> Response {
    let id = match request_id(request.headers()) {
        Ok(id) => id,
        Err(error) => return error.response(),
    };
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str);
    let route = route.to_owned();
    let (method, path) = match log_messages {
        true => (request.method().as_str(), request.uri().path()),
        false if METHODS.contains(request.method()) => (request.method().as_str(), &*route),
        false => ("other", &*route),
    };
    let (method, path) = (method.to_owned(), path.to_owned());
    let client = request.extensions().get::<ClientAddress>().copied();
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let (began, inside) = (Instant::now(), span.clone());
    let answer = None;
    let mut observed =
        ObservedRequest { engine, method, path, route, client, span, began, log_messages, answer };
    let mut response = next.run(request).instrument(inside).await;
    response.headers_mut().insert(REQUEST_ID, id);

    observed.count_duration();
    let (status, extensions) = (response.status(), response.extensions());
    let (error, end) = (extensions.get().cloned(), extensions.get::<StreamEnd>().cloned());
    let is_stream = end.is_some();
    observed.answer = Some(Answer { status, error, end });
    if !is_stream {
        return response;
    }
    // The request ends with the body.
    let hold = move |_: &_| {
        let _observed = &observed;
    };
    response.map(|body| Body::from_stream(body.into_data_stream().inspect(hold)))
}

/// The client's request id if it is valid in a header and a log, else a random one.
fn request_id(headers: &HeaderMap) -> Result<HeaderValue> {
    let fit = |value: &&HeaderValue| {
        (1..=128).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let given = [INFERENCE_ID, REQUEST_ID].iter().filter_map(|name| headers.get(name)).find(fit);
    match given {
        Some(given) => Ok(given.clone()),
        None => Ok(HeaderValue::try_from(format!("{:016x}", ids::short()?))
            .unwrap_or(HeaderValue::from_static("-"))),
    }
}

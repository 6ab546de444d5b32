//! Admission: what every request with a body passes before anything is done with it. It takes one
//! of the request slots and room for the body, starts the request's clock and reads the body.

use std::borrow::Cow;
use std::convert::Infallible;
use std::error::Error as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderValue};
use futures_util::StreamExt as _;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::coding::Coding;
use super::deadline::{Deadline, Timeout};
use super::error::{ApiError, Result};
use super::middleware::forwarded::ClientAddress;
use super::slots::{Amount, Limit, Share};
use super::state::{AppState, HttpConfig, model_of};
use crate::engine::Client;
use crate::request::{Fields, ValidationError, brief};

/// A slower transfer counts as stalled, in bytes per second.
pub(crate) const MIN_RATE: u64 = 1 << 16;

/// Interval at which a stored job asks for a slot again.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Maximum length of a body that holds no image, in bytes.
const MAX_SMALL_BODY: usize = 1 << 20;

/// An admitted request: its headers, its whole body, its client, and its slot with the deadline.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) client: Client,
    pub(crate) timeout: Timeout,
    /// Deadline of a response that is a stream.
    pub(crate) stream_deadline: Deadline,
    pub(crate) slot: RequestSlot,
}

/// An admitted request whose body holds no image, so that 1 MiB is enough for it.
#[derive(Debug)]
pub(crate) struct AdmittedSmall(pub(crate) Admitted);

/// One of `--max-requests` slots and the room for its body, which only admission creates. Work for
/// the request on another thread holds a clone, so that the slot is free when the last of the work
/// has ended, not when the client has disconnected.
#[derive(Debug, Clone)]
pub(crate) struct RequestSlot {
    /// When the request is answered at the latest, unless the response is a stream.
    pub(crate) deadline: Deadline,
    share: Arc<Share>,
    /// The room for the body, until what was in it has been freed.
    body: Option<Arc<Share>>,
    /// Whether it waits for room until its deadline: a record of many, or a stored job.
    pub(crate) is_patient: bool,
    /// What the response says of what was not read.
    unread: Arc<[String]>,
    /// Whether the client has a key, where keys are configured.
    may_choose: bool,
    accepted: AcceptedWork,
}

/// The accepted work of one connection, which a draining server waits for: an extension of its
/// requests.
#[derive(Debug, Clone, Default)]
pub(crate) struct AcceptedWork(pub(crate) TaskTracker);

/// The client of a request: its API key, else its address.
#[derive(Debug)]
pub(crate) struct ClientId(pub(crate) Client);

impl FromRequest<AppState> for Admitted {
    type Rejection = ApiError;

    /// Rejects before the body is read if a header is invalid, there is no slot or the model is
    /// not ready.
    async fn from_request(request: Request, state: &AppState) -> Result<Self> {
        admit(request, state, BodyLimit::of(&state.settings)).await
    }
}

impl FromRequest<AppState> for AdmittedSmall {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self> {
        let small = BodyLimit { bytes: MAX_SMALL_BODY, name: "this route" };
        let configured = BodyLimit::of(&state.settings);
        let limit = if configured.bytes < small.bytes { configured } else { small };
        admit(request, state, limit).await.map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ClientId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(client(&parts.extensions)))
    }
}

fn client(extensions: &Extensions) -> Client {
    let address = || Some(Client::at(extensions.get::<ClientAddress>()?.0));
    extensions.get::<Client>().cloned().or_else(address).unwrap_or_default()
}

/// The client of a request, unless it is one of many that cannot be told apart: a trusted proxy that
/// names no client, or a caller without an address. The limits of one client are not for it.
pub(crate) fn limited_client(extensions: &Extensions, settings: &HttpConfig) -> Option<Client> {
    let address = extensions.get::<ClientAddress>();
    let is_proxy = address.is_none_or(|client| settings.is_trusted(client.0));
    let is_shared = extensions.get::<Client>().is_none() && is_proxy;
    (!is_shared).then(|| client(extensions))
}

/// The maximum length of a body.
#[derive(Clone, Copy)]
struct BodyLimit {
    bytes: usize,
    /// The option that sets it, or what else has it, for the client.
    name: &'static str,
}

impl BodyLimit {
    fn of(settings: &HttpConfig) -> Self {
        Self { bytes: settings.max_body_bytes, name: "--max-body-bytes" }
    }

    fn check(self, length: usize) -> Result<()> {
        let Self { bytes, name } = self;
        if length > bytes { Err(ApiError::TooLarge { bytes, limit: name }) } else { Ok(()) }
    }
}

/// Admits a request with a body of at most `limit`.
async fn admit(request: Request, state: &AppState, limit: BodyLimit) -> Result<Admitted> {
    let arrived = Instant::now();
    let settings = &state.settings;
    let headers = request.headers().clone();
    let timeout = Timeout::of(&headers, "--request-timeout-ms", settings.request_timeout)?;
    let deadline = timeout.after(arrived);
    let stream = Timeout::of(&headers, "--stream-timeout-ms", settings.stream_timeout)?;
    let stream_deadline = stream.after(arrived);
    let unread = unread_query(&request);
    let extensions = request.extensions();
    let client = client(extensions);
    let may_choose = settings.access.api_keys.is_empty() || extensions.get::<Client>().is_some();
    let accepted = extensions.get::<AcceptedWork>().cloned().unwrap_or_default();
    let crowded = |limit| ApiError::Crowded { limit, retry_after_s: state.engine.retry_after() };
    let limited = limited_client(extensions, settings);
    let take = |requests, bytes| state.slots.take(limited.as_ref(), Amount { requests, bytes });
    let slot = take(1, 0).map_err(crowded)?;
    // If there is no model, the body may name one.
    model_of(&state.engine)?;
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let declared = declared.and_then(|length| length.parse().ok()).unwrap_or(0);
    limit.check(declared)?;
    check_transfer(&headers)?;
    let coding = Coding::of(&headers)?;
    let mut room = take(0, declared).map_err(crowded)?;
    let body = Receive { limit, declared, arrived, patience: settings.body_timeout, deadline };
    let mut body = body.read(request, &mut room, crowded).await?;
    let held = Arc::new(slot);
    if !coding.is_plain(&body) {
        let (sent, retry_after_s) = (body.len(), state.engine.retry_after());
        let decode = move || {
            let grow = |length| {
                limit.check(length)?;
                // The sent body is small beside what it becomes.
                let grown = room.grow_to(length.max(sent));
                grown.map_err(|limit| ApiError::Crowded { limit, retry_after_s })
            };
            let body = coding.decode(body, grow)?;
            Ok((body, room))
        };
        (body, room) = state.reader.run(deadline, Arc::clone(&held), decode).await?;
        room.shrink_to(body.len());
    }
    let room = Some(Arc::new(room));
    let slot = RequestSlot {
        deadline,
        share: held,
        body: room,
        is_patient: false,
        unread,
        may_choose,
        accepted,
    };
    Ok(Admitted { headers, body, client, timeout, stream_deadline, slot })
}

/// What is said of the parameters of a query: no route that takes a body reads one.
fn unread_query(request: &Request) -> Arc<[String]> {
    /// Maximum number of parameters that are named.
    const MAX: usize = 8;
    let query = request.uri().query().unwrap_or_default();
    let names = form_urlencoded::parse(query.as_bytes()).map(|(name, _)| name).take(MAX);
    let said = |name: Cow<'_, str>| {
        format!("the query parameter {} was ignored: fields are read from the body", brief(&name))
    };
    names.map(said).collect()
}

/// Rejects a body in another transfer coding. A length beside `chunked` never comes here: hyper removes it.
fn check_transfer(headers: &HeaderMap) -> Result<()> {
    let mut transfer = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if !transfer.next().is_none_or(is_chunked) || transfer.next().is_some() {
        let reason = "must be chunked, once and alone";
        return Err(ValidationError::malformed("transfer-encoding", reason).into());
    }
    Ok(())
}

/// How a body is read.
struct Receive {
    limit: BodyLimit,
    /// Declared length, in bytes; 0 if none is declared.
    declared: usize,
    arrived: Instant,
    /// Time for the body, in any case; more only while it arrives at `MIN_RATE` on average.
    patience: Duration,
    deadline: Deadline,
}

impl Receive {
    /// Reads the whole body. A body without a declared length takes room as it grows.
    async fn read(
        self,
        request: Request,
        room: &mut Share,
        crowded: impl Fn(Limit) -> ApiError,
    ) -> Result<Vec<u8>> {
        let mut parts = request.into_body().into_data_stream();
        let mut body = Vec::with_capacity(self.declared);
        loop {
            let (until, limit) = self.until(body.len());
            let part = timeout_at(until, parts.next()).await;
            let part = match part.map_err(|_| ApiError::SlowBody(limit))? {
                None => return Ok(body),
                Some(Ok(part)) => part,
                Some(Err(error)) => return Err(cut(&error)),
            };
            let length = body.len() + part.len();
            self.limit.check(length)?;
            room.grow_to(length).map_err(&crowded)?;
            body.extend_from_slice(&part);
        }
    }

    /// The time at which the next bytes must have arrived, and the limit that sets it.
    fn until(&self, received: usize) -> (Instant, &'static str) {
        let paid = Duration::from_micros(received as u64 * 1_000_000 / MIN_RATE);
        let body = (self.arrived + self.patience.max(paid), "--body-timeout-ms");
        let Deadline { at, limit } = self.deadline;
        if at < body.0 { (at, limit) } else { body }
    }
}

/// Why no more of a body comes: its chunks are malformed, or the client is gone.
fn cut(error: &axum::Error) -> ApiError {
    use io::ErrorKind::{InvalidData, InvalidInput};
    let mut causes = std::iter::successors(error.source(), |&error| error.source());
    let is_malformed = causes.any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|error| [InvalidData, InvalidInput].contains(&error.kind()))
    });
    if is_malformed {
        ValidationError::body("the chunks of the body are malformed").into()
    } else {
        ApiError::ClientClosed
    }
}

impl Admitted {
    /// Takes the body out, and its fields out of that. It is JSON whatever its declared type.
    pub(crate) async fn json(&mut self, state: &AppState) -> Result<Fields> {
        let body = std::mem::take(&mut self.body);
        let json = |body: &[u8]| Ok(Fields::json(text(body)?)?);
        state.reader.parse(self.slot.deadline, self.slot.clone(), body, json).await
    }
}

/// A body as text, without the byte order mark that editors of Windows put before it.
pub(crate) fn text(body: &[u8]) -> Result<&str, ValidationError> {
    let text = std::str::from_utf8(body).map(|text| text.trim_start_matches('\u{feff}'));
    text.map_err(|error| ValidationError::body(format!("the body is not UTF-8: {error}")))
}

impl RequestSlot {
    /// A slot for a job that was accepted by an earlier process; waits until one is free.
    pub(crate) async fn wait(state: &AppState, deadline: Deadline) -> Self {
        loop {
            let amount = Amount { requests: 1, bytes: 0 };
            if let Ok(slot) = state.slots.take(None, amount) {
                return Self {
                    deadline,
                    share: Arc::new(slot),
                    body: None,
                    is_patient: true,
                    unread: Arc::default(),
                    may_choose: true,
                    accepted: AcceptedWork::default(),
                };
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Takes room for the input images that the request holds until they are generated from.
    pub(crate) async fn hold_inputs(&self, state: &AppState, bytes: usize) -> Result<Share> {
        let take = async || {
            loop {
                match state.inputs.take_for(&self.share, bytes) {
                    Err(_) if self.is_patient => tokio::time::sleep(RETRY_INTERVAL).await,
                    taken => break taken,
                }
            }
        };
        let retry_after_s = state.engine.retry_after();
        let taken = self.deadline.wait(take()).await?;
        taken.map_err(|limit| ApiError::Crowded { limit, retry_after_s })
    }

    /// What the response says of what was not read.
    pub(crate) fn unread(&self) -> &[String] {
        &self.unread
    }

    /// Whether the client may name a model, which may unload another: not without a key, where keys
    /// are configured.
    pub(crate) fn may_choose(&self) -> bool {
        self.may_choose
    }

    /// Gives back the room of the body: nothing of it is left, except in work that holds a clone.
    pub(crate) fn release_body(&mut self) {
        self.body = None;
    }

    /// Takes the room of the body out, for who keeps the body.
    pub(crate) fn take_body(&mut self) -> Option<Arc<Share>> {
        self.body.take()
    }

    /// Held until the work is done whose result the connection must still send.
    pub(crate) fn accept(&self) -> TaskTrackerToken {
        self.accepted.0.token()
    }
}

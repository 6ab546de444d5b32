//! The accept loop: `axum::serve` with bounds. Connections are limited in number, in all and of each
//! address; request headers must arrive in time, responses must be taken in time, and handlers get
//! the client's address. A few connections beyond the limits are reserved for health checks.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, TRANSFER_ENCODING};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use futures_util::FutureExt as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::access::TrustedProxies;
use super::admission::{AcceptedWork, MIN_RATE};
use super::error::ApiError;
use super::middleware::unread;
use super::progress::MustProgress;
use super::state::HttpConfig;
use crate::engine::Client;

/// Pause after a failed accept, as when there are no file descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Number of connections beyond the limits that are reserved for health checks.
pub const RESERVED_CONNECTIONS: usize = 32;

/// The routes that are answered on reserved connections.
const PROBES: [&str; 3] = ["/ping", "/health/live", "/health/ready"];

/// Time for the headers of a request on a reserved connection, and again for its response.
const RESERVED_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval at which a closing connection is looked at. One that for all of it has had no accepted
/// work, and has taken less than `MIN_RATE` of its response, is closed.
const CLOSING_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes that wait in the kernel to be sent, at most. More would hide for how long the client has
/// taken nothing.
const UNSENT_BYTES: u32 = 1 << 17;

/// Serves connections until `shutdown` completes, and then until every open request has its
/// response, or its client does not take it.
pub async fn listen(
    listener: TcpListener,
    app: Router,
    settings: HttpConfig,
    shutdown: impl Future<Output = ()>,
) {
    let discard = || from_fn_with_state(settings.body_timeout, unread::discard);
    let reserved = app.clone().layer(from_fn(only_probes)).layer(discard());
    let app = app.layer(discard());
    let closing = CancellationToken::new();
    let mut connections = Connections::new(&settings);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.tasks.join_next_with_id() => {
                connections.places.remove(&ended.map_or_else(|error| error.id(), |(id, ())| id));
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let is_reserved = connections.is_full(peer);
                let app = if is_reserved { reserved.clone() } else { app.clone() };
                let serve = serve(stream, peer, app, is_reserved, &settings, closing.clone());
                connections.insert(peer, is_reserved, serve);
            }
            // The client has disconnected already.
            Err(error) if is_disconnect(&error) => {}
            Err(error) => {
                warn!("accept failed: {error}");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    drop(listener);
    closing.cancel();
    while connections.tasks.join_next().await.is_some() {}
}

fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// The open connections.
struct Connections {
    tasks: JoinSet<()>,
    places: HashMap<Id, Place>,
    max: usize,
    max_of_address: usize,
    /// Addresses with many clients, for which `max_of_address` does not hold.
    proxies: TrustedProxies,
    /// Whether the last connection was beyond the limits.
    was_full: bool,
}

/// One connection.
struct Place {
    /// Its address; of IPv6 the /64.
    address: Client,
    is_reserved: bool,
    opened: Instant,
    task: AbortHandle,
}

impl Connections {
    fn new(settings: &HttpConfig) -> Self {
        let (tasks, places) = Default::default();
        let proxies = settings.access.trusted_proxies.clone();
        let (max, max_of_address) = (settings.max_connections, settings.connections_per_address());
        Self { tasks, places, max, max_of_address, proxies, was_full: false }
    }

    /// Whether a new connection of this address is beyond the limits.
    fn is_full(&mut self, peer: SocketAddr) -> bool {
        let address = Client::at(peer.ip());
        let open = || self.places.values().filter(|place| !place.is_reserved);
        let of_address = || open().filter(|place| place.address == address).count();
        let is_full = open().count() >= self.max
            || !self.proxies.contains(peer.ip()) && of_address() >= self.max_of_address;
        if is_full && !self.was_full {
            let open = open().count();
            warn!(open, %peer, "too many connections: new ones get health checks only");
        }
        self.was_full = is_full;
        is_full
    }

    fn insert(
        &mut self,
        peer: SocketAddr,
        is_reserved: bool,
        serve: impl Future<Output = ()> + Send + 'static,
    ) {
        if is_reserved {
            self.make_room();
        }
        let task = self.tasks.spawn(serve);
        let (address, opened) = (Client::at(peer.ip()), Instant::now());
        self.places.insert(task.id(), Place { address, is_reserved, opened, task });
    }

    /// If all reserved connections are taken, closes the oldest of the address that has most.
    fn make_room(&mut self) {
        let reserved = self.places.iter().filter(|(_, place)| place.is_reserved);
        let mut of_address: HashMap<&Client, Vec<(Instant, Id)>> = HashMap::new();
        for (id, place) in reserved {
            of_address.entry(&place.address).or_default().push((place.opened, *id));
        }
        if of_address.values().map(Vec::len).sum::<usize>() < RESERVED_CONNECTIONS {
            return;
        }
        let most = of_address.into_values().max_by_key(Vec::len).unwrap_or_default();
        let oldest = most.iter().min_by_key(|(opened, _)| *opened);
        if let Some(place) = oldest.and_then(|(_, id)| self.places.remove(id)) {
            place.task.abort();
        }
    }
}

/// Answers health checks, and 503 on all other routes. The connection is closed after it.
async fn only_probes(request: Request, next: Next) -> Response {
    let mut response = if PROBES.contains(&request.uri().path()) {
        next.run(request).await
    } else {
        ApiError::Connections.into_response()
    };
    close(&mut response);
    response
}

/// Lets a response be the last of its connection.
fn close(response: &mut Response) {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}

/// One connection, which ends when it has been closed, was idle for too long or takes nothing.
fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    app: Router,
    is_reserved: bool,
    settings: &HttpConfig,
    closing: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    // A response is one write; waiting for more of it would only delay it.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
    let written = Arc::new(AtomicU64::new(0));
    let stream = MustProgress::new(stream, settings.write_timeout, MIN_RATE, Arc::clone(&written));
    let work = AcceptedWork::default();
    let accepted = work.clone();
    let respond = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        // A request may have had a length beside it, which hyper has dropped: what a proxy that went
        // by the length takes for the body's end would be the next request here (RFC 9112, 6.3).
        let is_last = request.headers().contains_key(TRANSFER_ENCODING);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        request.extensions_mut().insert(accepted.clone());
        let mut response = Box::pin(app.clone().oneshot(request));
        // Polled once at once: hyper may see that the client has disconnected before it polls for
        // the response, and a request that was never polled is not counted.
        let first = (&mut response).now_or_never();
        async move {
            let mut response = match first {
                Some(response) => response,
                None => response.await,
            };
            if let (Ok(response), true) = (&mut response, is_last) {
                close(response);
            }
            response
        }
    });
    let idle_timeout = settings.idle_timeout;
    let head_timeout = if is_reserved { idle_timeout.min(RESERVED_TIMEOUT) } else { idle_timeout };
    // The end of the client's stream counts as a disconnect, as in nginx: a closed and a half-closed
    // connection look alike until one writes, and images for disconnected clients cost minutes.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .serve_connection(TokioIo::new(stream), respond);
    async move {
        let mut connection = std::pin::pin!(connection);
        let log = |ended: Result<(), hyper::Error>| {
            if let Err(error) = ended {
                debug!("connection with {peer}: {error}");
            }
        };
        if is_reserved {
            if let Ok(ended) = timeout(2 * RESERVED_TIMEOUT, connection).await {
                log(ended);
            }
            return;
        }
        tokio::select! {
            ended = &mut connection => return log(ended),
            () = closing.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        loop {
            // The response of work that has just ended is still to be written.
            let (was_idle, before) = (work.0.is_empty(), written.load(Ordering::Relaxed));
            if let Ok(ended) = timeout(CLOSING_INTERVAL, &mut connection).await {
                return log(ended);
            }
            let taken = written.load(Ordering::Relaxed) - before;
            let is_idle = was_idle && work.0.is_empty();
            if is_idle && taken < MIN_RATE * CLOSING_INTERVAL.as_secs() {
                return debug!("connection with {peer}: closed with the server");
            }
        }
    }
}

//! The accept loop: `axum::serve` with bounds. The number of connections is limited, request
//! headers must arrive in time, and handlers get the client's address.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use futures_util::FutureExt as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::state::HttpConfig;

/// Pause after a failed accept, as when there are no file descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves connections until `shutdown` completes, and then until every open request has its
/// response.
pub async fn listen(
    listener: TcpListener,
    app: Router,
    settings: HttpConfig,
    shutdown: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(settings.max_connections));
    let connections = GracefulShutdown::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        match accepted {
            Ok((stream, peer, slot)) => {
                let serve = serve(stream, peer, app.clone(), settings.idle_timeout);
                let connection = connections.watch(serve);
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        debug!("connection with {peer}: {error}");
                    }
                    drop(slot);
                });
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
    connections.shutdown().await;
}

fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// The next connection, once there is a slot for it.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    // A response is one write; waiting for more of it would only delay it.
    let _ = stream.set_nodelay(true);
    Ok((stream, peer, permit))
}

/// One connection, which ends when it has been closed or was idle for too long.
fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    app: Router,
    idle_timeout: Duration,
) -> impl GracefulConnection<Error = hyper::Error> {
    let respond = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        let mut response = Box::pin(app.clone().oneshot(request));
        // Polled once at once: hyper may see that the client has disconnected before it polls for
        // the response, and a request that was never polled is not counted.
        let first = (&mut response).now_or_never();
        async move {
            match first {
                Some(response) => response,
                None => response.await,
            }
        }
    });
    // The end of the client's stream counts as a disconnect, as in nginx: a closed and a half-closed
    // connection look alike until one writes, and images for disconnected clients cost minutes.
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(idle_timeout)
        .serve_connection(TokioIo::new(stream), respond)
}

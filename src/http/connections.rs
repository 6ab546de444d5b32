//! The accept loop: what `axum::serve` does, with bounds. Connections are counted, a request's
//! head has to arrive in time, and the peer's address is known to the handlers.

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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::state::HttpConfig;

/// The pause after an accept that failed, as it does when there are no file descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves connections until `close` is set, and then until the last of them has its answer.
pub async fn listen(
    listener: TcpListener,
    app: Router,
    settings: HttpConfig,
    mut close: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(settings.max_connections));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            biased;
            () = closed(&mut close) => break,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let (app, close) = (app.clone(), close.clone());
                connections.spawn(async move {
                    serve(stream, peer, app, settings.idle_timeout, close).await;
                    drop(permit);
                });
            }
            // Clients who are gone already are no trouble.
            Err(error) if gone(&error) => {}
            Err(error) => {
                warn!("accept failed: {error}");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn closed(close: &mut watch::Receiver<bool>) {
    let _ = close.wait_for(|close| *close).await;
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    // An answer is one write; waiting for more of it would only delay it.
    let _ = stream.set_nodelay(true);
    Ok((stream, peer, permit))
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    app: Router,
    idle_timeout: Duration,
    mut close: watch::Receiver<bool>,
) {
    let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        let mut answer = Box::pin(app.clone().oneshot(request));
        // Once at once: hyper may see that the client has left before it polls for the answer, and
        // a request that nobody has looked at is not counted.
        let begun = (&mut answer).now_or_never();
        async move {
            match begun {
                Some(answer) => answer,
                None => answer.await,
            }
        }
    });
    // The end of the client's stream counts as its leaving, as in nginx: `close` and a half-closed
    // connection look alike until one writes, and pictures that nobody waits for cost minutes.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(idle_timeout)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closed(&mut close) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("connection with {peer}: {error}");
    }
}

//! Bodies that nobody has read. A response before the whole body was received, such as 401 or 413,
//! would be lost to clients that send everything before they read: closing the connection while
//! they send makes their writes fail. So the rest of the body is received and discarded, beside the
//! response.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt as _;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// Maximum number of bytes to discard.
const MAX_DISCARDED: usize = 64 << 20;

/// A body of which fewer bytes than this arrive in a second is not waited for.
const MIN_PER_SECOND: usize = 1 << 16;

/// Discards the rest of a body after its response, for `patience` at most.
pub(crate) async fn discard(
    State(patience): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    // A client that asks whether to send its body has not sent it.
    if request.body().is_end_stream() || request.headers().contains_key(EXPECT) {
        return next.run(request).await;
    }
    let (back, mut rest) = oneshot::channel();
    let request = request.map(|body| Body::new(Lent { body, back: Some(back) }));
    let response = next.run(request).await;
    // An error means that the body was read to its end.
    if let Ok(rest) = rest.try_recv() {
        tokio::spawn(receive(rest, Instant::now() + patience));
    }
    response
}

/// Receives what is left, unless it is too much, too slow or too late.
async fn receive(rest: Body, end: Instant) {
    let mut parts = rest.into_data_stream();
    let (mut total, mut recent) = (0, 0);
    let mut second = Instant::now() + Duration::from_secs(1);
    while total < MAX_DISCARDED {
        match timeout_at(second.min(end), parts.next()).await {
            Ok(Some(Ok(part))) => (total, recent) = (total + part.len(), recent + part.len()),
            Err(_) if recent >= MIN_PER_SECOND && Instant::now() < end => {
                (second, recent) = (Instant::now() + Duration::from_secs(1), 0);
            }
            _ => break,
        }
    }
}

/// A body that is given back if it is dropped before its end.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = frame {
            self.back = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take()
            && !self.body.is_end_stream()
        {
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

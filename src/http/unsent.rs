//! Responses that wait for their clients. What a request has produced is weighed with the bodies of
//! requests until the system has taken it, so that clients who do not read cannot fill the memory.
//! Responses to GET are not weighed: all who receive a stored result or image share its memory.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};

use super::admission::limited_client;
use super::slots::{Share, Slots};
use super::state::AppState;
use crate::engine::Client;

/// Shorter parts of a response are not weighed: probes, errors, events without an image. All
/// connections together hold little of them.
const FREE_BYTES: usize = 64 << 10;

/// Weighs what is sent in response to anything but GET.
pub(crate) async fn weigh(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    let client = limited_client(request.extensions(), &state.settings);
    let slots = Arc::clone(&state.slots);
    next.run(request).await.map(|body| Body::new(Unsent { body, client, slots }))
}

/// A body whose parts are weighed from when they are handed over until they are written.
struct Unsent {
    body: Body,
    client: Option<Client>,
    slots: Arc<Slots>,
}

/// A part of a body with its share, as the owner of [`Bytes`].
struct Part {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl HttpBody for Unsent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        let weigh = |bytes: Bytes| match bytes.len() {
            ..FREE_BYTES => bytes,
            length => {
                let _share = self.slots.count(self.client.as_ref(), length);
                Bytes::from_owner(Part { bytes, _share })
            }
        };
        frame.map_ok(|frame| frame.map_data(weigh))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

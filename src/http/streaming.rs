//! Responses that are sent while they are produced, by a task of their own: server-sent events and
//! JSON Lines.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, Stream};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::admission::RequestSlot;
use super::deadline::Deadline;
use super::error::{ApiError, Result, StreamEnd};

/// Interval of keep-alive comments in streams: proxies close idle connections.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// What `produce` sends, and how it ended; its error becomes the `last` item. Dropping the stream, as
/// after a disconnect, cancels `produce`. Each item is sent when the one before the last has been
/// taken.
pub(crate) fn produced<T: Send + 'static, F>(
    produce: impl FnOnce(mpsc::Sender<T>) -> F + 'static,
    last: impl FnOnce(&ApiError) -> T + Send + 'static,
) -> (impl Stream<Item = Result<T, Infallible>> + Send, StreamEnd)
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(1);
    let end = StreamEnd::default();
    let (work, told) = (produce(sender.clone()), end.clone());
    let work = async move {
        let ended = work.await;
        let last = ended.as_ref().err().map(last);
        // The end is known before the stream ends, also of a stream that nobody reads.
        if !sender.is_closed() {
            told.set(ended);
        }
        if let Some(last) = last {
            let _ = sender.send(last).await;
        }
        drop(sender);
    };
    let task = AbortOnDropHandle::new(tokio::spawn(work.in_current_span()));
    let items = stream::unfold((receiver, task), async |(mut receiver, task)| {
        let item = receiver.recv().await?;
        Some((Ok(item), (receiver, task)))
    });
    (items, end)
}

/// A response of the server-sent events of `produce`, until the deadline. Its error becomes the
/// last event, with the data that `describe` returns. The slot is free at the deadline even if the
/// client takes nothing.
pub(crate) fn event_stream<F>(
    deadline: Deadline,
    slot: RequestSlot,
    describe: fn(&ApiError) -> String,
    produce: impl FnOnce(EventSender) -> F + 'static,
) -> Response
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let produce = move |sender| {
        let work = produce(EventSender(sender));
        let work = async move {
            let _slot = slot;
            work.await
        };
        async move {
            let ended = deadline.wait(work).await?;
            ended.map_err(|error| deadline.name(error))
        }
    };
    let last = move |error: &ApiError| Event::default().event("error").data(describe(error));
    let (events, end) = produced(produce, last);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE_INTERVAL).text("waiting");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    response.extensions_mut().insert(end);
    response
}

/// Sends the events of a stream.
#[derive(Debug)]
pub(crate) struct EventSender(mpsc::Sender<Event>);

impl EventSender {
    /// Waits until the client has received the event before the last.
    pub(crate) async fn send(&self, name: &str, data: impl AsRef<str>) {
        // After a disconnect the stream is about to be cancelled.
        let _ = self.0.send(Event::default().event(name).data(data)).await;
    }
}

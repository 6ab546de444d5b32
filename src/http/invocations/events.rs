//! A request as a stream of server-sent events: `queued` at once and whenever the place in the
//! queue changes, `step` for each step, `preview` now and then for those who ask for it, and at the
//! end `result` or `error`. Closing the connection drops the stream and with it the ticket, which
//! withdraws the job.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Bytes;
use axum::http;
use axum::response::Response;
use axum::response::sse::Event;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::render::Invocation;
use crate::engine::{Engine, Estimate, JobMonitor, Preview, Progress, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::drawing::{self, encode_preview};
use crate::http::error::ApiError;
use crate::image::{Format, JPEG_QUALITY};

/// Interval of `queued` events, which are sent when the position has changed.
const POSITION_INTERVAL: Duration = Duration::from_secs(1);

/// The steps of a stream.
enum Stage {
    Queued(Box<ProgressStream>),
    Drawing(Box<ProgressStream>),
    Over,
}

struct ProgressStream {
    monitor: JobMonitor,
    /// The last that was told of the queue.
    told: Option<Estimate>,
    result: AbortOnDropHandle<Result<http::Response<Bytes>, ApiError>>,
    _slot: RequestSlot,
}

/// Answers with events.
pub(crate) fn stream(
    engine: &Engine,
    asked: Invocation,
    ticket: Ticket,
    slot: RequestSlot,
) -> Response {
    let monitor = engine.monitor(&ticket);
    let result = tokio::spawn(async move {
        let pictures = ticket.wait().await?;
        asked.answer(pictures).await
    });
    let result = AbortOnDropHandle::new(result);
    let underway = ProgressStream { monitor, told: None, result, _slot: slot };
    let first = Stage::Queued(Box::new(underway));
    drawing::events(stream::unfold(first, async |stage| {
        let (event, stage) = stage.next().await?;
        Some((Ok::<_, Infallible>(event), stage))
    }))
}

impl Stage {
    /// The next event and what comes after it.
    async fn next(self) -> Option<(Event, Self)> {
        match self {
            Self::Queued(mut underway) => match underway.place().await {
                Some(event) => Some((event, Self::Queued(underway))),
                None => underway.step().await,
            },
            Self::Drawing(underway) => underway.step().await,
            Self::Over => None,
        }
    }
}

impl ProgressStream {
    /// News of the queue: at once the first time, later when the place has changed. `None` when
    /// the job has begun or ended.
    async fn place(&mut self) -> Option<Event> {
        loop {
            let outlook = self.monitor.estimate();
            if self.told.is_none_or(|told| told.position != outlook.position)
                && (self.told.is_none() || outlook.position.is_some())
            {
                self.told = Some(outlook);
                return Some(event("queued", &place(outlook)));
            }
            outlook.position?;
            match timeout(POSITION_INTERVAL, self.monitor.progress().changed()).await {
                Ok(Ok(())) => {
                    // It has begun; what there is to tell of it is told by `step`.
                    self.monitor.progress().mark_changed();
                    return None;
                }
                Err(_) if !self.result.is_finished() => {}
                _ => return None,
            }
        }
    }

    /// The next step, or a look at the last, or the end.
    async fn step(mut self: Box<Self>) -> Option<(Event, Stage)> {
        if let Some(event) = self.preview().await {
            return Some((event, Stage::Drawing(self)));
        }
        loop {
            match timeout(POSITION_INTERVAL, self.monitor.progress().changed()).await {
                Ok(Ok(())) => {
                    let progress = *self.monitor.progress().borrow_and_update();
                    let event = event("step", &step(progress, self.monitor.estimate()));
                    return Some((event, Stage::Drawing(self)));
                }
                // The orders are gone, or the time is up while a step lasts.
                Ok(Err(_)) => break,
                Err(_) if self.result.is_finished() => break,
                Err(_) => {}
            }
        }
        let result = (&mut self.result).await.unwrap_or(Err(ApiError::Encode));
        let event = match result {
            Ok(answer) => {
                Event::default().event("result").data(String::from_utf8_lossy(answer.body()))
            }
            Err(error) => event("error", &error.json()),
        };
        Some((event, Stage::Over))
    }

    /// A preview that has not been told yet.
    async fn preview(&mut self) -> Option<Event> {
        let previews = self.monitor.previews()?;
        if !previews.has_changed().unwrap_or(false) {
            return None;
        }
        let Preview { index, rgb } = previews.borrow_and_update().clone()?;
        let data = encode_preview(rgb, Format::Jpeg, JPEG_QUALITY).await?;
        let media_type = Format::Jpeg.media_type();
        Some(event("preview", &json!({ "index": index, "content_type": media_type, "data": data })))
    }
}

fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}

/// `position` counts from 1.
pub(crate) fn place(outlook: Estimate) -> Value {
    json!({
        "position": outlook.position.map_or(0, |ahead| ahead + 1),
        "seconds_left": seconds(outlook.left),
    })
}

/// Steps over all pictures of the request that have begun.
pub(crate) fn step(progress: Progress, outlook: Estimate) -> Value {
    let Progress { completed, total, .. } = progress;
    json!({ "step": completed, "steps": total, "seconds_left": seconds(outlook.left) })
}

/// Tenths are more than an estimate can promise.
fn seconds(left: Option<Duration>) -> Option<f64> {
    left.map(|left| (left.as_secs_f64() * 10.0).round() / 10.0)
}

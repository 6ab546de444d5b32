//! A request as a stream of server-sent events: `queued` at once and whenever the position in the
//! queue changes, `step` for each step, `preview` if previews are wanted, and finally `result` or
//! `error`. A disconnect drops the ticket, which cancels the job.

use std::pin::pin;
use std::time::Duration;

use axum::response::Response;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::render::Invocation;
use crate::engine::{Estimate, JobMonitor, Preview, Progress, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::deadline::Deadline;
use crate::http::drawing::{encode_preview, next_preview};
use crate::http::error::ApiError;
use crate::http::streaming::{EventSender, event_stream};
use crate::image::Format;

/// Interval at which the position in the queue is checked.
const POSITION_INTERVAL: Duration = Duration::from_secs(1);

/// The response of events.
pub(crate) fn stream(
    invocation: Invocation,
    ticket: Ticket,
    deadline: Deadline,
    slot: RequestSlot,
) -> Response {
    let mut monitor = invocation.drawing.monitor(&ticket);
    let describe = |error: &ApiError| error.json().to_string();
    event_stream(deadline, slot, describe, move |events| async move {
        // Progress that waits for the client has a place in the channel before the last event, so it
        // is dropped first.
        let result = {
            let mut result = pin!(async {
                let images = ticket.wait().await;
                let images = images.map_err(|error| invocation.drawing.failed(error, deadline))?;
                invocation.respond(images).await
            });
            let mut progress = pin!(send_progress(&mut monitor, &events));
            tokio::select! {
                biased;
                () = &mut progress => result.await,
                result = &mut result => {
                    if result.is_ok() {
                        progress.await;
                    }
                    result
                }
            }
        };
        events.send("result", String::from_utf8_lossy(result?.body())).await;
        Ok(())
    })
}

/// Sends the events of the queue, the steps and the previews until the images have ended.
async fn send_progress(monitor: &mut JobMonitor, events: &EventSender) {
    let mut sent = None;
    loop {
        let estimate = monitor.estimate();
        let position = estimate.position;
        if sent.is_none() || (position.is_some() && sent != Some(position)) {
            sent = Some(position);
            events.send("queued", place(estimate).to_string()).await;
        }
        if position.is_none() {
            break;
        }
        match timeout(POSITION_INTERVAL, monitor.progress().changed()).await {
            Err(_) => {}
            Ok(Err(_)) => return,
            // It has started, which is also its first step.
            Ok(Ok(())) => {
                monitor.progress().mark_changed();
                break;
            }
        }
    }
    let mut previews = monitor.previews().cloned();
    loop {
        tokio::select! {
            biased;
            changed = monitor.progress().changed() => {
                if changed.is_err() {
                    return;
                }
                let progress = *monitor.progress().borrow_and_update();
                events.send("step", step(progress, monitor.estimate()).to_string()).await;
            }
            Preview { index, rgb } = next_preview(previews.as_mut()) => {
                let format = Format::Jpeg;
                if let Some(data) = encode_preview(rgb, format, None).await {
                    let media_type = format.media_type();
                    let event = json!({ "index": index, "content_type": media_type, "data": data });
                    events.send("preview", event.to_string()).await;
                }
            }
        }
    }
}

/// The data of a `queued` event. `position` counts from 1.
pub(crate) fn place(estimate: Estimate) -> Value {
    json!({
        "position": estimate.position.map_or(0, |ahead| ahead + 1),
        "seconds_left": seconds(estimate.left),
    })
}

/// The data of a `step` event: the steps of all images that have started.
pub(crate) fn step(progress: Progress, estimate: Estimate) -> Value {
    let Progress { completed, total, .. } = progress;
    json!({ "step": completed, "steps": total, "seconds_left": seconds(estimate.left) })
}

/// Seconds, rounded to tenths.
fn seconds(left: Option<Duration>) -> Option<f64> {
    left.map(|left| (left.as_secs_f64() * 10.0).round() / 10.0)
}

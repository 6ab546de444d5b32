//! Responses as streams of server-sent events.

use axum::response::Response;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::error::describe;
use super::render::{ReplyOptions, data, now};
use crate::engine::{Preview, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::deadline::Deadline;
use crate::http::drawing::{Drawing, encode_preview};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::http::streaming::{EventSender, event_stream};

/// The response of events.
pub(crate) fn stream(
    state: AppState,
    drawing: Drawing,
    ticket: Ticket,
    options: ReplyOptions,
    common: Value,
    (deadline, slot): (Deadline, RequestSlot),
) -> Response {
    let (format, quality) = (drawing.reply.format(), drawing.quality);
    let mut monitor = state.engine.monitor(&ticket);
    let describe = |error: &ApiError| describe(error.status(), &error.reason()).to_string();
    event_stream(deadline, slot, describe, move |events| async move {
        let kind = options.kind;
        let send =
            async |end: &str, data| send(&events, &format!("{kind}.{end}"), data, &common).await;
        // A task, because the images are finished and encoded while the client takes nothing.
        let result = async move {
            let images = ticket.wait().await.map_err(|error| drawing.failed(error, deadline))?;
            data(&state, drawing, images, options).await
        };
        let mut result = AbortOnDropHandle::new(tokio::spawn(result.in_current_span()));
        let mut sent = 0;
        let mut send_parts = async |parts: Vec<Preview>| {
            for part in parts.into_iter().skip(sent) {
                if let Some(file) = encode_preview(part.rgb, format, quality).await {
                    let data = json!({ "b64_json": file, "partial_image_index": sent });
                    send("partial_image", data).await;
                }
                sent += 1;
            }
        };
        let (images, usage) = loop {
            tokio::select! {
                biased;
                parts = all_parts(monitor.previews()) => send_parts(parts).await,
                result = &mut result => break result.map_err(|_| ApiError::Encode)??,
            }
        };
        // Those of the last steps, which came as the images were finished.
        let rest = monitor.previews().map(|parts| parts.borrow().clone());
        send_parts(rest.unwrap_or_default()).await;
        for mut data in images {
            data["usage"] = usage.json(1);
            send("completed", data).await;
        }
        Ok(())
    })
}

/// All parts so far, once there are more. Never completes if there are none.
async fn all_parts(parts: Option<&mut watch::Receiver<Vec<Preview>>>) -> Vec<Preview> {
    if let Some(parts) = parts
        && parts.changed().await.is_ok()
    {
        return parts.borrow_and_update().clone();
    }
    std::future::pending().await
}

async fn send(events: &EventSender, name: &str, mut data: Value, common: &Value) {
    data["type"] = name.into();
    data["created_at"] = now().into();
    for (name, value) in common.as_object().into_iter().flatten() {
        data[name] = value.clone();
    }
    events.send(name, data.to_string()).await;
}

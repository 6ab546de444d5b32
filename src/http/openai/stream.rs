//! Responses as streams of server-sent events.

use axum::response::Response;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::error::describe;
use super::render::{ImageUrls, data, now};
use crate::engine::{Progress, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::deadline::Deadline;
use crate::http::drawing::{Drawing, encode_preview, next_preview};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::http::streaming::{EventSender, event_stream};

/// The options of a response.
#[derive(Debug, Clone)]
pub(crate) struct ReplyOptions {
    /// `image_generation` or `image_edit`: the prefix of the names of events.
    pub(crate) kind: &'static str,
    /// If the response holds URLs instead of images.
    pub(crate) urls: Option<ImageUrls>,
    pub(crate) partial_images: usize,
}

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
        let ReplyOptions { kind, urls, partial_images } = options;
        let send =
            async |end: &str, data| send(&events, &format!("{kind}.{end}"), data, &common).await;
        // A task, because the images are finished and encoded while the client takes nothing.
        let result = async move { data(&state, drawing, ticket.wait().await?, urls).await };
        let mut result = AbortOnDropHandle::new(tokio::spawn(result.in_current_span()));
        let mut sent = 0;
        let images = loop {
            tokio::select! {
                result = &mut result => break result.map_err(|_| ApiError::Encode)??,
                preview = next_preview(monitor.previews().filter(|_| sent < partial_images)) => {
                    let Progress { completed, total, .. } = monitor.current();
                    // One preview for each equal part of the steps.
                    if completed * (partial_images + 1) >= total * (sent + 1)
                        && let Some(file) = encode_preview(preview.rgb, format, quality).await
                    {
                        let data = json!({ "b64_json": file, "partial_image_index": sent });
                        sent += 1;
                        send("partial_image", data).await;
                    }
                }
            }
        };
        for data in images {
            send("completed", data).await;
        }
        Ok(())
    })
}

async fn send(events: &EventSender, name: &str, mut data: Value, common: &Value) {
    data["type"] = name.into();
    data["created_at"] = now().into();
    data["quality"] = "auto".into();
    for (name, value) in common.as_object().into_iter().flatten() {
        data[name] = value.clone();
    }
    events.send(name, data.to_string()).await;
}

//! A request as a stream of events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::Response;
use axum::response::sse::Event;
use futures_util::stream;
use serde_json::{Map, Value, json};
use tokio_util::task::AbortOnDropHandle;

use super::error::describe;
use super::render::{data, now};
use crate::engine::{JobMonitor, Preview, Progress, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::drawing::{self, Drawing, encode_preview};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::image::Format;

/// What a client wants besides pictures.
#[derive(Debug, Clone)]
pub(crate) struct ReplyOptions {
    /// `image_generation` or `image_edit`: the first half of the names of events.
    pub(crate) kind: &'static str,
    /// Where pictures are fetched, if they are not to be in the answer.
    pub(crate) url: Option<String>,
    pub(crate) partial_images: usize,
}

/// A request as a stream of events.
struct ImageStream {
    wish: ReplyOptions,
    common: Map<String, Value>,
    format: Format,
    quality: u8,
    monitor: JobMonitor,
    /// Previews that have been told.
    told: usize,
    result: AbortOnDropHandle<Result<Vec<Value>, ApiError>>,
    /// What is to be told when the pictures are there.
    last: VecDeque<Event>,
    over: bool,
    _slot: RequestSlot,
}

pub(crate) fn stream(
    state: AppState,
    asked: Drawing,
    ticket: Ticket,
    wish: ReplyOptions,
    common: Map<String, Value>,
    slot: RequestSlot,
) -> Response {
    let (format, quality) = (asked.reply.format(), asked.quality);
    let monitor = state.engine.monitor(&ticket);
    let url = wish.url.clone();
    let result = tokio::spawn(async move {
        let pictures = ticket.wait().await?;
        data(&state, asked, pictures, url).await
    });
    let underway = ImageStream {
        wish,
        common,
        format,
        quality,
        monitor,
        told: 0,
        result: AbortOnDropHandle::new(result),
        last: VecDeque::new(),
        over: false,
        _slot: slot,
    };
    let events = stream::unfold(underway, async |mut underway| {
        let event = underway.next().await?;
        Some((Ok::<_, Infallible>(event), underway))
    });
    drawing::events(events)
}

impl ImageStream {
    async fn next(&mut self) -> Option<Event> {
        while !self.over {
            let wanted = self.told < self.wish.partial_images;
            let preview = next_preview(&mut self.monitor, wanted);
            tokio::select! {
                result = &mut self.result => {
                    self.over = true;
                    self.end(result.unwrap_or(Err(ApiError::Encode)));
                }
                preview = preview => {
                    if let Some(event) = self.partial(preview).await {
                        return Some(event);
                    }
                }
            }
        }
        self.last.pop_front()
    }

    /// A look at a picture, when the next share of the steps has been made.
    async fn partial(&mut self, Preview { rgb, .. }: Preview) -> Option<Event> {
        let Progress { completed, total, .. } = self.monitor.current();
        if completed * (self.wish.partial_images + 1) < total * (self.told + 1) {
            return None;
        }
        let (format, quality) = (self.format, self.quality);
        let file = encode_preview(rgb, format, quality).await?;
        let mut data = json!({ "b64_json": file });
        data["partial_image_index"] = self.told.into();
        self.told += 1;
        Some(self.event("partial_image", data))
    }

    fn end(&mut self, result: Result<Vec<Value>, ApiError>) {
        match result {
            Ok(pictures) => {
                let events = pictures.into_iter().map(|data| self.event("completed", data));
                self.last = events.collect();
            }
            Err(error) => {
                let data = describe(error.status(), &error.reason());
                self.last.push_back(Event::default().event("error").data(data.to_string()));
            }
        }
    }

    fn event(&self, end: &str, mut data: Value) -> Event {
        let name = format!("{}.{end}", self.wish.kind);
        data["type"] = name.as_str().into();
        data["created_at"] = now().into();
        data["quality"] = "auto".into();
        for (name, value) in &self.common {
            data[name] = value.clone();
        }
        Event::default().event(name).data(data.to_string())
    }
}

/// The next preview, if it is wanted; never completes if there is none.
async fn next_preview(monitor: &mut JobMonitor, wanted: bool) -> Preview {
    if let Some(previews) = monitor.previews().filter(|_| wanted)
        && previews.changed().await.is_ok()
        && let Some(preview) = previews.borrow_and_update().clone()
    {
        return preview;
    }
    std::future::pending().await
}

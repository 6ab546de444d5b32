//! A request as a stream of events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::Response;
use axum::response::sse::Event;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::task::AbortOnDropHandle;

use super::error::describe;
use super::render::{data, now};
use crate::engine::{Preview, Progress, Ticket};
use crate::http::drawing::{self, Drawing};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::image::{self, Format};

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
    previews: Option<watch::Receiver<Option<Preview>>>,
    progress: watch::Receiver<Progress>,
    /// Previews that have been told.
    told: usize,
    result: AbortOnDropHandle<Result<Vec<Value>, ApiError>>,
    /// What is to be told when the pictures are there.
    last: VecDeque<Event>,
    over: bool,
    _permit: OwnedSemaphorePermit,
}

pub(crate) fn stream(
    state: AppState,
    asked: Drawing,
    ticket: Ticket,
    wish: ReplyOptions,
    common: Map<String, Value>,
    permit: OwnedSemaphorePermit,
) -> Response {
    let (format, quality) = (asked.reply.format(), asked.quality);
    let (previews, progress) = (ticket.previews(), ticket.progress());
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
        previews,
        progress,
        told: 0,
        result: AbortOnDropHandle::new(result),
        last: VecDeque::new(),
        over: false,
        _permit: permit,
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
            let preview = look(self.previews.as_mut().filter(|_| wanted));
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
        let Progress { completed, total, .. } = *self.progress.borrow();
        if completed * (self.wish.partial_images + 1) < total * (self.told + 1) {
            return None;
        }
        let (format, quality) = (self.format, self.quality);
        let encode = move || image::encode(&rgb, format, quality, "");
        let file = tokio::task::spawn_blocking(encode).await.ok()?.ok()?;
        let mut data = json!({ "b64_json": BASE64_STANDARD.encode(file) });
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

/// The next preview; never, where there is none to come.
async fn look(previews: Option<&mut watch::Receiver<Option<Preview>>>) -> Preview {
    if let Some(previews) = previews
        && previews.changed().await.is_ok()
        && let Some(preview) = previews.borrow_and_update().clone()
    {
        return preview;
    }
    std::future::pending().await
}

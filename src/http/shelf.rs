//! Pictures that are kept for a while, for replies that hold a URL in their place. Bounded in bytes
//! and time; the oldest goes first. A name cannot be guessed and is the only protection, so that
//! an `<img>` tag, which has no key, can show it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::IntoResponse;

use super::error::ApiError;
use super::{Settings, State};
use crate::image::Format;

/// The pictures, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    files: Mutex<VecDeque<File>>,
}

#[derive(Debug, Clone)]
struct File {
    name: String,
    format: Format,
    data: Bytes,
    since: Instant,
}

impl Shelf {
    fn files(&self, retention: Duration) -> MutexGuard<'_, VecDeque<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        while files.front().is_some_and(|file| file.since.elapsed() >= retention) {
            files.pop_front();
        }
        files
    }

    /// Keeps a picture and returns its name.
    pub(super) fn keep(&self, data: Vec<u8>, format: Format, settings: &Settings) -> String {
        let name = format!("{:032x}.{}", super::random(), format.name());
        let mut files = self.files(settings.url_retention);
        let mut room = settings.max_url_bytes.saturating_sub(data.len());
        // From the newest on, as many as fit beside the new one.
        let kept = files.iter().rev().take_while(|file| {
            let fits = file.data.len() <= room;
            room = room.saturating_sub(file.data.len());
            fits
        });
        let gone = files.len() - kept.count();
        files.drain(..gone);
        let file = File { name: name.clone(), format, data: data.into(), since: Instant::now() };
        files.push_back(file);
        name
    }
}

/// `GET /files/{name}`.
pub(super) async fn file(
    state: State,
    Path(name): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    let files = state.shelf.files(state.settings.url_retention);
    let file = files.iter().find(|file| file.name == name).cloned().ok_or(ApiError::NoFile)?;
    let headers = [
        (CONTENT_TYPE, file.format.media_type()),
        (CACHE_CONTROL, "private, max-age=3600, immutable"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((headers, file.data))
}

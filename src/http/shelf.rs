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
use crate::api::Invalid;
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

    /// Keeps the pictures of a request, for which older ones may have to go, and returns their
    /// names. Those that never fit together are refused, and nothing goes.
    pub(super) fn keep(
        &self,
        pictures: Vec<Vec<u8>>,
        format: Format,
        settings: &Settings,
    ) -> Result<Vec<String>, Invalid> {
        let (bytes, most) = (pictures.iter().map(Vec::len).sum(), settings.max_url_bytes);
        let Some(mut room) = most.checked_sub(bytes) else {
            let reason = format!(
                "cannot be url: these pictures have {bytes} bytes, and {most} are kept in all; \
                 ask for b64_json"
            );
            return Err(Invalid::range("response_format", reason));
        };
        let mut files = self.files(settings.url_retention);
        // From the newest on, as many as fit beside the new ones.
        let kept = files.iter().rev().take_while(|file| {
            let left = room.checked_sub(file.data.len());
            room = left.unwrap_or(0);
            left.is_some()
        });
        let gone = files.len() - kept.count();
        files.drain(..gone);
        let since = Instant::now();
        let name = || format!("{:032x}.{}", super::random(), format.name());
        let new = pictures.into_iter().map(|data| (name(), Bytes::from(data)));
        let first = files.len();
        files.extend(new.map(|(name, data)| File { name, format, data, since }));
        Ok(files.range(first..).map(|file| file.name.clone()).collect())
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

//! Images for responses with URLs. They are retained for a limited time and up to a total size; the
//! oldest is evicted first.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;

use crate::http::error::Result;
use crate::http::ids::random;
use crate::image::Format;
use crate::request::ValidationError;

/// The images, the oldest first.
#[derive(Debug)]
pub(crate) struct UrlStore {
    retention: Duration,
    max_bytes: usize,
    files: Mutex<VecDeque<StoredImage>>,
}

#[derive(Debug)]
struct StoredImage {
    name: String,
    format: Format,
    data: Bytes,
    since: Instant,
}

impl UrlStore {
    /// Retains images for `retention`, and at most `max_bytes` of them.
    pub(crate) fn new(retention: Duration, max_bytes: usize) -> Self {
        Self { retention, max_bytes, files: Mutex::default() }
    }

    fn files(&self) -> MutexGuard<'_, VecDeque<StoredImage>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        while files.front().is_some_and(|file| file.since.elapsed() >= self.retention) {
            files.pop_front();
        }
        files
    }

    /// Adds the images of a request, which may evict older ones, and returns their names. If they
    /// are too large together, they are rejected and nothing is evicted.
    pub(crate) fn insert(&self, images: Vec<Vec<u8>>, format: Format) -> Result<Vec<String>> {
        let (bytes, most) = (images.iter().map(Vec::len).sum(), self.max_bytes);
        let Some(mut room) = most.checked_sub(bytes) else {
            let reason = format!(
                "cannot be url: these images have {bytes} bytes, the maximum is {most}; \
                 request b64_json"
            );
            return Err(ValidationError::range("response_format", reason).into());
        };
        let mut files = self.files();
        // The newest images that fit beside the new ones.
        let kept = files.iter().rev().take_while(|file| {
            let left = room.checked_sub(file.data.len());
            room = left.unwrap_or(0);
            left.is_some()
        });
        let evicted = files.len() - kept.count();
        files.drain(..evicted);
        let since = Instant::now();
        let named = |data| Ok((format!("{:032x}.{}", random()?, format.name()), data));
        let new = images.into_iter().map(named).collect::<Result<Vec<(String, Vec<u8>)>>>()?;
        let first = files.len();
        let image = |(name, data)| StoredImage { name, format, data: Bytes::from(data), since };
        files.extend(new.into_iter().map(image));
        Ok(files.range(first..).map(|file| file.name.clone()).collect())
    }

    /// Deletes the images whose time is over.
    pub(crate) fn purge(&self) {
        drop(self.files());
    }

    /// The image of a name, and the time for which it is still retained.
    pub(crate) fn get(&self, name: &str) -> Option<(Format, Bytes, Duration)> {
        let files = self.files();
        let file = files.iter().find(|file| file.name == name)?;
        let left = self.retention.saturating_sub(file.since.elapsed());
        Some((file.format, file.data.clone(), left))
    }
}

//! Images for responses with URLs. They are retained for a limited time and up to a total size; the
//! oldest of the client that has most is evicted first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;

use crate::engine::Client;
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
    /// Whose request has made it.
    client: Client,
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

    /// Adds the images of a client's request, which may evict others, and returns their names. If
    /// they are too large together, they are rejected and nothing is evicted.
    pub(crate) fn insert(
        &self,
        client: &Client,
        images: Vec<Vec<u8>>,
        format: Format,
    ) -> Result<Vec<String>> {
        let (bytes, most) = (images.iter().map(Vec::len).sum(), self.max_bytes);
        let Some(room) = most.checked_sub(bytes) else {
            let reason = format!(
                "cannot be url: these images have {bytes} bytes, the maximum is {most}; \
                 request b64_json"
            );
            return Err(ValidationError::range("response_format", reason).into());
        };
        let since = Instant::now();
        let image = |data| {
            let name = format!("{:032x}.{}", random()?, format.name());
            Ok(StoredImage { name, client: client.clone(), format, data: Bytes::from(data), since })
        };
        let new = images.into_iter().map(image).collect::<Result<Vec<_>>>()?;
        let mut files = self.files();
        while files.iter().map(|file| file.data.len()).sum::<usize>() > room {
            let next = next_to_evict(&files, client, bytes);
            files.remove(next);
        }
        let names = new.iter().map(|file| file.name.clone()).collect();
        files.extend(new);
        Ok(names)
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

/// The place of the oldest image of the client that has most, if `client` adds so many bytes: who
/// stores much evicts nothing of those who store little.
fn next_to_evict(files: &VecDeque<StoredImage>, client: &Client, bytes: usize) -> usize {
    let mut held: HashMap<&Client, usize> = HashMap::new();
    for file in files {
        *held.entry(&file.client).or_default() += file.data.len();
    }
    if let Some(own) = held.get_mut(client) {
        *own += bytes;
    }
    let most = held.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(client, _)| client);
    files.iter().position(|file| Some(&file.client) == most).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_evicted_of_the_client_that_has_most() -> Result<()> {
        let store = UrlStore::new(Duration::from_secs(60), 100);
        let (one, two) = (Client::named("one"), Client::named("two"));
        let insert = |client, sizes: &[usize]| {
            let images = sizes.iter().map(|size| vec![0; *size]).collect();
            store.insert(client, images, Format::Png)
        };
        let has =
            |names: &[String]| names.iter().map(|n| store.get(n).is_some()).collect::<Vec<_>>();
        let first = insert(&one, &[30])?;
        let flood = [insert(&two, &[40])?, insert(&two, &[30])?, insert(&two, &[40])?].concat();
        assert_eq!((has(&first), has(&flood)), (vec![true], vec![false, true, true]));
        let second = insert(&one, &[10])?;
        assert_eq!(has(&flood), [false, false, true], "the oldest of who has most");
        assert!(insert(&two, &[60, 41]).is_err());
        assert_eq!((has(&first), has(&second)), (vec![true], vec![true]), "nothing is evicted");
        insert(&two, &[100])?;
        assert_eq!((has(&first), has(&second)), (vec![false], vec![false]), "all of it");
        Ok(())
    }
}

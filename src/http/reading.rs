//! Where bodies are parsed and input images decoded: on blocking threads, as many at a time as
//! there are CPU cores. Decoded images are weighed, since they take many times the memory of their
//! files, and what reading has taken is returned to the system. Directories that requests name files
//! of are looked at on threads of their own, since they may be on a slow file system.

use std::sync::Arc;
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::Result;
use crate::host::freed::FreedMemory;
use crate::request::ValidationError;

/// A shorter body is parsed on the async thread that has received it, in less than a millisecond.
const SHORT_BODY_BYTES: usize = 32 << 10;

/// Maximum number of threads that look at directories.
const MAX_LOOKUPS: usize = 4;

/// The unit in which decoded images are weighed, in bytes: permits are counted in 32 bits.
const UNIT_BYTES: usize = 1 << 10;

/// The blocking threads for reading, and the memory for decoded images.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    threads: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
    pixels: Arc<Semaphore>,
    /// All units of `pixels`.
    units: usize,
    freed: FreedMemory,
}

/// Memory that is reserved for the decoded images of a request.
#[derive(Debug)]
pub(crate) struct Weighed {
    bytes: usize,
    freed: FreedMemory,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Weighed {
    fn drop(&mut self) {
        self.freed.add(self.bytes);
    }
}

impl Reader {
    /// A reader whose decoded images take at most so many bytes together.
    pub(crate) fn new(max_decoded_bytes: usize) -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let units = (max_decoded_bytes / UNIT_BYTES).clamp(1, u32::MAX as usize);
        let units = units.min(Semaphore::MAX_PERMITS);
        let [threads, lookups, pixels] =
            [threads, MAX_LOOKUPS, units].map(|permits| Arc::new(Semaphore::new(permits)));
        Self { threads, lookups, pixels, units, freed: FreedMemory::default() }
    }

    /// Runs `work` on a blocking thread. What it holds is held until it has ended, whether or not
    /// the client waits for it.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        held: impl Send + 'static,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        run(&self.threads, held, work).await
    }

    /// Runs `work`, which looks at directories, on a blocking thread, as [`Self::run`] does.
    pub(crate) async fn look_up<T: Send + 'static>(
        &self,
        held: impl Send + 'static,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        run(&self.lookups, held, work).await
    }

    /// Parses a body, which is freed afterwards.
    pub(crate) async fn parse<T: Send + 'static>(
        &self,
        held: impl Send + 'static,
        body: impl AsRef<[u8]> + Send + 'static,
        parse: impl FnOnce(&[u8]) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let bytes = body.as_ref().len();
        if bytes <= SHORT_BODY_BYTES {
            return parse(body.as_ref());
        }
        let freed = self.freed.clone();
        let parse = move || {
            let parsed = parse(body.as_ref());
            drop(body);
            freed.add(bytes);
            parsed
        };
        self.run(held, parse).await
    }

    /// Waits until there is memory for decoded images of so many bytes. Images that alone take
    /// more than all of it are decoded alone. Only for work of [`Self::run`], which holds nothing
    /// that others wait for while they have memory.
    pub(crate) fn weigh(&self, bytes: usize) -> Weighed {
        let units = bytes.div_ceil(UNIT_BYTES).min(self.units) as u32;
        let permit = Handle::current().block_on(Arc::clone(&self.pixels).acquire_many_owned(units));
        // The semaphore is never closed.
        Weighed { bytes, freed: self.freed.clone(), _permit: permit.ok() }
    }
}

/// Runs `work` on a blocking thread, with one of these permits.
async fn run<T: Send + 'static>(
    threads: &Arc<Semaphore>,
    held: impl Send + 'static,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread = Arc::clone(threads).acquire_owned().await;
    let work = move || {
        let _held = (thread, held);
        work()
    };
    // A parser or decoder that panics was given a malicious body.
    let unreadable = |_| ValidationError::body("the request cannot be read");
    tokio::task::spawn_blocking(work).await.map_err(unreadable)?
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn images_wait_for_the_memory_of_others_and_too_large_ones_for_all() {
        let reader = Reader::new(10 << 20);
        let weigh = |bytes| {
            let reader = reader.clone();
            tokio::task::spawn_blocking(move || reader.weigh(bytes))
        };
        let (first, second) = (weigh(4 << 20).await, weigh(6 << 20).await);
        let (first, second) = (first.expect("memory"), second.expect("memory"));
        let mut large = weigh(usize::MAX);
        let waits = tokio::time::timeout(Duration::from_millis(50), &mut large).await;
        assert!(waits.is_err());
        drop(first);
        let waits = tokio::time::timeout(Duration::from_millis(50), &mut large).await;
        assert!(waits.is_err());
        drop(second);
        assert_eq!(large.await.expect("memory").bytes, usize::MAX);
        assert_eq!(reader.pixels.available_permits(), 10 << 10);
    }

    #[tokio::test]
    async fn what_a_body_held_is_free_when_its_work_has_ended_and_not_before() {
        let (reader, held) = (Reader::new(1), Arc::new(()));
        let threads = reader.threads.available_permits();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let parse = reader.parse(Arc::clone(&held), vec![0; SHORT_BODY_BYTES + 1], move |body| {
            let _ = wait.recv();
            Ok(body.len())
        });
        // The client leaves while its body is parsed.
        assert!(tokio::time::timeout(Duration::from_millis(50), parse).await.is_err());
        assert_eq!(
            (Arc::strong_count(&held), reader.threads.available_permits()),
            (2, threads - 1)
        );
        drop(go);
        while Arc::strong_count(&held) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(reader.threads.available_permits(), threads);
    }
}

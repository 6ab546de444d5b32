//! Threads that read LoRAs, ControlNets, IP-Adapters, upscalers and refiners for the images that wait
//! for them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use sd_models::NamedFiles;

use crate::engine::job::ImageTask;
use crate::engine::model::ReadFiles;
use crate::engine::shared::EngineShared;

/// A thread that reads the files of an image.
#[derive(Default)]
pub(super) struct Reader {
    ended: AtomicBool,
    /// What it has read; nothing if it has panicked.
    files: Mutex<Option<sd_models::Result<NamedFiles>>>,
}

impl Reader {
    pub(super) fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Starts a thread, which notifies the worker when it ends.
    pub(super) fn start(engine: &Arc<EngineShared>, read: ReadFiles) -> io::Result<Arc<Self>> {
        let reader = Arc::<Self>::default();
        let notify = NotifyOnDrop { engine: Arc::clone(engine), reader: Arc::clone(&reader) };
        let work = move || {
            let read = read();
            *notify.reader.files() = Some(read);
        };
        thread::Builder::new().name("files".into()).spawn(work)?;
        Ok(reader)
    }

    /// What it has read; nothing if it has panicked.
    pub(super) fn take(&self) -> Option<sd_models::Result<NamedFiles>> {
        self.files().take()
    }

    fn files(&self) -> MutexGuard<'_, Option<sd_models::Result<NamedFiles>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image that has its rows reserved and waits for its files.
pub(super) struct PendingFiles {
    pub(super) task: ImageTask,
    pub(super) reader: Arc<Reader>,
}

impl PendingFiles {
    pub(super) fn done(&self) -> bool {
        self.reader.ended()
    }
}

/// Notifies the worker when a thread that reads files ends, also by panic.
struct NotifyOnDrop {
    engine: Arc<EngineShared>,
    reader: Arc<Reader>,
}

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.reader.ended.store(true, Ordering::Release);
        // The worker checks under this lock, so it cannot miss the change.
        drop(self.engine.queue());
        self.engine.arrived.notify_one();
    }
}

//! Freed memory. The allocator keeps it, because the steps of a model allocate the same blocks
//! again and again; what a large body or image has taken is not needed again and is returned.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

/// Number of bytes after which memory is returned. Less is not worth the page faults of the next
/// step, whose own memory is returned with it.
const BURST_BYTES: usize = 32 << 20;

/// Time after a burst until memory is returned, and so the minimum interval.
const DELAY: Duration = Duration::from_secs(1);

/// The number of bytes that were freed since memory was last returned to the system.
#[derive(Debug, Clone, Default)]
pub(crate) struct FreedMemory(Arc<AtomicUsize>);

impl FreedMemory {
    /// Adds memory that is free now or in a moment. It is returned a second later if there is much
    /// of it. Outside of a tokio runtime, as when one ends, nothing is returned.
    pub(crate) fn add(&self, bytes: usize) {
        let Ok(runtime) = Handle::try_current() else { return };
        let bytes = bytes.min(BURST_BYTES);
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        if before >= BURST_BYTES || before + bytes < BURST_BYTES {
            return;
        }
        let freed = self.clone();
        runtime.spawn(async move {
            tokio::time::sleep(DELAY).await;
            freed.0.store(0, Ordering::Relaxed);
            // It takes the allocator's lock and milliseconds. A panic would be in the log.
            let _ = tokio::task::spawn_blocking(sd_models::return_host_memory).await;
        });
    }
}

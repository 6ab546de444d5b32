//! How far the host runs ahead of a card: by one step. Work is only queued, so without a limit a
//! host would measure how fast it queues, and a picture that is cancelled would be drawn on.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{Device, Result};

/// A step that was queued.
struct Step {
    stream: Weak<CudaStream>,
    /// Its end.
    end: CudaEvent,
}

/// The last step of each card, by the card's number.
static LAST: LazyLock<Mutex<BTreeMap<usize, Step>>> = LazyLock::new(Mutex::default);

fn last() -> MutexGuard<'static, BTreeMap<usize, Step>> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Before a step is queued: waits for that of another model on the card, so that the activations of
/// one model at a time are in memory.
pub(crate) fn begin_step(device: &Device) -> Result<()> {
    let Device::Cuda(device) = device else { return Ok(()) };
    let stream = device.cuda_stream();
    let card = stream.context().ordinal();
    let other = {
        let mut last = last();
        let is_other = |step: &Step| step.stream.as_ptr() != Arc::as_ptr(&stream);
        if last.get(&card).is_some_and(is_other) { last.remove(&card) } else { None }
    };
    match other {
        Some(step) => step.end.synchronize().w(),
        None => Ok(()),
    }
}

/// When a step is queued: waits for the one before it.
pub(crate) fn end_step(device: &Device) -> Result<()> {
    let Device::Cuda(device) = device else { return Ok(()) };
    let stream = device.cuda_stream();
    // A thread that waits sleeps.
    let end = stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).w()?;
    let step = Step { stream: Arc::downgrade(&stream), end };
    let before = last().insert(stream.context().ordinal(), step);
    match before {
        Some(step) => step.end.synchronize().w(),
        None => Ok(()),
    }
}

/// Forgets the steps of devices that are closed.
pub(super) fn forget_closed() {
    last().retain(|_, step| step.stream.strong_count() > 0);
}

//! A model that is idle is unloaded, and loaded again for the next image. What is known of it stays,
//! so that requests are checked and queued meanwhile.

use std::sync::PoisonError;

use tracing::error;

use super::images::{PanicGuard, Worker};
use super::start::open;
use crate::engine::job::JobError;
use crate::engine::model::Model;
use crate::engine::shared::EngineShared;
use crate::engine::state::{EngineState, is_device_lost, is_out_of_memory};

impl<M: Model> Worker<M> {
    /// Frees the memory of the model.
    pub(super) fn unload(self) -> PanicGuard {
        let Self { engine, model, .. } = self;
        drop(model);
        sd_models::return_freed_memory();
        // The other models have more, and this one will have another.
        engine.device.forget_budget();
        engine.rest.send_modify(|rest| (rest.unloaded, rest.unload) = (true, false));
        engine
    }
}

/// Waits until an image or a client needs the model, and loads it again. None if the engine ends. If
/// the model cannot be loaded, the waiting images fail, and the next one tries again, unless the
/// device is lost.
pub(super) fn wake<M: Model>(
    engine: &EngineShared,
    load: &mut impl FnMut() -> anyhow::Result<M>,
) -> Option<M> {
    while is_needed(engine) {
        match open(engine, load) {
            Ok(model) => {
                engine.set_model(model.info().clone());
                engine.rest.send_modify(|rest| (rest.unloaded, rest.reload) = (false, false));
                return Some(model);
            }
            Err(error) if is_device_lost(&error) => {
                error!("device lost, restart required: {error:#}");
                // Before any client receives the error, so that `/ping` already returns 503.
                engine.set_state(EngineState::DeviceLost);
                let waiting = engine.queue().clear();
                waiting.into_iter().for_each(|task| task.complete(Err(JobError::DeviceLost)));
                return None;
            }
            Err(error) => {
                error!("the model cannot be loaded again: {error:#}");
                let failure = match is_out_of_memory(&error) {
                    true => JobError::NoRoom,
                    false => JobError::Unloaded,
                };
                let waiting = engine.queue().take_all();
                // Before any client receives the error and asks again.
                engine.rest.send_modify(|rest| {
                    rest.reload = false;
                    rest.failures += 1;
                });
                waiting.into_iter().for_each(|task| task.complete(Err(failure.clone())));
            }
        }
    }
    None
}

/// Waits until the model is needed; false if the engine is stopped, or drained and done.
fn is_needed(engine: &EngineShared) -> bool {
    let mut queue = engine.queue();
    loop {
        if matches!(*engine.state.borrow(), EngineState::Stopped) || queue.is_over() {
            return false;
        }
        if !queue.is_empty() || engine.rest.borrow().reload {
            return true;
        }
        queue = engine.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

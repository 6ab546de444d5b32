//! Configuration and state of an engine.

use std::sync::Arc;

use sd_models::ModelInfo;

/// Configuration of the engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Maximum number of queued images.
    pub max_queue: usize,
    /// Maximum number of rows per UNet call; a guided image has two.
    pub max_batch_rows: usize,
    /// Memory budget of one UNet call or VAE decode, in bytes; `None`: a share of the free memory.
    pub memory_budget_bytes: Option<u64>,
    /// The action on flagged images.
    pub safety: Safety,
}

/// The action on an image that the model's safety checker flags as NSFW.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safety {
    /// Return it unchanged, marked as NSFW.
    Flag,
    /// Return it blurred, marked as NSFW. All previews are blurred.
    Blur,
    /// Fail the request. All previews are blurred.
    Block,
}

impl Safety {
    /// The name in options, metrics and `/info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Blur => "blur",
            Self::Block => "block",
        }
    }
}

/// The state of the engine. It changes only downwards in this list.
#[derive(Debug, Clone)]
pub enum EngineState {
    /// There is no default model; others can be loaded by name.
    Absent,
    /// The model is being downloaded, read or warmed up.
    Loading,
    /// The model is ready.
    Ready(Arc<ModelInfo>),
    /// Accepted jobs are finished, new ones rejected.
    Draining,
    /// Unfinished jobs are cancelled.
    Stopped,
    /// The device is lost with all running images; the process must be restarted.
    DeviceLost,
    /// The model thread has terminated.
    Dead(WorkerError),
}

impl EngineState {
    pub(super) fn rank(&self) -> u8 {
        match self {
            Self::Absent | Self::Loading => 0,
            Self::Ready(_) => 1,
            Self::Draining => 2,
            Self::Stopped => 3,
            Self::DeviceLost => 4,
            Self::Dead(_) => 5,
        }
    }
}

/// Why a model thread terminated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct WorkerError {
    reason: String,
    /// Whether the device was out of memory, so that unloading another model may help.
    pub out_of_memory: bool,
}

impl From<anyhow::Error> for WorkerError {
    fn from(error: anyhow::Error) -> Self {
        let full = |cause: &sd_models::Error| matches!(cause, sd_models::Error::OutOfMemory(_));
        let out_of_memory = error.chain().filter_map(|cause| cause.downcast_ref()).any(full);
        Self { reason: format!("{error:#}"), out_of_memory }
    }
}

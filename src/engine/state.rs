//! The bounds of an engine, and where it stands.

use std::sync::Arc;

use sd_models::ModelInfo;

/// The bounds of the engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Pictures that may wait for a place in a batch.
    pub max_queue: usize,
    /// Rows of one UNet evaluation; a picture with guidance takes two.
    pub max_batch_rows: usize,
    /// Memory that one evaluation or decoding may take; a share of what is free when absent.
    pub memory_budget_bytes: Option<u64>,
    /// What becomes of pictures that should not be shown.
    pub safety: Safety,
}

/// What becomes of a picture that the model's safety checker objects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safety {
    /// It goes out, and the client is told.
    Flag,
    /// It goes out unrecognisable, and the client is told. So do looks at all that is in the making.
    Blur,
    /// It does not go out. Looks at what is in the making are blurred.
    Block,
}

impl Safety {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Blur => "blur",
            Self::Block => "block",
        }
    }
}

/// Where the engine stands. It moves downwards only.
#[derive(Debug, Clone)]
pub enum EngineState {
    /// There is no model; others may be chosen by name.
    Absent,
    /// The model is being fetched, read or warmed.
    Loading,
    /// Pictures are drawn.
    Ready(Arc<ModelInfo>),
    /// What was accepted is finished; nothing more is taken.
    Draining,
    /// What was accepted and is not finished will not be.
    Stopped,
    /// The device is gone, and every picture with it; only a new process can help.
    DeviceLost,
    /// The model thread ended.
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

/// Why a model thread ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct WorkerError {
    reason: String,
    /// Whether another model in the way was the reason.
    pub out_of_memory: bool,
}

impl From<anyhow::Error> for WorkerError {
    fn from(error: anyhow::Error) -> Self {
        let full = |cause: &sd_models::Error| matches!(cause, sd_models::Error::OutOfMemory(_));
        let out_of_memory = error.chain().filter_map(|cause| cause.downcast_ref()).any(full);
        Self { reason: format!("{error:#}"), out_of_memory }
    }
}

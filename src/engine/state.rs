//! Configuration and state of an engine.

use std::sync::Arc;
use std::time::Duration;

use sd_models::ModelInfo;

use crate::options::{bytes, millis, min, switch};

/// The bounds of the engine, which are options of `serve`.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct EngineConfig {
    /// Maximum number of queued images. At the limit, requests get 429; the client with the most
    /// queued images or work may lose its newest jobs to one with less
    #[arg(long, env = "SD_MAX_QUEUE", default_value = "64", value_parser = min::<1>)]
    pub max_queue: usize,
    /// Maximum number of rows per UNet call: two per image, or one without guidance. More rows give
    /// more images per second, slower first images and need more memory
    #[arg(long, env = "SD_MAX_BATCH_ROWS", default_value = "8", value_parser = min::<2>)]
    pub max_batch_rows: usize,
    /// Maximum memory for one UNet call or VAE decode, in bytes. A batch has fewer rows to stay
    /// below it; images that never fit get 507. Default: 80 % of the memory free on the device
    /// after loading the model, without what ControlNets, IP-Adapters, LoRAs and upscalers may take
    #[arg(long, env = "SD_MEMORY_BUDGET_BYTES", value_parser = bytes)]
    pub memory_budget_bytes: Option<u64>,
    /// Let the VAE encode and decode in tiles what is larger than one, as diffusers' enable_tiling:
    /// less memory, and images that differ a little. Requests can choose otherwise. Without it only
    /// images whose whole would not fit the memory budget are in tiles, with a warning
    #[arg(long, env = "SD_VAE_TILING", value_parser = switch, help_heading = "Model")]
    pub vae_tiling: bool,
    /// Time after which a model that no request uses is unloaded, in milliseconds. The next request
    /// loads it again, and waits for that within its timeout. Default: never. With --multi-model
    /// only SageMaker unloads models
    #[arg(long = "unload-after-ms", env = "SD_UNLOAD_AFTER_MS", value_parser = millis::<1>)]
    #[arg(help_heading = "Several models")]
    pub unload_after: Option<Duration>,
    /// What to do with images that the safety checker flags.
    #[arg(skip = Safety::Blur)]
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

/// The state of the engine. It changes only to a later one of this list.
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
    /// Whether a file of the model is damaged, or no model.
    pub of_files: bool,
}

impl From<anyhow::Error> for WorkerError {
    fn from(error: anyhow::Error) -> Self {
        Self {
            reason: format!("{error:#}"),
            out_of_memory: is_out_of_memory(&error),
            of_files: is_of_files(&error),
        }
    }
}

/// Whether the cause of an error is a file of the model.
fn is_of_files(error: &anyhow::Error) -> bool {
    use sd_models::Error::{Config, File, Tensor, Tokenizer};
    let damaged = |cause: &sd_models::Error| {
        matches!(cause, File { .. } | Config { .. } | Tensor { .. } | Tokenizer(_))
    };
    error.chain().filter_map(|cause| cause.downcast_ref()).any(damaged)
}

/// Whether the cause of an error is that the device is out of memory.
pub(crate) fn is_out_of_memory(error: &anyhow::Error) -> bool {
    is_caused_by(error, |cause| matches!(cause, sd_models::Error::OutOfMemory(_)))
}

/// Whether the cause of an error is that the device is lost.
pub(super) fn is_device_lost(error: &anyhow::Error) -> bool {
    is_caused_by(error, |cause| matches!(cause, sd_models::Error::DeviceLost(_)))
}

fn is_caused_by(error: &anyhow::Error, is: impl Fn(&sd_models::Error) -> bool) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref()).any(is)
}

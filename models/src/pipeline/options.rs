//! What to load, and what requests can add to it.

use super::device::{DeviceName, Precision};
use crate::error::{Error, Result};
use crate::files::{AssetDir, Source};

/// What to load, and onto what.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The model's files.
    pub source: Source,
    /// Where the VAE comes from, when it is not the model's own.
    pub vae: Option<Source>,
    /// Where it runs.
    pub device: DeviceName,
    /// In which numbers.
    pub precision: Precision,
    /// Whether a safety checker is loaded with it.
    pub safety: SafetyMode,
    /// Threads of the CPU's kernels; all processors if `None`. Only the first model loaded in a
    /// process sets it.
    pub threads: Option<usize>,
    /// What requests can add to the model by name.
    pub add_ons: AddOns,
}

/// What requests can add to a model by name, from files that are read when they are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddOns {
    /// LoRAs.
    pub loras: AssetDir,
    /// What the LoRAs in memory may take; the one used longest ago makes room.
    pub max_lora_bytes: u64,
    /// Words learned by textual inversion; read with the model.
    pub embeddings: AssetDir,
    /// What their vectors may take; files beyond it are left out.
    pub max_embedding_bytes: u64,
}

/// Whether a safety checker is loaded with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafetyMode {
    /// None, even if the model has one.
    Never,
    /// If the model has one.
    IfPresent,
    /// A model that has none is refused.
    Required,
}

impl SafetyMode {
    /// Whether to load the checker of a model, which has one if `present`.
    pub(super) fn loads_checker(self, present: bool) -> Result<bool> {
        match self {
            Self::Required if !present => {
                let reason = "safety_checker: none is named, but one is required";
                Err(Error::config("model_index.json", reason))
            }
            Self::Never => Ok(false),
            Self::IfPresent | Self::Required => Ok(present),
        }
    }
}

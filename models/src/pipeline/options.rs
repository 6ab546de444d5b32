//! The options of loading a model.

use super::device::{DeviceName, Precision};
use crate::error::{Error, Result};
use crate::files::{AssetDir, Source};

/// The options of loading a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The model's name; default: that of its directory or file.
    pub name: Option<String>,
    /// Files of the model.
    pub source: Source,
    /// Files of the UNet, if they are not the model's.
    pub unet: Option<Source>,
    /// Files of the VAE, if they are not the model's.
    pub vae: Option<Source>,
    /// Device.
    pub device: DeviceName,
    /// Number type.
    pub precision: Precision,
    /// Whether to load the safety checker.
    pub safety: SafetyMode,
    /// Threads of the CPU kernels; default: all processors. Only the first model loaded in a
    /// process sets it.
    pub threads: Option<usize>,
    /// What requests can add to the model by name.
    pub add_ons: AddOns,
}

/// What requests can add to a model by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddOns {
    /// LoRA files, read when a request names them.
    pub loras: AssetDir,
    /// Maximum bytes of cached LoRAs; at the limit, the least recently used are evicted. A LoRA, or
    /// those of one image, that would take more are refused.
    pub max_lora_bytes: u64,
    /// ControlNets: files and directories in the Diffusers format, read when a request names them.
    pub controlnets: AssetDir,
    /// Maximum bytes of cached ControlNets; at the limit, the least recently used are evicted. A
    /// net, or those of one image, that would take more are refused.
    pub max_controlnet_bytes: u64,
    /// IP-Adapters, read when a request names them, each with the image encoder beside it.
    pub ip_adapters: AssetDir,
    /// Maximum bytes of cached IP-Adapters and their image encoders; at the limit, the least recently
    /// used are evicted. An adapter, or those of one image, that would take more are refused.
    pub max_ip_adapter_bytes: u64,
    /// Upscalers, read when a request names them.
    pub upscalers: AssetDir,
    /// Maximum bytes of cached upscalers; at the limit, the least recently used are evicted. One
    /// that would take more is refused.
    pub max_upscaler_bytes: u64,
    /// Maximum bytes of the weights of cached refiners; at the limit, the least recently used are
    /// evicted. One that would take more is refused.
    pub max_refiner_bytes: u64,
    /// The free memory of the host in bytes, where weights are in it.
    pub free_host_bytes: Option<FreeBytes>,
    /// Textual inversion embeddings, read with the model.
    pub embeddings: AssetDir,
    /// Maximum bytes of embeddings; files beyond it are skipped.
    pub max_embedding_bytes: u64,
}

/// Tells the free memory in bytes, if that is known.
#[derive(Debug, Clone, Copy)]
pub struct FreeBytes(pub fn() -> Option<u64>);

impl PartialEq for FreeBytes {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for FreeBytes {}

impl AddOns {
    /// The same, with the ControlNets that a model brings.
    pub(super) fn beside(&self, model: &Source) -> Self {
        let controlnets = AssetDir { built_in: model.controlnets(), ..self.controlnets.clone() };
        Self { controlnets, ..self.clone() }
    }
}

/// Whether to load a model's safety checker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafetyMode {
    /// Do not load it.
    Never,
    /// Load it if the model has one.
    IfPresent,
    /// Load it; a model without one is rejected.
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

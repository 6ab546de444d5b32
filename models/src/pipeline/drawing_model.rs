//! A loaded model as images are drawn with it: with what it has encoded, and what its previews are
//! made by.

use std::sync::OnceLock;

use candle_core::Device;

use super::load::LoadedModel;
use super::options::LoadOptions;
use super::preview::Preview;
use super::prompts::PromptCache;
use crate::error::Result;

/// A model that draws.
pub(crate) struct DrawingModel {
    pub(super) model: LoadedModel,
    pub(super) prompts: PromptCache,
    /// Fitted at the first preview.
    pub(super) preview: OnceLock<Preview>,
}

impl DrawingModel {
    /// Reads a model from its files onto a device. Takes seconds.
    pub(super) fn load(options: &LoadOptions, device: Device) -> Result<Self> {
        let model = LoadedModel::load(options, device)?;
        Ok(Self { model, prompts: PromptCache::default(), preview: OnceLock::new() })
    }
}

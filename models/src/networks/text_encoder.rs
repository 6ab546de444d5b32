//! CLIP's text tower around its transformer ([`super::clip`]).
//!
//! Reference: transformers `models/clip/modeling_clip.py`, `CLIPTextModel`. The output is the last
//! hidden state, or an earlier one, after the final layer norm: the context of Stable Diffusion's
//! cross attention.

use candle_core::{DType, Device, Tensor};

use super::clip::ClipTransformer;
use super::config::ClipTextConfig;
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, LoraStack};
use crate::ops::{LayerNorm, in_pool};

/// The text encoder.
pub struct ClipTextModel {
    config: ClipTextConfig,
    device: Device,
    token_embedding: Tensor,
    position_embedding: Tensor,
    transformer: ClipTransformer,
    final_layer_norm: LayerNorm,
}

impl ClipTextModel {
    /// Builds the encoder from its weights; every tensor must have the shape that `config` says.
    pub fn load(
        config: ClipTextConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let root = LayerBuilder::new(weights, device, dtype);
        // transformers 5 writes the tower without the prefix of older files.
        let old = root.pp("text_model");
        let bare = !old.has("final_layer_norm.weight") && root.has("final_layer_norm.weight");
        let p = if bare { root } else { old };
        let embeddings = p.pp("embeddings");
        let (width, eps) = (config.transformer.hidden_size, config.transformer.layer_norm_eps);
        // The last layer of OpenCLIP's tower, which SD 2.x does not use.
        let next = format!("encoder.layers.{}.", config.transformer.num_hidden_layers);
        let model = Self {
            token_embedding: embeddings
                .placed("token_embedding.weight", &[config.vocab_size, width])?,
            position_embedding: embeddings
                .placed("position_embedding.weight", &[config.max_position_embeddings, width])?,
            transformer: ClipTransformer::load(&p, &config.transformer, true)?,
            final_layer_norm: p.pp("final_layer_norm").layer_norm(width, eps)?,
            device: device.clone(),
            config,
        };
        weights.finish(|name| {
            name.ends_with("embeddings.position_ids")
                || name == "text_projection.weight"
                || name.starts_with(&next)
        });
        Ok(model)
    }

    /// Appends embeddings (n, hidden) f32 of new tokens, whose ids follow the vocabulary's.
    pub(crate) fn add_embeddings(&mut self, vectors: &Tensor) -> Result<()> {
        let known = &self.token_embedding;
        let vectors = vectors.to_dtype(known.dtype())?.to_device(&self.device)?;
        self.token_embedding = Tensor::cat(&[known, &vectors], 0)?;
        Ok(())
    }

    /// Its configuration.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Token ids (B rows of one length L), all with the same LoRAs -> hidden states (B, L, hidden)
    /// f32.
    pub fn forward(&self, ids: &[Vec<u32>], loras: &LoraStack) -> Result<Tensor> {
        self.forward_skipping(0, ids, loras)
    }

    /// The same without the last `skip` layers: `clip_skip` of diffusers' pipelines.
    pub fn forward_skipping(
        &self,
        skip: usize,
        ids: &[Vec<u32>],
        loras: &LoraStack,
    ) -> Result<Tensor> {
        let rows = vec![loras.clone(); ids.len()];
        let (batch, length) = (ids.len(), ids.first().map_or(0, Vec::len));
        let ids = Tensor::from_vec(ids.concat(), batch * length, &self.device)?;
        let tokens = self.token_embedding.index_select(&ids, 0)?;
        let tokens = tokens.reshape((batch, length, self.config.transformer.hidden_size))?;
        let x = tokens.broadcast_add(&self.position_embedding.narrow(0, 0, length)?)?;
        in_pool(&self.device, || {
            let x = self.transformer.forward(x, skip, &rows)?;
            Ok(self.final_layer_norm.forward(&x)?.to_dtype(DType::F32)?)
        })
    }
}

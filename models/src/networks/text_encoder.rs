//! CLIP's text tower around its transformer ([`super::clip`]).
//!
//! Reference: transformers `models/clip/modeling_clip.py`, `CLIPTextModel` and
//! `CLIPTextModelWithProjection`. The output is the last hidden state, or an earlier one, after the
//! final layer norm: the context of Stable Diffusion's cross attention. Stable Diffusion XL takes the
//! last but one, without that norm, and a pooled state.

use candle_core::{DType, Device, Tensor};

use super::clip::ClipTransformer;
use super::config::{ClipTextConfig, EndToken};
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::ops::{Epilogue, LayerNorm, Linear, cast, embed, in_pool};

/// The text encoder.
pub struct ClipTextModel {
    config: ClipTextConfig,
    device: Device,
    token_embedding: Tensor,
    position_embedding: Tensor,
    transformer: ClipTransformer,
    final_layer_norm: LayerNorm,
    /// (.., hidden) -> (.., projection_dim), of the pooled state.
    projection: Option<LoraLayer<Linear>>,
}

/// Which token's state is pooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PooledToken {
    /// That of the encoder's configuration.
    Configured,
    /// The first with this id.
    Id(u32),
}

/// What a UNet of Stable Diffusion XL is conditioned on.
pub struct PooledStates {
    /// Hidden states (B, L, hidden) f32.
    pub states: Tensor,
    /// Their pooled projections (B, projection_dim) f32, of an encoder that has one.
    pub pooled: Option<Tensor>,
}

impl ClipTextModel {
    /// Builds the encoder from its weights; every tensor must have the shape that `config` says.
    pub fn load(
        config: ClipTextConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::build(config, &LayerBuilder::new(weights, device, dtype), false)
    }

    /// The same with a projection of the pooled state: the second encoder of a model, by which its
    /// layers are known to LoRAs.
    pub fn load_projected(
        config: ClipTextConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let root = LayerBuilder::new(weights, device, dtype);
        Self::build(config, &root.second_encoder(), true)
    }

    fn build(config: ClipTextConfig, root: &LayerBuilder<'_>, projected: bool) -> Result<Self> {
        let weights = root.weights();
        // transformers 5 writes the tower without the prefix of older files.
        let old = root.pp("text_model");
        let bare = !old.has("final_layer_norm.weight") && root.has("final_layer_norm.weight");
        let p = if bare { root.clone() } else { old };
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
            projection: projected
                .then(|| {
                    let outputs = config.projection_dim;
                    LoraLayer::projection(&root.pp("text_projection"), width, outputs)
                })
                .transpose()?,
            device: root.device().clone(),
            config,
        };
        weights.finish(|name| {
            name.ends_with("embeddings.position_ids")
                || !projected && name == "text_projection.weight"
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

    /// The device that it runs on.
    pub(crate) fn device(&self) -> &Device {
        &self.device
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
        let x = self.embed(ids)?;
        in_pool(&self.device, || {
            let x = self.transformer.forward(x, skip, &rows)?;
            Ok(cast(&self.final_layer_norm.forward(&x)?, DType::F32)?)
        })
    }

    /// Token ids (B rows of one length L), all with the same LoRAs -> the hidden states before the
    /// last layer and `skip` more, without the final layer norm, and the pooled states of the last.
    pub fn forward_pooled(
        &self,
        skip: usize,
        ids: &[Vec<u32>],
        token: PooledToken,
        loras: &LoraStack,
    ) -> Result<PooledStates> {
        let rows = vec![loras.clone(); ids.len()];
        let x = self.embed(ids)?;
        in_pool(&self.device, || {
            let states = self.transformer.forward(x, skip + 1, &rows)?;
            let pool = |projection: &LoraLayer<Linear>| -> Result<_> {
                let last = self.transformer.rest(states.clone(), skip + 1, &rows)?;
                let ends = ids.iter().enumerate().map(|(row, ids)| {
                    last.narrow(0, row, 1)?.narrow(1, self.pooled_place(ids, token), 1)?.squeeze(1)
                });
                let ends = ends.collect::<candle_core::Result<Vec<_>>>()?;
                let ends = self.final_layer_norm.forward(&Tensor::cat(&ends, 0)?)?;
                Ok(cast(&projection.forward(&ends, Epilogue::NONE, &rows)?, DType::F32)?)
            };
            let pooled = self.projection.as_ref().map(pool).transpose()?;
            Ok(PooledStates { states: cast(&states, DType::F32)?, pooled })
        })
    }

    /// Token ids -> their embeddings (B, L, hidden).
    fn embed(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let length = ids.first().map_or(0, Vec::len);
        let positions = self.position_embedding.narrow(0, 0, length)?;
        Ok(embed(&self.token_embedding, &positions, ids)?)
    }

    /// The place of the token whose state is pooled; 0 if it is not among them, as in the reference.
    fn pooled_place(&self, ids: &[u32], token: PooledToken) -> usize {
        let wanted = match (token, self.config.end) {
            (PooledToken::Configured, EndToken::Greatest) => ids.iter().max().copied(),
            (PooledToken::Configured, EndToken::Id(id)) | (PooledToken::Id(id), _) => Some(id),
        };
        ids.iter().position(|id| Some(*id) == wanted).unwrap_or_default()
    }
}

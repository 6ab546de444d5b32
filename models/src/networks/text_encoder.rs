//! CLIP's text tower, all of it in this file.
//!
//! Reference: transformers `models/clip/modeling_clip.py`, `CLIPTextModel`; the output is the last
//! hidden state behind the final layer norm, which is what Stable Diffusion attends to.

use candle_core::{DType, Device, Tensor};

use super::config::ClipTextConfig;
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::ops::{Activation, Attention, LayerNorm, Linear, in_pool, self_attention};

const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// The text encoder.
pub struct ClipTextModel {
    config: ClipTextConfig,
    device: Device,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

struct Layer {
    layer_norm1: LayerNorm,
    qkv_proj: LoraLayer<Linear>,
    out_proj: LoraLayer<Linear>,
    layer_norm2: LayerNorm,
    fc1: LoraLayer<Linear>,
    fc2: LoraLayer<Linear>,
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
        // transformers 5 writes the tower without the prefix that older files have.
        let old = root.pp("text_model");
        let bare = !old.has("final_layer_norm.weight") && root.has("final_layer_norm.weight");
        let p = if bare { root } else { old };
        let embeddings = p.pp("embeddings");
        let (width, eps) = (config.hidden_size, config.layer_norm_eps);
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::load(&p.pp("encoder").pp("layers").pp(i), &config))
            .collect::<Result<_>>()?;
        let model = Self {
            token_embedding: embeddings
                .placed("token_embedding.weight", &[config.vocab_size, width])?,
            position_embedding: embeddings
                .placed("position_embedding.weight", &[config.max_position_embeddings, width])?,
            layers,
            final_layer_norm: p.pp("final_layer_norm").layer_norm(width, eps)?,
            device: device.clone(),
            config,
        };
        weights.finish(|name| {
            name.ends_with("embeddings.position_ids") || name == "text_projection.weight"
        })?;
        Ok(model)
    }

    /// Adds vectors (n, hidden) f32 behind those of the vocabulary, where ids find them.
    pub(crate) fn learn(&mut self, vectors: &Tensor) -> Result<()> {
        let known = &self.token_embedding;
        let vectors = vectors.to_dtype(known.dtype())?.to_device(&self.device)?;
        self.token_embedding = Tensor::cat(&[known, &vectors], 0)?;
        Ok(())
    }

    /// What the encoder was built from.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Token ids (B rows of one length L), all with the same LoRAs -> hidden states (B, L, hidden)
    /// f32.
    pub fn forward(&self, ids: &[Vec<u32>], loras: &LoraStack) -> Result<Tensor> {
        let rows = vec![loras.clone(); ids.len()];
        let (batch, length) = (ids.len(), ids.first().map_or(0, Vec::len));
        let ids = Tensor::from_vec(ids.concat(), batch * length, &self.device)?;
        let tokens = self.token_embedding.index_select(&ids, 0)?;
        let tokens = tokens.reshape((batch, length, self.config.hidden_size))?;
        let mut x = tokens.broadcast_add(&self.position_embedding.narrow(0, 0, length)?)?;
        let activation = match self.config.hidden_act.as_str() {
            "gelu" => Activation::Gelu,
            _ => Activation::QuickGelu,
        };
        let heads = self.config.num_attention_heads;
        in_pool(&self.device, || {
            for layer in &self.layers {
                x = layer.forward(&x, heads, activation, &rows)?;
            }
            Ok(self.final_layer_norm.forward(&x)?.to_dtype(DType::F32)?)
        })
    }
}

impl Layer {
    fn load(p: &LayerBuilder<'_>, config: &ClipTextConfig) -> Result<Self> {
        let (width, inner, eps) =
            (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (attention, mlp) = (p.pp("self_attn"), p.pp("mlp"));
        Ok(Self {
            layer_norm1: p.pp("layer_norm1").layer_norm(width, eps)?,
            qkv_proj: LoraLayer::linears(&attention, &QKV, width, width, true)?,
            out_proj: LoraLayer::linear(&attention.pp("out_proj"), width, width)?,
            layer_norm2: p.pp("layer_norm2").layer_norm(width, eps)?,
            fc1: LoraLayer::linear(&mlp.pp("fc1"), width, inner)?,
            fc2: LoraLayer::linear(&mlp.pp("fc2"), inner, width)?,
        })
    }

    /// (B, L, hidden) -> (B, L, hidden)
    fn forward(
        &self,
        x: &Tensor,
        heads: usize,
        activation: Activation,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let n = self.layer_norm1.forward(x)?;
        let qkv = self.qkv_proj.forward(&n, loras)?;
        let kind = Attention { heads, causal: true, tiles: self.out_proj.on_tiles() };
        let y = self_attention(&qkv, kind)?;
        let x = self.out_proj.forward_add(&y, x, loras)?;
        let n = self.layer_norm2.forward(&x)?;
        let n = self.fc1.forward_activate(&n, activation, loras)?;
        Ok(self.fc2.forward_add(&n, &x, loras)?)
    }
}

//! CLIP's transformer, which the text encoder and the safety checker's vision tower share. Not
//! their embeddings and projections.
//!
//! Reference: transformers `models/clip/modeling_clip.py`, `CLIPEncoder` and `CLIPEncoderLayer`.

use candle_core::Tensor;

use super::config::ClipConfig;
use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::ops::{Activation, Attention, Epilogue, LayerNorm, Linear, self_attention};

/// The layers of a tower.
pub(super) struct ClipTransformer {
    layers: Vec<ClipLayer>,
    heads: usize,
    activation: Activation,
    /// Whether a token attends only to itself and those before it.
    causal: bool,
}

struct ClipLayer {
    layer_norm1: LayerNorm,
    qkv_proj: LoraLayer<Linear>,
    out_proj: LoraLayer<Linear>,
    layer_norm2: LayerNorm,
    fc1: LoraLayer<Linear>,
    fc2: LoraLayer<Linear>,
}

impl ClipTransformer {
    pub(super) fn load(p: &LayerBuilder<'_>, config: &ClipConfig, causal: bool) -> Result<Self> {
        let layer = |i| ClipLayer::load(&p.pp("encoder").pp("layers").pp(i), config);
        Ok(Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            causal,
        })
    }

    /// (B, L, hidden) and the LoRAs of the rows, or none at all -> (B, L, hidden), without the last
    /// `skip` layers
    pub(super) fn forward(&self, x: Tensor, skip: usize, loras: &[LoraStack]) -> Result<Tensor> {
        self.run(&self.layers[..self.layers.len().saturating_sub(skip)], x, loras)
    }

    /// The last `skipped` layers, which [`Self::forward`] has left out.
    pub(super) fn rest(&self, x: Tensor, skipped: usize, loras: &[LoraStack]) -> Result<Tensor> {
        self.run(&self.layers[self.layers.len().saturating_sub(skipped)..], x, loras)
    }

    fn run(&self, layers: &[ClipLayer], x: Tensor, loras: &[LoraStack]) -> Result<Tensor> {
        layers.iter().try_fold(x, |x, layer| {
            let n = layer.layer_norm1.forward(&x)?;
            let qkv = layer.qkv_proj.forward(&n, Epilogue::NONE, loras)?; // (B, L, 3 hidden)
            let (heads, causal) = (self.heads, self.causal);
            let kind = Attention { heads, causal, amx: layer.out_proj.uses_amx() };
            let y = self_attention(&qkv, kind)?;
            let x = layer.out_proj.forward(&y, Epilogue::residual(&x), loras)?;
            let n = layer.layer_norm2.forward(&x)?;
            let activation = Epilogue::activation(self.activation);
            let n = layer.fc1.forward(&n, activation, loras)?; // (B, L, inner)
            Ok(layer.fc2.forward(&n, Epilogue::residual(&x), loras)?)
        })
    }
}

impl ClipLayer {
    fn load(p: &LayerBuilder<'_>, config: &ClipConfig) -> Result<Self> {
        let (width, inner, eps) =
            (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (attention, mlp) = (p.pp("self_attn"), p.pp("mlp"));
        let qkv = ["q_proj", "k_proj", "v_proj"];
        Ok(Self {
            layer_norm1: p.pp("layer_norm1").layer_norm(width, eps)?,
            qkv_proj: LoraLayer::linears(&attention, &qkv, width, width, true)?,
            out_proj: LoraLayer::linear(&attention.pp("out_proj"), width, width)?,
            layer_norm2: p.pp("layer_norm2").layer_norm(width, eps)?,
            fc1: LoraLayer::linear(&mlp.pp("fc1"), width, inner)?,
            fc2: LoraLayer::linear(&mlp.pp("fc2"), inner, width)?,
        })
    }
}

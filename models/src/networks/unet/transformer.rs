//! The transformers of the UNet: self attention, cross attention to the prompt, feed forward.

use candle_core::Tensor;

use super::conditioning::{Conditioning, Seen};
use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::networks::config::UNetConfig;
use crate::networks::resnet::{Stack, StackSlice};
use crate::ops::{
    Attention, Epilogue, GroupNorm, LayerNorm, Linear, add, attention, cat_rows, self_attention,
};

/// Transformer2DModel.
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: LoraLayer<Linear>,
    blocks: Vec<TransformerBlock>,
    proj_out: LoraLayer<Linear>,
}

/// BasicTransformerBlock.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: SelfAttention,
    norm2: LayerNorm,
    attn2: CrossAttention,
    norm3: LayerNorm,
    ff_in: LoraLayer<Linear>,
    ff_out: LoraLayer<Linear>,
}

impl Transformer {
    /// Builds one of a level, of `depth` blocks; its cross attentions add their projections to `to_kv`.
    pub(super) fn load<'w>(
        p: &LayerBuilder<'w>,
        config: &UNetConfig,
        (level, depth): (usize, usize),
        to_kv: &Stack<'w>,
    ) -> Result<Self> {
        let channels = config.block_out_channels[level];
        let heads = config.heads[level];
        let conv = !config.use_linear_projection;
        let block =
            |i| TransformerBlock::load(&p.pp("transformer_blocks").pp(i), channels, heads, to_kv);
        Ok(Self {
            norm: p.pp("norm").group_norm(channels, config.norm_num_groups, 1e-6)?,
            proj_in: LoraLayer::linear_or_conv(&p.pp("proj_in"), channels, channels, conv)?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            proj_out: LoraLayer::linear_or_conv(&p.pp("proj_out"), channels, channels, conv)?,
        })
    }

    /// (B, H, W, C) -> (B, H, W, C)
    pub(super) fn forward(
        &self,
        x: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let (batch, h, w, channels) = x.dims4()?;
        let tokens = (batch, h * w, channels);
        let mut y = self.norm.forward(x)?.reshape(tokens)?;
        y = self.proj_in.forward(&y, Epilogue::NONE, loras)?;
        for block in &self.blocks {
            y = block.forward(y, conditioning, loras)?;
        }
        let y = self.proj_out.forward(&y, Epilogue::residual(&x.reshape(tokens)?), loras)?;
        Ok(y.reshape((batch, h, w, channels))?)
    }
}

impl TransformerBlock {
    fn load<'w>(
        p: &LayerBuilder<'w>,
        channels: usize,
        heads: usize,
        to_kv: &Stack<'w>,
    ) -> Result<Self> {
        let feed_forward = p.pp("ff").pp("net");
        Ok(Self {
            norm1: p.pp("norm1").layer_norm(channels, 1e-5)?,
            attn1: SelfAttention::load(&p.pp("attn1"), channels, heads)?,
            norm2: p.pp("norm2").layer_norm(channels, 1e-5)?,
            attn2: CrossAttention::load(&p.pp("attn2"), channels, to_kv, heads)?,
            norm3: p.pp("norm3").layer_norm(channels, 1e-5)?,
            ff_in: LoraLayer::geglu(&feed_forward.pp(0).pp("proj"), channels, 4 * channels)?,
            ff_out: LoraLayer::linear(&feed_forward.pp(2), 4 * channels, channels)?,
        })
    }

    /// (B, L, C) -> (B, L, C)
    fn forward(
        &self,
        mut y: Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        // 1. Self attention
        y = self.attn1.forward_add(&self.norm1.forward(&y)?, &y, loras)?;
        // 2. Cross attention
        y = self.attn2.forward_add(&self.norm2.forward(&y)?, conditioning, &y, loras)?;
        // 3. Feed forward
        let n = self.ff_in.forward(&self.norm3.forward(&y)?, Epilogue::NONE, loras)?; // (B, L, 4 C)
        Ok(self.ff_out.forward(&n, Epilogue::residual(&y), loras)?)
    }
}

struct SelfAttention {
    to_qkv: LoraLayer<Linear>,
    to_out: LoraLayer<Linear>,
    heads: usize,
}

impl SelfAttention {
    fn load(p: &LayerBuilder<'_>, channels: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_qkv: LoraLayer::linears(p, &["to_q", "to_k", "to_v"], channels, channels, false)?,
            to_out: LoraLayer::linear(&p.pp("to_out").pp(0), channels, channels)?,
            heads,
        })
    }

    /// x (B, L, C), residual (B, L, C) -> (B, L, C)
    fn forward_add(&self, x: &Tensor, residual: &Tensor, loras: &[LoraStack]) -> Result<Tensor> {
        let kind = Attention { heads: self.heads, causal: false, amx: self.to_out.uses_amx() };
        let y = self_attention(&self.to_qkv.forward(x, Epilogue::NONE, loras)?, kind)?;
        Ok(self.to_out.forward(&y, Epilogue::residual(residual), loras)?)
    }
}

/// Attention to the prompt, and to the pictures of IP-Adapters.
struct CrossAttention {
    to_q: LoraLayer<Linear>,
    k: StackSlice,
    v: StackSlice,
    to_out: LoraLayer<Linear>,
    heads: usize,
}

impl CrossAttention {
    fn load<'w>(
        p: &LayerBuilder<'w>,
        channels: usize,
        to_kv: &Stack<'w>,
        heads: usize,
    ) -> Result<Self> {
        Ok(Self {
            to_q: LoraLayer::linears(p, &["to_q"], channels, channels, false)?,
            k: to_kv.add(&p.pp("to_k"), channels, false)?,
            v: to_kv.add(&p.pp("to_v"), channels, false)?,
            to_out: LoraLayer::linear(&p.pp("to_out").pp(0), channels, channels)?,
            heads,
        })
    }

    /// x (B, L, C), the rows' conditioning, residual (B, L, C) -> (B, L, C)
    fn forward_add(
        &self,
        x: &Tensor,
        conditioning: &[Conditioning],
        residual: &Tensor,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let q = self.to_q.forward(x, Epilogue::NONE, loras)?;
        let kind = Attention { heads: self.heads, causal: false, amx: self.to_out.uses_amx() };
        let mut outputs = Vec::with_capacity(conditioning.len());
        let mut row = 0;
        for Conditioning { kv, seen, .. } in conditioning {
            let (rows, k, v) = (kv.dim(0)?, self.k.of(kv)?, self.v.of(kv)?);
            let q = q.narrow(0, row, rows)?;
            let y = attention(&q, &k, &v, kind)?;
            outputs.push(seen.iter().try_fold(y, |y, seen| self.add_seen(&y, &q, seen, kind))?);
            row += rows;
        }
        let y = match &outputs[..] {
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        Ok(self.to_out.forward(&y, Epilogue::residual(residual), loras)?)
    }

    /// y (B, L, C) of queries (B, L, C), and added to the rows that see pictures what attends to these.
    fn add_seen(&self, y: &Tensor, q: &Tensor, seen: &Seen, kind: Attention) -> Result<Tensor> {
        let Seen { first, rows, kv } = seen;
        let (k, v) = (self.k.of(kv)?, self.v.of(kv)?);
        let added = attention(&q.narrow(0, *first, *rows)?, &k, &v, kind)?;
        let (all, end) = (y.dim(0)?, first + rows);
        if *rows == all {
            return Ok(add(y, &added)?);
        }
        let sum = add(&y.narrow(0, *first, *rows)?, &added)?;
        let parts = [y.narrow(0, 0, *first)?, sum, y.narrow(0, end, all - end)?];
        let parts: Vec<_> = parts.iter().filter(|part| part.elem_count() > 0).collect();
        Ok(cat_rows(&parts)?)
    }
}

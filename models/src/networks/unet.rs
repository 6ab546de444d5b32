//! UNet2DConditionModel of Stable Diffusion 1.x and 2.x, but for the residual block, which is in
//! [`super::resnet`].
//!
//! Reference: diffusers 0.42 `models/unets/unet_2d_condition.py`, `unet_2d_blocks.py`,
//! `transformers/transformer_2d.py` and `attention.py`, as far as [`UNetConfig`] can express it.
//!
//! Shapes: B batch rows, H and W latent pixels of a level, C its channels, L = H W tokens, M tokens
//! of a prompt. Activations are channels-last. Each row has its own timestep and conditioning, and
//! `loras` holds the LoRAs of each row, or nothing if no row has any.

use candle_core::{DType, Device, Tensor};

use super::config::UNetConfig;
use super::resnet::{Norm, Resnet, Stack, StackSlice};
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack, activation_dtype};
use crate::ops::{
    Activation, Attention, ChannelConcat, Conv2d, Epilogue, Geometry, GroupNorm, LayerNorm, Linear,
    attention, channels_first, channels_last, in_pool, self_attention,
};

/// 3x3, stride 2.
const DOWN: Geometry = Geometry { kernel: 3, stride: 2, before: 1, after: 1 };

/// The denoising network.
pub struct UNet2DConditionModel {
    config: UNetConfig,
    device: Device,
    dtype: DType,
    /// The guidance scale's embedding (.., time_cond_proj_dim) -> (.., first), of a UNet that takes
    /// it as an input.
    cond_proj: Option<LoraLayer<Linear>>,
    time: [LoraLayer<Linear>; 2],
    /// The time projections of all residual blocks: (.., 4 first) -> (.., time_width)
    time_proj: LoraLayer<Linear>,
    /// The key and value projections of all cross attentions: (.., D) -> (.., kv_width)
    to_kv: LoraLayer<Linear>,
    conv_in: LoraLayer<Conv2d>,
    down: Vec<DownBlock>,
    /// Distilled models have none.
    mid: Option<(Resnet, Transformer, Resnet)>,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: LoraLayer<Conv2d>,
}

/// What batch rows are conditioned on, beside the timestep.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of all cross attentions (B, M, kv_width).
    kv: Tensor,
}

impl Conditioning {
    /// The conditioning of a batch from that of its rows: one entry for each run of rows that have
    /// equally many tokens.
    pub(crate) fn stack(rows: &[&Self]) -> Result<Vec<Self>> {
        let stacked = |run: &[&Self]| {
            let kv: Vec<_> = run.iter().map(|row| &row.kv).collect();
            Ok(Self { kv: Tensor::cat(&kv, 0)? })
        };
        rows.chunk_by(|a, b| a.kv.dims() == b.kv.dims()).map(stacked).collect()
    }

    /// How many numbers it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kv.elem_count()
    }
}

struct DownBlock {
    layers: Vec<(Resnet, Option<Transformer>)>,
    downsample: Option<LoraLayer<Conv2d>>,
}

struct UpBlock {
    layers: Vec<(Resnet, Option<Transformer>)>,
    upsample: Option<LoraLayer<Conv2d>>,
}

impl UNet2DConditionModel {
    /// Builds the network from its weights; every tensor must have the shape that `config` says.
    pub fn load(
        config: UNetConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let p = LayerBuilder::new(weights, device, dtype);
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let temb = 4 * first;
        let builder = BlockBuilder {
            config: &config,
            time_proj: Stack::new(temb),
            to_kv: Stack::new(config.cross_attention_dim),
        };
        let time = p.pp("time_embedding");
        let cond_proj = config
            .time_cond_proj_dim
            .map(|width| LoraLayer::linears(&time, &["cond_proj"], width, first, false));
        let middle = p.pp("mid_block");
        let down = builder.down_blocks(&p.pp("down_blocks"))?;
        let resnet = |i| builder.resnet(&middle.pp("resnets").pp(i), last, last);
        let mid = match config.mid_block {
            true => {
                let p = middle.pp("attentions").pp(0);
                let first = resnet(0)?;
                let transformer = builder.transformer(&p, channels.len() - 1)?;
                Some((first, transformer, resnet(1)?))
            }
            false => None,
        };
        let up = builder.up_blocks(&p.pp("up_blocks"))?;
        let model = Self {
            time_proj: builder.time_proj.build(&p)?,
            to_kv: builder.to_kv.build(&p)?,
            cond_proj: cond_proj.transpose()?,
            time: [
                LoraLayer::linear(&time.pp("linear_1"), first, temb)?,
                LoraLayer::linear(&time.pp("linear_2"), temb, temb)?,
            ],
            conv_in: LoraLayer::conv(&p.pp("conv_in"), config.in_channels, first, Geometry::SAME)?,
            down,
            mid,
            up,
            norm_out: p.pp("conv_norm_out").group_norm(
                first,
                config.norm_num_groups,
                config.norm_eps,
            )?,
            conv_out: LoraLayer::conv(
                &p.pp("conv_out"),
                first,
                config.out_channels,
                Geometry::SAME,
            )?,
            device: device.clone(),
            dtype: activation_dtype(device, dtype),
            config,
        };
        weights.finish(|_| false);
        Ok(model)
    }

    /// Its configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Width of the keys and values of all cross attentions together, the last dimension of
    /// [`Conditioning`].
    pub(crate) fn kv_width(&self) -> usize {
        self.to_kv.outputs()
    }

    /// Width of the time embeddings of all residual blocks together, the last dimension of
    /// [`Self::time_embeddings`].
    pub(crate) fn time_width(&self) -> usize {
        self.time_proj.outputs()
    }

    /// The conditioning for [`Self::forward`], which is the same at every step, from the text
    /// encoder's hidden states (B, M, D) f32.
    pub fn condition(&self, context: &Tensor, loras: &[LoraStack]) -> Result<Conditioning> {
        let context = context.to_dtype(self.dtype)?.contiguous()?;
        let kv = in_pool(&self.device, || self.to_kv.forward(&context, Epilogue::NONE, loras))?;
        Ok(Conditioning { kv })
    }

    /// T timesteps -> the time embeddings of all residual blocks (T, time_width) for
    /// [`Self::forward`]. Those of a schedule are known before its first step. A UNet that takes
    /// the guidance scale as an input gets 1.
    pub fn time_embeddings(&self, timesteps: &[f64], loras: &[LoraStack]) -> Result<Tensor> {
        self.guided_time_embeddings(timesteps, 1.0, loras)
    }

    /// The same with a guidance scale, which only a UNet that takes it as an input reads.
    pub fn guided_time_embeddings(
        &self,
        timesteps: &[f64],
        guidance_scale: f64,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        in_pool(&self.device, || {
            let embedded = self.time_embedding(timesteps, guidance_scale, loras)?;
            Ok(self.time_proj.forward(&embedded, Epilogue::NONE, loras)?)
        })
    }

    /// Latents (B, C, H, W) f32, time embeddings (B, time_width) and the conditioning of the rows
    /// in their order, whose entries may differ in M -> the prediction (B, C, H, W) f32.
    pub fn forward(
        &self,
        latents: &Tensor,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        in_pool(&self.device, || self.predict(latents, time_embeddings, conditioning, loras))
    }

    fn predict(
        &self,
        latents: &Tensor,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        // 1. In
        let x = channels_last(latents, self.dtype)?;
        let mut x = self.conv_in.forward(&x, Epilogue::NONE, loras)?; // (B, H, W, first)
        // 2. Down
        let mut skips = vec![x.clone()];
        for block in &self.down {
            for (resnet, transformer) in &block.layers {
                x = resnet.forward(&(&x).into(), time_embeddings, loras)?;
                if let Some(transformer) = transformer {
                    x = transformer.forward(&x, conditioning, loras)?;
                }
                skips.push(x.clone());
            }
            if let Some(downsample) = &block.downsample {
                x = downsample.forward(&x, Epilogue::NONE, loras)?;
                skips.push(x.clone());
            }
        }
        // 3. Middle
        if let Some((first, transformer, second)) = &self.mid {
            x = first.forward(&(&x).into(), time_embeddings, loras)?;
            x = transformer.forward(&x, conditioning, loras)?;
            x = second.forward(&(&x).into(), time_embeddings, loras)?;
        }
        // 4. Up
        for block in &self.up {
            for (resnet, transformer) in &block.layers {
                // load() built as many skips as layers.
                let skip = skips.pop().ok_or_else(|| candle_core::Error::msg("no skip left"))?;
                x = resnet.forward(&ChannelConcat::new(&x, &skip)?, time_embeddings, loras)?;
                if let Some(transformer) = transformer {
                    x = transformer.forward(&x, conditioning, loras)?;
                }
            }
            if let (Some(upsample), Some(next)) = (&block.upsample, skips.last()) {
                let (_, h, w, _) = next.dims4()?;
                x = upsample.forward_resized(&x, (h, w), Epilogue::NONE, loras)?;
            }
        }
        // 5. Out
        let x = self.conv_out.forward(&self.norm_out.forward_silu(&x)?, Epilogue::NONE, loras)?;
        Ok(channels_first(&x)?)
    }

    /// Sinusoidal embedding, two linear layers, and the SiLU with which every residual block
    /// begins: (T) -> (T, 4 first). Angles are computed in f32, as in the reference.
    fn time_embedding(
        &self,
        timesteps: &[f64],
        guidance_scale: f64,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let width = self.config.block_out_channels[0];
        let half = width / 2;
        let scale = -(10_000f64.ln()) / (half as f64 - self.config.freq_shift);
        let frequencies: Vec<f32> = (0..half).map(|i| (i as f64 * scale).exp() as f32).collect();
        let mut values = Vec::with_capacity(timesteps.len() * width);
        for t in timesteps {
            let angles = frequencies.iter().map(|f| *t as f32 * f);
            let (sines, cosines) = (angles.clone().map(f32::sin), angles.map(f32::cos));
            if self.config.flip_sin_to_cos {
                values.extend(cosines.chain(sines));
            } else {
                values.extend(sines.chain(cosines));
            }
        }
        let x = Tensor::from_vec(values, (timesteps.len(), width), &self.device)?;
        let mut x = x.to_dtype(self.dtype)?;
        if let (Some(cond_proj), Some(width)) = (&self.cond_proj, self.config.time_cond_proj_dim) {
            let guidance = guidance_embedding(guidance_scale, width).repeat(timesteps.len());
            let guidance = Tensor::from_vec(guidance, (timesteps.len(), width), &self.device)?;
            let guidance = guidance.to_dtype(self.dtype)?;
            x = (x + cond_proj.forward(&guidance, Epilogue::NONE, loras)?)?;
        }
        let silu = Epilogue::activation(Activation::Silu);
        Ok(self.time[1].forward(&self.time[0].forward(&x, silu, loras)?, silu, loras)?)
    }
}

/// The sinusoidal embedding of a guidance scale (diffusers' `get_guidance_scale_embedding`), in
/// diffusers' numbering of the scale, where 1 is no guidance. An odd width ends in a zero.
fn guidance_embedding(guidance_scale: f64, width: usize) -> Vec<f32> {
    let half = width / 2;
    let w = (guidance_scale - 1.0) as f32 * 1000.0;
    let scale = -(10_000f64.ln()) / (half as f64 - 1.0);
    let angles = (0..half).map(|i| w * ((i as f64 * scale) as f32).exp());
    let mut values: Vec<f32> = angles.clone().map(f32::sin).chain(angles.map(f32::cos)).collect();
    values.resize(width, 0.0);
    values
}

/// Builds the blocks, and gathers the layers that one product computes for all of them.
struct BlockBuilder<'a, 'w> {
    config: &'a UNetConfig,
    time_proj: Stack<'w>,
    to_kv: Stack<'w>,
}

impl<'w> BlockBuilder<'_, 'w> {
    fn down_blocks(&self, p: &LayerBuilder<'w>) -> Result<Vec<DownBlock>> {
        let channels = &self.config.block_out_channels;
        let mut inputs = channels[0];
        let mut blocks = Vec::new();
        for (level, outputs) in channels.iter().copied().enumerate() {
            let p = p.pp(level);
            let mut layers = Vec::new();
            for i in 0..self.config.layers_per_block {
                let resnet = self.resnet(&p.pp("resnets").pp(i), inputs, outputs)?;
                let cross = self.config.down_cross_attention[level];
                layers.push((resnet, self.maybe_transformer(&p, i, level, cross)?));
                inputs = outputs;
            }
            let last = level + 1 == channels.len();
            let p = p.pp("downsamplers").pp(0).pp("conv");
            let downsample =
                (!last).then(|| LoraLayer::conv(&p, outputs, outputs, DOWN)).transpose()?;
            blocks.push(DownBlock { layers, downsample });
        }
        Ok(blocks)
    }

    fn up_blocks(&self, p: &LayerBuilder<'w>) -> Result<Vec<UpBlock>> {
        let channels = &self.config.block_out_channels;
        let levels = channels.len();
        // Channels of the skips, in the order in which they are pushed.
        let mut skips = vec![channels[0]];
        for (level, c) in channels.iter().enumerate() {
            let downsample = usize::from(level + 1 < levels);
            skips.extend(std::iter::repeat_n(*c, self.config.layers_per_block + downsample));
        }
        let mut inputs = channels[levels - 1];
        let mut blocks = Vec::new();
        for i in 0..levels {
            let level = levels - 1 - i;
            let (p, outputs) = (p.pp(i), channels[level]);
            let mut layers = Vec::new();
            for j in 0..=self.config.layers_per_block {
                let skip = skips.pop().unwrap_or_default();
                let resnet = self.resnet(&p.pp("resnets").pp(j), inputs + skip, outputs)?;
                let cross = self.config.up_cross_attention[i];
                layers.push((resnet, self.maybe_transformer(&p, j, level, cross)?));
                inputs = outputs;
            }
            let p = p.pp("upsamplers").pp(0).pp("conv");
            let conv = || LoraLayer::conv(&p, outputs, outputs, Geometry::SAME);
            let upsample = (level > 0).then(conv).transpose()?;
            blocks.push(UpBlock { layers, upsample });
        }
        Ok(blocks)
    }

    fn resnet(&self, p: &LayerBuilder<'w>, inputs: usize, outputs: usize) -> Result<Resnet> {
        let norm = Norm { groups: self.config.norm_num_groups, eps: self.config.norm_eps };
        Resnet::load(p, inputs, outputs, Some(&self.time_proj), norm)
    }

    fn maybe_transformer(
        &self,
        p: &LayerBuilder<'w>,
        index: usize,
        level: usize,
        cross: bool,
    ) -> Result<Option<Transformer>> {
        let p = p.pp("attentions").pp(index);
        cross.then(|| self.transformer(&p, level)).transpose()
    }

    fn transformer(&self, p: &LayerBuilder<'w>, level: usize) -> Result<Transformer> {
        let config = self.config;
        let channels = config.block_out_channels[level];
        let conv = !config.use_linear_projection;
        let block = |i| self.transformer_block(&p.pp("transformer_blocks").pp(i), level);
        let depth = config.transformer_layers_per_block[level];
        Ok(Transformer {
            norm: p.pp("norm").group_norm(channels, config.norm_num_groups, 1e-6)?,
            proj_in: LoraLayer::linear_or_conv(&p.pp("proj_in"), channels, channels, conv)?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            proj_out: LoraLayer::linear_or_conv(&p.pp("proj_out"), channels, channels, conv)?,
        })
    }

    fn transformer_block(&self, p: &LayerBuilder<'w>, level: usize) -> Result<TransformerBlock> {
        let (channels, heads) = (self.config.block_out_channels[level], self.config.heads[level]);
        let feed_forward = p.pp("ff").pp("net");
        Ok(TransformerBlock {
            norm1: p.pp("norm1").layer_norm(channels, 1e-5)?,
            attn1: SelfAttention::load(&p.pp("attn1"), channels, heads)?,
            norm2: p.pp("norm2").layer_norm(channels, 1e-5)?,
            attn2: CrossAttention::load(&p.pp("attn2"), channels, &self.to_kv, heads)?,
            norm3: p.pp("norm3").layer_norm(channels, 1e-5)?,
            ff_in: LoraLayer::geglu(&feed_forward.pp(0).pp("proj"), channels, 4 * channels)?,
            ff_out: LoraLayer::linear(&feed_forward.pp(2), 4 * channels, channels)?,
        })
    }
}

/// Transformer2DModel.
struct Transformer {
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
    /// (B, H, W, C) -> (B, H, W, C)
    fn forward(
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
        for Conditioning { kv } in conditioning {
            let (rows, k, v) = (kv.dim(0)?, self.k.of(kv)?, self.v.of(kv)?);
            outputs.push(attention(&q.narrow(0, row, rows)?, &k, &v, kind)?);
            row += rows;
        }
        let y = match &outputs[..] {
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        Ok(self.to_out.forward(&y, Epilogue::residual(residual), loras)?)
    }
}

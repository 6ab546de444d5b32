//! AutoencoderKL: images to latents and back.
//!
//! Reference: diffusers 0.42 `models/autoencoders/autoencoder_kl.py` and `vae.py`.

use candle_core::{DType, Device, Tensor};

use super::config::VaeConfig;
use super::resnet::{Norm, Resnet};
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, activation_dtype};
use crate::ops::{
    Attention, Conv2d, Epilogue, Geometry, GroupNorm, Linear, cast, channels_last, in_pool,
    linear_combination, self_attention,
};

/// 3x3, stride 2, zero padding at the bottom and right only.
const DOWN: Geometry = Geometry { kernel: 3, stride: 2, before: 0, after: 1 };
const EPS: f64 = 1e-6;

impl VaeConfig {
    /// Latents (B, C, h, w) f32 of the encoder -> those that the UNet is trained on.
    pub(crate) fn scaled(&self, latents: &Tensor) -> Result<Tensor> {
        match &self.latents {
            None => Ok(linear_combination(&[(self.scaling_factor, latents)])?),
            Some(known) => {
                let [means, deviations] = by_channel(known, latents.device())?;
                let centred = latents.broadcast_sub(&means)?;
                Ok((centred * self.scaling_factor)?.broadcast_div(&deviations)?)
            }
        }
    }

    /// Latents (B, C, h, w) f32 of the UNet -> those that the decoder takes.
    pub(crate) fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        match &self.latents {
            None => Ok(linear_combination(&[(1.0 / self.scaling_factor, latents)])?),
            Some(known) => {
                let [means, deviations] = by_channel(known, latents.device())?;
                let spread = latents.broadcast_mul(&deviations)?;
                Ok((spread / self.scaling_factor)?.broadcast_add(&means)?)
            }
        }
    }

    /// The encoder's output (B, h, w, 2 C) f32 -> mean and log variance of the latents, each
    /// (B, C, h, w) f32.
    pub(crate) fn distribution(&self, moments: &Tensor) -> Result<(Tensor, Tensor)> {
        let (moments, channels) = (moments.permute((0, 3, 1, 2))?, self.latent_channels);
        let mean = moments.narrow(1, 0, channels)?.contiguous()?;
        let logvar = moments.narrow(1, channels, channels)?.contiguous()?.clamp(-30f32, 20f32)?;
        Ok((mean, logvar))
    }
}

/// Means and deviations, each (1, C, 1, 1) f32.
fn by_channel(known: &[(f64, f64)], device: &Device) -> Result<[Tensor; 2]> {
    let shape = (1, known.len(), 1, 1);
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, device);
    let means = known.iter().map(|(mean, _)| *mean as f32).collect();
    let deviations = known.iter().map(|(_, deviation)| *deviation as f32).collect();
    Ok([tensor(means)?, tensor(deviations)?])
}

/// Latents to images.
pub struct Decoder {
    config: VaeConfig,
    dtype: DType,
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid: MidBlock,
    up: Vec<(Vec<Resnet>, Option<Conv2d>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    /// Builds the decoder from its weights; every tensor must have the shape that `config` says.
    pub fn load(
        config: VaeConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let root = LayerBuilder::new(weights, device, dtype);
        let p = root.pp("decoder");
        let norm = Norm { groups: config.norm_num_groups, eps: EPS };
        let channels = &config.block_out_channels;
        let (latent, last) = (config.latent_channels, channels[channels.len() - 1]);
        let mut inputs = last;
        let mut up = Vec::new();
        for (i, outputs) in channels.iter().rev().copied().enumerate() {
            let p = p.pp("up_blocks").pp(i);
            let mut resnets = Vec::new();
            for j in 0..=config.layers_per_block {
                resnets.push(Resnet::load(&p.pp("resnets").pp(j), inputs, outputs, None, norm)?);
                inputs = outputs;
            }
            let last = i + 1 == channels.len();
            let p = p.pp("upsamplers").pp(0).pp("conv");
            let conv = (!last).then(|| p.conv(outputs, outputs, Geometry::SAME)).transpose()?;
            up.push((resnets, conv));
        }
        let post_quant = root.pp("post_quant_conv");
        let model = Self {
            post_quant_conv: config
                .use_post_quant_conv
                .then(|| post_quant.conv(latent, latent, Geometry::POINT))
                .transpose()?,
            conv_in: p.pp("conv_in").conv(latent, last, Geometry::SAME)?,
            mid: MidBlock::load(&p.pp("mid_block"), last, config.mid_block_add_attention, norm)?,
            up,
            norm_out: p.pp("conv_norm_out").group_norm(channels[0], norm.groups, norm.eps)?,
            conv_out: p.pp("conv_out").conv(channels[0], config.out_channels, Geometry::SAME)?,
            dtype: activation_dtype(device, dtype),
            config,
        };
        weights.finish(|name| name.starts_with("encoder.") || name.starts_with("quant_conv."));
        Ok(model)
    }

    /// Its configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Latents (B, C, h, w) f32, already divided by the scaling factor -> images (B, H, W, 3) f32,
    /// nominally in -1..1.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        in_pool(latents.device(), || self.draw(latents))
    }

    fn draw(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = channels_last(latents, self.dtype)?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x, Epilogue::NONE)?;
        }
        x = self.mid.forward(&self.conv_in.forward(&x, Epilogue::NONE)?)?;
        for (resnets, upsample) in &self.up {
            for resnet in resnets {
                x = resnet.forward_timeless(&x)?;
            }
            if let Some(conv) = upsample {
                let (_, h, w, _) = x.dims4()?;
                x = conv.forward_resized(&x, (2 * h, 2 * w), Epilogue::NONE)?;
            }
        }
        let x = self.conv_out.forward(&self.norm_out.forward_silu(&x)?, Epilogue::NONE)?;
        Ok(cast(&x, DType::F32)?)
    }
}

/// Images to the distribution of their latents.
pub struct Encoder {
    config: VaeConfig,
    dtype: DType,
    conv_in: Conv2d,
    down: Vec<(Vec<Resnet>, Option<Conv2d>)>,
    mid: MidBlock,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
}

impl Encoder {
    /// Builds the encoder from its weights; every tensor must have the shape that `config` says.
    pub fn load(
        config: VaeConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let root = LayerBuilder::new(weights, device, dtype);
        let p = root.pp("encoder");
        let norm = Norm { groups: config.norm_num_groups, eps: EPS };
        let channels = &config.block_out_channels;
        let (moments, last) = (2 * config.latent_channels, channels[channels.len() - 1]);
        let mut inputs = channels[0];
        let mut down = Vec::new();
        for (i, outputs) in channels.iter().copied().enumerate() {
            let p = p.pp("down_blocks").pp(i);
            let mut resnets = Vec::new();
            for j in 0..config.layers_per_block {
                resnets.push(Resnet::load(&p.pp("resnets").pp(j), inputs, outputs, None, norm)?);
                inputs = outputs;
            }
            let last = i + 1 == channels.len();
            let p = p.pp("downsamplers").pp(0).pp("conv");
            let conv = (!last).then(|| p.conv(outputs, outputs, DOWN)).transpose()?;
            down.push((resnets, conv));
        }
        let quant = root.pp("quant_conv");
        let model = Self {
            conv_in: p.pp("conv_in").conv(config.in_channels, channels[0], Geometry::SAME)?,
            down,
            mid: MidBlock::load(&p.pp("mid_block"), last, config.mid_block_add_attention, norm)?,
            norm_out: p.pp("conv_norm_out").group_norm(last, norm.groups, norm.eps)?,
            conv_out: p.pp("conv_out").conv(last, moments, Geometry::SAME)?,
            quant_conv: config
                .use_quant_conv
                .then(|| quant.conv(moments, moments, Geometry::POINT))
                .transpose()?,
            dtype: activation_dtype(device, dtype),
            config,
        };
        weights.finish(|name| name.starts_with("decoder.") || name.starts_with("post_quant_conv."));
        Ok(model)
    }

    /// Its configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Images (B, H, W, 3) in -1..1 -> mean and log variance of the latents, each (B, C, h, w) f32
    /// and not yet multiplied by the scaling factor.
    pub fn forward(&self, pictures: &Tensor) -> Result<(Tensor, Tensor)> {
        self.config.distribution(&self.moments(pictures)?)
    }

    /// Images (B, H, W, 3) in -1..1 -> what [`VaeConfig::distribution`] takes.
    pub(crate) fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        in_pool(pictures.device(), || self.read(pictures))
    }

    fn read(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut x = cast(&pictures.contiguous()?, self.dtype)?;
        x = self.conv_in.forward(&x, Epilogue::NONE)?;
        for (resnets, downsample) in &self.down {
            for resnet in resnets {
                x = resnet.forward_timeless(&x)?;
            }
            if let Some(conv) = downsample {
                x = conv.forward(&x, Epilogue::NONE)?;
            }
        }
        x = self.norm_out.forward_silu(&self.mid.forward(&x)?)?;
        x = self.conv_out.forward(&x, Epilogue::NONE)?;
        if let Some(conv) = &self.quant_conv {
            x = conv.forward(&x, Epilogue::NONE)?;
        }
        Ok(cast(&x, DType::F32)?)
    }
}

/// UNetMidBlock2D: residual block, attention over all pixels, residual block.
struct MidBlock {
    resnets: (Resnet, Resnet),
    attention: Option<PixelAttention>,
}

impl MidBlock {
    fn load(p: &LayerBuilder<'_>, channels: usize, attention: bool, norm: Norm) -> Result<Self> {
        let resnet = |i| Resnet::load(&p.pp("resnets").pp(i), channels, channels, None, norm);
        let attention = attention
            .then(|| PixelAttention::load(&p.pp("attentions").pp(0), channels, norm))
            .transpose()?;
        Ok(Self { resnets: (resnet(0)?, resnet(1)?), attention })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.resnets.0.forward_timeless(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.resnets.1.forward_timeless(&x)
    }
}

/// Single-head attention over all pixels.
struct PixelAttention {
    norm: GroupNorm,
    to_qkv: Linear,
    to_out: Linear,
}

impl PixelAttention {
    /// The second names are those of files written before diffusers 0.16, such as v1.4's.
    fn load(p: &LayerBuilder<'_>, channels: usize, norm: Norm) -> Result<Self> {
        let qkv = [["to_q", "query"], ["to_k", "key"], ["to_v", "value"]].map(|n| p.either(n));
        let out = p.either(["to_out.0", "proj_attn"]);
        Ok(Self {
            norm: p.pp("group_norm").group_norm(channels, norm.groups, norm.eps)?,
            to_qkv: p.linears(&qkv, channels, channels, true)?,
            to_out: p.pp(out).linear(channels, channels)?,
        })
    }

    /// (B, H, W, C) -> (B, H, W, C)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, h, w, channels) = x.dims4()?;
        let tokens = (batch, h * w, channels);
        let n = self.norm.forward(x)?.reshape(tokens)?;
        let kind = Attention { heads: 1, causal: false, amx: self.to_out.uses_amx() };
        let y = self_attention(&self.to_qkv.forward(&n, Epilogue::NONE)?, kind)?;
        let y = self.to_out.forward(&y, Epilogue::residual(&x.reshape(tokens)?))?;
        Ok(y.reshape((batch, h, w, channels))?)
    }
}

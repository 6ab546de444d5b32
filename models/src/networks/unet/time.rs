//! The embeddings of timesteps, of the guidance scale of UNets that take it as an input, and of the
//! pooled prompt and the sizes of those that take these.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::networks::config::{AddedConfig, UNetConfig};
use crate::ops::{Activation, Epilogue, Linear, add, cast};

/// A sinusoidal embedding and two linear layers.
pub(in crate::networks) struct TimeEmbedding {
    /// The guidance scale's embedding (.., time_cond_proj_dim) -> (.., first), of a UNet that takes
    /// it as an input.
    guidance: Option<(usize, LoraLayer<Linear>)>,
    linear: [LoraLayer<Linear>; 2],
    device: Device,
    dtype: DType,
    sinusoids: Sinusoids,
    /// Whether the SiLU with which every residual block begins follows: not where something is
    /// added first.
    ends_in_silu: bool,
}

impl TimeEmbedding {
    /// (T) -> (T, 4 first)
    pub(in crate::networks) fn load(
        p: &LayerBuilder<'_>,
        config: &UNetConfig,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let first = config.block_out_channels[0];
        let guidance = config.time_cond_proj_dim.map(|width| -> Result<_> {
            Ok((width, LoraLayer::linears(p, &["cond_proj"], width, first, false)?))
        });
        Ok(Self {
            guidance: guidance.transpose()?,
            linear: [
                LoraLayer::linear(&p.pp("linear_1"), first, 4 * first)?,
                LoraLayer::linear(&p.pp("linear_2"), 4 * first, 4 * first)?,
            ],
            device: device.clone(),
            dtype,
            sinusoids: sinusoids(config, first),
            ends_in_silu: config.added.is_none(),
        })
    }

    /// T timesteps, all at one guidance scale -> their embeddings (T, 4 first).
    pub(in crate::networks) fn forward(
        &self,
        timesteps: &[f64],
        guidance_scale: f64,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let shape = (timesteps.len(), self.sinusoids.width);
        let x = Tensor::from_vec(self.sinusoids.of(timesteps), shape, &self.device)?;
        let mut x = cast(&x, self.dtype)?;
        if let Some((width, cond_proj)) = &self.guidance {
            let guidance = guidance_embedding(guidance_scale, *width).repeat(timesteps.len());
            let guidance = Tensor::from_vec(guidance, (timesteps.len(), *width), &self.device)?;
            let guidance = cast(&guidance, self.dtype)?;
            x = add(&x, &cond_proj.forward(&guidance, Epilogue::NONE, loras)?)?;
        }
        let silu = Epilogue::activation(Activation::Silu);
        let x = self.linear[0].forward(&x, silu, loras)?;
        let end = if self.ends_in_silu { silu } else { Epilogue::NONE };
        Ok(self.linear[1].forward(&x, end, loras)?)
    }
}

/// How numbers become sinusoids.
#[derive(Clone, Copy)]
struct Sinusoids {
    width: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl Sinusoids {
    /// n numbers -> their sinusoids (n, width), row by row. Angles are computed in f32, as in the
    /// reference. An odd width ends in a zero.
    fn of(self, values: &[f64]) -> Vec<f32> {
        let half = self.width / 2;
        let scale = -(10_000f64.ln()) / (half as f64 - self.freq_shift);
        let frequencies: Vec<f32> = (0..half).map(|i| (i as f64 * scale).exp() as f32).collect();
        let mut embedded = Vec::with_capacity(values.len() * self.width);
        for value in values {
            let angles = frequencies.iter().map(|f| *value as f32 * f);
            let (sines, cosines) = (angles.clone().map(f32::sin), angles.map(f32::cos));
            if self.flip_sin_to_cos {
                embedded.extend(cosines.chain(sines));
            } else {
                embedded.extend(sines.chain(cosines));
            }
            embedded.extend((2 * half < self.width).then_some(0.0));
        }
        embedded
    }
}

/// The embedding of what a UNet of Stable Diffusion XL is conditioned on beside timestep and prompt.
pub(in crate::networks) struct AddedEmbedding {
    linear: [LoraLayer<Linear>; 2],
    device: Device,
    dtype: DType,
    sizes: Sinusoids,
}

impl AddedEmbedding {
    pub(in crate::networks) fn load(
        p: &LayerBuilder<'_>,
        config: &UNetConfig,
        added: AddedConfig,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let temb = 4 * config.block_out_channels[0];
        Ok(Self {
            linear: [
                LoraLayer::linear(&p.pp("linear_1"), added.inputs, temb)?,
                LoraLayer::linear(&p.pp("linear_2"), temb, temb)?,
            ],
            device: device.clone(),
            dtype,
            sizes: sinusoids(config, added.size_width),
        })
    }

    /// The pooled prompt (1, P) f32 and the sizes of a row -> (1, 4 first)
    pub(in crate::networks) fn forward(
        &self,
        pooled: &Tensor,
        sizes: &[f64],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let embedded = self.sizes.of(sizes);
        let width = embedded.len();
        let embedded = Tensor::from_vec(embedded, (1, width), &self.device)?;
        let x = cast(&Tensor::cat(&[pooled, &embedded], 1)?, self.dtype)?;
        let silu = Epilogue::activation(Activation::Silu);
        let x = self.linear[0].forward(&x, silu, loras)?;
        Ok(self.linear[1].forward(&x, Epilogue::NONE, loras)?)
    }
}

fn sinusoids(config: &UNetConfig, width: usize) -> Sinusoids {
    let UNetConfig { flip_sin_to_cos, freq_shift, .. } = *config;
    Sinusoids { width, flip_sin_to_cos, freq_shift }
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

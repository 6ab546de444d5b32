//! The embedding of timesteps, and of the guidance scale of UNets that take it as an input.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::networks::config::UNetConfig;
use crate::ops::{Activation, Epilogue, Linear};

/// A sinusoidal embedding and two linear layers.
pub(in crate::networks) struct TimeEmbedding {
    /// The guidance scale's embedding (.., time_cond_proj_dim) -> (.., first), of a UNet that takes
    /// it as an input.
    guidance: Option<(usize, LoraLayer<Linear>)>,
    linear: [LoraLayer<Linear>; 2],
    device: Device,
    dtype: DType,
    width: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
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
            width: first,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
        })
    }

    /// T timesteps, all at one guidance scale -> their embeddings (T, 4 first), with the SiLU with
    /// which every residual block begins.
    pub(in crate::networks) fn forward(
        &self,
        timesteps: &[f64],
        guidance_scale: f64,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let values = self.sinusoids(timesteps.iter().copied());
        let x = Tensor::from_vec(values, (timesteps.len(), self.width), &self.device)?;
        let mut x = x.to_dtype(self.dtype)?;
        if let Some((width, cond_proj)) = &self.guidance {
            let guidance = guidance_embedding(guidance_scale, *width).repeat(timesteps.len());
            let guidance = Tensor::from_vec(guidance, (timesteps.len(), *width), &self.device)?;
            let guidance = guidance.to_dtype(self.dtype)?;
            x = (x + cond_proj.forward(&guidance, Epilogue::NONE, loras)?)?;
        }
        let silu = Epilogue::activation(Activation::Silu);
        Ok(self.linear[1].forward(&self.linear[0].forward(&x, silu, loras)?, silu, loras)?)
    }

    /// The sinusoids (n, width) of n values, row by row. Angles are computed in f32, as in the
    /// reference.
    fn sinusoids(&self, values: impl Iterator<Item = f64>) -> Vec<f32> {
        let half = self.width / 2;
        let scale = -(10_000f64.ln()) / (half as f64 - self.freq_shift);
        let frequencies: Vec<f32> = (0..half).map(|i| (i as f64 * scale).exp() as f32).collect();
        let mut embedded = Vec::new();
        for value in values {
            let angles = frequencies.iter().map(|f| value as f32 * f);
            let (sines, cosines) = (angles.clone().map(f32::sin), angles.map(f32::cos));
            if self.flip_sin_to_cos {
                embedded.extend(cosines.chain(sines));
            } else {
                embedded.extend(sines.chain(cosines));
            }
        }
        embedded
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

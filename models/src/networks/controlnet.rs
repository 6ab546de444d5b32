//! ControlNetModel of Stable Diffusion 1.x, 2.x and XL: a copy of the UNet's way down that sees a
//! control picture, and steers the UNet by what it adds to the skips and to the middle.
//!
//! Zhang, Rao and Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models".
//! Reference: diffusers 0.42 `models/controlnets/controlnet.py`. LoRAs of the UNet are none of its
//! copy, as there.
//!
//! Shapes: B batch rows, H and W latent pixels of a level, C its channels.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

use super::config::{ControlNetConfig, UNetConfig};
use super::resnet::Stack;
use super::unet::{
    AddedEmbedding, BlockBuilder, Conditioning, DOWN, Descended, Descent, Inputs, TimeEmbedding,
};
use crate::error::{Error, Result};
use crate::files::{ControlNetFile, Weights};
use crate::layers::{LayerBuilder, LoraLayer, activation_dtype};
use crate::ops::{
    Activation, Conv2d, Epilogue, Geometry, Linear, cast, cat_rows, channels_last, in_pool, scale,
};
use crate::picture::Rgb;

/// A ControlNet.
pub struct ControlNetModel {
    id: u64,
    name: String,
    config: ControlNetConfig,
    device: Device,
    dtype: DType,
    time: TimeEmbedding,
    /// Of Stable Diffusion XL.
    added: Option<AddedEmbedding>,
    /// (.., 4 first) -> (.., time_width)
    time_proj: LoraLayer<Linear>,
    /// (.., D) -> (.., kv_width); none of a net without attention to the prompt.
    to_kv: Option<LoraLayer<Linear>>,
    hint: Vec<Conv2d>,
    descent: Descent,
    /// Of each skip, and of the middle.
    zero_convs: Vec<Linear>,
    bytes: u64,
    warnings: Vec<String>,
}

/// The batch rows of a call.
pub struct ControlBatch<'a> {
    /// (B, C, H, W) f32, without the further channels of an inpainting UNet.
    pub latents: &'a Tensor,
    /// (B, H, W, first)
    pub hints: &'a Tensor,
    /// (B, time_width)
    pub time_embeddings: &'a Tensor,
    /// Of the rows in their order.
    pub conditioning: &'a [Conditioning],
    /// For each row the factor of each residual.
    pub scales: &'a [&'a [f64]],
}

impl ControlNetModel {
    /// Reads the net of a file for a UNet whose latents have `scale` pixels a side.
    ///
    /// # Errors
    /// Files that are no ControlNet, that of another UNet, and one of more than `max_bytes`.
    pub fn read(
        file: &ControlNetFile,
        (unet, scale): (&UNetConfig, usize),
        (device, dtype): (&Device, DType),
        max_bytes: u64,
    ) -> Result<Self> {
        // Before the weights: another class has them in other files.
        let described = file.config()?.map(ControlNetConfig::parse).transpose()?;
        let weights = file.weights(dtype == DType::F16)?;
        let config = match described {
            Some(config) => config,
            None => ControlNetConfig::infer(&weights, unet, file.pools())?,
        };
        let refuse = |reason| Error::config(weights.file_names(), reason);
        config.check(unet, scale).map_err(refuse)?;
        let bytes = bytes_of(&weights, dtype);
        if bytes > max_bytes {
            return Err(refuse(format!(
                "takes {bytes} bytes of memory; at most {max_bytes} are allowed \
                 (--max-controlnet-bytes)"
            )));
        }
        Self::load(file.name(), config, &weights, device, dtype)
    }

    /// Builds the network from its weights; every tensor must have the shape that `config` says.
    fn load(
        name: String,
        config: ControlNetConfig,
        weights: &Weights,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let p = LayerBuilder::new(weights, device, dtype);
        let activation = activation_dtype(device, dtype);
        let unet = &config.unet;
        let builder = BlockBuilder {
            config: unet,
            time_proj: Stack::new(4 * unet.block_out_channels[0]),
            to_kv: Stack::new(unet.cross_attention_dim),
        };
        let descent = Descent::load(&builder, &p)?;
        let to_kv = Some(builder.to_kv).filter(|stack| !stack.is_empty());
        let added = unet.added.map(|added| {
            AddedEmbedding::load(&p.pp("add_embedding"), unet, added, device, activation)
        });
        let model = Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            name,
            time: TimeEmbedding::load(&p.pp("time_embedding"), unet, device, activation)?,
            added: added.transpose()?,
            time_proj: builder.time_proj.build(&p)?,
            to_kv: to_kv.map(|stack| stack.build(&p)).transpose()?,
            hint: hint_network(&p.pp("controlnet_cond_embedding"), &config)?,
            descent,
            zero_convs: zero_convs(&p, unet)?,
            device: device.clone(),
            dtype: activation,
            bytes: bytes_of(weights, dtype),
            warnings: {
                weights.finish(|_| false);
                weights.warnings()
            },
            config,
        };
        Ok(model)
    }

    /// A unique id of this read, for comparison.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The name by which requests select it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its configuration.
    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// Bytes of its weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is odd about its files.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A control picture -> what is added to `conv_in`'s output (1, H, W, first), which is the same
    /// at every step.
    pub fn hint(&self, picture: &Rgb) -> Result<Tensor> {
        let Rgb { width, height, ref data } = *picture;
        let mut values: Vec<f32> = data.iter().map(|byte| f32::from(*byte) / 255.0).collect();
        if self.config.is_bgr {
            values.chunks_exact_mut(3).for_each(<[f32]>::reverse);
        }
        let picture = Tensor::from_vec(values, (1, height, width, 3), &self.device)?;
        let mut x = cast(&picture, self.dtype)?;
        in_pool(&self.device, || {
            for (i, conv) in self.hint.iter().enumerate() {
                let is_last = i + 1 == self.hint.len();
                let silu = Epilogue::activation(Activation::Silu);
                x = conv.forward(&x, if is_last { Epilogue::NONE } else { silu })?;
            }
            Ok(x)
        })
    }

    /// The conditioning of a batch row by its keys and values here.
    pub fn condition(&self, row: &Conditioning) -> Result<Conditioning> {
        let Inputs { context, added } = row.inputs()?;
        let narrow = cast(&context.contiguous()?, self.dtype)?;
        in_pool(&self.device, || {
            let kv = match &self.to_kv {
                Some(to_kv) => to_kv.forward(&narrow, Epilogue::NONE, &[])?,
                // Nothing of it is read.
                None => narrow,
            };
            let own = match (&self.added, added) {
                (Some(own), Some((pooled, sizes))) => Some(own.forward(pooled, sizes, &[])?),
                _ => None,
            };
            let mut conditioning = Conditioning::new(Arc::new(kv), context.clone());
            conditioning.added = own;
            Ok(conditioning)
        })
    }

    /// T timesteps -> what [`Self::forward`] takes of them (T, width), as of the UNet.
    pub fn time_embeddings(&self, timesteps: &[f64]) -> Result<Tensor> {
        in_pool(&self.device, || {
            let embedded = self.time.forward(timesteps, 1.0, &[])?;
            match self.added {
                None => Ok(self.time_proj.forward(&embedded, Epilogue::NONE, &[])?),
                Some(_) => Ok(embedded),
            }
        })
    }

    /// What is added to each skip, and to the middle: (B, H, W, C), or (B, 1, 1, C) of a net that
    /// pools.
    pub fn forward(&self, batch: &ControlBatch<'_>) -> Result<Vec<Tensor>> {
        in_pool(&self.device, || {
            let times = match self.added {
                None => batch.time_embeddings.clone(),
                Some(_) => {
                    let times = Conditioning::added_to(batch.time_embeddings, batch.conditioning)?;
                    self.time_proj.forward(&times, Epilogue::NONE, &[])?
                }
            };
            let x = channels_last(batch.latents, self.dtype)?;
            let Descended { middle, mut skips } =
                self.descent.forward(&x, Some(batch.hints), &times, batch.conditioning, &[])?;
            skips.push(middle);
            let residual = |(k, (x, conv)): (usize, (Tensor, &Linear))| {
                let residual = scaled(&conv.forward(&x, Epilogue::NONE)?, batch.scales, k)?;
                match self.config.global_pool_conditions {
                    // A mean of f16 is summed in f32.
                    true => {
                        let mean = residual.to_dtype(DType::F32)?.mean_keepdim((1, 2))?;
                        Ok(mean.to_dtype(self.dtype)?)
                    }
                    false => Ok(residual),
                }
            };
            skips.into_iter().zip(&self.zero_convs).enumerate().map(residual).collect()
        })
    }
}

/// Bytes of the weights in a type.
fn bytes_of(weights: &Weights, dtype: DType) -> u64 {
    weights.parameters().saturating_mul(dtype.size_in_bytes() as u64)
}

/// x (B, H, W, C), each row times its k-th factor.
fn scaled(x: &Tensor, scales: &[&[f64]], k: usize) -> Result<Tensor> {
    let factors: Vec<_> = scales.iter().map(|row| row.get(k).copied().unwrap_or(1.0)).collect();
    let times =
        |x: &Tensor, factor: f64| if factor == 1.0 { Ok(x.clone()) } else { scale(x, factor) };
    let first = factors.first().copied().unwrap_or(1.0);
    if factors.iter().all(|factor| *factor == first) {
        return Ok(times(x, first)?);
    }
    // Row by row, so that a row is the same whatever its neighbours' factors are.
    let row = |(row, factor): (usize, &f64)| times(&x.narrow(0, row, 1)?, *factor);
    let rows = factors.iter().enumerate().map(row).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(cat_rows(&rows)?)
}

/// ControlNetConditioningEmbedding: at each level a convolution, and one that halves the sides.
fn hint_network(p: &LayerBuilder<'_>, config: &ControlNetConfig) -> Result<Vec<Conv2d>> {
    let channels = &config.hint_channels;
    let mut convs = vec![p.pp("conv_in").conv(3, channels[0], Geometry::SAME)?];
    for (i, pair) in channels.windows(2).enumerate() {
        let blocks = p.pp("blocks");
        convs.push(blocks.pp(2 * i).conv(pair[0], pair[0], Geometry::SAME)?);
        convs.push(blocks.pp(2 * i + 1).conv(pair[0], pair[1], DOWN)?);
    }
    let last = channels[channels.len() - 1];
    let first = config.unet.block_out_channels[0];
    convs.push(p.pp("conv_out").conv(last, first, Geometry::SAME)?);
    Ok(convs)
}

/// The 1x1 convolutions of the skips, in the order in which they are computed, and of the middle.
fn zero_convs(p: &LayerBuilder<'_>, unet: &UNetConfig) -> Result<Vec<Linear>> {
    let channels = &unet.block_out_channels;
    let mut widths = vec![channels[0]];
    for (level, width) in channels.iter().enumerate() {
        let downsample = usize::from(level + 1 < channels.len());
        widths.extend(std::iter::repeat_n(*width, unet.layers_per_block + downsample));
    }
    let p_skips = p.pp("controlnet_down_blocks");
    let skips = widths.iter().enumerate().map(|(i, c)| p_skips.pp(i).linear_or_conv(*c, *c, true));
    let last = channels[channels.len() - 1];
    let middle = p.pp("controlnet_mid_block").linear_or_conv(last, last, true);
    skips.chain(std::iter::once(middle)).collect()
}

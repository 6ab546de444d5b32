//! UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, but for the residual block, which is in
//! [`super::resnet`].
//!
//! Reference: diffusers 0.42 `models/unets/unet_2d_condition.py`, `unet_2d_blocks.py`,
//! `transformers/transformer_2d.py` and `attention.py`, as far as [`UNetConfig`] can express it.
//!
//! Shapes: B batch rows, H and W latent pixels of a level, C its channels, L = H W tokens, M tokens
//! of a prompt. Activations are channels-last. Each row has its own timestep and conditioning, and
//! `loras` holds the LoRAs of each row, or nothing if no row has any.

mod blocks;
mod conditioning;
mod descent;
mod residuals;
mod time;
mod transformer;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use self::blocks::UpBlock;
pub(super) use self::blocks::{BlockBuilder, DOWN};
pub use self::conditioning::Conditioning;
pub(super) use self::conditioning::Inputs;
pub(super) use self::descent::{Descended, Descent};
pub use self::residuals::Residuals;
pub(super) use self::time::{AddedEmbedding, TimeEmbedding};
use crate::error::Result;
use crate::files::Weights;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack, activation_dtype};
use crate::networks::config::UNetConfig;
use crate::networks::resnet::Stack;
use crate::ops::{
    ChannelConcat, Conv2d, Epilogue, Geometry, GroupNorm, Linear, cast, channels_first,
    channels_last, in_pool,
};

/// The denoising network.
pub struct UNet2DConditionModel {
    config: UNetConfig,
    device: Device,
    dtype: DType,
    time: TimeEmbedding,
    /// Of Stable Diffusion XL.
    added: Option<AddedEmbedding>,
    /// The time projections of all residual blocks: (.., 4 first) -> (.., time_width)
    time_proj: LoraLayer<Linear>,
    /// The key and value projections of all cross attentions: (.., D) -> (.., kv_width)
    to_kv: LoraLayer<Linear>,
    descent: Descent,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: LoraLayer<Conv2d>,
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
        let activation = activation_dtype(device, dtype);
        let channels = &config.block_out_channels;
        let first = channels[0];
        let temb = 4 * first;
        let builder = BlockBuilder {
            config: &config,
            time_proj: Stack::new(temb),
            to_kv: Stack::new(config.cross_attention_dim),
        };
        let descent = Descent::load(&builder, &p)?;
        let up = builder.up_blocks(&p.pp("up_blocks"))?;
        let added = config.added.map(|added| {
            AddedEmbedding::load(&p.pp("add_embedding"), &config, added, device, activation)
        });
        let model = Self {
            added: added.transpose()?,
            time_proj: builder.time_proj.build(&p)?,
            to_kv: builder.to_kv.build(&p)?,
            time: TimeEmbedding::load(&p.pp("time_embedding"), &config, device, activation)?,
            descent,
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
            dtype: activation,
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

    /// The last dimension of [`Self::time_embeddings`].
    pub(crate) fn time_width(&self) -> usize {
        match self.added {
            None => self.time_proj.outputs(),
            Some(_) => 4 * self.config.block_out_channels[0],
        }
    }

    /// Keys and values of all cross attentions (B, M, kv_width), which are the same at every step,
    /// from the text encoders' hidden states (B, M, D) f32.
    pub(crate) fn keys_values(&self, context: &Tensor, loras: &[LoraStack]) -> Result<Tensor> {
        let context = cast(&context.contiguous()?, self.dtype)?;
        in_pool(&self.device, || Ok(self.to_kv.forward(&context, Epilogue::NONE, loras)?))
    }

    /// The conditioning on a prompt whose keys and values are known, with its hidden states
    /// (B, M, D) f32.
    pub(crate) fn on_prompt(&self, kv: Arc<Tensor>, context: &Tensor) -> Result<Conditioning> {
        Ok(Conditioning::new(kv, cast(&context.contiguous()?, self.dtype)?))
    }

    /// The conditioning for [`Self::forward`] from the text encoders' hidden states (B, M, D) f32.
    /// A UNet that takes pooled prompts and sizes needs [`Self::add`] too.
    pub fn condition(&self, context: &Tensor, loras: &[LoraStack]) -> Result<Conditioning> {
        self.on_prompt(Arc::new(self.keys_values(context, loras)?), context)
    }

    /// The conditioning of one row with a pooled prompt (1, P) f32 and its sizes in pixels: height
    /// and width of the original, top and left of the crop, height and width of the target, or in
    /// their place the score of a refiner. A UNet that takes none is given none.
    pub fn add(
        &self,
        mut conditioning: Conditioning,
        pooled: &Tensor,
        sizes: &[f64],
        loras: &[LoraStack],
    ) -> Result<Conditioning> {
        let embed =
            |added: &AddedEmbedding| in_pool(&self.device, || added.forward(pooled, sizes, loras));
        conditioning.added = self.added.as_ref().map(embed).transpose()?;
        if let Some(inputs) = &mut conditioning.inputs {
            inputs.added = Some((pooled.clone(), sizes.to_vec()));
        }
        Ok(conditioning)
    }

    /// T timesteps -> what [`Self::forward`] takes of them (T, width): the time embeddings of all
    /// residual blocks, or that to which the conditions are added. Those of a schedule are known
    /// before its first step. A UNet that takes the guidance scale as an input gets 1.
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
            let embedded = self.time.forward(timesteps, guidance_scale, loras)?;
            match self.added {
                None => Ok(self.time_proj.forward(&embedded, Epilogue::NONE, loras)?),
                Some(_) => Ok(embedded),
            }
        })
    }

    /// Latents (B, C, H, W) f32, [`Self::time_embeddings`] (B, width) and the conditioning of the rows
    /// in their order, whose entries may differ in M -> the prediction (B, C, H, W) f32.
    pub fn forward(
        &self,
        latents: &Tensor,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let none = Residuals::default();
        self.forward_controlled(latents, time_embeddings, conditioning, loras, &none)
    }

    /// The same with what ControlNets add.
    pub fn forward_controlled(
        &self,
        latents: &Tensor,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
        residuals: &Residuals,
    ) -> Result<Tensor> {
        in_pool(&self.device, || {
            self.predict(latents, time_embeddings, conditioning, loras, residuals)
        })
    }

    fn predict(
        &self,
        latents: &Tensor,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
        residuals: &Residuals,
    ) -> Result<Tensor> {
        let projected = match self.added {
            None => time_embeddings.clone(),
            Some(_) => {
                let embedded = Conditioning::added_to(time_embeddings, conditioning)?;
                self.time_proj.forward(&embedded, Epilogue::NONE, loras)?
            }
        };
        let time_embeddings = &projected;
        // 1. In, down and the middle
        let x = channels_last(latents, self.dtype)?;
        let mut descended = self.descent.forward(&x, None, time_embeddings, conditioning, loras)?;
        // 2. ControlNets
        residuals.add_to(&mut descended)?;
        let Descended { middle: mut x, mut skips } = descended;
        // 3. Up
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
        // 4. Out
        let x = self.conv_out.forward(&self.norm_out.forward_silu(&x)?, Epilogue::NONE, loras)?;
        Ok(channels_first(&x)?)
    }
}

//! The way down and the middle of the UNet, of which a ControlNet has a copy.

use candle_core::Tensor;

use super::blocks::{BlockBuilder, DownBlock, MiddleBlock};
use super::conditioning::Conditioning;
use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer, LoraStack};
use crate::ops::{Conv2d, Epilogue, Geometry};

/// `conv_in`, the down blocks and the middle block.
pub(in crate::networks) struct Descent {
    conv_in: LoraLayer<Conv2d>,
    down: Vec<DownBlock>,
    /// Distilled models have none.
    mid: Option<MiddleBlock>,
}

/// What is computed on the way down.
pub(in crate::networks) struct Descended {
    /// The middle's output (B, H, W, C).
    pub(in crate::networks) middle: Tensor,
    /// The skips, in the order in which they are computed: (B, H, W, C) each.
    pub(in crate::networks) skips: Vec<Tensor>,
}

impl Descent {
    pub(in crate::networks) fn load<'w>(
        builder: &BlockBuilder<'_, 'w>,
        p: &LayerBuilder<'w>,
    ) -> Result<Self> {
        let config = builder.config;
        let first = config.block_out_channels[0];
        let down = builder.down_blocks(&p.pp("down_blocks"))?;
        let mid = builder.mid_block(&p.pp("mid_block"))?;
        let conv_in = p.pp("conv_in");
        let conv_in = LoraLayer::conv(&conv_in, config.in_channels, first, Geometry::SAME)?;
        Ok(Self { conv_in, down, mid })
    }

    /// Latents (B, H, W, in), and what is added to `conv_in`'s output (B, H, W, first).
    pub(in crate::networks) fn forward(
        &self,
        latents: &Tensor,
        added: Option<&Tensor>,
        time_embeddings: &Tensor,
        conditioning: &[Conditioning],
        loras: &[LoraStack],
    ) -> Result<Descended> {
        let epilogue = added.map_or(Epilogue::NONE, Epilogue::residual);
        let mut x = self.conv_in.forward(latents, epilogue, loras)?; // (B, H, W, first)
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
        if let Some(MiddleBlock { first, rest }) = &self.mid {
            x = first.forward(&(&x).into(), time_embeddings, loras)?;
            if let Some((transformer, second)) = rest {
                x = transformer.forward(&x, conditioning, loras)?;
                x = second.forward(&(&x).into(), time_embeddings, loras)?;
            }
        }
        Ok(Descended { middle: x, skips })
    }
}

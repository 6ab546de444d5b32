//! The blocks of the way down and of the way up, and how they are built.

use super::transformer::Transformer;
use crate::error::Result;
use crate::layers::{LayerBuilder, LoraLayer};
use crate::networks::config::{MidBlock, UNetConfig};
use crate::networks::resnet::{Norm, Resnet, Stack};
use crate::ops::{Conv2d, Geometry};

/// 3x3, stride 2.
pub(in crate::networks) const DOWN: Geometry =
    Geometry { kernel: 3, stride: 2, before: 1, after: 1 };

pub(super) struct DownBlock {
    pub(super) layers: Vec<(Resnet, Option<Transformer>)>,
    pub(super) downsample: Option<LoraLayer<Conv2d>>,
}

/// A residual block, and a transformer and a second one, where there are.
pub(super) struct MiddleBlock {
    pub(super) first: Resnet,
    pub(super) rest: Option<(Transformer, Resnet)>,
}

pub(super) struct UpBlock {
    pub(super) layers: Vec<(Resnet, Option<Transformer>)>,
    pub(super) upsample: Option<LoraLayer<Conv2d>>,
}

/// Builds the blocks, and gathers the layers that one product computes for all of them.
pub(in crate::networks) struct BlockBuilder<'a, 'w> {
    pub(in crate::networks) config: &'a UNetConfig,
    pub(in crate::networks) time_proj: Stack<'w>,
    pub(in crate::networks) to_kv: Stack<'w>,
}

impl<'w> BlockBuilder<'_, 'w> {
    pub(super) fn down_blocks(&self, p: &LayerBuilder<'w>) -> Result<Vec<DownBlock>> {
        let channels = &self.config.block_out_channels;
        let mut inputs = channels[0];
        let mut blocks = Vec::new();
        for (level, outputs) in channels.iter().copied().enumerate() {
            let p = p.pp(level);
            let mut layers = Vec::new();
            for i in 0..self.config.layers_per_block {
                let resnet = self.resnet(&p.pp("resnets").pp(i), inputs, outputs)?;
                let cross = self.config.down_cross_attention[level];
                layers.push((
                    resnet,
                    self.maybe_transformer(
                        &p,
                        i,
                        level,
                        cross.then_some(self.config.down_depths[level][i]),
                    )?,
                ));
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

    pub(super) fn mid_block(&self, p: &LayerBuilder<'w>) -> Result<Option<MiddleBlock>> {
        let level = self.config.block_out_channels.len() - 1;
        let channels = self.config.block_out_channels[level];
        let resnet = |i| self.resnet(&p.pp("resnets").pp(i), channels, channels);
        Ok(match self.config.mid_block {
            MidBlock::Absent => None,
            MidBlock::Plain => Some(MiddleBlock { first: resnet(0)?, rest: None }),
            MidBlock::CrossAttention => {
                let (p, first) = (p.pp("attentions").pp(0), resnet(0)?);
                let transformer = self.transformer(&p, level, self.config.mid_depth)?;
                Some(MiddleBlock { first, rest: Some((transformer, resnet(1)?)) })
            }
        })
    }

    pub(super) fn up_blocks(&self, p: &LayerBuilder<'w>) -> Result<Vec<UpBlock>> {
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
                layers.push((
                    resnet,
                    self.maybe_transformer(
                        &p,
                        j,
                        level,
                        cross.then_some(self.config.up_depths[i][j]),
                    )?,
                ));
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
        depth: Option<usize>,
    ) -> Result<Option<Transformer>> {
        let p = p.pp("attentions").pp(index);
        depth.map(|depth| self.transformer(&p, level, depth)).transpose()
    }

    /// A transformer of so many blocks.
    fn transformer(&self, p: &LayerBuilder<'w>, level: usize, depth: usize) -> Result<Transformer> {
        Transformer::load(p, self.config, (level, depth), &self.to_kv)
    }
}

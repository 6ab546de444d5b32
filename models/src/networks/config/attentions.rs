//! The cross attentions of a UNet, in the order in which it computes their keys and values.

use super::unet::{MidBlock, UNetConfig};

/// A part of a UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UNetPart {
    /// The way down.
    Down,
    /// The middle.
    Middle,
    /// The way up.
    Up,
}

/// A cross attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CrossAttentionPlace {
    pub(crate) part: UNetPart,
    /// Its block, and the transformer there that it is in.
    pub(crate) block: usize,
    pub(crate) layer: usize,
    /// Channels of its keys, and of its values.
    pub(crate) channels: usize,
}

impl UNetConfig {
    /// All cross attentions.
    pub(crate) fn cross_attentions(&self) -> Vec<CrossAttentionPlace> {
        let mut places = Vec::new();
        let mut add = |part, block, layer, channels, depth| {
            let place = CrossAttentionPlace { part, block, layer, channels };
            places.extend(std::iter::repeat_n(place, depth));
        };
        let channels = &self.block_out_channels;
        let last = channels.len().saturating_sub(1);
        for (block, depths) in self.down_depths.iter().enumerate() {
            if self.down_cross_attention[block] {
                for (layer, depth) in depths.iter().enumerate() {
                    add(UNetPart::Down, block, layer, channels[block], *depth);
                }
            }
        }
        if self.mid_block == MidBlock::CrossAttention {
            add(UNetPart::Middle, 0, 0, channels[last], self.mid_depth);
        }
        for (block, depths) in self.up_depths.iter().enumerate() {
            if self.up_cross_attention[block] {
                for (layer, depth) in depths.iter().enumerate() {
                    add(UNetPart::Up, block, layer, channels[last - block], *depth);
                }
            }
        }
        places
    }
}

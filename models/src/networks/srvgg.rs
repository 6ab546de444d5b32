//! SRVGGNetCompact: convolutions with PReLU at the size of the input, whose last outputs are the
//! pixels of the output, added to the input.
//!
//! Reference: BasicSR `archs/srvgg_arch.py` (Real-ESRGAN's `realesr-general-x4v3`,
//! `realesr-animevideov3`).

use candle_core::Tensor;

use super::pixels::pixel_shuffle;
use crate::error::{Error, Result};
use crate::files::Weights;
use crate::layers::LayerBuilder;
use crate::ops::{Conv2d, Epilogue, Geometry};

pub(super) struct Srvgg {
    /// Each with the slopes of its PReLU (features).
    convs: Vec<(Conv2d, Tensor)>,
    last: Conv2d,
    scale: usize,
    features: usize,
}

impl Srvgg {
    /// Names that only this network has.
    pub(super) const MARKS: [&str; 3] = ["body.0.weight", "body.1.weight", "body.2.weight"];

    /// The network and its scale.
    pub(super) fn load(p: &LayerBuilder<'_>, weights: &Weights) -> Result<(Self, usize)> {
        let layer = |i: usize| p.pp("body").pp(i);
        let count = (0..).take_while(|i| layer(*i).has("weight")).count();
        // Layers and PReLUs in turn, and one more layer.
        let last = count - 1;
        let outputs = layer(last).side("weight", 0);
        let features = layer(0).side("weight", 0);
        let scale = (1..=16).find(|scale| 3 * scale * scale == outputs);
        let (Some(scale), true) = (scale, last.is_multiple_of(2) && features > 0) else {
            let reason = format!(
                "has {count} layers of {features} channels in its body, whose last has {outputs}"
            );
            return Err(Error::config(weights.file_names(), reason));
        };
        let mut convs = Vec::new();
        for i in (0..last).step_by(2) {
            let inputs = if i == 0 { 3 } else { features };
            let conv = layer(i).conv(inputs, features, Geometry::SAME)?;
            convs.push((conv, layer(i + 1).placed("weight", &[features])?));
        }
        let last = layer(last).conv(features, outputs, Geometry::SAME)?;
        Ok((Self { convs, last, scale, features }, scale))
    }

    /// Bytes of the weights as they are stored.
    pub(super) fn bytes(&self) -> usize {
        let convs = self.convs.iter().map(|(conv, _)| conv.bytes());
        convs.sum::<usize>() + self.last.bytes()
    }

    /// Values per pixel of the input at the widest point.
    pub(super) fn widest(&self) -> usize {
        self.features.max(3 * self.scale * self.scale)
    }

    /// (B, H, W, 3) -> (B, s H, s W, 3)
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.clone();
        for (conv, slopes) in &self.convs {
            y = conv.forward(&y, Epilogue::NONE)?;
            let below = y.neg()?.relu()?.broadcast_mul(slopes)?;
            y = (y.relu()? - below)?;
        }
        let y = pixel_shuffle(&self.last.forward(&y, Epilogue::NONE)?, self.scale)?;
        let (batch, h, w, c) = x.dims4()?;
        let s = self.scale;
        let nearest = x.reshape((batch, h, 1, w, 1, c))?.broadcast_as((batch, h, s, w, s, c))?;
        Ok((y + nearest.contiguous()?.reshape((batch, s * h, s * w, c))?)?)
    }
}

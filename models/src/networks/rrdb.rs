//! RRDBNet: residual in residual dense blocks, then for each doubling of the size a convolution of
//! the picture enlarged by nearest neighbours.
//!
//! Reference: BasicSR `archs/rrdbnet_arch.py`; ESRGAN's first code for the old names; ESRGAN+ for
//! the 1x1 convolutions of its blocks. Real-ESRGAN's models for 2x and 1x see 2x2 or 4x4 pixels as
//! the channels of one.

use candle_core::Tensor;

use super::pixels::pixel_unshuffle;
use crate::error::{Error, Result};
use crate::files::Weights;
use crate::layers::LayerBuilder;
use crate::ops::{Activation, ChannelConcat, Conv2d, Epilogue, Geometry, linear_combination};

/// How much of what a block computes is added to its input.
const RESIDUAL: f64 = 0.2;

/// The most channels of a layer; published networks have 64.
const MAX_CHANNELS: usize = 4096;

const LEAKY: Epilogue<'static> =
    Epilogue { shift: None, residual: None, activation: Some(Activation::LeakyRelu) };

/// The names of the layers in a kind of files.
pub(super) struct Names {
    /// Names that tell the kind.
    pub(super) marks: &'static [&'static str],
    first: &'static str,
    /// The list of blocks, and the first letters of a dense block.
    blocks: (&'static str, &'static str),
    /// What stands behind the name of a dense block's convolution.
    conv_end: &'static str,
    trunk: &'static str,
    up: &'static str,
    hr: &'static str,
    last: &'static str,
}

pub(super) struct Rrdb {
    /// Pixels along a side that are the channels of one.
    unshuffle: usize,
    first: Conv2d,
    blocks: Vec<[DenseBlock; 3]>,
    trunk: Conv2d,
    up: Vec<Conv2d>,
    hr: Conv2d,
    last: Conv2d,
    features: usize,
    growth: usize,
}

impl Rrdb {
    pub(super) const NAMES: &'static [Names] = &[
        Names {
            marks: &["conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"],
            first: "conv_first",
            blocks: ("body", "rdb"),
            conv_end: "",
            trunk: "conv_body",
            up: "conv_up",
            hr: "conv_hr",
            last: "conv_last",
        },
        Names {
            marks: &["conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "conv_last.weight"],
            first: "conv_first",
            blocks: ("RRDB_trunk", "RDB"),
            conv_end: "",
            trunk: "trunk_conv",
            up: "upconv",
            hr: "HRconv",
            last: "conv_last",
        },
        // A list of layers by their numbers: `up`, `hr` and `last` are among them.
        Names {
            marks: &["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
            first: "model.0",
            blocks: ("model.1.sub", "RDB"),
            conv_end: ".0",
            trunk: "model.1.sub",
            up: "",
            hr: "",
            last: "",
        },
    ];

    /// The network and its scale.
    pub(super) fn load(
        p: &LayerBuilder<'_>,
        weights: &Weights,
        names: &Names,
    ) -> Result<(Self, usize)> {
        let refuse = |reason: String| Err(Error::config(weights.file_names(), reason));
        let first = p.pp(names.first);
        let (features, inputs) = (first.side("weight", 0), first.side("weight", 1));
        let (blocks, dense) = names.blocks;
        let block = |i: usize, k: usize| p.pp(blocks).pp(i).pp(format!("{dense}{k}"));
        let conv = |i, k, c: usize| block(i, k).pp(format!("conv{c}{}", names.conv_end));
        let growth = conv(0, 1, 1).side("weight", 0);
        let count = (0..).take_while(|i| conv(*i, 1, 1).has("weight")).count();
        let numbered = names.hr.is_empty();
        let trunk = if numbered { p.pp(names.trunk).pp(count) } else { p.pp(names.trunk) };
        let (up, hr, last) = if numbered {
            let layer = |i: usize| p.pp("model").pp(i);
            let layers: Vec<_> = (2..64).filter(|i| layer(*i).has("weight")).collect();
            let [up @ .., hr, last] = &layers[..] else {
                return refuse("is an RRDBNet without its last layers".into());
            };
            // An enlarging, a convolution and an activation each.
            if up.iter().zip(1..).any(|(layer, nth)| *layer != 3 * nth) {
                return refuse(format!("has layers {layers:?}, which is no RRDBNet that is known"));
            }
            (up.iter().map(|i| layer(*i)).collect(), layer(*hr), layer(*last))
        } else {
            let up = (1..).map(|i| p.pp(format!("{}{i}", names.up)));
            (up.take_while(|up| up.has("weight")).collect(), p.pp(names.hr), p.pp(names.last))
        };
        let up: Vec<LayerBuilder<'_>> = up;
        let unshuffle = match inputs {
            3 => 1,
            12 => 2,
            48 => 4,
            other => return refuse(format!("reads {other} channels; expected 3, 12 or 48")),
        };
        if ![features, growth].iter().all(|channels| (1..=MAX_CHANNELS).contains(channels)) {
            return refuse(format!(
                "has layers of {features} and {growth} channels; 1 to {MAX_CHANNELS} are supported"
            ));
        }
        let enlarged = 1_usize << up.len().min(16);
        if enlarged < unshuffle {
            return refuse(format!("makes pictures smaller: {enlarged} of {unshuffle} pixels"));
        }
        let same = |p: &LayerBuilder<'_>, inputs, outputs| p.conv(inputs, outputs, Geometry::SAME);
        let mut loaded = Vec::new();
        for i in 0..count {
            let dense = |k| {
                let convs = [1, 2, 3, 4, 5].map(|c| conv(i, k, c));
                DenseBlock::load(&convs, &block(i, k).pp("conv1x1"), features, growth)
            };
            loaded.push([dense(1)?, dense(2)?, dense(3)?]);
        }
        let up = up.iter().map(|p| same(p, features, features));
        let network = Self {
            unshuffle,
            first: same(&first, inputs, features)?,
            blocks: loaded,
            trunk: same(&trunk, features, features)?,
            up: up.collect::<Result<_>>()?,
            hr: same(&hr, features, features)?,
            last: same(&last, features, 3)?,
            features,
            growth,
        };
        Ok((network, enlarged / unshuffle))
    }

    /// Bytes of the weights as they are stored.
    pub(super) fn bytes(&self) -> usize {
        let dense = self.blocks.iter().flatten();
        let dense = dense.flat_map(|dense| dense.convs.iter().chain(&dense.shortcut));
        let rest = [&self.first, &self.trunk, &self.hr, &self.last].into_iter().chain(&self.up);
        dense.chain(rest).map(Conv2d::bytes).sum()
    }

    /// Values per pixel of the output at the widest point; of the input's where that is wider.
    pub(super) fn widest(&self) -> usize {
        let enlarged = (1 << self.up.len()) / self.unshuffle;
        let dense = (self.features + 4 * self.growth).div_ceil(self.unshuffle.pow(2));
        self.features.max(dense.div_ceil(enlarged * enlarged))
    }

    /// (B, H, W, 3) -> (B, s H, s W, 3)
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        let x = match self.unshuffle {
            1 => x.clone(),
            factor => pixel_unshuffle(&reflected(x, factor)?, factor)?,
        };
        let first = self.first.forward(&x, Epilogue::NONE)?;
        let mut y = first.clone();
        for [one, two, three] in &self.blocks {
            let inner = three.forward(&two.forward(&one.forward(&y)?)?)?;
            y = linear_combination(&[(RESIDUAL, &inner), (1.0, &y)])?;
        }
        y = self.trunk.forward(&y, Epilogue::residual(&first))?;
        drop(first);
        for up in &self.up {
            let (_, h, w, _) = y.dims4()?;
            y = up.forward_resized(&y, (2 * h, 2 * w), LEAKY)?;
        }
        y = self.last.forward(&self.hr.forward(&y, LEAKY)?, Epilogue::NONE)?;
        if self.unshuffle == 1 {
            return Ok(y);
        }
        let scale = (1 << self.up.len()) / self.unshuffle;
        Ok(y.narrow(1, 0, scale * h)?.narrow(2, 0, scale * w)?.contiguous()?)
    }
}

/// A residual dense block: each of five convolutions sees the outputs of all before it.
struct DenseBlock {
    convs: [Conv2d; 5],
    /// Of ESRGAN+: a shortcut past the second convolution, without a bias.
    shortcut: Option<Conv2d>,
}

impl DenseBlock {
    fn load(
        convs: &[LayerBuilder<'_>; 5],
        shortcut: &LayerBuilder<'_>,
        features: usize,
        growth: usize,
    ) -> Result<Self> {
        let same = |i: usize| convs[i].conv(features + i * growth, growth, Geometry::SAME);
        // The share of the residual is in the weights of the last.
        let last =
            convs[4].scaled_conv((features + 4 * growth, features), Geometry::SAME, RESIDUAL)?;
        let shortcut = shortcut
            .has("weight")
            .then(|| shortcut.conv_without_bias(features, growth, Geometry::POINT))
            .transpose()?;
        Ok(Self { convs: [same(0)?, same(1)?, same(2)?, same(3)?, last], shortcut })
    }

    /// (B, H, W, features) -> (B, H, W, features)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, third, fourth, last] = &self.convs;
        let joined = |a: &Tensor, b: &Tensor| ChannelConcat::new(a, b);
        let one = first.forward(x, LEAKY)?;
        let seen = joined(x, &one)?;
        let mut two = second.forward(&seen, LEAKY)?;
        if let Some(shortcut) = &self.shortcut {
            two = (two + shortcut.forward(x, Epilogue::NONE)?)?;
        }
        let seen = joined(&seen.whole()?, &two)?;
        let three = third.forward(&seen, LEAKY)?;
        let seen = joined(&seen.whole()?, &three)?;
        let mut four = fourth.forward(&seen, LEAKY)?;
        if self.shortcut.is_some() {
            four = (four + two)?;
        }
        let seen = joined(&seen.whole()?, &four)?;
        Ok(last.forward(&seen, Epilogue::residual(x))?)
    }
}

/// The picture (B, H, W, C) with sides that are multiples of `factor`: its last rows and columns are
/// mirrored beyond the edge, without those at the edge.
fn reflected(x: &Tensor, factor: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [1, 2] {
        let side = x.dim(dim)?;
        let beyond = side.next_multiple_of(factor) - side;
        if beyond > 0 {
            let at: Vec<_> = (1..=beyond).map(|k| (side - 1).saturating_sub(k) as u32).collect();
            let mirrored = x.index_select(&Tensor::new(at, x.device())?, dim)?;
            x = Tensor::cat(&[&x, &mirrored], dim)?;
        }
    }
    Ok(x)
}

//! Layers whose outputs LoRAs add to, row by row of a batch: y + scale * delta(x). The files of LoRAs
//! are read in [`super::lora`].
//!
//! The weights themselves never change, so that rows with other LoRAs, and rows with none, are
//! computed together. Where no row has a LoRA nothing else is computed.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::builder::LayerBuilder;
use super::lora::Lora;
use super::lora_names::Network;
use super::placed_delta::PlacedDelta;
use crate::error;
use crate::files::{AssetFile, LoraTarget};
use crate::ops::{ChannelConcat, Conv2d, Epilogue, Geometry, Linear, add};

/// A LoRA and its scales.
#[derive(Clone)]
pub(crate) struct ScaledLora {
    pub(crate) lora: Arc<Lora>,
    /// In the UNet.
    pub(crate) unet: f64,
    /// In the text encoder.
    pub(crate) text: f64,
}

/// The LoRAs of a batch row and their scales.
#[derive(Clone, Default)]
pub struct LoraStack(Vec<ScaledLora>);

impl LoraStack {
    pub(crate) fn new(loras: Vec<ScaledLora>) -> Self {
        Self(loras)
    }

    /// The files of the LoRAs, in the versions that were read.
    pub(crate) fn files(&self) -> Vec<AssetFile> {
        self.0.iter().map(|scaled| scaled.lora.file().clone()).collect()
    }

    /// What of the files is not applied, or assumed.
    pub(crate) fn warnings(&self) -> impl Iterator<Item = String> {
        self.0.iter().flat_map(|ScaledLora { lora, .. }| {
            let name = &lora.file().name;
            lora.warnings().iter().map(move |warning| format!("the LoRA {name:?} {warning}"))
        })
    }

    /// A cache key: ids, and the bits of scales.
    pub(crate) fn key(&self) -> Vec<(u64, [u64; 2])> {
        let bits = |scaled: &ScaledLora| [scaled.unet.to_bits(), scaled.text.to_bits()];
        self.0.iter().map(|scaled| (scaled.lora.id(), bits(scaled))).collect()
    }
}

impl PartialEq for LoraStack {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

/// A layer and the names of its weights.
pub(crate) struct LoraLayer<L> {
    layer: L,
    /// Weights that are computed as one layer, their outputs concatenated.
    parts: Vec<Part>,
}

/// The name of a weight and its outputs.
pub(crate) struct Part {
    name: String,
    outputs: usize,
}

impl Part {
    /// The weight at this place in the tree.
    pub(crate) fn at(p: &LayerBuilder<'_>, target: LoraTarget) -> Self {
        Self { name: p.lora_target(target), outputs: target.outputs }
    }
}

impl<L> LoraLayer<L> {
    /// Channels of the output.
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.outputs).sum()
    }

    /// What LoRAs add to the outputs, if anything. `add` computes what one adds for some rows
    /// (first, count) at a scale, beside the sum of those before it.
    fn delta(
        &self,
        rows: &[LoraStack],
        add: impl Fn(&PlacedDelta, (usize, usize), f64, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let (mut first, mut deltas) = (0, Vec::new());
        for run in rows.chunk_by(PartialEq::eq) {
            let mut parts = Vec::new();
            for Part { name, outputs } in &self.parts {
                let mut sum: Option<Tensor> = None;
                for ScaledLora { lora, unet, text } in &run[0].0 {
                    let Some((network, delta)) = lora.delta(name) else { continue };
                    let scale = if *network == Network::UNet { *unet } else { *text };
                    sum = Some(add(delta, (first, run.len()), scale, sum.as_ref())?);
                }
                parts.push((*outputs, sum));
            }
            deltas.push((run.len(), concat(parts, true)?));
            first += run.len();
        }
        concat(deltas, false)
    }
}

/// Concatenates tensors of the given sizes in the last dimension or in the first, with zeros where
/// there is none; `None` where there is none at all.
fn concat(pieces: Vec<(usize, Option<Tensor>)>, last: bool) -> Result<Option<Tensor>> {
    let Some(like) = pieces.iter().find_map(|(_, piece)| piece.clone()) else { return Ok(None) };
    let dim = if last { like.rank() - 1 } else { 0 };
    let fill = |(size, piece): (usize, Option<Tensor>)| match piece {
        Some(piece) => Ok(piece),
        None => {
            let mut shape = like.dims().to_vec();
            shape[dim] = size;
            Tensor::zeros(shape, like.dtype(), like.device())
        }
    };
    let pieces = pieces.into_iter().map(fill).collect::<Result<Vec<_>>>()?;
    match &pieces[..] {
        [one] => Ok(Some(one.clone())),
        several => Tensor::cat(several, dim)?.contiguous().map(Some),
    }
}

fn plus(y: Tensor, delta: Option<Tensor>) -> Result<Tensor> {
    match delta {
        None => Ok(y),
        Some(delta) => add(&y, &delta),
    }
}

impl LoraLayer<Linear> {
    pub(crate) fn linear(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, outputs));
        Ok(Self::new(p.linear(inputs, outputs)?, vec![part]))
    }

    /// Several over one input, their outputs concatenated.
    pub(crate) fn linears(
        p: &LayerBuilder<'_>,
        names: &[&str],
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> error::Result<Self> {
        let part = |name| Part::at(&p.pp(name), LoraTarget::linear(inputs, outputs));
        let parts = names.iter().map(part).collect();
        Ok(Self::new(p.linears(names, inputs, outputs, bias)?, parts))
    }

    /// Without a bias, from a weight that may be stored the other way round, without `.weight` in its
    /// name.
    pub(crate) fn projection(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, outputs));
        Ok(Self::new(p.projection(inputs, outputs)?, vec![part]))
    }

    pub(crate) fn linear_or_conv(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
        conv: bool,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, outputs));
        Ok(Self::new(p.linear_or_conv(inputs, outputs, conv)?, vec![part]))
    }

    pub(crate) fn geglu(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, 2 * outputs));
        Ok(Self::new(p.geglu(inputs, outputs)?, vec![part]))
    }

    pub(crate) fn new(layer: Linear, parts: Vec<Part>) -> Self {
        Self { layer, parts }
    }

    /// Whether operands are rounded to bf16 and multiplied by AMX.
    pub(crate) fn uses_amx(&self) -> bool {
        self.layer.uses_amx()
    }

    /// x (B, .., in) -> (B, .., out). LoRAs add before an activation or a gate.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        epilogue: Epilogue<'_>,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        let delta = |x: &Tensor, rows: &[LoraStack]| {
            self.delta(rows, |delta, (first, count), scale, sum| {
                delta.linear(&x.narrow(0, first, count)?, scale, sum)
            })
        };
        if self.layer.is_linear(epilogue) {
            return plus(self.layer.forward(x, epilogue)?, delta(x, rows)?);
        }
        if epilogue.residual.is_some() {
            bail!("a residual before an activation leaves no place for LoRAs");
        }
        // Rows with LoRAs are computed apart, so that the others are computed as ever.
        let (mut first, mut outputs) = (0, Vec::new());
        for run in rows.chunk_by(PartialEq::eq) {
            let x = x.narrow(0, first, run.len())?;
            let delta = delta(&x, run)?;
            let epilogue = Epilogue { residual: delta.as_ref(), ..epilogue };
            outputs.push(self.layer.forward(&x, epilogue)?);
            first += run.len();
        }
        match &outputs[..] {
            [] => self.layer.forward(x, epilogue),
            [one] => Ok(one.clone()),
            several => Tensor::cat(several, 0),
        }
    }
}

impl LoraLayer<Conv2d> {
    pub(crate) fn conv(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
        geometry: Geometry,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget { inputs, outputs, geometry: Some(geometry) });
        Ok(Self { layer: p.conv(inputs, outputs, geometry)?, parts: vec![part] })
    }

    /// x (B, H, W, in) -> (B, H', W', out)
    pub(crate) fn forward(
        &self,
        x: impl Into<ChannelConcat>,
        epilogue: Epilogue<'_>,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        let x = x.into();
        self.forward_resized(&x, x.size()?, epilogue, rows)
    }

    /// As `forward` on `x` resized to `size` (height, width) by nearest neighbours.
    pub(crate) fn forward_resized(
        &self,
        x: impl Into<ChannelConcat>,
        size: (usize, usize),
        epilogue: Epilogue<'_>,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        if epilogue.activation.is_some() {
            bail!("LoRAs would be added after the activation of a convolution");
        }
        let x = x.into();
        let delta = self.delta(rows, |delta, (first, count), scale, sum| {
            delta.conv(&x.samples(first, count)?, size, scale, sum)
        })?;
        plus(self.layer.forward_resized(&x, size, epilogue)?, delta)
    }
}

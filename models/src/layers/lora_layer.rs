//! Layers to whose outputs LoRAs may add, row by row of a batch: y + scale * up(down(x)). Where
//! the files come from is [`super::lora`]'s business.
//!
//! The weights themselves never change, so that rows with other LoRAs, and rows with none, share
//! the product with them. Where no row has a LoRA nothing else is computed.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::builder::LayerBuilder;
use super::lora::Lora;
use crate::error;
use crate::files::LoraTarget;
use crate::ops::{Activation, Conv2d, Geglu, Geometry, Joined, Linear};

/// The LoRAs of a batch row and their scales.
#[derive(Clone, Default)]
pub struct LoraStack(Vec<(Arc<Lora>, f64)>);

impl LoraStack {
    pub(crate) fn new(loras: Vec<(Arc<Lora>, f64)>) -> Self {
        Self(loras)
    }

    /// A cache key: ids, and the bits of scales.
    pub(crate) fn key(&self) -> Vec<(u64, u64)> {
        self.ids().map(|(id, scale)| (id, scale.to_bits())).collect()
    }

    fn ids(&self) -> impl Iterator<Item = (u64, f64)> {
        self.0.iter().map(|(lora, scale)| (lora.id(), *scale))
    }
}

impl PartialEq for LoraStack {
    fn eq(&self, other: &Self) -> bool {
        self.ids().eq(other.ids())
    }
}

/// A layer that knows its weights' names.
pub(crate) struct LoraLayer<L> {
    layer: L,
    /// Weights that are computed as one, their outputs side by side.
    parts: Vec<Part>,
}

/// A weight's name and its outputs.
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

/// A part of a LoRA: what the down projection made of an input (.., rank), and the up projection.
type Low<'l> = (Tensor, &'l Linear);

impl<L> LoraLayer<L> {
    /// Channels of the output.
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.outputs).sum()
    }

    /// What LoRAs add to the outputs, or nothing; `low` computes a weight's down projection for
    /// some rows (first, count).
    fn term(
        &self,
        rows: &[LoraStack],
        low: impl for<'l> Fn(&'l Lora, &str, (usize, usize)) -> Result<Option<Low<'l>>>,
    ) -> Result<Option<Tensor>> {
        let (mut first, mut terms) = (0, Vec::new());
        for run in rows.chunk_by(PartialEq::eq) {
            let mut parts = Vec::new();
            for Part { name, outputs } in &self.parts {
                let mut sum: Option<Tensor> = None;
                for (lora, scale) in &run[0].0 {
                    let Some((low, up)) = low(lora, name, (first, run.len()))? else { continue };
                    let low = (low * *scale)?;
                    sum = Some(match sum {
                        Some(sum) => up.forward_add(&low, &sum)?,
                        None => up.forward(&low)?,
                    });
                }
                parts.push((*outputs, sum));
            }
            terms.push((run.len(), filled(parts, true)?));
            first += run.len();
        }
        filled(terms, false)
    }
}

/// Tensors side by side in the last dimension or in the first, zeros where there is none; nothing
/// where there is none at all.
fn filled(pieces: Vec<(usize, Option<Tensor>)>, last: bool) -> Result<Option<Tensor>> {
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

fn plus(y: Tensor, term: Option<Tensor>) -> Result<Tensor> {
    term.map_or(Ok(y.clone()), |term| y + term)
}

fn samples(x: &Tensor, (first, count): (usize, usize)) -> Result<Tensor> {
    x.narrow(0, first, count)
}

/// What one linear layer's weight adds.
fn low_linear<'l>(
    x: &Tensor,
    lora: &'l Lora,
    name: &str,
    rows: (usize, usize),
) -> Result<Option<Low<'l>>> {
    let Some((down, up)) = lora.linear(name) else { return Ok(None) };
    Ok(Some((down.forward(&samples(x, rows)?)?, up)))
}

/// A nonlinear layer over rows with LoRAs and rows without, which go apart: what has none is
/// computed as ever.
fn apart(
    x: &Tensor,
    rows: &[LoraStack],
    term: impl Fn(&Tensor, &[LoraStack]) -> Result<Option<Tensor>>,
    plain: impl Fn(&Tensor) -> Result<Tensor>,
    with: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (mut first, mut outputs) = (0, Vec::new());
    for run in rows.chunk_by(PartialEq::eq) {
        let x = samples(x, (first, run.len()))?;
        outputs.push(match term(&x, run)? {
            Some(term) => with(&x, &term)?,
            None => plain(&x)?,
        });
        first += run.len();
    }
    match &outputs[..] {
        [] => plain(x),
        [one] => Ok(one.clone()),
        several => Tensor::cat(several, 0),
    }
}

impl LoraLayer<Linear> {
    pub(crate) fn linear(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
    ) -> error::Result<Self> {
        Ok(Self::new(
            p.linear(inputs, outputs)?,
            vec![Part::at(p, LoraTarget::linear(inputs, outputs))],
        ))
    }

    /// Several over one input, their outputs side by side.
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

    pub(crate) fn linear_or_conv(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
        conv: bool,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, outputs));
        Ok(Self::new(p.linear_or_conv(inputs, outputs, conv)?, vec![part]))
    }

    pub(crate) fn new(layer: Linear, parts: Vec<Part>) -> Self {
        Self { layer, parts }
    }

    /// Whether its products are those of bf16 on tiles.
    pub(crate) fn on_tiles(&self) -> bool {
        self.layer.on_tiles()
    }

    fn term_of(&self, x: &Tensor, rows: &[LoraStack]) -> Result<Option<Tensor>> {
        self.term(rows, |lora, name, rows| low_linear(x, lora, name, rows))
    }

    /// (B, .., in) -> (B, .., out)
    pub(crate) fn forward(&self, x: &Tensor, rows: &[LoraStack]) -> Result<Tensor> {
        plus(self.layer.forward(x)?, self.term_of(x, rows)?)
    }

    /// (B, .., in) -> (B, .., out), plus `residual` (B, .., out)
    pub(crate) fn forward_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        plus(self.layer.forward_add(x, residual)?, self.term_of(x, rows)?)
    }

    /// (B, .., in) -> (B, .., out), through an activation
    pub(crate) fn forward_activate(
        &self,
        x: &Tensor,
        activation: Activation,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        apart(
            x,
            rows,
            |x, rows| self.term_of(x, rows),
            |x| self.layer.forward_activate(x, activation),
            |x, term| self.layer.forward_add_activate(x, term, activation),
        )
    }
}

impl LoraLayer<Geglu> {
    pub(crate) fn geglu(
        p: &LayerBuilder<'_>,
        inputs: usize,
        outputs: usize,
    ) -> error::Result<Self> {
        let part = Part::at(p, LoraTarget::linear(inputs, 2 * outputs));
        Ok(Self { layer: p.geglu(inputs, outputs)?, parts: vec![part] })
    }

    /// (B, .., in) -> (B, .., D)
    pub(crate) fn forward(&self, x: &Tensor, rows: &[LoraStack]) -> Result<Tensor> {
        apart(
            x,
            rows,
            |x, rows| self.term(rows, |lora, name, rows| low_linear(x, lora, name, rows)),
            |x| self.layer.forward(x),
            |x, term| self.layer.forward_add(x, term),
        )
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

    fn term_of(
        &self,
        x: &Joined,
        rows: &[LoraStack],
        run: impl Fn(&Conv2d, &Joined) -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        self.term(rows, |lora, name, (first, count)| {
            let Some((down, up)) = lora.conv(name) else { return Ok(None) };
            Ok(Some((run(down, &x.samples(first, count)?)?, up)))
        })
    }

    /// (B, H, W, in) -> (B, H', W', out)
    pub(crate) fn forward(&self, x: &Tensor, rows: &[LoraStack]) -> Result<Tensor> {
        self.forward_joined(&Joined::one(x), rows)
    }

    /// As `forward` on two pictures as one.
    pub(crate) fn forward_joined(&self, x: &Joined, rows: &[LoraStack]) -> Result<Tensor> {
        let term = self.term_of(x, rows, Conv2d::forward_joined)?;
        plus(self.layer.forward_joined(x)?, term)
    }

    /// As `forward` on `x` resized to `size` (height, width) by nearest neighbours.
    pub(crate) fn forward_resized(
        &self,
        x: &Tensor,
        size: (usize, usize),
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        let down = |down: &Conv2d, x: &Joined| down.forward_resized(&x.whole()?, size);
        let term = self.term_of(&Joined::one(x), rows, down)?;
        plus(self.layer.forward_resized(x, size)?, term)
    }

    /// As `forward`, plus `per_sample` (B, out) on every pixel.
    pub(crate) fn forward_shift(
        &self,
        x: &Tensor,
        per_sample: &Tensor,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        let term = self.term_of(&Joined::one(x), rows, Conv2d::forward_joined)?;
        plus(self.layer.forward_shift(x, per_sample)?, term)
    }

    /// As `forward`, plus `residual` (B, H', W', out).
    pub(crate) fn forward_add(
        &self,
        x: &Tensor,
        residual: &Tensor,
        rows: &[LoraStack],
    ) -> Result<Tensor> {
        let term = self.term_of(&Joined::one(x), rows, Conv2d::forward_joined)?;
        plus(self.layer.forward_add(x, residual)?, term)
    }
}

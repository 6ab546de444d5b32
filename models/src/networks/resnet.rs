//! The residual block that the UNet and the VAE have in common, and linear layers of many blocks as
//! one product.
//!
//! Reference: diffusers 0.42 `models/resnet.py`, `ResnetBlock2D`.

use std::cell::RefCell;

use candle_core::{D, Tensor};

use crate::error::Result;
use crate::files::LoraTarget;
use crate::layers::{LayerBuilder, LinearPart, LoraLayer, LoraStack, Part};
use crate::ops::{ChannelConcat, Conv2d, Epilogue, Geometry, GroupNorm, Linear};

/// Groups and epsilon of a group norm.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) groups: usize,
    pub(crate) eps: f64,
}

/// ResnetBlock2D: norm, SiLU, convolution; time embedding; norm, SiLU, convolution; shortcut. Those
/// of the VAE have no time embedding.
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: LoraLayer<Conv2d>,
    time: Option<StackSlice>,
    norm2: GroupNorm,
    conv2: LoraLayer<Conv2d>,
    conv_shortcut: Option<LoraLayer<Conv2d>>,
}

impl Resnet {
    pub(crate) fn load<'w>(
        p: &LayerBuilder<'w>,
        inputs: usize,
        outputs: usize,
        time_proj: Option<&Stack<'w>>,
        norm: Norm,
    ) -> Result<Self> {
        let shortcut = p.pp("conv_shortcut");
        Ok(Self {
            norm1: p.pp("norm1").group_norm(inputs, norm.groups, norm.eps)?,
            conv1: LoraLayer::conv(&p.pp("conv1"), inputs, outputs, Geometry::SAME)?,
            time: time_proj
                .map(|stack| stack.add(&p.pp("time_emb_proj"), outputs, true))
                .transpose()?,
            norm2: p.pp("norm2").group_norm(outputs, norm.groups, norm.eps)?,
            conv2: LoraLayer::conv(&p.pp("conv2"), outputs, outputs, Geometry::SAME)?,
            conv_shortcut: (inputs != outputs)
                .then(|| LoraLayer::conv(&shortcut, inputs, outputs, Geometry::POINT))
                .transpose()?,
        })
    }

    /// x (B, H, W, in), the time embeddings of all blocks (B, time_width) -> (B, H, W, out)
    pub(crate) fn forward(
        &self,
        x: &ChannelConcat,
        time_embeddings: &Tensor,
        loras: &[LoraStack],
    ) -> Result<Tensor> {
        let y = self.norm1.forward_silu(x)?;
        let y = match self.time {
            Some(time) => {
                let shift = time.of(time_embeddings)?;
                self.conv1.forward(&y, Epilogue::shift(&shift), loras)?
            }
            None => self.conv1.forward(&y, Epilogue::NONE, loras)?,
        };
        self.second_half(x, y, loras)
    }

    /// A block without time embedding: (B, H, W, in) -> (B, H, W, out)
    pub(crate) fn forward_timeless(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward(&self.norm1.forward_silu(x)?, Epilogue::NONE, &[])?;
        self.second_half(&x.into(), y, &[])
    }

    fn second_half(&self, x: &ChannelConcat, y: Tensor, loras: &[LoraStack]) -> Result<Tensor> {
        let normalized = self.norm2.forward_silu(&y)?;
        // In the last level of a VAE, y is 128 MiB at 512 px.
        drop(y);
        let y = normalized;
        let residual = match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x, Epilogue::NONE, loras)?,
            None => x.whole()?,
        };
        Ok(self.conv2.forward(&y, Epilogue::residual(&residual), loras)?)
    }
}

/// Linear layers of many blocks over one input, gathered while the blocks are built and computed by
/// one product.
pub(crate) struct Stack<'w> {
    inputs: usize,
    layers: RefCell<Vec<LinearPart<'w>>>,
    parts: RefCell<Vec<Part>>,
}

/// One layer's share of a [`Stack`]'s outputs.
#[derive(Clone, Copy)]
pub(crate) struct StackSlice {
    first: usize,
    count: usize,
}

impl<'w> Stack<'w> {
    pub(crate) fn new(inputs: usize) -> Self {
        Self { inputs, layers: RefCell::default(), parts: RefCell::default() }
    }

    pub(crate) fn add(
        &self,
        p: &LayerBuilder<'w>,
        outputs: usize,
        bias: bool,
    ) -> Result<StackSlice> {
        let mut layers = self.layers.borrow_mut();
        let first = layers.iter().map(LinearPart::outputs).sum();
        layers.push(p.part(self.inputs, outputs, bias)?);
        self.parts.borrow_mut().push(Part::at(p, LoraTarget::linear(self.inputs, outputs)));
        Ok(StackSlice { first, count: outputs })
    }

    /// Whether no layer was added.
    pub(crate) fn is_empty(&self) -> bool {
        self.layers.borrow().is_empty()
    }

    pub(crate) fn build(self, p: &LayerBuilder<'w>) -> Result<LoraLayer<Linear>> {
        Ok(LoraLayer::new(p.stack(&self.layers.into_inner())?, self.parts.into_inner()))
    }
}

impl StackSlice {
    /// (.., all) -> (.., own)
    pub(crate) fn of(self, product: &Tensor) -> candle_core::Result<Tensor> {
        product.narrow(D::Minus1, self.first, self.count)
    }
}

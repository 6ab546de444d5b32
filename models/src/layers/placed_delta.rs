//! What a LoRA adds to the output of one layer, where it is computed.

use candle_core::{DType, Device, Result, Tensor};

use super::builder::activation_dtype;
use super::lora_delta::{Delta, WeightDelta};
use crate::files::LoraTarget;
use crate::ops::{ChannelConcat, Conv2d, Epilogue, Linear};

/// A change of a weight and of its bias, on a device.
pub(crate) struct PlacedDelta {
    /// Nothing if the bias alone changes.
    down: Option<Input>,
    /// Projects up what `down` gives; nothing if that is the whole.
    up: Option<Linear>,
    bias: Option<Tensor>,
    target: LoraTarget,
}

/// The layer that sees the input.
enum Input {
    Linear(Linear),
    Conv(Conv2d),
}

impl PlacedDelta {
    pub(super) fn new(
        delta: &Delta,
        target: LoraTarget,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let LoraTarget { inputs, geometry, .. } = target;
        let (first, up) = match &delta.weight {
            Some(WeightDelta::LowRank { down, up }) => (Some(down), Some(up)),
            Some(WeightDelta::Dense(weight)) => (Some(weight), None),
            None => (None, None),
        };
        let layer = |first: &Tensor| {
            let rows = first.dim(0)?;
            Ok::<_, candle_core::Error>(match geometry {
                None => {
                    let first = first.reshape((rows, inputs))?;
                    Input::Linear(Linear::new(&first, None, device, dtype)?)
                }
                Some(geometry) => {
                    let zeros = Tensor::zeros(rows, DType::F32, &Device::Cpu)?;
                    Input::Conv(Conv2d::new(first, &zeros, geometry, device, dtype)?)
                }
            })
        };
        let down = first.map(layer).transpose()?;
        let up = up.map(|up| Linear::new(up, None, device, dtype)).transpose()?;
        let place =
            |bias: &Tensor| bias.to_dtype(activation_dtype(device, dtype))?.to_device(device);
        Ok(Self { down, up, bias: delta.bias.as_ref().map(place).transpose()?, target })
    }

    /// Bytes of its weights and its bias.
    pub(super) fn bytes(&self) -> u64 {
        let down = match &self.down {
            Some(Input::Linear(layer)) => layer.bytes(),
            Some(Input::Conv(layer)) => layer.bytes(),
            None => 0,
        };
        let of_bias = |bias: &Tensor| bias.elem_count() * bias.dtype().size_in_bytes();
        let bias = self.bias.as_ref().map_or(0, of_bias);
        (down + self.up.as_ref().map_or(0, Linear::bytes) + bias) as u64
    }

    /// `sum` and what it adds at a scale to the output of a linear layer of x (B, .., in).
    pub(super) fn linear(&self, x: &Tensor, scale: f64, sum: Option<&Tensor>) -> Result<Tensor> {
        let y = match &self.down {
            Some(Input::Linear(down)) => Some((down.forward(x, Epilogue::NONE)? * scale)?),
            Some(Input::Conv(_)) => {
                candle_core::bail!("a LoRA of a convolution was given to a linear layer");
            }
            None => None,
        };
        let (pixels, _) = x.dims().split_at(x.rank() - 1);
        self.finish(y, pixels, scale, sum)
    }

    /// `sum` and what it adds at a scale to the output of a convolution of x (B, H, W, in), resized
    /// to `size`.
    pub(super) fn conv(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        scale: f64,
        sum: Option<&Tensor>,
    ) -> Result<Tensor> {
        let y = match &self.down {
            Some(Input::Conv(down)) => {
                Some((down.forward_resized(x, size, Epilogue::NONE)? * scale)?)
            }
            Some(Input::Linear(_)) => {
                candle_core::bail!("a LoRA of a linear layer was given to a convolution");
            }
            None => None,
        };
        let side = |side| self.target.geometry.map_or(side, |geometry| geometry.output(side));
        self.finish(y, &[x.count()?, side(size.0), side(size.1)], scale, sum)
    }

    /// From what `down` gives, for outputs at these places (B, ..).
    fn finish(
        &self,
        y: Option<Tensor>,
        places: &[usize],
        scale: f64,
        sum: Option<&Tensor>,
    ) -> Result<Tensor> {
        let y = match (y, &self.up, sum) {
            (Some(y), Some(up), _) => {
                Some(up.forward(&y, Epilogue { residual: sum, ..Epilogue::NONE })?)
            }
            (Some(y), None, Some(sum)) => Some((y + sum)?),
            (Some(y), None, None) => Some(y),
            (None, _, sum) => sum.cloned(),
        };
        let bias = self.bias.as_ref().map(|bias| bias * scale).transpose()?;
        match (y, bias) {
            (Some(y), Some(bias)) => y.broadcast_add(&bias),
            (Some(y), None) => Ok(y),
            (None, Some(bias)) => {
                bias.broadcast_as([places, &[self.target.outputs]].concat())?.contiguous()
            }
            (None, None) => candle_core::bail!("a LoRA that changes nothing was placed"),
        }
    }
}

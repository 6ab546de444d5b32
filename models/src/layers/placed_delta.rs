//! What a LoRA adds to the output of one layer, where it is computed.

use candle_core::{DType, Device, Result, Tensor};

use super::builder::activation_dtype;
use super::lora_delta::{Delta, WeightDelta};
use crate::files::LoraTarget;
use crate::ops::{ChannelConcat, Conv2d, Epilogue, Linear};

/// A change of a weight and of its bias, on a device.
pub(crate) struct PlacedDelta {
    down: Input,
    /// Projects up what `down` gives; nothing if that is the whole.
    up: Option<Linear>,
    bias: Option<Tensor>,
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
        let LoraTarget { inputs, outputs, geometry } = target;
        let kernel = geometry.map_or(1, |geometry| geometry.kernel);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let (first, up) = match &delta.weight {
            Some(WeightDelta::LowRank { down, up }) => (down.clone(), Some(up.clone())),
            Some(WeightDelta::Dense(weight)) => (weight.clone(), None),
            // The bias alone changes.
            None => (zeros(&[1, inputs, kernel, kernel])?, Some(zeros(&[outputs, 1])?)),
        };
        let rows = first.dim(0)?;
        let down = match geometry {
            None => {
                let first = first.reshape((rows, inputs))?;
                Input::Linear(Linear::new(&first, None, device, dtype)?)
            }
            Some(geometry) => {
                Input::Conv(Conv2d::new(&first, &zeros(&[rows])?, geometry, device, dtype)?)
            }
        };
        let up = up.map(|up| Linear::new(&up, None, device, dtype)).transpose()?;
        let place =
            |bias: &Tensor| bias.to_dtype(activation_dtype(device, dtype))?.to_device(device);
        Ok(Self { down, up, bias: delta.bias.as_ref().map(place).transpose()? })
    }

    /// Bytes of its weights.
    pub(super) fn bytes(&self) -> u64 {
        let down = match &self.down {
            Input::Linear(layer) => layer.bytes(),
            Input::Conv(layer) => layer.bytes(),
        };
        (down + self.up.as_ref().map_or(0, Linear::bytes)) as u64
    }

    /// `sum` and what it adds at a scale to the output of a linear layer of x (B, .., in).
    pub(super) fn linear(&self, x: &Tensor, scale: f64, sum: Option<&Tensor>) -> Result<Tensor> {
        let Input::Linear(down) = &self.down else {
            candle_core::bail!("a LoRA of a convolution was given to a linear layer");
        };
        let y = (down.forward(x, Epilogue::NONE)? * scale)?;
        self.finish(y, scale, sum)
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
        let Input::Conv(down) = &self.down else {
            candle_core::bail!("a LoRA of a linear layer was given to a convolution");
        };
        let y = (down.forward_resized(x, size, Epilogue::NONE)? * scale)?;
        self.finish(y, scale, sum)
    }

    fn finish(&self, y: Tensor, scale: f64, sum: Option<&Tensor>) -> Result<Tensor> {
        let y = match (&self.up, sum) {
            (Some(up), _) => up.forward(&y, Epilogue { residual: sum, ..Epilogue::NONE })?,
            (None, Some(sum)) => (y + sum)?,
            (None, None) => y,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&(bias * scale)?),
            None => Ok(y),
        }
    }
}

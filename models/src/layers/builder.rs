//! Builds layers from the tensors of a network: each layer packs its weights for a device.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::files::{LoraTarget, StoredTensor, Weights};
use crate::ops::{Conv2d, Geometry, GroupNorm, LayerNorm, Linear, TensorData, Weight};

/// The tensors of a linear layer, in their file.
pub(crate) struct LinearPart<'a> {
    weight: StoredTensor<'a>,
    bias: Option<Tensor>,
}

impl LinearPart<'_> {
    pub(crate) fn outputs(&self) -> usize {
        self.weight.shape[0]
    }
}

/// A prefix in a network's tree of tensor names, from which layers are built for a device (candle's
/// `VarBuilder`).
#[derive(Clone)]
pub(crate) struct LayerBuilder<'a> {
    weights: &'a Weights,
    prefix: String,
    /// What the names of the weights begin with for LoRAs: those of two text encoders are the same.
    scope: &'static str,
    device: &'a Device,
    dtype: DType,
}

/// The scope of a second text encoder.
pub(super) const SECOND_ENCODER: &str = "text_encoder_2.";

impl<'a> LayerBuilder<'a> {
    /// The root of the tree.
    pub(crate) fn new(weights: &'a Weights, device: &'a Device, dtype: DType) -> Self {
        Self { weights, prefix: String::new(), scope: "", device, dtype }
    }

    /// A child: `pp("down_blocks").pp(0)` is `down_blocks.0`.
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        let prefix = match self.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}.{name}"),
        };
        Self { prefix, ..self.clone() }
    }

    /// The root of the tree of a second text encoder.
    pub(crate) fn second_encoder(&self) -> Self {
        Self { scope: SECOND_ENCODER, ..self.clone() }
    }

    /// The tensors that layers are built from.
    pub(crate) fn weights(&self) -> &'a Weights {
        self.weights
    }

    /// The device that layers are built for.
    pub(crate) fn device(&self) -> &'a Device {
        self.device
    }

    /// The type of the network.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether the file has this tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.weights.shape(&self.pp(name).prefix).is_some()
    }

    /// A side of the shape of a tensor; 0 if the file has none of this name, or it has no such side.
    pub(crate) fn side(&self, name: &str, dim: usize) -> usize {
        let shape = self.weights.shape(&self.pp(name).prefix);
        shape.and_then(|shape| shape.get(dim).copied()).unwrap_or(0)
    }

    /// The name under which the file has a weight: the second, of older files, or the first.
    pub(crate) fn either<'n>(&self, names: [&'n str; 2]) -> &'n str {
        if self.pp(names[1]).has("weight") { names[1] } else { names[0] }
    }

    /// Registers the weight of this prefix as a LoRA target, and returns its name.
    pub(crate) fn lora_target(&self, target: LoraTarget) -> String {
        // Only some files of text encoders have this prefix.
        let name = self.prefix.strip_prefix("text_model.").unwrap_or(&self.prefix);
        let name = format!("{}{name}", self.scope);
        self.weights.add_lora_target(name.clone(), target);
        name
    }

    /// A tensor as f32 on the CPU.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.stored(name, shape)?.floats(), shape, &Device::Cpu)?)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'a>> {
        self.weights.weight(&self.pp(name).prefix, shape)
    }

    /// A tensor on the device, in the type of the network.
    pub(crate) fn placed(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let dtype = activation_dtype(self.device, self.dtype);
        Ok(self.tensor(name, shape)?.to_dtype(dtype)?.to_device(self.device)?)
    }

    pub(crate) fn linear(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        self.linear_or_conv(inputs, outputs, false)
    }

    pub(crate) fn geglu(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        let weight = self.stored("weight", &[2 * outputs, inputs])?;
        let bias = self.tensor("bias", &[2 * outputs])?;
        Ok(Linear::geglu(&weight, &bias, self.device, self.dtype)?)
    }

    /// Several linear layers over one input as one product, with concatenated outputs.
    pub(crate) fn linears(
        &self,
        names: &[&str],
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Linear> {
        let parts = names.iter().map(|name| self.pp(name).part(inputs, outputs, bias));
        Ok(self.stack(&parts.collect::<Result<Vec<_>>>()?)?)
    }

    /// A linear layer that is to be computed with others.
    pub(crate) fn part(&self, inputs: usize, outputs: usize, bias: bool) -> Result<LinearPart<'a>> {
        let weight = self.stored("weight", &[outputs, inputs])?;
        let bias = bias.then(|| self.tensor("bias", &[outputs])).transpose()?;
        Ok(LinearPart { weight, bias })
    }

    /// Linear layers over one input as one product, with concatenated outputs. All have a bias, or
    /// none.
    pub(crate) fn stack(&self, parts: &[LinearPart<'_>]) -> candle_core::Result<Linear> {
        let numbers: Vec<_> = parts.iter().map(|part| part.weight.numbers()).collect();
        let inputs = parts.first().map_or(0, |part| part.weight.shape[1]);
        let shape = [parts.iter().map(LinearPart::outputs).sum(), inputs];
        let biases: Option<Vec<_>> = parts.iter().map(|part| part.bias.as_ref()).collect();
        let bias = biases.map(|biases| Tensor::cat(&biases, 0)).transpose()?;
        let weight = Weight::Data(TensorData::Parts(&numbers), &shape);
        Linear::new(weight, bias.as_ref(), self.device, self.dtype)
    }

    /// A linear layer without a bias that the file may store transposed, under the name of the layer.
    pub(crate) fn projection(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        if self.has("weight") {
            return Ok(self.stack(&[self.part(inputs, outputs, false)?])?);
        }
        let shape = [inputs, outputs];
        let stored = self.weights.weight(&self.prefix, &shape)?;
        let weight = Tensor::from_vec(stored.floats(), &shape, &Device::Cpu)?.t()?.contiguous()?;
        Ok(Linear::new(&weight, None, self.device, self.dtype)?)
    }

    /// A linear layer that the file may store as a 1x1 convolution.
    pub(crate) fn linear_or_conv(
        &self,
        inputs: usize,
        outputs: usize,
        conv: bool,
    ) -> Result<Linear> {
        let shape = [outputs, inputs, 1, 1];
        let weight = self.stored("weight", if conv { &shape } else { &shape[..2] })?;
        let bias = self.tensor("bias", &[outputs])?;
        Ok(Linear::new(&weight, Some(&bias), self.device, self.dtype)?)
    }

    pub(crate) fn conv(&self, inputs: usize, outputs: usize, geometry: Geometry) -> Result<Conv2d> {
        let kernel = geometry.kernel;
        let weight = self.stored("weight", &[outputs, inputs, kernel, kernel])?;
        let bias = self.tensor("bias", &[outputs])?;
        Ok(Conv2d::new(&weight, &bias, geometry, self.device, self.dtype)?)
    }

    /// A convolution whose outputs are multiplied by a factor: in its weights.
    pub(crate) fn scaled_conv(
        &self,
        (inputs, outputs): (usize, usize),
        geometry: Geometry,
        factor: f64,
    ) -> Result<Conv2d> {
        let kernel = geometry.kernel;
        let weight = (self.tensor("weight", &[outputs, inputs, kernel, kernel])? * factor)?;
        let bias = (self.tensor("bias", &[outputs])? * factor)?;
        Ok(Conv2d::new(&weight, &bias, geometry, self.device, self.dtype)?)
    }

    pub(crate) fn conv_without_bias(
        &self,
        inputs: usize,
        outputs: usize,
        geometry: Geometry,
    ) -> Result<Conv2d> {
        let kernel = geometry.kernel;
        let weight = self.stored("weight", &[outputs, inputs, kernel, kernel])?;
        let bias = Tensor::zeros(outputs, DType::F32, &Device::Cpu)?;
        Ok(Conv2d::new(&weight, &bias, geometry, self.device, self.dtype)?)
    }

    pub(crate) fn group_norm(&self, channels: usize, groups: usize, eps: f64) -> Result<GroupNorm> {
        let (weight, bias) = self.affine(channels)?;
        Ok(GroupNorm::new(&weight, &bias, groups, eps, self.device)?)
    }

    pub(crate) fn layer_norm(&self, channels: usize, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = self.affine(channels)?;
        Ok(LayerNorm::new(&weight, &bias, eps, self.device)?)
    }

    fn affine(&self, channels: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.tensor("weight", &[channels])?, self.tensor("bias", &[channels])?))
    }
}

/// The type of activations: f32 on the CPU, that of the weights elsewhere.
pub(crate) fn activation_dtype(device: &Device, dtype: DType) -> DType {
    if device.is_cpu() { DType::F32 } else { dtype }
}

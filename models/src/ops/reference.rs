//! Every operation composed from candle's, in the tensors' own type, with norms and softmax in f32:
//! the fallback on devices without kernels of our own, and the oracle that kernels are tested
//! against.

use candle_core::{D, DType, Device, Result, Tensor};

use super::concat::ChannelConcat;
use super::types::{Activation, Attention, Epilogue, Geometry};

/// The activation of every element.
pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
        Activation::LeakyRelu => x.maximum(&(x * 0.2)?),
    }
}

/// GEGLU (Shazeer 2020): (.., 2D) -> (.., D), the first half times the gelu of the second.
pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    let gate = x.narrow(D::Minus1, width, width)?.contiguous()?.gelu_erf()?;
    x.narrow(D::Minus1, 0, width)?.contiguous()? * gate
}

/// The weight of a linear layer or a convolution as tensors of its device.
pub(super) struct TensorFilter {
    /// (out, in, k, k)
    weight: Tensor,
    /// (out)
    bias: Option<Tensor>,
    gated: bool,
}

impl TensorFilter {
    /// From a weight (out, in, k, k) and a bias (out).
    pub(super) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        gated: bool,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let place = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
        Ok(Self { weight: place(weight)?, bias: bias.map(place).transpose()?, gated })
    }

    /// Bytes of the weight.
    pub(super) fn bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    /// (.., in) -> (.., out); (.., out / 2) if gated
    pub(super) fn linear(&self, x: &Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let inputs = shape.pop().unwrap_or_default();
        shape.push(self.weight.dim(0)?);
        let weight = self.weight.flatten_from(1)?.t()?;
        let y = x.reshape(((), inputs))?.matmul(&weight)?;
        let y = self.add_bias(&y)?.reshape(shape)?;
        let y = finish(y, epilogue)?;
        if self.gated { geglu(&y) } else { Ok(y) }
    }

    /// (B, H, W, in), resized to `size` -> (B, H', W', out)
    pub(super) fn convolve(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        geometry: Geometry,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let y = convolve(&x.whole()?, size, &self.weight, geometry)?;
        finish(self.add_bias(&y)?, epilogue)
    }

    fn add_bias(&self, y: &Tensor) -> Result<Tensor> {
        self.bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }
}

/// The epilogue of y (B, .., out).
pub(super) fn finish(mut y: Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
    if let Some(shift) = epilogue.shift {
        y = y.broadcast_add(&shift.reshape((y.dim(0)?, 1, 1, ()))?)?;
    }
    if let Some(residual) = epilogue.residual {
        y = (y + residual)?;
    }
    epilogue.activation.map_or(Ok(y.clone()), |activation| activate(&y, activation))
}

/// x (B, H, W, in), resized to `size` by nearest neighbours, and weight (out, in, k, k)
/// -> (B, H', W', out)
pub(super) fn convolve(
    x: &Tensor,
    size: (usize, usize),
    weight: &Tensor,
    geometry: Geometry,
) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    let mut x = x.permute((0, 3, 1, 2))?.contiguous()?;
    if size != (h, w) {
        x = x.upsample_nearest2d(size.0, size.1)?;
    }
    let Geometry { stride, before, after, .. } = geometry;
    let padding = if before == after {
        before
    } else {
        x = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
        0
    };
    x.conv2d(weight, padding, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()
}

/// q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C)
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, kind: Attention) -> Result<Tensor> {
    let (batch, queries, channels) = q.dims3()?;
    let width = channels / kind.heads;
    let split = |t: &Tensor| {
        let (b, l, _) = t.dims3()?;
        t.reshape((b, l, kind.heads, width))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (split(q)?, split(k)?, split(v)?); // (B, heads, L, width)
    // Scaling before the multiplication keeps f16 scores in range.
    let q = (q * (width as f64).powf(-0.5))?;
    let mut scores = q.matmul(&k.t()?)?.to_dtype(DType::F32)?; // (B, heads, Lq, Lk)
    if kind.causal {
        let keys = k.dim(2)?;
        let hidden = (0..queries)
            .flat_map(|i| (0..keys).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let hidden = Tensor::from_vec(hidden, (queries, keys), scores.device())?;
        scores = scores.broadcast_add(&hidden)?;
    }
    let scores = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
    scores.matmul(&v)?.transpose(1, 2)?.reshape((batch, queries, channels))
}

/// (B, H, W, C) -> (B, H, W, C), `weight` and `bias` (C) f32
pub(super) fn group_norm(
    x: &ChannelConcat,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let x = x.whole()?;
    let (batch, h, w, channels) = x.dims4()?;
    let y = x.to_dtype(DType::F32)?.reshape((batch, h * w, groups, channels / groups))?;
    let y = y.transpose(1, 2)?.flatten_from(2)?; // (B, groups, H * W * C / groups)
    let y = standardize(&y, eps)?;
    let y = y.reshape((batch, groups, h * w, channels / groups))?.transpose(1, 2)?;
    let y = y.contiguous()?.reshape((batch, h, w, channels))?;
    let y = y.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())?;
    if silu { y.silu() } else { Ok(y) }
}

/// (.., C) -> (.., C), `weight` and `bias` (C) f32
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let y = standardize(&x.to_dtype(DType::F32)?, eps)?;
    y.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

/// Mean 0 and variance 1 over the last dimension.
fn standardize(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// The sum of `factor * tensor`, added from the first to the last; a factor of 1 is not multiplied.
pub(super) fn linear_combination(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let mut scaled = terms.iter().map(|&(factor, x)| match factor {
        1.0 => Ok(x.clone()),
        _ => x.affine(factor, 0.0),
    });
    let first = scaled.next().expect("a linear combination has terms")?;
    scaled.try_fold(first, |sum, term| sum + term?)
}

/// a + t (b - a)
pub(super) fn lerp(a: &Tensor, b: &Tensor, t: f64) -> Result<Tensor> {
    a + ((b - a)? * t)?
}

/// (B, C, H, W) f32 -> (B, H, W, C)
pub(super) fn channels_last(x: &Tensor, dtype: DType) -> Result<Tensor> {
    x.permute((0, 2, 3, 1))?.contiguous()?.to_dtype(dtype)
}

/// (B, H, W, C) -> (B, C, H, W) f32
pub(super) fn channels_first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()?.to_dtype(DType::F32)
}

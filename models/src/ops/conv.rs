//! Convolution over channels-last pictures, as a matrix product whose left rows are receptive
//! fields gathered while they are packed (implicit GEMM). Nearest upsampling by two is folded into
//! the gather, so the enlarged picture never exists. Kernels of 3 over pictures that are large
//! enough go another way: [`winograd`].

use candle_core::{DType, Device, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::{Joined, Weight, host, to_host, winograd};

/// How a kernel moves over a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Kernel side: 3 or 1.
    pub(crate) kernel: usize,
    /// Pixels from one output to the next.
    pub(crate) stride: usize,
    /// Zeros before the first row and column.
    pub(crate) before: usize,
    /// Zeros after the last row and column.
    pub(crate) after: usize,
}

impl Geometry {
    /// Kernel 3 with one zero around: the size stays.
    pub(crate) const SAME: Self = Self { kernel: 3, stride: 1, before: 1, after: 1 };
    /// Kernel 1.
    pub(crate) const POINT: Self = Self { kernel: 1, stride: 1, before: 0, after: 0 };

    pub(super) fn output(&self, side: usize) -> usize {
        (side + self.before + self.after - self.kernel) / self.stride + 1
    }
}

/// A convolution; its weights are packed for the CPU, or lie on another device.
pub(crate) struct Conv2d {
    weights: Weights,
    geometry: Geometry,
    inputs: usize,
    outputs: usize,
}

enum Weights {
    Cpu {
        packed: Packed,
        kept: Option<winograd::Kept>,
        bias: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    Cuda(cuda::Filter),
    Device {
        weight: Tensor,
        bias: Tensor,
    },
}

impl Conv2d {
    /// From a weight (out, in, k, k) and a bias (out), for a device and its type.
    pub(crate) fn new<'a>(
        weight: impl Into<Weight<'a>>,
        bias: &Tensor,
        geometry: Geometry,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weight = weight.into();
        let taps = geometry.kernel * geometry.kernel;
        let (outputs, depth) = weight.matrix();
        let inputs = depth / taps;
        let weights = if device.is_cpu() {
            let packed = Packed::new(&weight, taps, dtype)?;
            let kept = (geometry == Geometry::SAME).then(|| winograd::Kept::new(&packed)).flatten();
            Weights::Cpu { packed, kept, bias: to_host(bias)? }
        } else {
            Self::on_device(&weight.tensor()?, bias, device, dtype)?
        };
        Ok(Self { weights, geometry, inputs, outputs })
    }

    fn on_device(weight: &Tensor, bias: &Tensor, device: &Device, dtype: DType) -> Result<Weights> {
        #[cfg(feature = "cuda")]
        {
            let taps = weight.flatten_from(2)?.transpose(1, 2)?; // (out, k * k, in)
            if let Some(filter) = cuda::Filter::new(&taps, Some(bias), false, device, dtype)? {
                return Ok(Weights::Cuda(filter));
            }
        }
        let place = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
        Ok(Weights::Device { weight: place(weight)?, bias: place(bias)? })
    }

    /// Bytes of its weights as they lie in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Cpu { packed, kept, .. } => {
                packed.bytes() + kept.as_ref().map_or(0, winograd::Kept::bytes)
            }
            #[cfg(feature = "cuda")]
            Weights::Cuda(filter) => filter.bytes(),
            Weights::Device { weight, .. } => weight.elem_count() * weight.dtype().size_in_bytes(),
        }
    }

    /// (B, H, W, in) -> (B, H', W', out)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_joined(&Joined::one(x))
    }

    /// As `forward` on two pictures as one.
    pub(crate) fn forward_joined(&self, x: &Joined) -> Result<Tensor> {
        let (_, h, w, _) = x.first.dims4()?;
        self.run(x, (h, w), Added::default())
    }

    /// As `forward` on `x` resized to `size` (height, width) by nearest neighbours.
    pub(crate) fn forward_resized(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        self.run(&Joined::one(x), size, Added::default())
    }

    /// As `forward`, plus `per_sample` (B, out) on every pixel.
    pub(crate) fn forward_shift(&self, x: &Tensor, per_sample: &Tensor) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        self.run(&Joined::one(x), (h, w), Added { per_sample: Some(per_sample), residual: None })
    }

    /// As `forward`, plus `residual` (B, H', W', out).
    pub(crate) fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        self.run(&Joined::one(x), (h, w), Added { per_sample: None, residual: Some(residual) })
    }

    fn run(&self, joined: &Joined, size: (usize, usize), added: Added<'_>) -> Result<Tensor> {
        let x = &joined.first;
        let (batch, h, w, _) = x.dims4()?;
        let (c1, c2) = joined.channels()?;
        if c1 + c2 != self.inputs {
            candle_core::bail!("a convolution of {} channels was given {c1} + {c2}", self.inputs);
        }
        let (rows, columns) = (self.geometry.output(size.0), self.geometry.output(size.1));
        let shape = (batch, rows, columns, self.outputs);
        match &self.weights {
            Weights::Cpu { packed, kept, bias } => {
                let (source, skip) = (host(x)?, joined.second.as_ref().map(host).transpose()?);
                let shift = added.per_sample.map(Tensor::contiguous).transpose()?;
                let (shift, residual) = (shift.as_ref().map(host), added.residual.map(host));
                let (shift, residual) = (shift.transpose()?, residual.transpose()?);
                let shift = shift.as_ref().map(|s| s.data()).transpose()?;
                let epilogue = Epilogue {
                    bias: Some(bias),
                    row_bias: shift.map(|s| (s, rows * columns)),
                    residual: residual.as_ref().map(|r| r.data()).transpose()?,
                    activation: None,
                };
                let second = (skip.as_ref().map_or(Ok(&[][..]), |s| s.data())?, c2);
                let first = (source.data()?, c1);
                let fields = Fields::new(first, second, (h, w), size, self.geometry);
                let count = batch * rows * columns;
                // Tiles do eight times the products of vectors, Winograd's saves three of four.
                let fast = self.geometry == Geometry::SAME
                    && c2 == 0
                    && !packed.tiled()
                    && winograd::pays(rows, columns, c1);
                let out = if fast {
                    winograd::convolve(&fields, batch, packed, kept.as_ref(), epilogue)
                } else {
                    gemm(count, &fields, packed, epilogue)
                };
                Tensor::from_vec(out, shape, x.device())
            }
            #[cfg(feature = "cuda")]
            Weights::Cuda(filter) => {
                let Added { per_sample: shift, residual } = added;
                let after = cuda::After { shift, residual, ..cuda::After::default() };
                let field = cuda::Field { size, geometry: self.geometry };
                filter.convolve(joined, field, after)
            }
            Weights::Device { weight, bias } => {
                let x = joined.whole()?;
                let y = reference(&x, size, weight, self.geometry)?.broadcast_add(bias)?;
                let y = match added.per_sample {
                    Some(shift) => y.broadcast_add(&shift.reshape((batch, 1, 1, ()))?)?,
                    None => y,
                };
                added.residual.map_or(Ok(y.clone()), |r| y + r)
            }
        }
    }
}

/// What is added to a convolution's result.
#[derive(Default, Clone, Copy)]
struct Added<'a> {
    per_sample: Option<&'a Tensor>,
    residual: Option<&'a Tensor>,
}

/// The same from candle's operations, which want channels first.
fn reference(
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

/// The receptive fields of a convolution, one row for each output pixel.
pub(super) struct Fields<'a> {
    /// A picture and its channels.
    first: (&'a [f32], usize),
    /// One of the same size whose channels follow, if it has any.
    second: (&'a [f32], usize),
    /// Height and width of the picture in memory.
    picture: (usize, usize),
    pub(super) output: (usize, usize),
    geometry: Geometry,
    /// Which row and which column of the picture a row and a column of the padded and resized one
    /// are, where they are not padding.
    sources: (Vec<Option<usize>>, Vec<Option<usize>>),
    /// What a pixel of the padding holds.
    zeros: Vec<f32>,
}

/// Where an output's field begins: sample, row and column.
type Corner = (usize, usize, usize);

impl<'a> Fields<'a> {
    /// Of pictures (H, W, C) of one size, `resized` by nearest neighbours.
    fn new(
        first: (&'a [f32], usize),
        second: (&'a [f32], usize),
        picture: (usize, usize),
        resized: (usize, usize),
        geometry: Geometry,
    ) -> Self {
        let sources = |side: usize, resized: usize| {
            let inside = |at: usize| at.checked_sub(geometry.before).filter(|at| *at < resized);
            let padded = geometry.before + resized + geometry.after + winograd::BEYOND;
            (0..padded).map(|at| inside(at).map(|at| at * side / resized)).collect()
        };
        Self {
            first,
            second,
            picture,
            output: (geometry.output(resized.0), geometry.output(resized.1)),
            geometry,
            sources: (sources(picture.0, resized.0), sources(picture.1, resized.1)),
            zeros: vec![0.0; first.1.max(second.1)],
        }
    }

    pub(super) fn channels(&self) -> usize {
        self.first.1 + self.second.1
    }

    /// The channels of a pixel of the padded and resized picture, if there is one picture.
    pub(super) fn input(&self, at: Corner) -> &[f32] {
        self.part(self.first, at)
    }

    /// The same of one of the two.
    fn part<'p>(&'p self, (data, channels): (&'p [f32], usize), at: Corner) -> &'p [f32] {
        let (sample, y, x) = at;
        let (Some(y), Some(x)) = (self.sources.0[y], self.sources.1[x]) else {
            return &self.zeros[..channels];
        };
        let (h, w) = self.picture;
        &data[((sample * h + y) * w + x) * channels..][..channels]
    }
}

impl Rows for Fields<'_> {
    type Place = Corner;

    fn place(&self, row: usize) -> Corner {
        let (rows, columns) = self.output;
        let (sample, place) = (row / (rows * columns), row % (rows * columns));
        let stride = self.geometry.stride;
        (sample, place / columns * stride, place % columns * stride)
    }

    fn runs<const N: usize>(&self, places: &[Corner; N], k: usize) -> [&[f32]; N] {
        let (tap, channel) = (k / self.channels(), k % self.channels());
        let (dy, dx) = (tap / self.geometry.kernel, tap % self.geometry.kernel);
        let (part, channel) = match channel.checked_sub(self.first.1) {
            None => (self.first, channel),
            Some(channel) => (self.second, channel),
        };
        places.map(|(sample, y, x)| &self.part(part, (sample, y + dy, x + dx))[channel..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn convolutions_agree_with_candle() {
        let down = Geometry { kernel: 3, stride: 2, before: 1, after: 1 };
        let vae_down = Geometry { kernel: 3, stride: 2, before: 0, after: 1 };
        for geometry in [Geometry::SAME, Geometry::POINT, down, vae_down] {
            // The last two are Winograd's with weights that are too many to be kept, and with more
            // channels than a block is deep.
            for (h, w, inputs, outputs) in [
                (8, 8, 16, 32),
                (5, 7, 3, 4),
                (1, 1, 40, 33),
                (18, 17, 32, 70),
                (13, 16, 144, 161),
                (13, 16, 176, 33),
            ] {
                if h + geometry.before + geometry.after < geometry.kernel {
                    continue;
                }
                let x = tensor(&[2, h, w, inputs], 1);
                let weight = tensor(&[outputs, inputs, geometry.kernel, geometry.kernel], 2);
                let bias = tensor(&[outputs], 3);
                let conv = Conv2d::new(&weight, &bias, geometry, &Device::Cpu, DType::F32).unwrap();
                for size in [(h, w), (2 * h, 2 * w), (2 * h - 1, 2 * w - 1)] {
                    let want = reference(&x, size, &weight, geometry).unwrap();
                    let want = want.broadcast_add(&bias).unwrap();
                    let got = conv.forward_resized(&x, size).unwrap();
                    assert!(difference(&got, &want) < 1e-5, "{geometry:?} {h}x{w} to {size:?}");
                }
                let y = conv.forward(&x).unwrap();
                let (shift, residual) = (tensor(&[2, outputs], 4), tensor(y.dims(), 5));
                let want = y.broadcast_add(&shift.reshape((2, 1, 1, outputs)).unwrap()).unwrap();
                assert!(difference(&conv.forward_shift(&x, &shift).unwrap(), &want) < 1e-6);
                let want = (&y + &residual).unwrap();
                assert!(difference(&conv.forward_add(&x, &residual).unwrap(), &want) < 1e-6);
            }
        }
    }

    /// More than is transformed at a time, and more than one pass for each part of it.
    #[test]
    fn a_large_picture_is_taken_in_pieces() {
        let (x, weight, bias) =
            (tensor(&[1, 112, 112, 320], 1), tensor(&[33, 320, 3, 3], 2), tensor(&[33], 3));
        let conv = Conv2d::new(&weight, &bias, Geometry::SAME, &Device::Cpu, DType::F32).unwrap();
        let want = reference(&x, (112, 112), &weight, Geometry::SAME).unwrap();
        let want = want.broadcast_add(&bias).unwrap();
        assert!(difference(&conv.forward(&x).unwrap(), &want) < 1e-5);
    }

    #[test]
    fn two_pictures_are_read_as_one() {
        for geometry in [Geometry::POINT, Geometry::SAME] {
            let (x, skip) = (tensor(&[2, 16, 17, 48], 1), tensor(&[2, 16, 17, 20], 2));
            let weight = tensor(&[33, 68, geometry.kernel, geometry.kernel], 3);
            let bias = tensor(&[33], 4);
            let conv = Conv2d::new(&weight, &bias, geometry, &Device::Cpu, DType::F32).unwrap();
            let joined = Joined::new(&x, &skip).unwrap();
            let want = reference(&joined.whole().unwrap(), (16, 17), &weight, geometry).unwrap();
            let want = want.broadcast_add(&bias).unwrap();
            assert!(difference(&conv.forward_joined(&joined).unwrap(), &want) < 1e-5);
        }
    }
}

//! Convolution over channels-last images.

use candle_core::{DType, Device, Result, Tensor};

use super::concat::ChannelConcat;
use super::cpu::Weight;
use super::filter::PlacedFilter;
use super::reference::finish;
use super::tiling::{is_tiling, wrapped};
use super::types::{Epilogue, Geometry};

/// A convolution with a bias.
pub(crate) struct Conv2d {
    filter: PlacedFilter,
    geometry: Geometry,
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
        let filter = PlacedFilter::new(&weight.into(), Some(bias), geometry, false, device, dtype)?;
        Ok(Self { filter, geometry })
    }

    /// Bytes of the weight as it is stored.
    pub(crate) fn bytes(&self) -> usize {
        self.filter.bytes()
    }

    /// x (B, H, W, in) -> (B, H', W', out)
    pub(crate) fn forward(
        &self,
        x: impl Into<ChannelConcat>,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let x = x.into();
        let size = x.size()?;
        self.convolve(&x, size, epilogue)
    }

    /// As `forward` on `x` resized to `size` (height, width) by nearest neighbours.
    pub(crate) fn forward_resized(
        &self,
        x: impl Into<ChannelConcat>,
        size: (usize, usize),
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        self.convolve(&x.into(), size, epilogue)
    }

    fn convolve(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        // As there, a convolution without padding of its own stays as it is.
        match self.geometry.before > 0 && is_tiling() {
            true => self.convolve_tiling(&x.whole()?, size, epilogue),
            false => self.filter.convolve(x, size, self.geometry, epilogue),
        }
    }

    /// As `convolve` on an image whose opposite edges meet: one that is continued on all sides, of
    /// whose output the middle is taken.
    fn convolve_tiling(
        &self,
        x: &Tensor,
        size: (usize, usize),
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        let x = match size == (h, w) {
            true => x.clone(),
            false => nearest(x, size)?,
        };
        // A whole number of strides, so that the outputs are at the places that they had.
        let pad = self.geometry.before.next_multiple_of(self.geometry.stride);
        let wide = (size.0 + 2 * pad, size.1 + 2 * pad);
        let plain = Epilogue { shift: epilogue.shift, ..Epilogue::NONE };
        let y = self.filter.convolve(&(&wrapped(&x, pad)?).into(), wide, self.geometry, plain)?;
        let first = pad / self.geometry.stride;
        let y = y.narrow(1, first, self.geometry.output(size.0))?;
        let y = y.narrow(2, first, self.geometry.output(size.1))?.contiguous()?;
        finish(y, Epilogue { shift: None, ..epilogue })
    }
}

/// x (B, H, W, C) resized to `size` by nearest neighbours.
fn nearest(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    let mut x = x.clone();
    for (dim, to) in [(1, size.0), (2, size.1)] {
        let from = x.dim(dim)?;
        let places: Vec<_> = (0..to).map(|i| (i * from / to) as u32).collect();
        x = x.index_select(&Tensor::new(places, x.device())?, dim)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::convolve;
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
                    let want = convolve(&x, size, &weight, geometry).unwrap();
                    let want = want.broadcast_add(&bias).unwrap();
                    let got = conv.forward_resized(&x, size, Epilogue::NONE).unwrap();
                    assert!(difference(&got, &want) < 1e-5, "{geometry:?} {h}x{w} to {size:?}");
                }
                let y = conv.forward(&x, Epilogue::NONE).unwrap();
                let (shift, residual) = (tensor(&[2, outputs], 4), tensor(y.dims(), 5));
                let want = y.broadcast_add(&shift.reshape((2, 1, 1, outputs)).unwrap()).unwrap();
                assert!(
                    difference(&conv.forward(&x, Epilogue::shift(&shift)).unwrap(), &want) < 1e-6
                );
                let want = (&y + &residual).unwrap();
                assert!(
                    difference(&conv.forward(&x, Epilogue::residual(&residual)).unwrap(), &want)
                        < 1e-6
                );
            }
        }
    }

    /// More than is transformed at a time, and more than one pass for each part of it.
    #[test]
    fn a_large_picture_is_taken_in_pieces() {
        let (x, weight, bias) =
            (tensor(&[1, 112, 112, 320], 1), tensor(&[33, 320, 3, 3], 2), tensor(&[33], 3));
        let conv = Conv2d::new(&weight, &bias, Geometry::SAME, &Device::Cpu, DType::F32).unwrap();
        let want = convolve(&x, (112, 112), &weight, Geometry::SAME).unwrap();
        let want = want.broadcast_add(&bias).unwrap();
        assert!(difference(&conv.forward(&x, Epilogue::NONE).unwrap(), &want) < 1e-5);
    }

    #[test]
    fn opposite_edges_meet() {
        use crate::ops::tiling;
        let down = Geometry { kernel: 3, stride: 2, before: 1, after: 1 };
        for (geometry, h, w) in [
            (Geometry::SAME, 6, 7),
            (down, 6, 8),
            (down, 5, 7),
            (Geometry::SAME, 1, 2),
            (down, 1, 1),
        ] {
            let x = tensor(&[2, h, w, 16], 1);
            let (weight, bias) = (tensor(&[8, 16, 3, 3], 2), tensor(&[8], 3));
            let conv = Conv2d::new(&weight, &bias, geometry, &Device::Cpu, DType::F32).unwrap();
            let inner = Geometry { before: 0, after: 0, ..geometry };
            for (rows, columns) in [(h, w), (2 * h, 2 * w)] {
                // The image nine times, and the filter without padding on the middle one and a
                // pixel around it.
                let large = nearest(&x, (rows, columns)).unwrap();
                let three = Tensor::cat(&[&large, &large, &large], 1).unwrap();
                let nine = Tensor::cat(&[&three, &three, &three], 2).unwrap();
                let around = nine.narrow(1, rows - 1, rows + 2).unwrap();
                let around = around.narrow(2, columns - 1, columns + 2).unwrap();
                let around = around.contiguous().unwrap();
                let sides = (rows + 2, columns + 2);
                let want = convolve(&around, sides, &weight, inner).unwrap();
                let want = want.broadcast_add(&bias).unwrap();
                let got = tiling(true, || {
                    conv.forward_resized(&x, (rows, columns), Epilogue::NONE).unwrap()
                });
                assert!(difference(&got, &want) < 1e-5, "{geometry:?} {rows}x{columns}");
                let (shift, residual) = (tensor(&[2, 8], 4), tensor(got.dims(), 5));
                let want = got.broadcast_add(&shift.reshape((2, 1, 1, 8)).unwrap()).unwrap();
                let want = (want + &residual).unwrap();
                let epilogue = Epilogue { residual: Some(&residual), ..Epilogue::shift(&shift) };
                let got =
                    tiling(true, || conv.forward_resized(&x, (rows, columns), epilogue).unwrap());
                assert!(difference(&got, &want) < 1e-5);
            }
            let padded = conv.forward(&x, Epilogue::NONE).unwrap();
            let tiled = tiling(true, || conv.forward(&x, Epilogue::NONE).unwrap());
            assert!(difference(&padded, &tiled) > 1e-3, "it changes something");
        }
    }

    #[test]
    fn two_pictures_are_read_as_one() {
        for geometry in [Geometry::POINT, Geometry::SAME] {
            let (x, skip) = (tensor(&[2, 16, 17, 48], 1), tensor(&[2, 16, 17, 20], 2));
            let weight = tensor(&[33, 68, geometry.kernel, geometry.kernel], 3);
            let bias = tensor(&[33], 4);
            let conv = Conv2d::new(&weight, &bias, geometry, &Device::Cpu, DType::F32).unwrap();
            let joined = ChannelConcat::new(&x, &skip).unwrap();
            let want = convolve(&joined.whole().unwrap(), (16, 17), &weight, geometry).unwrap();
            let want = want.broadcast_add(&bias).unwrap();
            assert!(difference(&conv.forward(&joined, Epilogue::NONE).unwrap(), &want) < 1e-5);
        }
    }
}

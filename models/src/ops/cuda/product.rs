//! Convolutions and linear layers with their epilogues, in `product.cu`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::device::{Gpu, has_products};
use super::images::PRODUCT;
use super::launch::{Grid, launch};
use super::memory::{Operand, address, bytes, int, output, second};
use crate::ops::concat::ChannelConcat;
use crate::ops::gated::gated_order;
use crate::ops::reference;
use crate::ops::types::{Activation, Epilogue, Geometry};

/// Mirrors `Product` in `product.cu`.
#[repr(C)]
struct ProductArgs {
    a: [u64; 2],
    weight: u64,
    bias: u64,
    shift: u64,
    residual: u64,
    out: u64,
    m: i32,
    n: i32,
    row: i32,
    image: [i32; 2],
    c: i32,
    c1: i32,
    sized: [i32; 2],
    output: [i32; 2],
    kernel: i32,
    stride: i32,
    before: i32,
    shift_row: i32,
    activation: i32,
}

const _: () = assert!(size_of::<ProductArgs>() == 120);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for ProductArgs {}

/// The last of `Activation` in `product.cu`.
const GEGLU: i32 = 5;

/// As `Activation` in `product.cu`.
fn activation(activation: Option<Activation>) -> i32 {
    match activation {
        None => 0,
        Some(Activation::Silu) => 1,
        Some(Activation::Gelu) => 2,
        Some(Activation::QuickGelu) => 3,
        Some(Activation::LeakyRelu) => 4,
    }
}

/// The weight and the bias of a convolution or a linear layer.
pub(in crate::ops) struct CudaFilter {
    /// (n, taps * c rounded up to 8)
    weight: Tensor,
    /// (n) f32
    bias: Option<Tensor>,
    inputs: usize,
    /// Whether outputs are values and gates in turn.
    gated: bool,
}

impl CudaFilter {
    /// From a weight (n, c, k, k) and a bias (n), if there is a kernel for the device and type. A
    /// gated weight is (2 out, c, 1, 1): values, then gates.
    pub(in crate::ops) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        gated: bool,
        device: &Device,
        dtype: DType,
    ) -> Result<Option<Self>> {
        if !has_products(device, dtype)? {
            return Ok(None);
        }
        let (n, inputs) = (weight.dim(0)?, weight.dim(1)?);
        let arrange = |t: &Tensor| {
            if !gated {
                return Ok(t.clone());
            }
            let order: Vec<_> = gated_order(n / 2, 1).flatten().map(|at| at as u32).collect();
            t.index_select(&Tensor::new(order, t.device())?, 0)
        };
        let weight = weight.flatten_from(2)?.transpose(1, 2)?.flatten_from(1)?; // (n, taps * c)
        let depth = weight.dim(1)?;
        let weight = arrange(&weight)?;
        let weight = weight.pad_with_zeros(1, 0, depth.next_multiple_of(8) - depth)?;
        let place = |t: &Tensor, dtype| t.to_dtype(dtype)?.contiguous()?.to_device(device);
        let bias = bias.map(|b| place(&arrange(b)?, DType::F32)).transpose()?;
        Ok(Some(Self { weight: place(&weight, dtype)?, bias, inputs, gated }))
    }

    /// Bytes of the weight.
    pub(in crate::ops) fn bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    /// (.., c) -> (.., n); gated (.., n / 2)
    pub(in crate::ops) fn linear(&self, x: &Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
        match epilogue.residual {
            Some(residual) if self.gated => {
                // The kernel adds no residual before the gate.
                let y = self.rows(x, Epilogue::NONE, false)?; // values and gates in turn
                let (shape, n) = (y.shape(), y.dim(D::Minus1)?);
                let y = y.reshape(((), n / 2, 2))?.transpose(1, 2)?.contiguous()?.reshape(shape)?;
                reference::geglu(&(y + residual)?)
            }
            _ => self.rows(x, epilogue, self.gated),
        }
    }

    /// (.., c) -> (.., n); gated (.., n / 2)
    fn rows(&self, x: &Tensor, epilogue: Epilogue<'_>, gated: bool) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape.pop();
        let rows = shape.iter().product();
        let row = x.contiguous()?.reshape((1, 1, rows, self.inputs))?;
        let y = self.multiply(&(&row).into(), (1, rows), Geometry::POINT, epilogue, gated)?;
        shape.push(y.dim(3)?);
        y.reshape(shape)
    }

    /// (B, H, W, c), resized to `size` by nearest neighbours -> (B, H', W', n)
    pub(in crate::ops) fn convolve(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        geometry: Geometry,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        self.multiply(x, size, geometry, epilogue, false)
    }

    /// (B, H, W, c), resized to `size` -> (B, H', W', n); gated (B, H', W', n / 2)
    fn multiply(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        geometry: Geometry,
        epilogue: Epilogue<'_>,
        gated: bool,
    ) -> Result<Tensor> {
        if let Epilogue { residual: Some(_), activation: Some(activation), .. } = epilogue {
            // The kernel adds a residual after the activation.
            let epilogue = Epilogue { activation: None, ..epilogue };
            let y = self.multiply(x, size, geometry, epilogue, gated)?;
            return reference::activate(&y, activation);
        }
        let (device, dtype) = (x.first.device().as_cuda_device()?, x.first.dtype());
        if dtype != self.weight.dtype() {
            bail!("a layer of {:?} was given {dtype:?}", self.weight.dtype());
        }
        let (batch, h, w, c1) = x.first.dims4()?;
        let (first, (second, c2)) = (Operand::dense(&x.first)?, second(x)?);
        if c1 + c2 != self.inputs {
            bail!("a layer of {} channels was given {}", self.inputs, c1 + c2);
        }
        let (n, row) = self.weight.dims2()?;
        let (rows, columns) = (geometry.output(size.0), geometry.output(size.1));
        let m = batch * rows * columns;
        let outputs = if gated { n / 2 } else { n };
        let (y, out) = output(device, dtype, (batch, rows, columns, outputs))?;
        let weight = Operand::dense(&self.weight)?;
        let bias = self.bias.as_ref().map(Operand::dense).transpose()?;
        let shift = epilogue.shift.map(Operand::new).transpose()?;
        let shift_row = match epilogue.shift.map(|shift| (shift.dims(), shift.stride())) {
            None => 0,
            Some(([b, c], [row, 1])) if (*b, *c) == (batch, n) => int(*row)?,
            Some(_) => bail!("a shift must be ({batch}, {n}) in dense rows"),
        };
        let residual = epilogue.residual.map(Operand::dense).transpose()?;
        if epilogue.residual.is_some_and(|r| r.elem_count() != y.elem_count()) {
            bail!("a residual must have the output's {} elements", y.elem_count());
        }
        let pair = |(a, b): (usize, usize)| -> Result<[i32; 2]> { Ok([int(a)?, int(b)?]) };
        let args = ProductArgs {
            a: [first.address, address(second.as_ref())],
            weight: weight.address,
            bias: address(bias.as_ref()),
            shift: address(shift.as_ref()),
            residual: address(residual.as_ref()),
            out,
            m: int(m)?,
            n: int(n)?,
            row: int(row)?,
            image: pair((h, w))?,
            c: int(self.inputs)?,
            c1: int(c1)?,
            sized: pair(size)?,
            output: pair((rows, columns))?,
            kernel: int(geometry.kernel)?,
            stride: int(geometry.stride)?,
            before: int(geometry.before)?,
            shift_row,
            activation: if gated { GEGLU } else { activation(epilogue.activation) },
        };
        // A chunk of 16 bytes is part of one pixel of one image.
        let aligned = args.a.iter().all(|address| address.is_multiple_of(16));
        let whole = aligned && c1.is_multiple_of(8) && c2.is_multiple_of(8);
        let tile = Tile::of(Gpu::of(device)?.processors, (m, n), whole);
        // On the x axis, columns first: the others end at 65,535, less than a large image's rows.
        let blocks = (n.div_ceil(tile.columns) * m.div_ceil(tile.rows), 1, 1);
        let grid = Grid { blocks, threads: tile.threads, shared: 0 };
        // SAFETY: the operands have the shapes that the arguments say.
        unsafe { launch(device, &PRODUCT, (tile.kernel, dtype), &grid, &args)? };
        let operands = [Some(&x.first), x.second.as_ref(), Some(&self.weight), epilogue.residual];
        let moved = bytes(&operands) + bytes(&[Some(&y)]);
        PRODUCT.count((2 * m * n * row) as u64, moved);
        Ok(y)
    }
}

/// What a block computes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    kernel: &'static str,
    rows: usize,
    columns: usize,
    threads: usize,
}

impl Tile {
    pub(super) const LARGE: Self =
        Self { kernel: "product_large", rows: 128, columns: 128, threads: 256 };
    pub(super) const MIDDLE: Self =
        Self { kernel: "product_middle", rows: 128, columns: 64, threads: 256 };
    pub(super) const SMALL: Self =
        Self { kernel: "product_small", rows: 64, columns: 64, threads: 128 };
    /// For operands that are not whole pieces of 16 bytes.
    pub(super) const RAGGED: Self = Self { kernel: "product_ragged", ..Self::SMALL };

    /// The largest that fills the device with a product (m, n).
    fn of(processors: usize, (m, n): (usize, usize), whole: bool) -> Self {
        #[cfg(test)]
        if let Some(forced) = FORCED.get() {
            return forced;
        }
        let fills = |tile: Self| m.div_ceil(tile.rows) * n.div_ceil(tile.columns) >= processors;
        if !whole {
            Self::RAGGED
        } else if n.div_ceil(64).is_multiple_of(2) && fills(Self::LARGE) {
            Self::LARGE
        } else if fills(Self::MIDDLE) {
            Self::MIDDLE
        } else {
            Self::SMALL
        }
    }
}

#[cfg(test)]
thread_local! {
    /// The tile that a test takes.
    pub(super) static FORCED: std::cell::Cell<Option<Tile>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_tile_that_fills_the_device_is_chosen() {
        // 128 x 128 tiles of 4,096 pixels by 640 channels: 32 x 5, more than an H100 has processors.
        assert_eq!(Tile::of(132, (4096, 640), true), Tile::LARGE);
        // Five columns of 64 are odd.
        assert_eq!(Tile::of(132, (8192, 320), true), Tile::MIDDLE);
        assert_eq!(Tile::of(132, (128, 1280), true), Tile::SMALL);
        assert_eq!(Tile::of(40, (128, 1280), false), Tile::RAGGED);
    }
}

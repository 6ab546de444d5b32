//! Pixels as channels and back.
//!
//! Reference: torch's `pixel_unshuffle` and `pixel_shuffle`.

use candle_core::Tensor;

use crate::error::Result;

/// The pixels (B, H, W, C) of `factor` x `factor` squares as channels: (B, H', W', C f f), in the
/// order of torch's `pixel_unshuffle`.
pub(super) fn pixel_unshuffle(x: &Tensor, factor: usize) -> Result<Tensor> {
    let (batch, h, w, c) = x.dims4()?;
    let (rows, columns) = (h / factor, w / factor);
    let x = x.reshape((batch, rows, factor, columns, factor, c))?;
    let x = x.permute((0, 1, 3, 5, 2, 4))?.contiguous()?;
    Ok(x.reshape((batch, rows, columns, c * factor * factor))?)
}

/// The inverse: (B, H, W, C f f) -> (B, f H, f W, C), torch's `pixel_shuffle`.
pub(super) fn pixel_shuffle(x: &Tensor, factor: usize) -> Result<Tensor> {
    let (batch, h, w, c) = x.dims4()?;
    let c = c / (factor * factor);
    let x = x.reshape((batch, h, w, c, factor, factor))?;
    let x = x.permute((0, 1, 4, 2, 5, 3))?.contiguous()?;
    Ok(x.reshape((batch, h * factor, w * factor, c))?)
}

//! The epilogue of a GEMM in host memory, applied to a few columns of a row while they are in L1d.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::activation::activate;
use super::host::host;
use crate::ops::types::{Activation, Epilogue};

/// An [`Epilogue`] as slices, with the bias of the layer. A gated layer has a bias, in the order of
/// its panels' columns, and a residual (rows, 2n), both added before the gate, and nothing else.
#[derive(Default, Clone, Copy)]
pub(super) struct HostEpilogue<'a> {
    /// Broadcast over the rows, (n).
    pub(super) bias: Option<&'a [f32]>,
    /// Broadcast over the rows of each sample: (samples, n), and rows per sample.
    pub(super) shift: Option<(&'a [f32], usize)>,
    /// (rows, n)
    pub(super) residual: Option<&'a [f32]>,
    /// Of every element, last.
    pub(super) activation: Option<Activation>,
}

impl HostEpilogue<'_> {
    /// Applies it to `c`, which holds `columns` of a row of n.
    #[inline(always)]
    pub(super) fn apply(&self, row: usize, n: usize, columns: &Range<usize>, c: &mut [f32]) {
        if let Some(bias) = self.bias {
            add(c, &bias[columns.clone()]);
        }
        if let Some((shift, rows)) = self.shift {
            add(c, &shift[row / rows * n..][columns.clone()]);
        }
        if let Some(residual) = self.residual {
            add(c, &residual[row * n..][columns.clone()]);
        }
        if let Some(activation) = self.activation {
            activate(c, activation);
        }
    }
}

/// c += d
#[inline(always)]
pub(super) fn add(c: &mut [f32], d: &[f32]) {
    for (c, d) in c.iter_mut().zip(d) {
        *c += d;
    }
}

/// Calls `run` while the operands of an epilogue of `rows` rows are locked.
pub(super) fn with_host<T>(
    epilogue: Epilogue<'_>,
    bias: Option<&[f32]>,
    rows: usize,
    run: impl FnOnce(HostEpilogue<'_>) -> Result<T>,
) -> Result<T> {
    let shift = epilogue.shift.map(Tensor::contiguous).transpose()?;
    let samples = shift.as_ref().map_or(Ok(1), |shift| shift.dim(0))?;
    let shift = shift.as_ref().map(host).transpose()?;
    let shift = shift.as_ref().map(|shift| shift.data()).transpose()?;
    let residual = epilogue.residual.map(host).transpose()?;
    run(HostEpilogue {
        bias,
        shift: shift.map(|shift| (shift, rows / samples)),
        residual: residual.as_ref().map(|residual| residual.data()).transpose()?,
        activation: epilogue.activation,
    })
}

//! Parameters of operations, shared by the facade and every backend. Nothing here computes.

use candle_core::Tensor;

/// A pointwise nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// x * Phi(x), exact
    Gelu,
    /// x * sigmoid(1.702 x)
    QuickGelu,
    /// x, or 0.2 x below zero
    LeakyRelu,
}

/// What follows a matrix multiplication or a convolution, and the bias of its layer, before the
/// result y is stored: `activation(y + shift + residual)`.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue<'a> {
    /// (B, out), broadcast over the pixels of each sample. Of convolutions alone.
    pub(crate) shift: Option<&'a Tensor>,
    /// Of the shape of the output; (.., 2 out) for a gated layer, which adds it before the gate.
    pub(crate) residual: Option<&'a Tensor>,
    /// Of layers without a gate.
    pub(crate) activation: Option<Activation>,
}

impl<'a> Epilogue<'a> {
    /// y as it is.
    pub(crate) const NONE: Self = Self { shift: None, residual: None, activation: None };

    /// y + shift
    pub(crate) fn shift(shift: &'a Tensor) -> Self {
        Self { shift: Some(shift), ..Self::NONE }
    }

    /// y + residual
    pub(crate) fn residual(residual: &'a Tensor) -> Self {
        Self { residual: Some(residual), ..Self::NONE }
    }

    /// activation(y)
    pub(crate) fn activation(activation: Activation) -> Self {
        Self { activation: Some(activation), ..Self::NONE }
    }
}

/// What an error says of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CPU has no faults"))]
pub(crate) enum DeviceFault {
    /// It had no memory for this, and has for less.
    OutOfMemory,
    /// Nothing will run on it again.
    Lost,
}

/// How the kernel of a convolution moves over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Side of the kernel: 3 or 1.
    pub(crate) kernel: usize,
    /// Pixels from one output to the next.
    pub(crate) stride: usize,
    /// Zero padding before the first row and column.
    pub(crate) before: usize,
    /// Zero padding after the last row and column.
    pub(crate) after: usize,
}

impl Geometry {
    /// 3x3, stride 1, padding 1: height and width are kept.
    pub(crate) const SAME: Self = Self { kernel: 3, stride: 1, before: 1, after: 1 };
    /// 1x1, stride 1, no padding.
    pub(crate) const POINT: Self = Self { kernel: 1, stride: 1, before: 0, after: 0 };

    /// Taps of the kernel: pixels of a receptive field.
    pub(super) fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Height or width of the output for that of the input.
    pub(crate) fn output(&self, side: usize) -> usize {
        (side + self.before + self.after - self.kernel) / self.stride + 1
    }
}

/// How queries attend to keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    /// Heads, each with an equal share of the channels.
    pub(crate) heads: usize,
    /// A query attends to no later key.
    pub(crate) causal: bool,
    /// On the CPU: operands are rounded to bf16 and multiplied by AMX.
    pub(crate) amx: bool,
}

/// What the kernels of one kind have done since the program began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct KernelStats {
    /// Launches.
    pub launches: u64,
    /// Floating-point operations of matrix multiplications: multiplications and additions.
    pub flops: u64,
    /// Compulsory memory traffic in bytes: every operand and result once.
    pub bytes: u64,
}

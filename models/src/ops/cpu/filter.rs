//! Linear layers and convolutions on the CPU.

use candle_core::{DType, Result, Tensor, bail};

use super::epilogue::with_host;
use super::gemm::gemm;
use super::host::{host, to_host};
use super::im2col::ReceptiveFields;
use super::packed::{Packed, PanelLayout};
use super::product::Matrix;
use super::tensor_data::Weight;
use super::winograd::{self, TransformedWeights};
use crate::ops::concat::ChannelConcat;
use crate::ops::types::{Epilogue, Geometry};

/// The weight of a linear layer or a convolution in packed panels, and its bias.
pub(in crate::ops) struct PackedFilter {
    weight: Packed,
    /// The same for Winograd's convolution, where the layer is small enough to keep both.
    transformed: Option<TransformedWeights>,
    bias: Option<Vec<f32>>,
}

impl PackedFilter {
    /// From a weight (out, in, k, k) or (out, in), gated (2 out, in), and a bias (out).
    pub(in crate::ops) fn new(
        weight: &Weight<'_>,
        bias: Option<&Tensor>,
        geometry: Geometry,
        gated: bool,
        dtype: DType,
    ) -> Result<Self> {
        let weight = Packed::new(weight, geometry.taps(), gated, PanelLayout::of(dtype))?;
        let transformed = (geometry == Geometry::SAME).then(|| TransformedWeights::new(&weight));
        let bias = bias.map(to_host).transpose()?.map(|bias| weight.arrange(bias));
        Ok(Self { transformed: transformed.flatten(), weight, bias })
    }

    /// Bytes of the weight in all its forms.
    pub(in crate::ops) fn bytes(&self) -> usize {
        let transformed = self.transformed.as_ref().map_or(0, TransformedWeights::bytes);
        self.weight.bytes() + transformed
    }

    /// Whether operands are rounded to bf16 and multiplied by AMX.
    pub(in crate::ops) fn uses_amx(&self) -> bool {
        self.weight.is_vnni()
    }

    /// (.., in) -> (.., out)
    pub(in crate::ops) fn linear(&self, x: &Tensor, epilogue: Epilogue<'_>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let k = shape.pop().unwrap_or_default();
        if k != self.weight.k {
            bail!("a linear layer of {} inputs was given {k}", self.weight.k);
        }
        let rows = shape.iter().product::<usize>();
        shape.push(self.weight.n);
        let source = host(x)?;
        let a = Matrix { data: source.data()?, stride: k };
        let out = with_host(epilogue, self.bias.as_deref(), rows, |epilogue| {
            Ok(gemm(rows, &a, &self.weight, epilogue))
        })?;
        Tensor::from_vec(out, shape, x.device())
    }

    /// (B, H, W, in), resized to `size` by nearest neighbours -> (B, H', W', out)
    pub(in crate::ops) fn convolve(
        &self,
        x: &ChannelConcat,
        size: (usize, usize),
        geometry: Geometry,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let weight = &self.weight;
        let (batch, h, w, _) = x.first.dims4()?;
        let (c1, c2) = x.channels()?;
        let inputs = weight.k / geometry.taps();
        if c1 + c2 != inputs {
            bail!("a convolution of {inputs} channels was given {c1} + {c2}");
        }
        let (first, second) = (host(&x.first)?, x.second.as_ref().map(host).transpose()?);
        let second = (second.as_ref().map_or(Ok(&[][..]), |second| second.data())?, c2);
        let fields = ReceptiveFields::new((first.data()?, c1), second, (h, w), size, geometry);
        let (rows, columns) = fields.output;
        // AMX multiplies eight times as fast as vectors; Winograd saves three quarters of the
        // multiplications.
        let fast = geometry == Geometry::SAME
            && c2 == 0
            && !weight.is_vnni()
            && winograd::is_profitable(rows, columns, c1);
        let count = batch * rows * columns;
        let out = with_host(epilogue, self.bias.as_deref(), count, |epilogue| {
            Ok(if fast {
                winograd::convolve(&fields, batch, weight, self.transformed.as_ref(), epilogue)
            } else {
                gemm(count, &fields, weight, epilogue)
            })
        })?;
        Tensor::from_vec(out, (batch, rows, columns, weight.n), x.first.device())
    }
}

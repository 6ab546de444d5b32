//! What batch rows are conditioned on, beside the timestep.

use candle_core::Tensor;

use crate::error::Result;

/// What batch rows are conditioned on, beside the timestep.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of all cross attentions (B, M, kv_width).
    pub(super) kv: Tensor,
}

impl Conditioning {
    /// The conditioning of a batch from that of its rows: one entry for each run of rows that have
    /// equally many tokens.
    pub(crate) fn stack(rows: &[&Self]) -> Result<Vec<Self>> {
        let stacked = |run: &[&Self]| {
            let kv: Vec<_> = run.iter().map(|row| &row.kv).collect();
            Ok(Self { kv: Tensor::cat(&kv, 0)? })
        };
        rows.chunk_by(|a, b| a.kv.dims() == b.kv.dims()).map(stacked).collect()
    }

    /// How many numbers it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kv.elem_count()
    }
}

//! What batch rows are conditioned on, beside the timestep.

use candle_core::Tensor;

use crate::error::Result;

/// What batch rows are conditioned on, beside the timestep.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of all cross attentions (B, M, kv_width).
    pub(super) kv: Tensor,
    /// The text encoder's hidden states (B, M, D), which ControlNets have keys and values of, too.
    /// None of a batch.
    context: Option<Tensor>,
}

impl Conditioning {
    /// The conditioning of a row.
    pub(in crate::networks) fn new(kv: Tensor, context: Tensor) -> Self {
        Self { kv, context: Some(context) }
    }

    /// The hidden states (1, M, D) of a row.
    pub(in crate::networks) fn context(&self) -> Result<&Tensor> {
        let none = || candle_core::Error::msg("a batch has no context of its own");
        Ok(self.context.as_ref().ok_or_else(none)?)
    }

    /// The conditioning of a batch from that of its rows: one entry for each run of rows that have
    /// equally many tokens.
    pub(crate) fn stack(rows: &[&Self]) -> Result<Vec<Self>> {
        let stacked = |run: &[&Self]| {
            let kv: Vec<_> = run.iter().map(|row| &row.kv).collect();
            Ok(Self { kv: Tensor::cat(&kv, 0)?, context: None })
        };
        rows.chunk_by(|a, b| a.kv.dims() == b.kv.dims()).map(stacked).collect()
    }

    /// How many numbers it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kv.elem_count()
    }
}

//! What batch rows are conditioned on, beside the timestep.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;

/// What batch rows are conditioned on, beside the timestep.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of all cross attentions (B, M, kv_width): those of a prompt are shared by all
    /// rows that have it.
    pub(super) kv: Arc<Tensor>,
    /// The text encoders' hidden states (B, M, D), which ControlNets have keys and values of, too.
    /// None of a batch.
    context: Option<Tensor>,
    /// What is added to the time embedding (B, 4 first), for a UNet that takes pooled prompts and
    /// sizes.
    pub(super) added: Option<Tensor>,
}

impl Conditioning {
    /// The conditioning of a row on its prompt alone.
    pub(crate) fn new(kv: Arc<Tensor>, context: Tensor) -> Self {
        Self { kv, context: Some(context), added: None }
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
            let kv: Vec<_> = run.iter().map(|row| &*row.kv).collect();
            let added: Option<Vec<_>> = run.iter().map(|row| row.added.as_ref()).collect();
            let added = added.map(|added| Tensor::cat(&added, 0)).transpose()?;
            Ok(Self { kv: Arc::new(Tensor::cat(&kv, 0)?), context: None, added })
        };
        rows.chunk_by(|a, b| a.kv.dims() == b.kv.dims()).map(stacked).collect()
    }

    /// Whether it is on the same encoded prompt as another.
    pub(crate) fn has_prompt_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.kv, &other.kv)
    }

    /// How many numbers it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kv.elem_count() + self.added.as_ref().map_or(0, Tensor::elem_count)
    }
}

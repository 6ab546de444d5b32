//! What batch rows are conditioned on, beside the timestep.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::ops::{add_silu, cat_rows};

/// What batch rows are conditioned on, beside the timestep.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of all cross attentions (B, M, kv_width): those of a prompt are shared by all
    /// rows that have it.
    pub(super) kv: Arc<Tensor>,
    /// What is added to the time embedding (B, 4 first), for a UNet that takes pooled prompts and
    /// sizes.
    pub(in crate::networks) added: Option<Tensor>,
    /// What a row is made of. None of a batch.
    pub(super) inputs: Option<Inputs>,
    /// Of a batch, what its rows see beside their prompts, in the order in which that is summed.
    pub(super) seen: Vec<Seen>,
}

/// Pictures of IP-Adapters that rows of a batch see, which follow each other.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Keys and values of all cross attentions (rows, N, kv_width).
    pub(super) kv: Tensor,
}

/// What a row's conditioning is made of, from which ControlNets make their own.
#[derive(Debug, Clone)]
pub(in crate::networks) struct Inputs {
    /// The text encoders' hidden states (1, M, D).
    pub(in crate::networks) context: Tensor,
    /// The pooled prompt (1, P) f32, and the sizes.
    pub(in crate::networks) added: Option<(Tensor, Vec<f64>)>,
}

impl Conditioning {
    /// The conditioning of a row on its prompt alone.
    pub(crate) fn new(kv: Arc<Tensor>, context: Tensor) -> Self {
        let inputs = Some(Inputs { context, added: None });
        Self { kv, added: None, inputs, seen: Vec::new() }
    }

    /// What a row is made of.
    pub(in crate::networks) fn inputs(&self) -> Result<&Inputs> {
        let none = || candle_core::Error::msg("a batch has no inputs of its own");
        Ok(self.inputs.as_ref().ok_or_else(none)?)
    }

    /// Time embeddings (B, 4 first) with what the conditioning of the rows adds, and the SiLU with which
    /// every residual block begins.
    pub(in crate::networks) fn added_to(times: &Tensor, conditioning: &[Self]) -> Result<Tensor> {
        let added: Option<Vec<_>> = conditioning.iter().map(|rows| rows.added.as_ref()).collect();
        let none = || candle_core::Error::msg("rows have no pooled prompt and sizes");
        Ok(add_silu(times, &cat_rows(&added.ok_or_else(none)?)?)?)
    }

    /// The conditioning of a batch from that of its rows: one entry for each run of rows that have
    /// equally many tokens.
    pub fn stack(rows: &[&Self]) -> Result<Vec<Self>> {
        Self::stack_seeing(rows, &vec![Vec::new(); rows.len()])
    }

    /// The same with the keys and values of pictures that each row sees, (1, N, kv_width) each.
    pub(crate) fn stack_seeing(rows: &[&Self], seen: &[Vec<Arc<Tensor>>]) -> Result<Vec<Self>> {
        let mut first = 0;
        let stacked = |run: &[&Self]| {
            let kv: Vec<_> = run.iter().map(|row| &*row.kv).collect();
            let added: Option<Vec<_>> = run.iter().map(|row| row.added.as_ref()).collect();
            let added = added.map(|added| cat_rows(&added)).transpose()?;
            let seen = Seen::stack(&seen[first..first + run.len()])?;
            first += run.len();
            Ok(Self { kv: Arc::new(cat_rows(&kv)?), added, inputs: None, seen })
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

impl Seen {
    /// The first pictures of all rows, then the second ones, ..: one entry for each run of rows that
    /// have one of equally many tokens.
    fn stack(rows: &[Vec<Arc<Tensor>>]) -> Result<Vec<Self>> {
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut all = Vec::new();
        for k in 0..most {
            let tokens = |row: &Vec<Arc<Tensor>>| row.get(k).map(|kv| kv.dims().to_vec());
            let mut first = 0;
            for run in rows.chunk_by(|a, b| tokens(a) == tokens(b)) {
                let kv: Vec<_> = run.iter().filter_map(|row| row.get(k)).map(|kv| &**kv).collect();
                if !kv.is_empty() {
                    all.push(Self { first, rows: run.len(), kv: cat_rows(&kv)? });
                }
                first += run.len();
            }
        }
        Ok(all)
    }
}

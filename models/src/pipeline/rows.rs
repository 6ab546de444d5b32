//! The batch rows of an image in one pass: what each is conditioned on at each evaluation of the
//! UNet, and how their outputs become one.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/prompt_parser.py`
//! `reconstruct_multicond_batch`, and `modules/sd_samplers_cfg_denoiser.py` `combine_denoised`.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::networks::Conditioning;
use crate::ops::linear_combination;
use crate::sampling::{guide, rescale};

/// The rows of an image, in diffusers' order: with guidance first the unconditional row (the
/// negative prompt's), then the conditional rows.
pub(super) struct Rows {
    pub(super) unconditional: Option<Row>,
    /// Each with its weight. Without an unconditional row there is one, of weight 1.
    pub(super) conditional: Vec<(Row, f64)>,
    pub(super) guidance_scale: f64,
    pub(super) guidance_rescale: f64,
}

/// The conditioning of a row: the last evaluation of each, counted from 0, in their order.
pub(super) struct Row(pub(super) Vec<(usize, Arc<Conditioning>)>);

/// The output of an evaluation.
pub(super) struct Combined {
    /// After guidance, (1, C, h, w) f32.
    pub(super) guided: Tensor,
    /// Of the unconditional row; without guidance the same.
    pub(super) unguided: Tensor,
}

impl Row {
    /// The conditioning of an evaluation.
    fn at(&self, evaluation: usize) -> Option<&Arc<Conditioning>> {
        let Self(spans) = self;
        let span = spans.iter().find(|(until, _)| evaluation <= *until);
        span.or(spans.last()).map(|(_, conditioning)| conditioning)
    }
}

impl Rows {
    /// How many they are.
    pub(super) fn len(&self) -> usize {
        self.conditional.len() + usize::from(self.unconditional.is_some())
    }

    /// The conditioning of the rows at an evaluation.
    pub(super) fn at(&self, evaluation: usize) -> impl Iterator<Item = &Arc<Conditioning>> {
        let conditional = self.conditional.iter().map(|(row, _)| row);
        self.unconditional.iter().chain(conditional).filter_map(move |row| row.at(evaluation))
    }

    /// The output of an evaluation from those of the rows (rows, C, h, w) f32. The prompts' weights
    /// are shares of what they add to the unconditional output.
    pub(super) fn combine(&self, outputs: &Tensor) -> Result<Combined> {
        let unguided = outputs.narrow(0, 0, 1)?;
        if self.unconditional.is_none() {
            return Ok(Combined { guided: unguided.clone(), unguided });
        }
        let of = |row: usize| outputs.narrow(0, row + 1, 1);
        let weights = self.conditional.iter().map(|(_, weight)| *weight);
        let prompted = if weights.clone().eq([1.0]) {
            of(0)?
        } else {
            let rows = (0..self.conditional.len()).map(of);
            let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
            let mut terms: Vec<_> = weights.clone().zip(&rows).collect();
            terms.push((1.0 - weights.sum::<f64>(), &unguided));
            linear_combination(&terms)?
        };
        let guided = guide(&unguided, &prompted, self.guidance_scale)?;
        let guided = match self.guidance_rescale > 0.0 {
            true => rescale(&guided, &prompted, self.guidance_rescale)?,
            false => guided,
        };
        Ok(Combined { guided, unguided })
    }
}

//! The noise of all steps of a run, drawn and uploaded before the first of them.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};

use super::ahead::Ahead;
use super::noise::Noise;
use super::state::SamplerState;
use crate::error::Result;

/// Noise that is on the device before it is needed, in bytes at the most; the steps of a longer run
/// upload the rest.
const MOST_BYTES: usize = 32 << 20;

impl SamplerState {
    /// Draws the noise of all evaluations that are left, for latents of a shape (B, C, H, W), and
    /// uploads it at once. On the CPU there is nothing to upload.
    pub(crate) fn draw_ahead(
        &mut self,
        shape: &Shape,
        noise: &mut Noise,
        device: &Device,
    ) -> Result<()> {
        if device.is_cpu() {
            return Ok(());
        }
        let values = self.rehearsed(shape, noise, MOST_BYTES / size_of::<f32>())?;
        if !values.is_empty() {
            let mut dims = shape.dims().to_vec();
            dims.insert(0, values.len() / shape.elem_count());
            let drawn = Tensor::from_vec(values, dims, device)?;
            self.ahead = Ahead::Uploaded(Arc::new(drawn), 0);
        }
        Ok(())
    }

    /// The noise of the evaluations that are left, but at most so many values, in whole evaluations:
    /// those are done on the CPU with outputs of zeros, of which nothing that is drawn depends.
    fn rehearsed(&self, shape: &Shape, noise: &mut Noise, most: usize) -> Result<Vec<f32>> {
        let mut state = self.clone();
        let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        state.history.iter_mut().for_each(|result| *result = zeros.clone());
        state.anchor = state.anchor.map(|_| zeros.clone());
        let mut values = Vec::new();
        while state.next().is_some() {
            let mut after = noise.clone();
            state.ahead = Ahead::Noting(Vec::new());
            state.advance(&zeros, &zeros, &mut after)?;
            let Ahead::Noting(drawn) = &state.ahead else { break };
            if values.len() + drawn.len() * shape.elem_count() > most {
                break;
            }
            values.extend(drawn.iter().flatten());
            *noise = after;
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::{Run, Sampler, SamplerOptions, SchedulerConfig, SigmaSchedule, Span};

    /// The latents after a run whose outputs are some constant, if so many values are drawn ahead.
    fn run(sampler: Sampler, most: Option<usize>) -> (Vec<f32>, bool) {
        let run = Run {
            sampler,
            schedule: SigmaSchedule::Model,
            options: SamplerOptions::default(),
            steps: 5,
            skipped: 0,
            share: 1.0,
            is_xl: false,
            span: Span::default(),
        };
        let mut state = SamplerState::new(&SchedulerConfig::default(), run).expect("a run");
        let (shape, mut noise) = (Shape::from((1, 2, 3, 4)), Noise::new(7));
        let mut x = Tensor::ones(&shape, DType::F32, &Device::Cpu).expect("latents");
        let output = x.affine(0.3, 0.0).expect("an output");
        let mut is_ahead = false;
        if let Some(most) = most {
            let values = state.rehearsed(&shape, &mut noise, most).expect("noise");
            let draws = values.len() / 24;
            is_ahead = draws > 0;
            let drawn = Tensor::from_vec(values, (draws, 1, 2, 3, 4), &Device::Cpu);
            state.ahead = Ahead::Uploaded(Arc::new(drawn.expect("noise")), 0);
        }
        while state.next().is_some() {
            x = state.advance(&x, &output, &mut noise).expect("a step");
        }
        (x.flatten_all().and_then(|x| x.to_vec1()).expect("values"), is_ahead)
    }

    #[test]
    fn noise_that_is_drawn_ahead_is_that_which_a_step_would_draw() {
        let mut ahead = 0;
        for sampler in Sampler::all() {
            let (expected, _) = run(sampler, None);
            for most in [usize::MAX, 60, 0] {
                let (found, is_ahead) = run(sampler, Some(most));
                assert_eq!(found, expected, "{sampler}, {most} values");
                ahead += usize::from(is_ahead);
            }
        }
        assert!(ahead > 8, "{ahead}");
    }
}

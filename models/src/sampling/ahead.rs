//! Noise that is drawn before it is needed: an upload in a step would have the GPU wait for the host.

use std::sync::Arc;

use candle_core::{Result, Tensor};

/// What was drawn ahead, in the order in which it is taken.
#[derive(Debug, Clone, Default)]
pub(super) enum Ahead {
    /// Nothing is: noise is drawn when it is asked for.
    #[default]
    Nothing,
    /// What is asked for is noted.
    Noting(Vec<Vec<f32>>),
    /// (draws, B, C, H, W), of which so many are taken.
    Uploaded(Arc<Tensor>, usize),
}

impl Ahead {
    /// The next noise for x: that which was drawn ahead, else what `draw` makes.
    pub(super) fn next(&mut self, x: &Tensor, draw: impl FnOnce() -> Vec<f32>) -> Result<Tensor> {
        match self {
            Self::Uploaded(drawn, taken) if *taken < drawn.dim(0)? => {
                *taken += 1;
                drawn.get(*taken - 1)
            }
            Self::Noting(drawn) => {
                drawn.push(draw());
                x.zeros_like()
            }
            Self::Nothing | Self::Uploaded(..) => Tensor::from_vec(draw(), x.shape(), x.device()),
        }
    }
}

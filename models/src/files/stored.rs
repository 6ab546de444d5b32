//! A tensor as it is in its file, until it is packed or copied.

use std::borrow::Cow;

use crate::ops::{TensorData, Weight};

/// A tensor's numbers and its shape.
pub(crate) struct StoredTensor<'a> {
    pub(super) numbers: Numbers<'a>,
    pub(crate) shape: &'a [usize],
}

/// The numbers of a tensor: as they are stored, or of types that layers do not read as f32.
pub(super) enum Numbers<'a> {
    Stored(Cow<'a, [u8]>, fn(&[u8]) -> TensorData<'_>),
    Widened(Vec<f32>),
}

impl StoredTensor<'_> {
    pub(crate) fn numbers(&self) -> TensorData<'_> {
        match &self.numbers {
            Numbers::Stored(bytes, view) => view(bytes),
            Numbers::Widened(values) => TensorData::Floats(values),
        }
    }

    /// As f32.
    pub(crate) fn floats(self) -> Vec<f32> {
        match self.numbers {
            Numbers::Stored(bytes, view) => view(&bytes).floats(),
            Numbers::Widened(values) => values,
        }
    }
}

impl<'a> From<&'a StoredTensor<'_>> for Weight<'a> {
    fn from(stored: &'a StoredTensor<'_>) -> Self {
        Self::Data(stored.numbers(), stored.shape)
    }
}

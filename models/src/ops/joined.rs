//! Two pictures whose channels lie behind each other, as a skip meets its layer.

use candle_core::{Result, Tensor, bail};

/// One picture (B, H, W, C), or two (B, H, W, C1), (B, H, W, C2) that are read as one of C1 + C2
/// channels. They are only concatenated where no kernel reads two.
pub(crate) struct Joined {
    pub(super) first: Tensor,
    pub(super) second: Option<Tensor>,
}

impl Joined {
    /// Two pictures of one size.
    pub(crate) fn new(first: &Tensor, second: &Tensor) -> Result<Self> {
        if first.dims()[..3] != second.dims()[..3] {
            bail!("pictures of {:?} and {:?} cannot be joined", first.dims(), second.dims());
        }
        Ok(Self { first: first.clone(), second: Some(second.clone()) })
    }

    /// One picture.
    pub(crate) fn one(first: &Tensor) -> Self {
        Self { first: first.clone(), second: None }
    }

    /// Some samples of the batch.
    pub(crate) fn samples(&self, first: usize, count: usize) -> Result<Self> {
        let narrow = |picture: &Tensor| picture.narrow(0, first, count);
        let second = self.second.as_ref().map(narrow).transpose()?;
        Ok(Self { first: narrow(&self.first)?, second })
    }

    /// The picture as one tensor.
    pub(crate) fn whole(&self) -> Result<Tensor> {
        match &self.second {
            None => Ok(self.first.clone()),
            Some(second) => Tensor::cat(&[&self.first, second], 3),
        }
    }

    /// Channels of the first and of the second.
    pub(super) fn channels(&self) -> Result<(usize, usize)> {
        let second = self.second.as_ref().map_or(Ok(0), |second| second.dim(3))?;
        Ok((self.first.dim(3)?, second))
    }
}

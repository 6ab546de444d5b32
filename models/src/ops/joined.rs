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
        #[cfg(feature = "cuda")]
        if super::cuda::has_products(first.device(), first.dtype())? {
            return Ok(Self { first: first.clone(), second: Some(second.clone()) });
        }
        Ok(Self { first: Tensor::cat(&[first, second], 3)?, second: None })
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

    /// The picture, if it is one tensor.
    pub(crate) fn whole(&self) -> Result<&Tensor> {
        match &self.second {
            None => Ok(&self.first),
            Some(_) => bail!("a residual needs one tensor, and a skip was joined to it"),
        }
    }
}

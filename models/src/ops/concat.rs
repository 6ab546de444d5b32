//! Images concatenated along their channels without a copy, as a skip connection meets its layer.

use candle_core::{Result, Tensor, bail};

/// One image (B, H, W, C), or two (B, H, W, C1) and (B, H, W, C2) that are read as one of C1 + C2
/// channels. They are copied into one tensor only where a kernel cannot read two.
#[derive(Clone)]
pub(crate) struct ChannelConcat {
    pub(super) first: Tensor,
    pub(super) second: Option<Tensor>,
}

impl From<&Tensor> for ChannelConcat {
    fn from(image: &Tensor) -> Self {
        Self { first: image.clone(), second: None }
    }
}

impl From<&ChannelConcat> for ChannelConcat {
    fn from(images: &ChannelConcat) -> Self {
        images.clone()
    }
}

impl ChannelConcat {
    /// Two images of one size.
    pub(crate) fn new(first: &Tensor, second: &Tensor) -> Result<Self> {
        if first.dims()[..3] != second.dims()[..3] {
            bail!("images of {:?} and {:?} cannot be concatenated", first.dims(), second.dims());
        }
        Ok(Self { first: first.clone(), second: Some(second.clone()) })
    }

    /// Samples `first .. first + count` of the batch.
    pub(crate) fn samples(&self, first: usize, count: usize) -> Result<Self> {
        let narrow = |image: &Tensor| image.narrow(0, first, count);
        let second = self.second.as_ref().map(narrow).transpose()?;
        Ok(Self { first: narrow(&self.first)?, second })
    }

    /// As one tensor: a copy if there are two images.
    pub(crate) fn whole(&self) -> Result<Tensor> {
        match &self.second {
            None => Ok(self.first.clone()),
            Some(second) => Tensor::cat(&[&self.first, second], 3),
        }
    }

    /// Samples of the batch.
    pub(crate) fn count(&self) -> Result<usize> {
        self.first.dim(0)
    }

    /// Height and width.
    pub(crate) fn size(&self) -> Result<(usize, usize)> {
        let (_, h, w, _) = self.first.dims4()?;
        Ok((h, w))
    }

    /// C1 and C2.
    pub(super) fn channels(&self) -> Result<(usize, usize)> {
        let second = self.second.as_ref().map_or(Ok(0), |second| second.dim(3))?;
        Ok((self.first.dim(3)?, second))
    }
}

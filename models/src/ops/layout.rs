//! Between latents, (B, C, H, W) f32, and activations, (B, H, W, C) in the network's type.

use candle_core::{DType, Result, Tensor};

/// (B, C, H, W) f32 -> (B, H, W, C)
pub(crate) fn channels_last(x: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = super::cuda::channels_last(x, dtype)? {
        return Ok(y);
    }
    x.permute((0, 2, 3, 1))?.contiguous()?.to_dtype(dtype)
}

/// (B, H, W, C) -> (B, C, H, W) f32
pub(crate) fn channels_first(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = super::cuda::channels_first(x)? {
        return Ok(y);
    }
    x.permute((0, 3, 1, 2))?.contiguous()?.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::tensor;

    #[test]
    fn a_picture_comes_back() {
        let x = tensor(&[2, 4, 3, 5], 1);
        let turned = channels_last(&x, DType::F32).unwrap();
        assert_eq!(turned.dims(), [2, 3, 5, 4]);
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&turned)[4 * 7 + 2], values(&x)[2 * 15 + 7]);
        assert_eq!(values(&channels_first(&turned).unwrap()), values(&x));
    }
}

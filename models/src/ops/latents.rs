//! Latents between two UNet calls: their linear combinations and guidance, in f32 and rounded after
//! every operation, so that all devices agree to the bit; and their conversion from (B, C, H, W)
//! f32 to activations (B, H, W, C) of the network's type and back.

use candle_core::{DType, Result, Tensor};

use super::{cuda, reference};

/// The sum of `factor * tensor` over tensors of one shape, added from the first to the last.
pub(crate) fn linear_combination(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    match cuda::linear_combination(terms)? {
        Some(sum) => Ok(sum),
        None => reference::linear_combination(terms),
    }
}

/// a + t (b - a), both of one shape; guidance extrapolates with t > 1.
pub(crate) fn lerp(a: &Tensor, b: &Tensor, t: f64) -> Result<Tensor> {
    match cuda::lerp(a, b, t)? {
        Some(y) => Ok(y),
        None => reference::lerp(a, b, t),
    }
}

/// (B, C, H, W) f32 -> (B, H, W, C)
pub(crate) fn channels_last(x: &Tensor, dtype: DType) -> Result<Tensor> {
    match cuda::channels_last(x, dtype)? {
        Some(y) => Ok(y),
        None => reference::channels_last(x, dtype),
    }
}

/// (B, H, W, C) -> (B, C, H, W) f32
pub(crate) fn channels_first(x: &Tensor) -> Result<Tensor> {
    match cuda::channels_first(x)? {
        Some(y) => Ok(y),
        None => reference::channels_first(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{random, tensor};

    #[test]
    fn every_operation_is_rounded() {
        let [a, b] = [1, 2].map(|seed| random(1000, seed));
        let vector = |v: &[f32]| Tensor::new(v, &candle_core::Device::Cpu).unwrap();
        let values = |t: Result<Tensor>| t.unwrap().to_vec1::<f32>().unwrap();
        let each = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
            a.iter().zip(&b).map(|(a, b)| f(*a, *b)).collect()
        };
        let (x, y) = (vector(&a), vector(&b));
        let sum = values(linear_combination(&[(0.3, &x), (1.0, &y), (-1.7, &x)]));
        assert_eq!(sum, each(&|a, b| a * 0.3 + b + a * -1.7));
        assert_eq!(values(lerp(&x, &y, 7.5)), each(&|a, b| a + (b - a) * 7.5));
    }

    #[test]
    fn layouts_round_trip() {
        let x = tensor(&[2, 4, 3, 5], 1);
        let turned = channels_last(&x, DType::F32).unwrap();
        assert_eq!(turned.dims(), [2, 3, 5, 4]);
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&turned)[4 * 7 + 2], values(&x)[2 * 15 + 7]);
        assert_eq!(values(&channels_first(&turned).unwrap()), values(&x));
    }
}

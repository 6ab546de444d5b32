//! What becomes of latents between two evaluations: sums of scaled tensors, and guidance, in f32
//! and rounded after every operation, so that all devices agree to the bit.

use candle_core::{Result, Tensor};

/// The sum of some tensors of one shape, each times its factor, from the first to the last.
pub(crate) fn combine(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = super::cuda::combine(terms)? {
        return Ok(sum);
    }
    let mut scaled = terms.iter().map(|&(factor, x)| match factor {
        1.0 => Ok(x.clone()),
        _ => x.affine(factor, 0.0),
    });
    let first = scaled.next().expect("a combination has terms")?;
    scaled.try_fold(first, |sum, term| sum + term?)
}

/// a + scale (b - a), both of one shape.
pub(crate) fn extrapolate(a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = super::cuda::extrapolate(a, b, scale)? {
        return Ok(y);
    }
    a + ((b - a)? * scale)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn every_operation_is_rounded() {
        let [a, b] = [1, 2].map(|seed| random(1000, seed));
        let tensor = |v: &[f32]| Tensor::new(v, &candle_core::Device::Cpu).unwrap();
        let values = |t: Result<Tensor>| t.unwrap().to_vec1::<f32>().unwrap();
        let each = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
            a.iter().zip(&b).map(|(a, b)| f(*a, *b)).collect()
        };
        let (x, y) = (tensor(&a), tensor(&b));
        let sum = values(combine(&[(0.3, &x), (1.0, &y), (-1.7, &x)]));
        assert_eq!(sum, each(&|a, b| a * 0.3 + b + a * -1.7));
        assert_eq!(values(extrapolate(&x, &y, 7.5)), each(&|a, b| a + (b - a) * 7.5));
    }
}

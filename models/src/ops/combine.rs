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

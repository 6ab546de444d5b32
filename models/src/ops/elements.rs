//! Conversions between types, sums and embeddings of tokens: element by element.

use candle_core::{DType, Result, Tensor};

use super::cuda;

/// The tensor in another type.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    match cuda::convert(x, dtype)? {
        Some(y) => Ok(y),
        None => x.to_dtype(dtype),
    }
}

/// a + b, of one shape and type.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match cuda::scaled_sum(a, 1.0, Some(b), false)? {
        Some(y) => Ok(y),
        None => a + b,
    }
}

/// silu(a + b), of one shape and type.
pub(crate) fn add_silu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match cuda::scaled_sum(a, 1.0, Some(b), true)? {
        Some(y) => Ok(y),
        None => (a + b)?.silu(),
    }
}

/// Tensors of one type and one shape beyond the first dimension, below each other.
pub(crate) fn cat_rows<T: AsRef<Tensor>>(tensors: &[T]) -> Result<Tensor> {
    if let [one] = tensors {
        return Ok(one.as_ref().clone());
    }
    match cuda::cat_rows(tensors)? {
        Some(y) => Ok(y),
        None => Tensor::cat(tensors, 0),
    }
}

/// x times a factor that is rounded to f32.
pub(crate) fn scale(x: &Tensor, factor: f64) -> Result<Tensor> {
    match cuda::scaled_sum(x, factor, None, false)? {
        Some(y) => Ok(y),
        None => {
            let factor = Tensor::new(factor as f32, x.device())?.to_dtype(x.dtype())?;
            x.broadcast_mul(&factor)
        }
    }
}

/// The embeddings (V, C) of tokens, B rows of one length L, plus those of their places (L, C):
/// (B, L, C).
///
/// # Errors
/// An id that is no row of the table.
pub(crate) fn embed(table: &Tensor, positions: &Tensor, ids: &[Vec<u32>]) -> Result<Tensor> {
    let (batch, length) = (ids.len(), ids.first().map_or(0, Vec::len));
    let (vocabulary, width) = table.dims2()?;
    let ids = ids.concat();
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
        candle_core::bail!("a token's id is {id}, and there are {vocabulary}");
    }
    let ids = Tensor::from_vec(ids, batch * length, table.device())?;
    let shape = (batch, length, width);
    match cuda::embed(table, positions, &ids)? {
        Some(x) => x.reshape(shape),
        None => table.index_select(&ids, 0)?.reshape(shape)?.broadcast_add(positions),
    }
}

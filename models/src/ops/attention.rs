//! softmax(Q K^T / sqrt(d)) V, without the matrix of scores in memory where there is a kernel.

use candle_core::{Result, Tensor};

use super::types::Attention;
use super::{cpu, cuda, reference};

/// q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C); scores are scaled by 1 / sqrt(C / heads).
///
/// Rows may be strided (columns of a wider tensor); the last dimension must be dense.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, kind: Attention) -> Result<Tensor> {
    if q.device().is_cpu() {
        return cpu::attention(q, k, v, kind);
    }
    match cuda::attention(q, k, v, kind)? {
        Some(y) => Ok(y),
        None => reference::attention(q, k, v, kind),
    }
}

/// Attention of tokens to each other: (B, L, 3C), queries, keys and values side by side ->
/// (B, L, C).
pub(crate) fn self_attention(qkv: &Tensor, kind: Attention) -> Result<Tensor> {
    let channels = qkv.dim(2)? / 3;
    let part = |i| qkv.narrow(2, i * channels, channels);
    attention(&part(0)?, &part(1)?, &part(2)?, kind)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn attention_agrees_with_the_reference() {
        for (queries, keys, heads, width) in
            [(64, 64, 2, 40), (1, 1, 1, 8), (33, 77, 8, 20), (300, 500, 1, 64), (5, 400, 3, 7)]
        {
            let q = (tensor(&[2, queries, heads * width], 1) * 4.0).unwrap();
            let (k, v) =
                (tensor(&[2, keys, heads * width], 2), tensor(&[2, keys, heads * width], 3));
            let kind = Attention { heads, causal: false, amx: false };
            let got = attention(&q, &k, &v, kind).unwrap();
            assert!(difference(&got, &reference::attention(&q, &k, &v, kind).unwrap()) < 1e-5);
        }
        // The last is more than one block of keys; the first queries attend to none of the second.
        for tokens in [77, cpu::KEY_BLOCK + 38] {
            let part = |seed| tensor(&[2, tokens, 48], seed);
            let (q, k, v) = (part(4), part(5), part(6));
            let kind = Attention { heads: 3, causal: true, amx: false };
            let got = attention(&q, &k, &v, kind).unwrap();
            assert!(difference(&got, &reference::attention(&q, &k, &v, kind).unwrap()) < 1e-5);
        }
    }

    /// Probabilities too are rounded to bf16, whose numbers are 2^-8 apart.
    #[test]
    fn attention_on_tiles_is_as_close_as_bf16() {
        for (queries, keys, heads, width) in
            [(64, 64, 2, 40), (1, 1, 1, 8), (33, 77, 8, 20), (300, 500, 1, 64), (5, 400, 3, 7)]
        {
            let round = |t: Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let q = round((tensor(&[2, queries, heads * width], 1) * 4.0).unwrap());
            let k = round(tensor(&[2, keys, heads * width], 2));
            let v = round(tensor(&[2, keys, heads * width], 3));
            for causal in [false, queries == keys] {
                let kind = Attention { heads, causal, amx: false };
                let want = attention(&q, &k, &v, kind).unwrap();
                let got = attention(&q, &k, &v, Attention { amx: true, ..kind }).unwrap();
                let difference = difference(&got, &want);
                assert!(difference < 1e-2, "{queries} {keys} {width}: {difference}");
                let row = |t: &Tensor| t.narrow(0, 1, 1).unwrap().contiguous().unwrap();
                let kind = Attention { amx: true, ..kind };
                let alone = attention(&row(&q), &row(&k), &row(&v), kind).unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values(&alone), values(&row(&got)), "a sample depends on its batch");
            }
        }
    }

    #[test]
    fn columns_of_a_wider_tensor_serve() {
        let qkv = tensor(&[2, 50, 3 * 32], 7);
        let kind = Attention { heads: 4, causal: false, amx: false };
        let got = self_attention(&qkv, kind).unwrap();
        let dense = |i: usize| qkv.narrow(2, i * 32, 32).unwrap().contiguous().unwrap();
        let want = attention(&dense(0), &dense(1), &dense(2), kind).unwrap();
        assert_eq!(difference(&got, &want), 0.0);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = (tensor(&[1, 40, 16], 8) * 1e3).unwrap();
        let kind = Attention { heads: 1, causal: false, amx: false };
        let got = attention(&q, &q, &q, kind).unwrap();
        assert!(got.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}

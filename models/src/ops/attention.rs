//! Softmax(Q K^T) V without ever holding the scores (Milakov and Gimelshein 2018; Dao et al. 2022).
//!
//! On the CPU the whole computation is transposed: 32 queries lie along the vector lanes, so the
//! running maximum, the sum and the rescaling of the online softmax need no horizontal operation,
//! and the block of probabilities comes out of the kernel in just the layout in which the second
//! product wants its right-hand panel.

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::buffers::{Aligned, Scratch};
use super::gemm::{Kernel, MR, NR, interleave};
use super::on_cpu;
use super::simd::{exp, vectorized};

/// Keys of a block: BLOCK x NR probabilities stay in the first-level cache.
const BLOCK: usize = 16 * MR;

/// How queries attend to keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    /// Heads, each with an equal share of the channels.
    pub(crate) heads: usize,
    /// No query sees a later key.
    pub(crate) causal: bool,
}

/// q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C); scores are scaled by 1 / sqrt(C / heads).
///
/// Rows may be strided (columns of a wider tensor); the last dimension must be dense.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, kind: Attention) -> Result<Tensor> {
    if !on_cpu(q) {
        #[cfg(feature = "cuda")]
        if let Some(y) = super::cuda::attention(q, k, v, kind)? {
            return Ok(y);
        }
        return reference(q, k, v, kind);
    }
    let (batch, queries, channels) = q.dims3()?;
    let keys = k.dim(1)?;
    let width = channels / kind.heads;
    let (q, k, v) = (Strided::new(q)?, Strided::new(k)?, Strided::new(v)?);
    let (q, k, v) = (q.view()?, k.view()?, v.view()?);
    let problem = Problem { queries, keys, width, scale: (width as f32).powf(-0.5), kind };
    let heads: Vec<Head> = (0..batch * kind.heads)
        .into_par_iter()
        .map(|i| {
            let (sample, first) = (i / kind.heads, i % kind.heads * width);
            problem.pack(&k, &v, sample, first)
        })
        .collect();
    let mut out = vec![0f32; batch * queries * channels];
    // One task owns the rows of 32 queries for all heads: a dense piece of the output.
    let tiles = queries.div_ceil(NR);
    let pieces = out.chunks_mut(queries * channels).flat_map(|s| s.chunks_mut(NR * channels));
    let pieces: Vec<_> = pieces.enumerate().collect();
    let split = if pieces.len() < 4 * rayon::current_num_threads() { kind.heads } else { 1 };
    if split == 1 {
        pieces.into_par_iter().for_each(|(i, piece)| {
            for head in 0..kind.heads {
                let packed = &heads[i / tiles * kind.heads + head];
                let place = Place { sample: i / tiles, tile: i % tiles, first: head * width };
                problem.attend(&q, packed, place, |row, values| {
                    piece[row * channels + head * width..][..width].copy_from_slice(values);
                });
            }
        });
    } else {
        // Few queries: heads go to different threads, and their columns are put together after.
        let columns: Vec<Vec<f32>> = (0..pieces.len() * kind.heads)
            .into_par_iter()
            .map(|task| {
                let (i, head) = (task / kind.heads, task % kind.heads);
                let packed = &heads[i / tiles * kind.heads + head];
                let place = Place { sample: i / tiles, tile: i % tiles, first: head * width };
                let mut column = Vec::with_capacity(NR * width);
                problem.attend(&q, packed, place, |_, values| column.extend_from_slice(values));
                column
            })
            .collect();
        for (i, piece) in pieces {
            for head in 0..kind.heads {
                let column = &columns[i * kind.heads + head];
                for (row, values) in piece.chunks_exact_mut(channels).zip(column.chunks(width)) {
                    row[head * width..][..width].copy_from_slice(values);
                }
            }
        }
    }
    Tensor::from_vec(out, (batch, queries, channels), &candle_core::Device::Cpu)
}

/// Attention of tokens to each other: (B, L, 3C), queries, keys and values side by side ->
/// (B, L, C).
pub(crate) fn self_attention(qkv: &Tensor, kind: Attention) -> Result<Tensor> {
    let channels = qkv.dim(2)? / 3;
    let part = |i| qkv.narrow(2, i * channels, channels);
    attention(&part(0)?, &part(1)?, &part(2)?, kind)
}

/// A (B, L, C) tensor in host memory whose rows may lie apart.
struct Strided<'a> {
    storage: candle_core::StorageRef<'a>,
    start: usize,
    batch: usize,
    row: usize,
}

#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    batch: usize,
    row: usize,
}

impl<'a> Strided<'a> {
    fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match *layout.stride() {
            [batch, row, 1] => Ok(Self { storage, start: layout.start_offset(), batch, row }),
            ref other => bail!("attention wants dense channels, got strides {other:?}"),
        }
    }

    fn view(&self) -> Result<View<'_>> {
        match &*self.storage {
            candle_core::Storage::Cpu(candle_core::CpuStorage::F32(data)) => {
                Ok(View { data: &data[self.start..], batch: self.batch, row: self.row })
            }
            _ => bail!("attention on the CPU was given a tensor that is not f32"),
        }
    }
}

impl View<'_> {
    fn row(&self, sample: usize, row: usize, first: usize, width: usize) -> &[f32] {
        &self.data[sample * self.batch + row * self.row + first..][..width]
    }
}

/// Keys and values of one head as left-hand tiles: keys [group of 12][channel][12], values
/// [group of 12 channels][key][12].
struct Head {
    keys: Aligned,
    values: Aligned,
}

struct Problem {
    queries: usize,
    keys: usize,
    width: usize,
    scale: f32,
    kind: Attention,
}

/// Which 32 queries of which sample, and the first channel of their head.
#[derive(Clone, Copy)]
struct Place {
    sample: usize,
    tile: usize,
    first: usize,
}

impl Problem {
    fn pack(&self, k: &View<'_>, v: &View<'_>, sample: usize, first: usize) -> Head {
        let width = self.width;
        let mut keys = Aligned::zeros(self.keys.next_multiple_of(MR) * width);
        for (g, tile) in keys.as_mut_slice().chunks_exact_mut(MR * width).enumerate() {
            // Places past the last key repeat it; their scores are never read.
            let key = |i: usize| (g * MR + i).min(self.keys - 1);
            interleave::<MR>(&std::array::from_fn(|i| k.row(sample, key(i), first, width)), tile);
        }
        let mut values = Aligned::zeros(width.next_multiple_of(MR) * self.keys);
        for (g, tile) in values.as_mut_slice().chunks_mut(MR * self.keys).enumerate() {
            let columns = g * MR..width.min((g + 1) * MR);
            for (key, slot) in tile.chunks_exact_mut(MR).enumerate().take(self.keys) {
                let row = v.row(sample, key, first, width);
                if let Some(part) = row.get(columns.clone()) {
                    slot[..part.len()].copy_from_slice(part);
                }
            }
        }
        Head { keys, values }
    }

    /// Attends with 32 queries of one head and hands over each query's result (width).
    fn attend(&self, q: &View<'_>, head: &Head, place: Place, mut emit: impl FnMut(usize, &[f32])) {
        let kernel = Kernel::detect();
        let first_query = place.tile * NR;
        let count = NR.min(self.queries - first_query);
        // Columns past the last query hold anything: no column sees another.
        let mut panel = Scratch::new(self.width * NR);
        for j in 0..count {
            let row = q.row(place.sample, first_query + j, place.first, self.width);
            for (value, slot) in row.iter().zip(panel.chunks_exact_mut(NR)) {
                slot[j] = value * self.scale;
            }
        }
        let mut scores = Scratch::new(BLOCK * NR);
        let mut sum = Scratch::new(self.width.next_multiple_of(MR) * NR);
        sum.fill(0.0);
        let (mut max, mut total) = ([f32::NEG_INFINITY; NR], [0f32; NR]);
        let last = if self.kind.causal { first_query + count } else { self.keys };
        for key0 in (0..self.keys.min(last)).step_by(BLOCK) {
            let keys = BLOCK.min(self.keys - key0);
            let scores = &mut scores[..keys.next_multiple_of(MR) * NR];
            for (t, tile) in scores.chunks_exact_mut(MR * NR).enumerate() {
                let a = &head.keys.as_slice()[(key0 + t * MR) * self.width..];
                let c = tile.as_mut_ptr();
                // SAFETY: `tile` holds MR x NR floats.
                unsafe { kernel.run(a, &panel, self.width, MR, c, NR, false) };
            }
            let scores = &mut scores[..keys * NR];
            if self.kind.causal {
                mask(scores, key0, first_query);
            }
            let mut factor = [0f32; NR];
            softmax_block(scores, &mut max, &mut total, &mut factor);
            rescale(&mut sum, &factor);
            for (t, tile) in sum.chunks_exact_mut(MR * NR).enumerate() {
                let rows = MR.min(self.width - t * MR);
                let a = &head.values.as_slice()[(t * self.keys + key0) * MR..];
                // SAFETY: `tile` holds MR x NR floats.
                unsafe { kernel.run(a, scores, keys, rows, tile.as_mut_ptr(), NR, true) };
            }
        }
        let mut row = vec![0f32; self.width];
        for j in 0..count {
            let inverse = 1.0 / total[j];
            for (value, column) in row.iter_mut().zip(sum.chunks_exact(NR)) {
                *value = column[j] * inverse;
            }
            emit(j, &row);
        }
    }
}

/// Hides keys after the query.
fn mask(scores: &mut [f32], key0: usize, first_query: usize) {
    for (key, row) in scores.chunks_exact_mut(NR).enumerate() {
        let hidden = (key0 + key).saturating_sub(first_query).min(NR);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

vectorized! {
    /// One block of the online softmax: scores (keys, 32) become exp(score - max), and `factor`
    /// is what earlier results are worth under the new maximum.
    fn softmax_block(
        scores: &mut [f32],
        max: &mut [f32; NR],
        total: &mut [f32; NR],
        factor: &mut [f32; NR],
    ) {
        let mut new = *max;
        for row in scores.chunks_exact(NR) {
            for (m, s) in new.iter_mut().zip(row) {
                *m = if *s > *m { *s } else { *m };
            }
        }
        let mut sum = [0f32; NR];
        for row in scores.chunks_exact_mut(NR) {
            for ((score, max), sum) in row.iter_mut().zip(&new).zip(&mut sum) {
                *score = exp::<FMA>(*score - max);
                *sum += *score;
            }
        }
        for j in 0..NR {
            factor[j] = exp::<FMA>(max[j] - new[j]);
            total[j] = total[j] * factor[j] + sum[j];
        }
        *max = new;
    }
}

vectorized! {
    fn rescale(sum: &mut [f32], factor: &[f32; NR]) {
        for row in sum.chunks_exact_mut(NR) {
            for (value, factor) in row.iter_mut().zip(factor) {
                *value *= factor;
            }
        }
    }
}

/// The same from candle's operations, with the softmax in f32.
fn reference(q: &Tensor, k: &Tensor, v: &Tensor, kind: Attention) -> Result<Tensor> {
    let (batch, queries, channels) = q.dims3()?;
    let width = channels / kind.heads;
    let split = |t: &Tensor| {
        let (b, l, _) = t.dims3()?;
        t.reshape((b, l, kind.heads, width))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (split(q)?, split(k)?, split(v)?); // (B, heads, L, width)
    // Scaling before the product keeps f16 scores in range.
    let q = (q * (width as f64).powf(-0.5))?;
    let mut scores = q.matmul(&k.t()?)?.to_dtype(DType::F32)?; // (B, heads, Lq, Lk)
    if kind.causal {
        let keys = k.dim(2)?;
        let hidden = (0..queries)
            .flat_map(|i| (0..keys).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let hidden = Tensor::from_vec(hidden, (queries, keys), scores.device())?;
        scores = scores.broadcast_add(&hidden)?;
    }
    let scores = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
    scores.matmul(&v)?.transpose(1, 2)?.reshape((batch, queries, channels))
}

#[cfg(test)]
mod tests {
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
            let kind = Attention { heads, causal: false };
            let got = attention(&q, &k, &v, kind).unwrap();
            assert!(difference(&got, &reference(&q, &k, &v, kind).unwrap()) < 1e-5);
        }
        let (q, k, v) = (tensor(&[2, 77, 48], 4), tensor(&[2, 77, 48], 5), tensor(&[2, 77, 48], 6));
        let kind = Attention { heads: 3, causal: true };
        let got = attention(&q, &k, &v, kind).unwrap();
        assert!(difference(&got, &reference(&q, &k, &v, kind).unwrap()) < 1e-5);
    }

    #[test]
    fn columns_of_a_wider_tensor_serve() {
        let qkv = tensor(&[2, 50, 3 * 32], 7);
        let kind = Attention { heads: 4, causal: false };
        let got = self_attention(&qkv, kind).unwrap();
        let dense = |i: usize| qkv.narrow(2, i * 32, 32).unwrap().contiguous().unwrap();
        let want = attention(&dense(0), &dense(1), &dense(2), kind).unwrap();
        assert_eq!(difference(&got, &want), 0.0);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = (tensor(&[1, 40, 16], 8) * 1e3).unwrap();
        let kind = Attention { heads: 1, causal: false };
        let got = attention(&q, &q, &q, kind).unwrap();
        assert!(got.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}

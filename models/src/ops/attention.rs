//! Softmax(Q K^T) V without ever holding the scores (Milakov and Gimelshein 2018; Dao et al. 2022).
//!
//! On the CPU the whole computation is transposed: 32 queries lie along the vector lanes, so the
//! running maximum, the sum and the rescaling of the online softmax need no horizontal operation,
//! and the block of probabilities comes out of the kernel in just the layout in which the second
//! product wants its right-hand panel. The products are those of vectors in f32 ([`Vectors`]), or of
//! tiles in bf16 ([`super::amx`]).

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::buffers::{Aligned, Out, Scratch, written};
use super::gemm::{Kernel, MR, NR, Rows, interleave};
use super::simd::{exp, vectorized};
use super::{floats, on_cpu};

/// Keys of a block: BLOCK x NR probabilities stay in the first-level cache.
pub(super) const BLOCK: usize = 16 * MR;

/// How queries attend to keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    /// Heads, each with an equal share of the channels.
    pub(crate) heads: usize,
    /// No query sees a later key.
    pub(crate) causal: bool,
    /// On the CPU: operands are rounded to bf16 and multiplied on tiles.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for AMX alone"))]
    pub(crate) tiles: bool,
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
    if keys == 0 || k.dims() != [batch, keys, channels] || v.dims() != k.dims() {
        bail!("attention of {:?} to {:?} and {:?}", q.dims(), k.dims(), v.dims());
    }
    let width = channels / kind.heads;
    let (q, k, v) = (Strided::new(q)?, Strided::new(k)?, Strided::new(v)?);
    let (q, k, v) = (q.view()?, k.view()?, v.view()?);
    let problem = Problem { queries, keys, width, scale: (width as f32).powf(-0.5), kind };
    #[cfg(target_arch = "x86_64")]
    if kind.tiles {
        return problem.solve::<super::amx::Head>(batch, &q, &k, &v);
    }
    problem.solve::<Vectors>(batch, &q, &k, &v)
}

impl Problem {
    fn solve<H: Head>(
        &self,
        batch: usize,
        q: &View<'_>,
        k: &View<'_>,
        v: &View<'_>,
    ) -> Result<Tensor> {
        let Self { queries, width, kind, .. } = *self;
        let channels = kind.heads * width;
        let heads: Vec<H> = (0..batch * kind.heads)
            .into_par_iter()
            .map(|i| {
                let (sample, first) = (i / kind.heads, i % kind.heads * width);
                H::pack(self.columns(k, sample, first), self.columns(v, sample, first))
            })
            .collect();
        // A task has 32 queries of all heads, a dense piece of the output, or of one if such pieces
        // are few.
        let tiles = queries.div_ceil(NR);
        let few = batch * tiles < 4 * rayon::current_num_threads();
        let share = if few { 1 } else { kind.heads };
        let shares = kind.heads / share;
        let attend = |out: Out| {
            (0..batch * tiles * shares).into_par_iter().for_each(|task| {
                let (tile, first) = (task / shares, task % shares * share);
                let (sample, tile) = (tile / tiles, tile % tiles);
                for (head, packed) in (first..).zip(&heads[sample * kind.heads + first..][..share])
                {
                    let (first_query, first_channel) = (tile * NR, head * width);
                    let tile = Tile { sample, first_query, first_channel };
                    self.attend(q, packed, tile, |query, values| {
                        let row = (sample * queries + query) * channels;
                        // SAFETY: no other task has these queries and this head.
                        let row = unsafe { out.slice(row + first_channel, width) };
                        row.write_copy_of_slice(values);
                    });
                }
            });
        };
        // SAFETY: every query gets the values of every head.
        let out = unsafe { written(batch * queries * channels, attend) };
        Tensor::from_vec(out, (batch, queries, channels), &candle_core::Device::Cpu)
    }

    fn columns<'a>(&self, view: &'a View<'_>, sample: usize, first: usize) -> Columns<'a> {
        Columns { view, sample, first, count: self.keys, width: self.width }
    }

    /// Attends with 32 queries of one head and hands over each query's result (width).
    fn attend<H: Head>(
        &self,
        q: &View<'_>,
        head: &H,
        tile: Tile,
        mut emit: impl FnMut(usize, &[f32]),
    ) {
        let Tile { sample, first_query, first_channel } = tile;
        let count = NR.min(self.queries - first_query);
        // Columns past the last query repeat it: no column sees another.
        let query = |j: usize| first_query + j.min(count - 1);
        let rows = |j| q.row(sample, query(j), first_channel, self.width);
        let mut panel = Scratch::new(self.width * NR);
        interleave::<NR>(&std::array::from_fn(rows), &mut panel);
        rescale(&mut panel, &[self.scale; NR]);
        let mut queries = H::queries(panel);
        let mut scores = Scratch::new(BLOCK * NR);
        let mut sums = Scratch::new(self.width.next_multiple_of(H::GROUP) * NR);
        sums.fill(0.0);
        let (mut max, mut total) = ([f32::NEG_INFINITY; NR], [0f32; NR]);
        let last = if self.kind.causal { first_query + count } else { self.keys };
        for key0 in (0..self.keys.min(last)).step_by(BLOCK) {
            let keys = BLOCK.min(self.keys - key0);
            let scores = &mut scores[..keys.next_multiple_of(H::GROUP) * NR];
            head.scores(&mut queries, key0, scores);
            let seen = &mut scores[..keys * NR];
            if self.kind.causal {
                mask(seen, key0, first_query);
            }
            let mut factor = [0f32; NR];
            softmax_block(seen, &mut max, &mut total, &mut factor);
            rescale(&mut sums, &factor);
            head.add(&mut queries, key0..key0 + keys, scores, &mut sums);
        }
        rescale(&mut sums, &total.map(|total| 1.0 / total));
        let mut rows = Scratch::new(NR * self.width);
        turn(&sums, self.width, &mut rows);
        for (j, row) in rows.chunks_exact(self.width).take(count).enumerate() {
            emit(first_query + j, row);
        }
    }
}

/// From [channel][NR], of which there are whole groups of four, to [NR][channel] of `width` channels.
fn turn(sums: &[f32], width: usize, rows: &mut [f32]) {
    const FOUR: usize = 4;
    let mut square = [0f32; FOUR * NR];
    for (columns, first) in sums.chunks_exact(FOUR * NR).zip((0..width).step_by(FOUR)) {
        interleave::<FOUR>(&std::array::from_fn(|i| &columns[i * NR..][..NR]), &mut square);
        for (row, part) in rows.chunks_exact_mut(width).zip(square.chunks_exact(FOUR)) {
            let row = &mut row[first..];
            match row.first_chunk_mut::<FOUR>() {
                Some(row) => row.copy_from_slice(part),
                None => row.copy_from_slice(&part[..row.len()]),
            }
        }
    }
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
        let data = &floats(&self.storage)?[self.start..];
        Ok(View { data, batch: self.batch, row: self.row })
    }
}

impl View<'_> {
    fn row(&self, sample: usize, row: usize, first: usize, width: usize) -> &[f32] {
        &self.data[sample * self.batch + row * self.row + first..][..width]
    }
}

/// The keys or values of one head: a matrix of rows that may lie apart.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    view: &'a View<'a>,
    sample: usize,
    first: usize,
    pub(super) count: usize,
    pub(super) width: usize,
}

impl Columns<'_> {
    pub(super) fn row(&self, row: usize) -> &[f32] {
        self.view.row(self.sample, row, self.first, self.width)
    }
}

impl Rows for Columns<'_> {
    type Place = usize;

    fn place(&self, row: usize) -> usize {
        row
    }

    fn runs<const N: usize>(&self, rows: &[usize; N], k: usize) -> [&[f32]; N] {
        rows.map(|row| &self.row(row)[k..])
    }
}

/// Keys and values of one head, packed for two products.
pub(super) trait Head: Send + Sync {
    /// Keys and channels come in groups of as many: a divisor of [`BLOCK`].
    const GROUP: usize;
    /// The queries of a task, and what the products are computed with.
    type Queries;

    fn pack(keys: Columns<'_>, values: Columns<'_>) -> Self;

    /// From queries [channel][NR].
    fn queries(panel: Scratch) -> Self::Queries;

    /// Scores [key][NR] of the keys from `key0` on, whole groups of them.
    fn scores(&self, queries: &mut Self::Queries, key0: usize, scores: &mut [f32]);

    /// Adds to `sums`, [channel][NR] in whole groups, the values of `keys` keys from `key0` on,
    /// weighted by [key][NR], of which there are whole groups: rows past the last key hold
    /// anything.
    fn add(
        &self,
        queries: &mut Self::Queries,
        keys: Range<usize>,
        weights: &mut [f32],
        sums: &mut [f32],
    );
}

/// As left-hand tiles: keys [group of 12][channel][12], values [group of 12 channels][key][12].
struct Vectors {
    keys: Aligned,
    values: Aligned,
    count: usize,
    width: usize,
}

struct Problem {
    queries: usize,
    keys: usize,
    width: usize,
    scale: f32,
    kind: Attention,
}

/// 32 queries of a sample, and the first channel of their head.
#[derive(Clone, Copy)]
struct Tile {
    sample: usize,
    first_query: usize,
    first_channel: usize,
}

impl Head for Vectors {
    const GROUP: usize = MR;
    type Queries = (Kernel, Scratch);

    fn pack(k: Columns<'_>, v: Columns<'_>) -> Self {
        let Columns { count, width, .. } = k;
        let mut keys = Aligned::zeros(count.next_multiple_of(MR) * width);
        for (g, tile) in keys.as_mut_slice().chunks_exact_mut(MR * width).enumerate() {
            // Places past the last key repeat it; their scores are never read.
            let key = |i: usize| k.row((g * MR + i).min(count - 1));
            interleave::<MR>(&std::array::from_fn(key), tile);
        }
        let mut values = Aligned::zeros(width.next_multiple_of(MR) * count);
        for (g, tile) in values.as_mut_slice().chunks_mut(MR * count).enumerate() {
            let columns = g * MR..width.min((g + 1) * MR);
            for (key, slot) in tile.chunks_exact_mut(MR).enumerate() {
                let part = &v.row(key)[columns.clone()];
                match part.first_chunk::<MR>() {
                    Some(part) => slot.copy_from_slice(part),
                    None => slot[..part.len()].copy_from_slice(part),
                }
            }
        }
        Self { keys, values, count, width }
    }

    fn queries(panel: Scratch) -> Self::Queries {
        (Kernel::detect(), panel)
    }

    fn scores(&self, (kernel, panel): &mut Self::Queries, key0: usize, scores: &mut [f32]) {
        for (t, tile) in scores.chunks_exact_mut(MR * NR).enumerate() {
            let a = &self.keys.as_slice()[(key0 + t * MR) * self.width..];
            kernel.run(a, panel, tile, MR, false);
        }
    }

    fn add(
        &self,
        (kernel, _): &mut Self::Queries,
        keys: Range<usize>,
        weights: &mut [f32],
        sums: &mut [f32],
    ) {
        for (t, tile) in sums.chunks_exact_mut(MR * NR).enumerate() {
            let rows = MR.min(self.width - t * MR);
            let a = &self.values.as_slice()[(t * self.count + keys.start) * MR..];
            kernel.run(a, &weights[..keys.len() * NR], tile, rows, true);
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
            let kind = Attention { heads, causal: false, tiles: false };
            let got = attention(&q, &k, &v, kind).unwrap();
            assert!(difference(&got, &reference(&q, &k, &v, kind).unwrap()) < 1e-5);
        }
        // The last is of more than one block of keys, of which the first queries see none.
        for tokens in [77, BLOCK + 38] {
            let part = |seed| tensor(&[2, tokens, 48], seed);
            let (q, k, v) = (part(4), part(5), part(6));
            let kind = Attention { heads: 3, causal: true, tiles: false };
            let got = attention(&q, &k, &v, kind).unwrap();
            assert!(difference(&got, &reference(&q, &k, &v, kind).unwrap()) < 1e-5);
        }
    }

    /// Probabilities too are rounded to bf16, whose numbers are 2^-8 apart.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn attention_on_tiles_is_as_close_as_bf16() {
        for (queries, keys, heads, width) in
            [(64, 64, 2, 40), (1, 1, 1, 8), (33, 77, 8, 20), (300, 500, 1, 64), (5, 400, 3, 7)]
        {
            let round = |t: Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let q = round((tensor(&[2, queries, heads * width], 1) * 4.0).unwrap());
            let k = round(tensor(&[2, keys, heads * width], 2));
            let v = round(tensor(&[2, keys, heads * width], 3));
            for causal in [false, queries == keys] {
                let kind = Attention { heads, causal, tiles: false };
                let want = attention(&q, &k, &v, kind).unwrap();
                let got = attention(&q, &k, &v, Attention { tiles: true, ..kind }).unwrap();
                let difference = difference(&got, &want);
                assert!(difference < 1e-2, "{queries} {keys} {width}: {difference}");
                let row = |t: &Tensor| t.narrow(0, 1, 1).unwrap().contiguous().unwrap();
                let kind = Attention { tiles: true, ..kind };
                let alone = attention(&row(&q), &row(&k), &row(&v), kind).unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values(&alone), values(&row(&got)), "a sample depends on its batch");
            }
        }
    }

    #[test]
    fn columns_of_a_wider_tensor_serve() {
        let qkv = tensor(&[2, 50, 3 * 32], 7);
        let kind = Attention { heads: 4, causal: false, tiles: false };
        let got = self_attention(&qkv, kind).unwrap();
        let dense = |i: usize| qkv.narrow(2, i * 32, 32).unwrap().contiguous().unwrap();
        let want = attention(&dense(0), &dense(1), &dense(2), kind).unwrap();
        assert_eq!(difference(&got, &want), 0.0);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = (tensor(&[1, 40, 16], 8) * 1e3).unwrap();
        let kind = Attention { heads: 1, causal: false, tiles: false };
        let got = attention(&q, &q, &q, kind).unwrap();
        assert!(got.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}

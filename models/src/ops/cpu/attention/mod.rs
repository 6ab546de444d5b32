//! Attention by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//!
//! The whole computation is transposed: NR queries are along the vector lanes, so the running
//! maximum, the sum and the rescaling need no horizontal operation, and the block of probabilities
//! is the right-hand panel of the second matrix multiplication as it is. Both multiplications are
//! done by vectors in f32 ([`VectorHead`]) or by AMX in bf16 ([`AmxHead`]).

mod amx;
mod head;
mod vectors;

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::buffers::{Scratch, SharedOutput, fill};
use super::simd::{exp, vectorized};
use super::tile::NR;
use super::transpose::interleave;
use crate::ops::types::Attention;
use amx::AmxHead;
pub(in crate::ops) use head::BLOCK;
use head::{HeadRows, PackedHead, Strided, View};
use vectors::VectorHead;

/// q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C)
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: Attention,
) -> Result<Tensor> {
    let (batch, queries, channels) = q.dims3()?;
    let keys = k.dim(1)?;
    if keys == 0 || k.dims() != [batch, keys, channels] || v.dims() != k.dims() {
        bail!("attention of {:?} to {:?} and {:?}", q.dims(), k.dims(), v.dims());
    }
    let width = channels / kind.heads;
    let (q, k, v) = (Strided::new(q)?, Strided::new(k)?, Strided::new(v)?);
    let (q, k, v) = (q.view()?, k.view()?, v.view()?);
    let task = AttentionTask { queries, keys, width, scale: (width as f32).powf(-0.5), kind };
    if kind.amx {
        task.solve::<AmxHead>(batch, &q, &k, &v)
    } else {
        task.solve::<VectorHead>(batch, &q, &k, &v)
    }
}

/// Attention of `queries` to `keys`.
struct AttentionTask {
    queries: usize,
    keys: usize,
    width: usize,
    scale: f32,
    kind: Attention,
}

/// NR queries of a head of a sample.
#[derive(Clone, Copy)]
struct QueryTile {
    sample: usize,
    first_query: usize,
    first_channel: usize,
}

impl AttentionTask {
    fn solve<H: PackedHead>(
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
        // A task has NR queries of all heads, consecutive in the output, or of one head if there
        // are few such tasks.
        let tiles = queries.div_ceil(NR);
        let few = batch * tiles < 4 * rayon::current_num_threads();
        let share = if few { 1 } else { kind.heads };
        let shares = kind.heads / share;
        let attend = |out: SharedOutput| {
            (0..batch * tiles * shares).into_par_iter().for_each(|task| {
                let (tile, first) = (task / shares, task % shares * share);
                let (sample, tile) = (tile / tiles, tile % tiles);
                for (head, packed) in (first..).zip(&heads[sample * kind.heads + first..][..share])
                {
                    let (first_query, first_channel) = (tile * NR, head * width);
                    let tile = QueryTile { sample, first_query, first_channel };
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
        let out = unsafe { fill(batch * queries * channels, attend) };
        Tensor::from_vec(out, (batch, queries, channels), &Device::Cpu)
    }

    fn columns<'a>(&self, view: &'a View<'_>, sample: usize, first: usize) -> HeadRows<'a> {
        HeadRows { view, sample, first, count: self.keys, width: self.width }
    }

    /// Attends with NR queries of one head and calls `emit` with the result (width) of each.
    fn attend<H: PackedHead>(
        &self,
        q: &View<'_>,
        head: &H,
        tile: QueryTile,
        mut emit: impl FnMut(usize, &[f32]),
    ) {
        let QueryTile { sample, first_query, first_channel } = tile;
        let count = NR.min(self.queries - first_query);
        // Rows past the last query repeat it: no column sees another.
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
        transpose(&sums, self.width, &mut rows);
        for (j, row) in rows.chunks_exact(self.width).take(count).enumerate() {
            emit(first_query + j, row);
        }
    }
}

/// Transposes [channel][NR], in whole groups of four, to [NR][channel] of `width` channels.
fn transpose(sums: &[f32], width: usize, rows: &mut [f32]) {
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

/// Masks the keys after each query.
fn mask(scores: &mut [f32], key0: usize, first_query: usize) {
    for (key, row) in scores.chunks_exact_mut(NR).enumerate() {
        let hidden = (key0 + key).saturating_sub(first_query).min(NR);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

vectorized! {
    /// One block of the online softmax: scores (keys, NR) become exp(score - max), and `factor`
    /// rescales earlier results to the new maximum.
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

//! 3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): a
//! tile of 4 x 4 outputs costs 36 multiplications for each pair of channels, not 144.
//!
//! The points are 0, +-3/4, +-3/2 and infinity: exact in binary, and a third of the error of the
//! usual 0, +-1, +-2. Input tiles are transformed and packed once, weights panel by panel as they
//! are needed, and 36 small GEMMs run on the micro-kernel of [`super::vectors`]. The result of a
//! tile does not depend on the tiles beside it.

use std::mem::MaybeUninit;
use std::ops::{Add, Mul, Range, Sub};

use rayon::prelude::*;

use super::buffers::{Aligned, Scratch, SharedOutput, fill};
use super::epilogue::HostEpilogue;
use super::im2col::{OVERREAD, ReceptiveFields};
use super::packed::Packed;
use super::simd::vectorized;
use super::tile::{MR, NR};
use super::transpose::into_columns;
use super::vectors::MicroKernel;

/// Side of a tile of outputs.
const SIDE: usize = 4;
/// Side of a tile of inputs.
const PATCH: usize = SIDE + 2;
const _: () = assert!(OVERREAD >= SIDE - 1, "the last tile ends inside of the receptive fields");
/// Elements of a transformed tile.
const POINTS: usize = PATCH * PATCH;
/// Channels that are transformed at a time, a vector.
const LANES: usize = 16;
/// Groups of MR tiles that share a pass over the weights of a point.
const PASS: usize = 8;
/// K of a block: its weights (DEPTH x NR) and a tile stay in L1d.
const DEPTH: usize = 160;
/// Maximum size of transformed weights that are kept, in floats.
const MOST_KEPT: usize = 640 << 10;
/// Transformed input in memory at a time, in floats, unless [`FEWEST_GROUPS`] are more.
const CHUNK: usize = 8 << 20;
/// Fewest groups in memory at a time, if there are so many: weights that are not kept are
/// transformed again for the next.
const FEWEST_GROUPS: usize = 24;

const A: f32 = 0.75;
const B: f32 = 1.5;
const A2: f32 = A * A;
const B2: f32 = B * B;

/// Whether it is faster than im2col. This depends on the image alone, never on the batch, so that
/// the result of a sample does not either.
pub(super) fn is_profitable(height: usize, width: usize, channels: usize) -> bool {
    channels.is_multiple_of(LANES) && height.div_ceil(SIDE) * width.div_ceil(SIDE) >= 16
}

/// The convolution of `fields`, then the epilogue: (pixels, n).
pub(super) fn convolve(
    fields: &ReceptiveFields<'_>,
    samples: usize,
    weights: &Packed,
    kept: Option<&TransformedWeights>,
    epilogue: HostEpilogue<'_>,
) -> Vec<f32> {
    let (rows, columns) = fields.output;
    let problem = |out| Winograd {
        fields,
        channels: fields.channels(),
        tiles: (rows.div_ceil(SIDE), columns.div_ceil(SIDE)),
        samples,
        weights,
        kept,
        epilogue,
        out,
    };
    if samples * rows * columns * weights.n == 0 {
        return Vec::new();
    }
    // SAFETY: the tiles of all groups and the columns of all panels cover the output, and
    // store_group() writes those of its group and panel.
    unsafe { fill(samples * rows * columns * weights.n, |out| problem(out).run()) }
}

struct Winograd<'a> {
    fields: &'a ReceptiveFields<'a>,
    channels: usize,
    /// Tiles of an image: rows, columns.
    tiles: (usize, usize),
    samples: usize,
    weights: &'a Packed,
    kept: Option<&'a TransformedWeights>,
    epilogue: HostEpilogue<'a>,
    out: SharedOutput,
}

/// The weights of a small layer, transformed once at load: [panel][point][channel][NR].
pub(super) struct TransformedWeights(Aligned);

impl TransformedWeights {
    /// `None` if they would be too large (four times the weights in f32, eight times in bf16), or
    /// the layer never uses Winograd's convolution.
    pub(super) fn new(weights: &Packed) -> Option<Self> {
        let (panels, channels) = (weights.n.div_ceil(NR), weights.k / 9);
        let size = POINTS * channels * NR;
        let suits = channels.is_multiple_of(LANES) && !weights.is_vnni();
        if !suits || panels * size > MOST_KEPT {
            return None;
        }
        let mut kept = Aligned::zeros(panels * size);
        for (panel, out) in kept.as_mut_slice().chunks_exact_mut(size).enumerate() {
            transform_panel(weights, panel, out);
        }
        Some(Self(kept))
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }
}

impl Winograd<'_> {
    fn run(&self) {
        let groups = self.count().div_ceil(MR);
        let size = POINTS * MR * self.channels;
        let per_chunk = (CHUNK / size).max(FEWEST_GROUPS).min(groups);
        for first in (0..groups).step_by(per_chunk) {
            let chunk = first..groups.min(first + per_chunk);
            // SAFETY: the tasks of transform() cover all channels of all groups of the chunk, and
            // transform_group() writes all points of its own.
            let inputs = unsafe { fill(chunk.len() * size, |out| self.transform(&chunk, out)) };
            self.multiply(&chunk, &inputs);
        }
    }

    fn count(&self) -> usize {
        self.samples * self.tiles.0 * self.tiles.1
    }

    /// Sample, first row and first column of a tile.
    fn origin(&self, tile: usize) -> (usize, usize, usize) {
        let per_sample = self.tiles.0 * self.tiles.1;
        let place = tile % per_sample;
        (tile / per_sample, place / self.tiles.1 * SIDE, place % self.tiles.1 * SIDE)
    }

    /// Transforms the groups of a chunk, MR tiles each, into [group][point][channel][MR]. Tiles
    /// past the last repeat it.
    fn transform(&self, chunk: &Range<usize>, out: SharedOutput) {
        let blocks = self.channels / LANES;
        // Where there are few groups, threads divide their channels.
        let parts = (4 * rayon::current_num_threads()).div_ceil(chunk.len()).min(blocks);
        let length = blocks.div_ceil(parts);
        let parts = blocks.div_ceil(length);
        (0..chunk.len() * parts).into_par_iter().for_each(|task| {
            let (group, part) = (task / parts, task % parts);
            let channels = part * length * LANES..blocks.min((part + 1) * length) * LANES;
            self.transform_group(chunk.start + group, &channels, |point, channel| {
                let place = (group * POINTS + point) * self.channels + channel;
                // SAFETY: no other task has these channels of this group.
                unsafe { out.slice(place * MR, LANES * MR) }
            });
        });
    }

    /// Transforms some channels of a group, LANES at a time, into the memory that `place` returns
    /// for a point and a first channel.
    fn transform_group<'o>(
        &self,
        group: usize,
        channels: &Range<usize>,
        place: impl Fn(usize, usize) -> &'o mut [MaybeUninit<f32>],
    ) {
        let patches: [[&[f32]; POINTS]; MR] = std::array::from_fn(|i| {
            let (sample, y, x) = self.origin((group * MR + i).min(self.count() - 1));
            std::array::from_fn(|p| self.fields.input((sample, y + p / PATCH, x + p % PATCH)))
        });
        // [point][tile][LANES]
        let mut scratch = Scratch::new(POINTS * MR * LANES);
        for c in channels.clone().step_by(LANES) {
            for (i, patch) in patches.iter().enumerate() {
                transform_input(patch, c, i, &mut scratch);
            }
            for (p, rows) in scratch.chunks_exact(MR * LANES).enumerate() {
                let rows = std::array::from_fn(|i| &rows[i * LANES..][..LANES]);
                into_columns::<MR>(&rows, place(p, c));
            }
        }
    }

    /// The 36 GEMMs and the output transform, for the groups of a chunk.
    fn multiply(&self, chunk: &Range<usize>, inputs: &[f32]) {
        let panels = self.weights.n.div_ceil(NR);
        let tasks = 2 * rayon::current_num_threads();
        // Each task transforms its weights again, if they are not kept.
        let tasks = if self.kept.is_some() { 2 * tasks } else { tasks };
        let length = chunk.len().div_ceil(tasks.div_ceil(panels).min(chunk.len()));
        let splits = chunk.len().div_ceil(length);
        (0..panels * splits).into_par_iter().for_each(|task| {
            // Groups first: consecutive tasks of a thread reuse its tiles (cache locality).
            let (part, panel) = (task / panels, task % panels);
            let mine = part * length..chunk.len().min((part + 1) * length);
            let size = POINTS * self.channels * NR;
            let mut transformed = Scratch::new(if self.kept.is_some() { 0 } else { size });
            let weights = match self.kept {
                Some(TransformedWeights(all)) => &all.as_slice()[panel * size..][..size],
                None => {
                    transform_panel(self.weights, panel, &mut transformed);
                    &transformed
                }
            };
            let mut products = Scratch::new(PASS * POINTS * MR * NR);
            for first in mine.clone().step_by(PASS) {
                let pass = first..mine.end.min(first + PASS);
                self.products(&pass, inputs, weights, &mut products);
                let group = POINTS * MR * NR;
                for (g, product) in pass.zip(products.chunks_exact(group)) {
                    self.store_group(chunk.start + g, panel, product);
                }
            }
        });
    }

    /// The GEMMs of a pass, into `products` [group of the pass][point][MR][NR].
    fn products(&self, pass: &Range<usize>, inputs: &[f32], weights: &[f32], products: &mut [f32]) {
        let kernel = MicroKernel::detect();
        let depth = self.channels;
        for (p, b) in weights.chunks_exact(depth * NR).enumerate() {
            for k0 in (0..depth).step_by(DEPTH) {
                let kc = DEPTH.min(depth - k0);
                let b = &b[k0 * NR..][..kc * NR];
                for (slot, g) in pass.clone().enumerate() {
                    let a = &inputs[((g * POINTS + p) * depth + k0) * MR..][..kc * MR];
                    let c = &mut products[(slot * POINTS + p) * MR * NR..][..MR * NR];
                    kernel.run(a, b, c, MR, k0 > 0);
                }
            }
        }
    }

    /// The output transform of a group: writes the pixels that exist.
    fn store_group(&self, group: usize, panel: usize, product: &[f32]) {
        let columns = panel * NR..self.weights.n.min((panel + 1) * NR);
        for i in 0..MR.min(self.count() - group * MR) {
            let (sample, y0, x0) = self.origin(group * MR + i);
            let (height, width) = self.fields.output;
            let pixel = |p: usize| {
                let (y, x) = (y0 + p / SIDE, x0 + p % SIDE);
                (y < height && x < width).then_some((sample * height + y) * width + x)
            };
            let pixels = std::array::from_fn(pixel);
            store_tile(product, i, self.out, &pixels, &columns, self.weights.n, &self.epilogue);
        }
    }
}

/// A panel of weights as [point][channel][NR].
fn transform_panel(weights: &Packed, panel: usize, out: &mut [f32]) {
    let mut wide = Scratch::new(weights.k * NR);
    // From [tap][channel][NR].
    transform_weights(weights.panel(panel, 0, weights.k, &mut wide), out);
}

/// A value for each of sixteen channels.
#[derive(Clone, Copy)]
struct Lanes([f32; LANES]);

impl Lanes {
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let mut lanes = [0f32; LANES];
        lanes.copy_from_slice(&from[..LANES]);
        Self(lanes)
    }
}

impl Add for Lanes {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
}

impl Sub for Lanes {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
}

impl Mul<f32> for Lanes {
    type Output = Self;
    #[inline(always)]
    fn mul(self, factor: f32) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * factor))
    }
}

/// The input transform in one dimension, B^T d.
#[inline(always)]
fn input(d: [Lanes; PATCH]) -> [Lanes; PATCH] {
    let (even1, odd1) = (d[4] - d[2] * B2, (d[3] - d[1] * B2) * A);
    let (even2, odd2) = (d[4] - d[2] * A2, (d[3] - d[1] * A2) * B);
    [
        d[4] - d[2] * (A2 + B2) + d[0] * (A2 * B2),
        even1 + odd1,
        even1 - odd1,
        even2 + odd2,
        even2 - odd2,
        d[5] - d[3] * (A2 + B2) + d[1] * (A2 * B2),
    ]
}

/// The weight transform in one dimension, G g.
#[inline(always)]
fn weight(g: [Lanes; 3]) -> [Lanes; PATCH] {
    const FA: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
    const FB: f32 = 1.0 / (2.0 * B2 * (B2 - A2));
    let (even1, odd1) = (g[0] * FA + g[2] * (A2 * FA), g[1] * (A * FA));
    let (even2, odd2) = (g[0] * FB + g[2] * (B2 * FB), g[1] * (B * FB));
    [g[0] * (1.0 / (A2 * B2)), even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2, g[2]]
}

/// The output transform in one dimension, A^T m.
#[inline(always)]
fn output(m: [Lanes; PATCH]) -> [Lanes; SIDE] {
    let (sum1, difference1) = (m[1] + m[2], m[1] - m[2]);
    let (sum2, difference2) = (m[3] + m[4], m[3] - m[4]);
    [
        m[0] + sum1 + sum2,
        difference1 * A + difference2 * B,
        sum1 * A2 + sum2 * B2,
        difference1 * (A2 * A) + difference2 * (B2 * B) + m[5],
    ]
}

vectorized! {
    /// Channels c .. c + LANES of a patch to scratch[point][tile][LANES].
    fn transform_input(patch: &[&[f32]; POINTS], c: usize, tile: usize, scratch: &mut [f32]) {
        let mut rows = [[Lanes([0.0; LANES]); PATCH]; PATCH];
        for x in 0..PATCH {
            let column = std::array::from_fn(|y| Lanes::load(&patch[y * PATCH + x][c..]));
            for (y, value) in input(column).into_iter().enumerate() {
                rows[y][x] = value;
            }
        }
        for (y, row) in rows.into_iter().enumerate() {
            for (x, value) in input(row).into_iter().enumerate() {
                let place = ((y * PATCH + x) * MR + tile) * LANES;
                scratch[place..][..LANES].copy_from_slice(&value.0);
            }
        }
    }
}

vectorized! {
    /// taps [tap][channel][NR] to out [point][channel][NR].
    fn transform_weights(taps: &[f32], out: &mut [f32]) {
        let channels = taps.len() / (9 * NR);
        for c in 0..channels {
            for half in (0..NR).step_by(LANES) {
                let mut rows = [[Lanes([0.0; LANES]); 3]; PATCH];
                for x in 0..3 {
                    let tap = |y| Lanes::load(&taps[((y * 3 + x) * channels + c) * NR + half..]);
                    for (y, value) in weight(std::array::from_fn(tap)).into_iter().enumerate() {
                        rows[y][x] = value;
                    }
                }
                for (y, row) in rows.into_iter().enumerate() {
                    for (x, value) in weight(row).into_iter().enumerate() {
                        let place = ((y * PATCH + x) * channels + c) * NR + half;
                        out[place..][..LANES].copy_from_slice(&value.0);
                    }
                }
            }
        }
    }
}

vectorized! {
    /// The output transform of one tile, `product` [point][MR][NR], to some columns of its pixels
    /// of `out` (.., n), and the epilogue.
    fn store_tile(
        product: &[f32],
        tile: usize,
        out: SharedOutput,
        pixels: &[Option<usize>; SIDE * SIDE],
        columns: &Range<usize>,
        n: usize,
        epilogue: &HostEpilogue<'_>,
    ) {
        let mut values = [[0f32; NR]; SIDE * SIDE];
        for half in (0..NR).step_by(LANES) {
            let mut rows = [[Lanes([0.0; LANES]); PATCH]; SIDE];
            for x in 0..PATCH {
                let point = |y| Lanes::load(&product[((y * PATCH + x) * MR + tile) * NR + half..]);
                for (y, value) in output(std::array::from_fn(point)).into_iter().enumerate() {
                    rows[y][x] = value;
                }
            }
            for (y, row) in rows.into_iter().enumerate() {
                for (x, value) in output(row).into_iter().enumerate() {
                    values[y * SIDE + x][half..][..LANES].copy_from_slice(&value.0);
                }
            }
        }
        for (pixel, values) in pixels.iter().zip(&values) {
            let Some(pixel) = *pixel else { continue };
            // SAFETY: these columns of this pixel belong to this tile and panel alone, and lie
            // inside the output, whose length convolve() has set.
            let c = unsafe { out.slice(pixel * n + columns.start, columns.len()) };
            let c = c.write_copy_of_slice(&values[..columns.len()]);
            epilogue.apply(pixel, n, columns, c);
        }
    }
}

//! Weights as the kernels read them: in panels of [`NR`] columns, packed once, at load, straight
//! from where they are stored.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{DType, Result, bail};
use half::bf16;

use super::buffers::{Aligned, Scratch};
use super::gemm::interleave;
use super::numbers::{Numbers, Weight};
use super::simd::{has_tiles, vectorized};

/// Columns of a panel.
pub(crate) const NR: usize = 32;
/// Numbers of a column that are turned at a time: NR times as many stay in the first-level cache.
const DEPTH: usize = 128;
/// Rows of a panel in pairs are a multiple of this: the depth of a tile.
pub(crate) const STEP: usize = 32;

/// A (k, n) matrix in panels: panel p holds columns p * NR .. as [k][NR], the last one padded.
pub(crate) struct Packed {
    panels: Panels,
    pub(crate) k: usize,
    /// Columns of the result.
    pub(crate) n: usize,
    /// Whether half of a panel's columns are the gates of the other half.
    pub(crate) gated: bool,
}

enum Panels {
    F32(Aligned<f32>),
    /// Half the memory; widened block by block on the way to the kernel.
    Bf16(Aligned<bf16>),
    /// For tiles, which take two rows at a time: [k / 2][NR][2], zeros after the last row.
    Pairs(Aligned<bf16>),
}

/// How panels hold their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    F32,
    Bf16,
    Pairs,
}

impl Layout {
    /// What this processor multiplies fastest.
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 if has_tiles() => Self::Pairs,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }
}

impl Packed {
    /// Packs a weight (n, inputs, taps) as the matrix whose column j is output j and whose rows
    /// run over taps, then inputs: the order in which pixels lie in memory. In bf16 or f32.
    pub(crate) fn new(weight: &Weight<'_>, taps: usize, dtype: DType) -> Result<Self> {
        Self::laid_out(weight, taps, Layout::of(dtype))
    }

    pub(super) fn laid_out(weight: &Weight<'_>, taps: usize, layout: Layout) -> Result<Self> {
        let (n, k) = weight.matrix();
        let panels = Panels::new(weight, &columns(n), taps, layout)?;
        Ok(Self { panels, k, n, gated: false })
    }

    /// Packs a weight (2n, k) whose second half are the gates of the first: every panel holds
    /// NR / 2 values and their gates.
    pub(crate) fn gated(weight: &Weight<'_>, dtype: DType) -> Result<Self> {
        Self::gated_and_laid_out(weight, Layout::of(dtype))
    }

    pub(super) fn gated_and_laid_out(weight: &Weight<'_>, layout: Layout) -> Result<Self> {
        let (n, k) = weight.matrix();
        let panels = Panels::new(weight, &gated_columns(n / 2), 1, layout)?;
        Ok(Self { panels, k, n: n / 2, gated: true })
    }

    /// Columns of the result that a panel makes.
    pub(crate) fn width(&self) -> usize {
        if self.gated { NR / 2 } else { NR }
    }

    /// Bytes of the panels.
    pub(crate) fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) | Panels::Pairs(panels) => size_of_val(panels.as_slice()),
        }
    }

    /// Rows `k0 .. k0 + kc` of a panel, in `wide` if they have to be widened; none of panels in
    /// pairs.
    pub(crate) fn panel<'a>(
        &'a self,
        p: usize,
        k0: usize,
        kc: usize,
        wide: &'a mut Scratch,
    ) -> &'a [f32] {
        let range = (p * self.k + k0) * NR..(p * self.k + k0 + kc) * NR;
        match &self.panels {
            Panels::F32(panels) => &panels.as_slice()[range],
            Panels::Bf16(panels) => {
                let wide = &mut wide[..kc * NR];
                widen(&panels.as_slice()[range], wide);
                wide
            }
            Panels::Pairs(_) => &[],
        }
    }

    /// Whether the panels lie in pairs, for tiles.
    pub(super) fn tiled(&self) -> bool {
        matches!(self.panels, Panels::Pairs(_))
    }

    /// Rows of a panel in pairs, from a multiple of [`STEP`] on and up to one; none if they lie
    /// otherwise.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for AMX alone"))]
    pub(super) fn pairs(&self, p: usize, rows: Range<usize>) -> &[bf16] {
        let Panels::Pairs(panels) = &self.panels else { return &[] };
        let first = p * self.k.next_multiple_of(STEP);
        let last = first + rows.end.next_multiple_of(STEP);
        &panels.as_slice()[(first + rows.start) * NR..last * NR]
    }
}

/// Where a panel in pairs has column j of row k.
fn in_pairs(k: usize, j: usize) -> usize {
    (k / 2 * NR + j) * 2 + k % 2
}

/// The row of a weight that each column of the panels holds, if any.
type Columns = Vec<Option<usize>>;

fn columns(n: usize) -> Columns {
    (0..n.next_multiple_of(NR)).map(|j| (j < n).then_some(j)).collect()
}

/// In every panel NR / 2 of the first n rows, and those that lie n further.
pub(crate) fn gated_columns(n: usize) -> Columns {
    let half = NR / 2;
    let row = |j: usize| {
        let value = j / NR * half + j % half;
        (value < n).then_some(if j % NR < half { value } else { n + value })
    };
    (0..n.div_ceil(half) * NR).map(row).collect()
}

impl Panels {
    fn new(weight: &Weight<'_>, columns: &Columns, taps: usize, layout: Layout) -> Result<Self> {
        let (_, k) = weight.matrix();
        if k == 0 || !k.is_multiple_of(taps) {
            bail!("a weight of {k} numbers for each output is none of {taps} taps");
        }
        weight.numbers(|numbers| match layout {
            Layout::F32 => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<f32>]| {
                    panel[k * NR..][..NR].write_copy_of_slice(row);
                };
                Self::F32(pack(numbers, columns, (k, taps), k, place))
            }
            Layout::Bf16 => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<bf16>]| {
                    panel[k * NR..][..NR].write_copy_of_slice(&narrowed(row));
                };
                Self::Bf16(pack(numbers, columns, (k, taps), k, place))
            }
            Layout::Pairs => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<bf16>]| {
                    for (j, number) in narrowed(row).into_iter().enumerate() {
                        panel[in_pairs(k, j)].write(number);
                    }
                };
                Self::Pairs(pack(numbers, columns, (k, taps), k.next_multiple_of(STEP), place))
            }
        })
    }
}

/// `place` writes a row of a panel, which has `depth` rows: zeros after the k of the weight.
fn pack<T: Copy + Default + Send + Sync>(
    numbers: Numbers<'_>,
    columns: &Columns,
    (k, taps): (usize, usize),
    depth: usize,
    place: impl Fn(&[f32], usize, &mut [MaybeUninit<T>]) + Sync,
) -> Aligned<T> {
    let inputs = k / taps;
    let panel = |p: usize, panel: &mut [MaybeUninit<T>]| {
        let columns = &columns[p * NR..][..NR];
        let (mut block, mut rows) = (Scratch::new(NR * DEPTH), Scratch::new(NR * DEPTH));
        for first in (0..k).step_by(DEPTH) {
            let len = DEPTH.min(k - first);
            let (block, rows) = (&mut block[..NR * len], &mut rows[..NR * len]);
            for (column, row) in columns.iter().zip(block.chunks_exact_mut(len)) {
                match column {
                    Some(at) => numbers.read(at * k + first, row),
                    None => row.fill(0.0),
                }
            }
            let block = &*block;
            interleave::<NR>(&std::array::from_fn(|j| &block[j * len..][..len]), rows);
            for (i, row) in (first..).zip(rows.chunks_exact(NR)) {
                place(row, i % taps * inputs + i / taps, panel);
            }
        }
        for row in k..depth {
            place(&[0.0; NR], row, panel);
        }
    };
    // SAFETY: since `taps` divides k, the places of all i < k, and those after them, are all rows of
    // the panel, and `place` writes all of a row.
    unsafe { Aligned::written(columns.len() * depth, depth * NR, panel) }
}

fn narrowed(row: &[f32]) -> [bf16; NR] {
    let mut halves = [bf16::ZERO; NR];
    narrow(row, &mut halves);
    halves
}

vectorized! {
    pub(super) fn narrow(wide: &[f32], narrow: &mut [bf16]) {
        for (wide, narrow) in wide.iter().zip(narrow) {
            *narrow = bf16::from_bits(rounded(*wide));
        }
    }
}

/// The bits of the nearest bf16, of two as near the even one.
#[inline(always)]
pub(super) fn rounded(wide: f32) -> u16 {
    let bits = wide.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // What is not a number stays so.
    let bits = if wide.is_nan() { bits | 1 << 22 } else { rounded };
    (bits >> 16) as u16
}

vectorized! {
    fn widen(narrow: &[bf16], wide: &mut [f32]) {
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn numbers_are_narrowed_as_half_does_it() {
        let mut wide = random(4096, 2);
        wide.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1e-41]);
        wide.extend([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F80_0001].map(f32::from_bits));
        let mut narrowed = vec![bf16::ZERO; wide.len()];
        narrow(&wide, &mut narrowed);
        for (wide, narrow) in wide.iter().zip(&narrowed) {
            assert_eq!(narrow.to_bits(), bf16::from_f32(*wide).to_bits(), "{wide}");
        }
    }

    #[test]
    fn every_number_finds_its_place() {
        for (n, inputs, taps) in [(1, 1, 1), (33, 5, 9), (70, 300, 1), (32, 40, 9)] {
            let (k, values) = (inputs * taps, random(n * inputs * taps, 1));
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let numbers = Numbers::new(&bytes, DType::F32).unwrap();
            let shape = [n, inputs, taps];
            let weight = Weight::Stored(numbers, &shape);
            let mut wide = Scratch::new(k * NR);
            let rounded: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            for (layout, turned) in
                [(Layout::F32, &values), (Layout::Bf16, &rounded), (Layout::Pairs, &rounded)]
            {
                let packed = Packed::laid_out(&weight, taps, layout).unwrap();
                for j in 0..n.next_multiple_of(NR) {
                    let pairs = packed.pairs(j / NR, 0..k);
                    let panel = packed.panel(j / NR, 0, k, &mut wide);
                    for (tap, input) in (0..k).map(|i| (i / inputs, i % inputs)) {
                        let (row, column) = (tap * inputs + input, j % NR);
                        let got = match layout {
                            Layout::Pairs => pairs[in_pairs(row, column)].to_f32(),
                            _ => panel[row * NR + column],
                        };
                        let want = if j < n { turned[j * k + input * taps + tap] } else { 0.0 };
                        assert_eq!(got, want, "{shape:?} {layout:?} {j} {tap} {input}");
                    }
                }
                let rows = packed.pairs(0, 0..k).len() / NR;
                assert_eq!(rows, if packed.tiled() { k.next_multiple_of(STEP) } else { 0 });
                assert!(
                    packed.pairs(0, 0..k)[..]
                        .iter()
                        .skip(k.div_ceil(2) * 2 * NR)
                        .all(|v| *v == bf16::ZERO)
                );
            }
        }
    }
}

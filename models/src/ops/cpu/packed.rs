//! Weights as the GEMM reads them: in panels of [`NR`] columns, packed once, at load, directly from
//! where they are stored.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{DType, Result, bail};
use half::bf16;

use super::amx::has_amx;
use super::bf16::{narrow, widen};
use super::buffers::{Aligned, Scratch};
use super::tensor_data::{TensorData, Weight};
use super::tile::{Blocking, NR, STEP};
use super::transpose::interleave;
use crate::ops::gated::gated_order;

/// Numbers of a column that are transposed at a time: NR times as many stay in L1d.
const DEPTH: usize = 128;

/// A matrix (k, n) in panels: panel p holds columns p * NR .. as [k][NR], the last one padded.
pub(super) struct Packed {
    panels: Panels,
    pub(super) k: usize,
    /// Columns of the result.
    pub(super) n: usize,
    /// Whether half of a panel's columns are the gates of the other half.
    pub(super) gated: bool,
}

enum Panels {
    F32(Aligned<f32>),
    /// Half the memory; widened block by block for the micro-kernel.
    Bf16(Aligned<bf16>),
    /// For AMX, which takes two rows at a time: [k / 2][NR][2], zeros after the last row.
    Vnni(Aligned<bf16>),
}

/// Type and order of the numbers of a panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PanelLayout {
    F32,
    Bf16,
    Vnni,
}

impl PanelLayout {
    /// The fastest one of a type on this processor.
    pub(super) fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 if has_amx() => Self::Vnni,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }
}

impl Packed {
    /// Packs a weight (n, inputs, taps) as the matrix whose column j is output j and whose rows
    /// run over taps, then inputs: the order of the pixels' channels in memory.
    ///
    /// A gated weight is (2n, k), values, then gates: every panel holds NR / 2 values and their
    /// gates.
    pub(super) fn new(
        weight: &Weight<'_>,
        taps: usize,
        gated: bool,
        layout: PanelLayout,
    ) -> Result<Self> {
        let (outputs, k) = weight.matrix();
        let n = if gated { outputs / 2 } else { outputs };
        let panels = Panels::new(weight, &columns(n, gated), taps, layout)?;
        Ok(Self { panels, k, n, gated })
    }

    /// A bias in the order of the columns, as [`HostEpilogue`](super::epilogue::HostEpilogue) has
    /// it.
    pub(super) fn arrange(&self, bias: Vec<f32>) -> Vec<f32> {
        if !self.gated {
            return bias;
        }
        columns(self.n, true).into_iter().map(|at| at.map_or(0.0, |at| bias[at])).collect()
    }

    /// How its GEMM is cut into blocks.
    pub(super) fn blocking(&self) -> Blocking {
        if self.is_vnni() { Blocking::AMX } else { Blocking::VECTORS }
    }

    /// Columns of the result that a panel makes.
    pub(super) fn width(&self) -> usize {
        if self.gated { NR / 2 } else { NR }
    }

    /// Bytes of the panels.
    pub(super) fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) | Panels::Vnni(panels) => size_of_val(panels.as_slice()),
        }
    }

    /// Rows `k0 .. k0 + kc` of a panel, in `wide` if they are widened from bf16; empty for VNNI
    /// panels.
    pub(super) fn panel<'a>(
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
            Panels::Vnni(_) => &[],
        }
    }

    /// Whether the panels are in VNNI layout, for AMX.
    pub(super) fn is_vnni(&self) -> bool {
        matches!(self.panels, Panels::Vnni(_))
    }

    /// Rows of a VNNI panel, from a multiple of [`STEP`] on and up to one; empty for the other
    /// layouts.
    pub(super) fn vnni(&self, p: usize, rows: Range<usize>) -> &[bf16] {
        let Panels::Vnni(panels) = &self.panels else { return &[] };
        let first = p * self.k.next_multiple_of(STEP);
        let last = first + rows.end.next_multiple_of(STEP);
        &panels.as_slice()[(first + rows.start) * NR..last * NR]
    }
}

/// The index of column j of row k in a VNNI panel.
fn vnni_index(k: usize, j: usize) -> usize {
    (k / 2 * NR + j) * 2 + k % 2
}

/// The output that each column of the panels holds; `None` is padding.
fn columns(n: usize, gated: bool) -> Vec<Option<usize>> {
    if gated {
        return gated_order(n, NR / 2).collect();
    }
    (0..n.next_multiple_of(NR)).map(|j| (j < n).then_some(j)).collect()
}

impl Panels {
    fn new(
        weight: &Weight<'_>,
        columns: &[Option<usize>],
        taps: usize,
        layout: PanelLayout,
    ) -> Result<Self> {
        let (_, k) = weight.matrix();
        if k == 0 || !k.is_multiple_of(taps) {
            bail!("a weight of {k} numbers per output has not {taps} taps");
        }
        weight.data(|data| match layout {
            PanelLayout::F32 => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<f32>]| {
                    panel[k * NR..][..NR].write_copy_of_slice(row);
                };
                Self::F32(pack(data, columns, (k, taps), k, place))
            }
            PanelLayout::Bf16 => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<bf16>]| {
                    panel[k * NR..][..NR].write_copy_of_slice(&narrowed(row));
                };
                Self::Bf16(pack(data, columns, (k, taps), k, place))
            }
            PanelLayout::Vnni => {
                let place = |row: &[f32], k: usize, panel: &mut [MaybeUninit<bf16>]| {
                    for (j, number) in narrowed(row).into_iter().enumerate() {
                        panel[vnni_index(k, j)].write(number);
                    }
                };
                Self::Vnni(pack(data, columns, (k, taps), k.next_multiple_of(STEP), place))
            }
        })
    }
}

/// Packs all panels of `depth` rows: those of the weight, then zeros. `place` writes a row of a
/// panel.
fn pack<T: Copy + Default + Send + Sync>(
    data: TensorData<'_>,
    columns: &[Option<usize>],
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
                    Some(at) => data.read(at * k + first, row),
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
    // SAFETY: since `taps` divides k, the rows of all i < k, and those after them, are all rows of
    // the panel, and `place` writes all of a row.
    unsafe { Aligned::fill(columns.len() * depth, depth * NR, panel) }
}

fn narrowed(row: &[f32]) -> [bf16; NR] {
    let mut halves = [bf16::ZERO; NR];
    narrow(row, &mut halves);
    halves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn every_number_finds_its_place() {
        for (n, inputs, taps) in [(1, 1, 1), (33, 5, 9), (70, 300, 1), (32, 40, 9)] {
            let (k, values) = (inputs * taps, random(n * inputs * taps, 1));
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let data = TensorData::view(DType::F32).unwrap()(&bytes);
            let shape = [n, inputs, taps];
            let weight = Weight::Data(data, &shape);
            let mut wide = Scratch::new(k * NR);
            let rounded: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            for (layout, turned) in [
                (PanelLayout::F32, &values),
                (PanelLayout::Bf16, &rounded),
                (PanelLayout::Vnni, &rounded),
            ] {
                let packed = Packed::new(&weight, taps, false, layout).unwrap();
                for j in 0..n.next_multiple_of(NR) {
                    let vnni = packed.vnni(j / NR, 0..k);
                    let panel = packed.panel(j / NR, 0, k, &mut wide);
                    for (tap, input) in (0..k).map(|i| (i / inputs, i % inputs)) {
                        let (row, column) = (tap * inputs + input, j % NR);
                        let got = match layout {
                            PanelLayout::Vnni => vnni[vnni_index(row, column)].to_f32(),
                            _ => panel[row * NR + column],
                        };
                        let want = if j < n { turned[j * k + input * taps + tap] } else { 0.0 };
                        assert_eq!(got, want, "{shape:?} {layout:?} {j} {tap} {input}");
                    }
                }
                let rows = packed.vnni(0, 0..k).len() / NR;
                assert_eq!(rows, if packed.is_vnni() { k.next_multiple_of(STEP) } else { 0 });
                assert!(
                    packed.vnni(0, 0..k)[..]
                        .iter()
                        .skip(k.div_ceil(2) * 2 * NR)
                        .all(|v| *v == bf16::ZERO)
                );
            }
        }
    }
}

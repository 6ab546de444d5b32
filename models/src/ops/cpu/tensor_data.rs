//! The numbers of a tensor between a file and a layer. Converting them is most of the time that it
//! takes to load a model.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Tensor};
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use rayon::prelude::*;

use super::buffers::fill_chunks;
use super::host::host;
use crate::ops::host_copy::on_host;

/// Numbers that a thread converts at a time.
const CHUNK: usize = 1 << 16;
/// f16 that are converted at a time.
const BLOCK: usize = 256;

/// The numbers of a tensor: f32 in memory, or little-endian and unaligned as in a file.
#[derive(Clone, Copy)]
pub(crate) enum TensorData<'a> {
    Floats(&'a [f32]),
    F32(&'a [[u8; 4]]),
    F16(&'a [[u8; 2]]),
    Bf16(&'a [[u8; 2]]),
    /// Several, concatenated.
    Parts(&'a [Self]),
}

impl<'a> TensorData<'a> {
    /// How the bytes of a type are read as numbers; `None` if it is not f32, f16 or bf16.
    pub(crate) fn view(dtype: DType) -> Option<fn(&[u8]) -> TensorData<'_>> {
        match dtype {
            DType::F32 => Some(|bytes| TensorData::F32(bytes.as_chunks().0)),
            DType::F16 => Some(|bytes| TensorData::F16(bytes.as_chunks().0)),
            DType::BF16 => Some(|bytes| TensorData::Bf16(bytes.as_chunks().0)),
            _ => None,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Floats(numbers) => numbers.len(),
            Self::F32(numbers) => numbers.len(),
            Self::F16(numbers) | Self::Bf16(numbers) => numbers.len(),
            Self::Parts(parts) => parts.iter().map(Self::len).sum(),
        }
    }

    /// Reads the numbers from `first` on into all of `out`.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        match self {
            Self::Floats(numbers) => out.copy_from_slice(&numbers[range]),
            Self::F32(numbers) => {
                for (out, number) in out.iter_mut().zip(&numbers[range]) {
                    *out = f32::from_le_bytes(*number);
                }
            }
            Self::F16(numbers) => {
                let mut block = [f16::ZERO; BLOCK];
                for (numbers, out) in numbers[range].chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
                    let block = &mut block[..numbers.len()];
                    for (half, number) in block.iter_mut().zip(numbers) {
                        *half = f16::from_le_bytes(*number);
                    }
                    block.convert_to_f32_slice(out);
                }
            }
            Self::Bf16(numbers) => {
                for (out, number) in out.iter_mut().zip(&numbers[range]) {
                    *out = bf16::from_le_bytes(*number).to_f32();
                }
            }
            Self::Parts(parts) => {
                let (mut first, mut rest) = (first, out);
                for part in *parts {
                    let before = first.min(part.len());
                    let count = rest.len().min(part.len() - before);
                    let (out, after) = rest.split_at_mut(count);
                    part.read(before, out);
                    (first, rest) = (first - before, after);
                }
            }
        }
    }

    /// Whether no number is infinite or NaN: their exponents have all bits set. By all threads, at
    /// the speed of memory.
    pub(crate) fn are_finite(&self) -> bool {
        // Without a branch, so that the loop is vectorized.
        fn all<T: Copy + Sync>(numbers: &[T], finite: impl Fn(T) -> bool + Sync) -> bool {
            let chunk = |chunk: &[T]| chunk.iter().fold(true, |all, number| all & finite(*number));
            numbers.par_chunks(CHUNK).all(chunk)
        }
        let half = |bytes: [u8; 2], exponent| u16::from_le_bytes(bytes) & exponent != exponent;
        match self {
            Self::Floats(numbers) => all(numbers, f32::is_finite),
            Self::F32(numbers) => all(numbers, |bytes| f32::from_le_bytes(bytes).is_finite()),
            Self::F16(numbers) => all(numbers, |bytes| half(bytes, 0x7c00)),
            Self::Bf16(numbers) => all(numbers, |bytes| half(bytes, 0x7f80)),
            Self::Parts(parts) => parts.iter().all(Self::are_finite),
        }
    }

    /// All numbers, by all threads.
    pub(crate) fn floats(&self) -> Vec<f32> {
        let part = |i: usize, out: &mut [MaybeUninit<f32>]| {
            let mut block = [0.0; BLOCK];
            for (first, out) in (i * CHUNK..).step_by(BLOCK).zip(out.chunks_mut(BLOCK)) {
                let block = &mut block[..out.len()];
                self.read(first, block);
                out.write_copy_of_slice(block);
            }
        };
        // SAFETY: the blocks cover the chunk.
        unsafe { fill_chunks(self.len(), CHUNK, part) }
    }
}

/// The weight of a layer, (out, ..), before it is packed or placed.
pub(crate) enum Weight<'a> {
    Tensor(&'a Tensor),
    /// As stored, and the shape.
    Data(TensorData<'a>, &'a [usize]),
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl Weight<'_> {
    fn dims(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::Data(_, shape) => shape,
        }
    }

    /// As a matrix: outputs, and inputs of each.
    pub(in crate::ops) fn matrix(&self) -> (usize, usize) {
        let (outputs, rest) = self.dims().split_first().unwrap_or((&0, &[]));
        (*outputs, rest.iter().product())
    }

    /// As f32 in host memory.
    pub(in crate::ops) fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => on_host(tensor)?.to_dtype(DType::F32),
            Self::Data(numbers, shape) => Tensor::from_vec(numbers.floats(), *shape, &Device::Cpu),
        }
    }

    /// Calls `take` with the numbers.
    pub(super) fn data<T>(&self, take: impl FnOnce(TensorData<'_>) -> T) -> Result<T> {
        match self {
            Self::Tensor(_) => {
                let tensor = self.tensor()?.contiguous()?;
                let source = host(&tensor)?;
                Ok(take(TensorData::Floats(source.data()?)))
            }
            Self::Data(numbers, _) => Ok(take(*numbers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn data_of_every_type_and_length_is_read() {
        let floats = |bytes: &[u8], dtype| TensorData::view(dtype).unwrap()(bytes).floats();
        for len in [0, 1, BLOCK + 1, CHUNK + 77] {
            let values = random(len, 1);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(floats(&bytes, DType::F32), values);
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
            let want: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            assert_eq!(floats(&bytes, DType::F16), want);
            let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
            let want: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            assert_eq!(floats(&bytes, DType::BF16), want);
        }
        assert!(TensorData::view(DType::I64).is_none());
    }

    #[test]
    fn numbers_that_are_not_finite_are_seen() {
        let finite = |values: &[f32]| {
            let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let f16s: Vec<u8> =
                values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
            let bf16s: Vec<u8> =
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            [(f32s, DType::F32), (f16s, DType::F16), (bf16s, DType::BF16)]
                .map(|(bytes, dtype)| TensorData::view(dtype).unwrap()(&bytes).are_finite())
        };
        let mut values = random(CHUNK + 77, 1);
        values[3] = 65504.0;
        assert_eq!(finite(&values), [true; 3]);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[CHUNK + 5] = odd;
            assert_eq!(finite(&values), [false; 3]);
        }
        values[CHUNK + 5] = 1e6;
        assert_eq!(finite(&values), [true, false, true], "more than f16 holds");
    }

    #[test]
    fn parts_are_read_as_one() {
        let values = random(1000, 1);
        let parts =
            [0..300, 300..300, 300..301, 301..1000].map(|at| TensorData::Floats(&values[at]));
        let all = TensorData::Parts(&parts);
        assert_eq!(all.floats(), values);
        for (first, count) in [(0, 0), (0, 301), (299, 3), (300, 1), (301, 699), (1000, 0)] {
            let mut some = vec![0.0; count];
            all.read(first, &mut some);
            assert_eq!(some, values[first..first + count]);
        }
    }
}

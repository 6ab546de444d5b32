//! Numbers on their way from a file into a layer: most of what loading a model is.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Tensor};
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::buffers::written_in_chunks;
use super::host;

/// Numbers that one thread takes at a time.
const CHUNK: usize = 1 << 16;
/// Halves that are turned at a time.
const BLOCK: usize = 256;

/// Numbers in memory, or as a file holds them: little-endian, and anywhere.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    Floats(&'a [f32]),
    F32(&'a [[u8; 4]]),
    F16(&'a [[u8; 2]]),
    Bf16(&'a [[u8; 2]]),
    /// Several, one behind the other.
    Parts(&'a [Self]),
}

impl<'a> Numbers<'a> {
    /// `None` for a type that no weight has.
    pub(crate) fn new(bytes: &'a [u8], dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32(bytes.as_chunks().0)),
            DType::F16 => Some(Self::F16(bytes.as_chunks().0)),
            DType::BF16 => Some(Self::Bf16(bytes.as_chunks().0)),
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

    /// Those from `first` on, as many as `out` holds.
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

    /// All of them, by all threads.
    pub(crate) fn floats(&self) -> Vec<f32> {
        let part = |i: usize, out: &mut [MaybeUninit<f32>]| {
            let mut block = [0.0; BLOCK];
            for (first, out) in (i * CHUNK..).step_by(BLOCK).zip(out.chunks_mut(BLOCK)) {
                let block = &mut block[..out.len()];
                self.read(first, block);
                out.write_copy_of_slice(block);
            }
        };
        // SAFETY: the blocks are all of a chunk.
        unsafe { written_in_chunks(self.len(), CHUNK, part) }
    }
}

/// The weight of a layer, (out, ..), before it is packed or placed.
pub(crate) enum Weight<'a> {
    Tensor(&'a Tensor),
    /// Numbers and their shape.
    Stored(Numbers<'a>, &'a [usize]),
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl Weight<'_> {
    pub(super) fn dims(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::Stored(_, shape) => shape,
        }
    }

    /// As a matrix: outputs, and inputs of each.
    pub(super) fn matrix(&self) -> (usize, usize) {
        let (outputs, rest) = self.dims().split_first().unwrap_or((&0, &[]));
        (*outputs, rest.iter().product())
    }

    /// As f32 in host memory.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32),
            Self::Stored(numbers, shape) => {
                Tensor::from_vec(numbers.floats(), *shape, &Device::Cpu)
            }
        }
    }

    /// What `take` makes of the numbers.
    pub(super) fn numbers<T>(&self, take: impl FnOnce(Numbers<'_>) -> T) -> Result<T> {
        match self {
            Self::Tensor(_) => {
                let tensor = self.tensor()?.contiguous()?;
                let source = host(&tensor)?;
                Ok(take(Numbers::Floats(source.data()?)))
            }
            Self::Stored(numbers, _) => Ok(take(*numbers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn numbers_of_every_type_and_length_are_read() {
        let floats = |bytes: &[u8], dtype| Numbers::new(bytes, dtype).unwrap().floats();
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
        assert!(Numbers::new(&[0; 16], DType::I64).is_none());
    }

    #[test]
    fn parts_are_read_as_one() {
        let values = random(1000, 1);
        let parts = [0..300, 300..300, 300..301, 301..1000].map(|at| Numbers::Floats(&values[at]));
        let all = Numbers::Parts(&parts);
        assert_eq!(all.floats(), values);
        for (first, count) in [(0, 0), (0, 301), (299, 3), (300, 1), (301, 699), (1000, 0)] {
            let mut some = vec![0.0; count];
            all.read(first, &mut some);
            assert_eq!(some, values[first..first + count]);
        }
    }
}

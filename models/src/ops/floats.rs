//! Numbers as a file holds them, to f32, on all threads: most of what loading a model is.

use candle_core::DType;
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::buffers::written_in_chunks;

/// Numbers that one thread takes at a time.
const CHUNK: usize = 1 << 16;
/// Halves that are turned at a time.
const BLOCK: usize = 256;

/// Little-endian f32, f16 or bf16 as f32; `None` for another type.
pub(crate) fn floats(bytes: &[u8], dtype: DType) -> Option<Vec<f32>> {
    Some(match dtype {
        DType::F32 => {
            let numbers = bytes.as_chunks::<4>().0;
            widened(numbers, |numbers, out| {
                for (out, number) in out.iter_mut().zip(numbers) {
                    *out = f32::from_le_bytes(*number);
                }
            })
        }
        DType::F16 => widened(bytes.as_chunks::<2>().0, |numbers, out| {
            let mut block = [f16::ZERO; BLOCK];
            for (numbers, out) in numbers.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
                let block = &mut block[..numbers.len()];
                for (half, number) in block.iter_mut().zip(numbers) {
                    *half = f16::from_le_bytes(*number);
                }
                block.convert_to_f32_slice(out);
            }
        }),
        DType::BF16 => widened(bytes.as_chunks::<2>().0, |numbers, out| {
            for (out, number) in out.iter_mut().zip(numbers) {
                *out = bf16::from_le_bytes(*number).to_f32();
            }
        }),
        _ => return None,
    })
}

/// `turn` writes a float for each number.
fn widened<T: Sync>(numbers: &[T], turn: impl Fn(&[T], &mut [f32]) + Sync) -> Vec<f32> {
    let part = |i: usize, out: &mut [f32]| turn(&numbers[i * CHUNK..][..out.len()], out);
    // SAFETY: every `turn` here writes as many floats as it is given numbers.
    unsafe { written_in_chunks(numbers.len(), CHUNK, part) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn numbers_of_every_type_and_length_are_read() {
        for len in [0, 1, BLOCK + 1, CHUNK + 77] {
            let values = random(len, 1);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(floats(&bytes, DType::F32).unwrap(), values);
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
            let want: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            assert_eq!(floats(&bytes, DType::F16).unwrap(), want);
            let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
            let want: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            assert_eq!(floats(&bytes, DType::BF16).unwrap(), want);
        }
        assert!(floats(&[0; 16], DType::I64).is_none());
    }
}

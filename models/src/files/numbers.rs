//! How the numbers of a tensor are stored, and their values where layers cannot read them so:
//! fp8, and the quantized blocks of GGUF files.
//!
//! Reference: ml_dtypes `float8_e4m3fn`, `float8_e5m2`; ggml's `dequantize_row_*`, by candle.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::f16;
use rayon::prelude::*;

/// Blocks that a thread converts at a time.
const BLOCKS: usize = 4096;

/// The types whose numbers are read.
pub(super) const EXPECTED: &str = "expected F32, F16, BF16, F64 or fp8";

/// The type of stored numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberType {
    Plain(DType),
    /// fp8 of 4 exponent bits and no infinity.
    E4m3,
    /// fp8 of 5 exponent bits: the upper half of an f16.
    E5m2,
    /// Blocks of numbers with their scales.
    Blocks(GgmlDType),
}

impl NumberType {
    /// That of PyTorch's storages of a class; the class's name if it is one that is not read.
    pub(super) fn of_storage(class_name: &str) -> Result<Self, String> {
        Ok(Self::Plain(match class_name {
            "FloatStorage" => DType::F32,
            "DoubleStorage" => DType::F64,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            "ByteStorage" | "BoolStorage" => DType::U8,
            "LongStorage" => DType::I64,
            "IntStorage" => DType::I32,
            "ShortStorage" => DType::I16,
            other => return Err(other.to_owned()),
        }))
    }

    /// That of a type of PyTorch without a storage of its own; its name if it is one that is not
    /// read.
    pub(super) fn of_torch(name: &str) -> Result<Self, String> {
        match name {
            "float8_e4m3fn" => Ok(Self::E4m3),
            "float8_e5m2" => Ok(Self::E5m2),
            other => Err(other.to_owned()),
        }
    }

    /// The type whose numbers layers read from the file.
    pub(super) fn of_network(self) -> Option<DType> {
        match self {
            Self::Plain(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => Some(dtype),
            _ => None,
        }
    }

    pub(super) fn is_fp8(self) -> bool {
        matches!(self, Self::E4m3 | Self::E5m2)
    }

    /// Bytes of so many numbers; `None` if they are not whole blocks, or too many.
    pub(super) fn bytes(self, count: usize) -> Option<usize> {
        match self {
            Self::Plain(dtype) => count.checked_mul(dtype.size_in_bytes()),
            Self::E4m3 | Self::E5m2 => Some(count),
            Self::Blocks(kind) => {
                let whole = count.is_multiple_of(kind.block_size());
                whole.then(|| (count / kind.block_size()).checked_mul(kind.type_size()))?
            }
        }
    }

    /// The values of stored numbers, which must be whole. The error reads on from the tensor's name.
    pub(super) fn values(self, bytes: &[u8]) -> Result<Vec<f32>, String> {
        let words = |error: candle_core::Error| {
            error.to_string().lines().next().unwrap_or_default().to_owned()
        };
        let table = |value: fn(u8) -> f32| {
            let values: Vec<f32> = (0..=u8::MAX).map(value).collect();
            bytes.par_iter().map(|byte| values[usize::from(*byte)]).collect()
        };
        match self {
            Self::E4m3 => Ok(table(e4m3)),
            Self::E5m2 => Ok(table(|byte| f16::from_bits(u16::from(byte) << 8).to_f32())),
            Self::Plain(dtype) => {
                let count = bytes.len() / dtype.size_in_bytes().max(1);
                let tensor = Tensor::from_raw_buffer(bytes, dtype, &[count], &Device::Cpu);
                let floats = tensor.and_then(|tensor| tensor.to_dtype(DType::F32)?.to_vec1());
                floats.map_err(words)
            }
            Self::Blocks(kind) => {
                if !bytes.len().is_multiple_of(kind.type_size()) {
                    return Err("does not hold whole blocks".into());
                }
                // candle reads blocks where they are aligned.
                let mut copy = Vec::new();
                let aligned = |bytes: &[u8]| bytes.as_ptr().cast::<u64>().is_aligned();
                let bytes = if aligned(bytes) { bytes } else { realigned(bytes, &mut copy) };
                let dequantized = |blocks: &[u8]| {
                    let count = blocks.len() / kind.type_size() * kind.block_size();
                    let storage = QStorage::from_data(Cow::Borrowed(blocks), &Device::Cpu, kind)?;
                    QTensor::new(storage, count)?.dequantize(&Device::Cpu)?.to_vec1::<f32>()
                };
                let parts = bytes.par_chunks(BLOCKS * kind.type_size()).map(dequantized);
                let parts: candle_core::Result<Vec<_>> = parts.collect();
                Ok(parts.map_err(words)?.concat())
            }
        }
    }
}

/// A copy of bytes that begins where a u64 can.
fn realigned<'c>(bytes: &[u8], copy: &'c mut Vec<u8>) -> &'c [u8] {
    copy.resize(bytes.len() + size_of::<u64>(), 0);
    let start = copy.as_ptr().align_offset(size_of::<u64>()).min(size_of::<u64>());
    let part = &mut copy[start..start + bytes.len()];
    part.copy_from_slice(bytes);
    part
}

fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2_f32.powi(-6),
        _ => (1.0 + fraction) * 2_f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -size } else { size }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::files::Weights;

    #[test]
    fn fp8_is_what_ml_dtypes_reads() {
        let e4m3 = NumberType::E4m3.values(&[0x00, 0x38, 0xc0, 0x7e, 0x01, 0x08]).expect("values");
        assert_eq!(e4m3, [0.0, 1.0, -2.0, 448.0, 0.001953125, 0.015625]);
        let e5m2 = NumberType::E5m2.values(&[0x3c, 0xc0, 0x7b, 0x01]).expect("values");
        assert_eq!(e5m2, [1.0, -2.0, 57344.0, 1.525_878_9e-5]);
        assert!(NumberType::E4m3.values(&[0x7f]).expect("a value")[0].is_nan());
    }

    #[test]
    fn every_type_is_read_as_its_library_does() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized");
        let open = |name: &str| Weights::whole(&folder.join(name)).expect("a sound file");
        let (expected, blocks, fp8) =
            (open("expected.safetensors"), open("blocks.gguf"), open("fp8.safetensors"));
        let names: Vec<_> = expected.names().collect();
        assert_eq!(names.len(), 17);
        for name in names {
            let shape = expected.shape(name).expect("a tensor");
            let ours = if blocks.shape(name).is_some() { &blocks } else { &fp8 };
            let values = |weights: &Weights| {
                let tensor = weights.tensor(name, shape).expect("values");
                tensor.flatten_all().and_then(|all| all.to_vec1::<f32>()).expect("f32")
            };
            assert_eq!(values(ours), values(&expected), "{name}");
        }
        let error = blocks.tensor("tq1_0", &[1, 256]).expect_err("not read").to_string();
        assert!(error.contains("tensor tq1_0: is of GGUF's type TQ1_0; read are F32"), "{error}");
    }

    #[test]
    fn blocks_are_read_wherever_they_lie() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1 + 2 * 210).collect();
        let kind = NumberType::Blocks(GgmlDType::Q6K);
        let values = |bytes: &[u8]| {
            let values = kind.values(bytes).expect("values");
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let elsewhere = bytes[1..].to_vec();
        assert_eq!(values(&bytes[1..]), values(&elsewhere));
        assert!(kind.values(&bytes).is_err());
    }

    #[test]
    fn blocks_are_counted_whole() {
        let blocks = NumberType::Blocks(GgmlDType::Q8_0);
        assert_eq!((blocks.bytes(64), blocks.bytes(65)), (Some(68), None));
        assert_eq!(NumberType::Plain(DType::F16).bytes(usize::MAX), None);
    }
}

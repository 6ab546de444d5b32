//! The header of GGUF files: names, types, shapes and places of tensors, as stable-diffusion.cpp and
//! ComfyUI-GGUF write them.
//!
//! Reference: ggml `docs/gguf.md`. candle's reader stops at the first type that it does not know,
//! and takes an alignment of zero.

use std::collections::HashMap;

use candle_core::DType;
use candle_core::quantized::GgmlDType;

use super::bytes::Bytes;
use super::numbers::NumberType;

/// How a file begins.
pub(super) const MAGIC: &[u8] = b"GGUF";

/// Bytes of a file that are read first.
const BEGIN_BYTES: usize = 1 << 16;

/// The error of a header that is not whole.
const SHORT: &str =
    "is cut short within its header: the download is incomplete, fetch the file again";

/// The key before the name of a tensor that was stored in another shape, to make whole blocks.
const SHAPE: &str = "comfy.gguf.orig_shape.";

/// Maximum dimensions of a tensor, as in ggml.
const MAX_DIMENSIONS: u32 = 4;

/// Maximum nesting of arrays.
const MAX_DEPTH: usize = 4;

/// Number, name and type of numbers.
const TYPES: [(u32, &str, Option<NumberType>); 35] = [
    (0, "F32", Some(NumberType::Plain(DType::F32))),
    (1, "F16", Some(NumberType::Plain(DType::F16))),
    (2, "Q4_0", Some(NumberType::Blocks(GgmlDType::Q4_0))),
    (3, "Q4_1", Some(NumberType::Blocks(GgmlDType::Q4_1))),
    (6, "Q5_0", Some(NumberType::Blocks(GgmlDType::Q5_0))),
    (7, "Q5_1", Some(NumberType::Blocks(GgmlDType::Q5_1))),
    (8, "Q8_0", Some(NumberType::Blocks(GgmlDType::Q8_0))),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(NumberType::Blocks(GgmlDType::Q2K))),
    (11, "Q3_K", Some(NumberType::Blocks(GgmlDType::Q3K))),
    (12, "Q4_K", Some(NumberType::Blocks(GgmlDType::Q4K))),
    (13, "Q5_K", Some(NumberType::Blocks(GgmlDType::Q5K))),
    (14, "Q6_K", Some(NumberType::Blocks(GgmlDType::Q6K))),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", Some(NumberType::Plain(DType::I16))),
    (26, "I32", Some(NumberType::Plain(DType::I32))),
    (27, "I64", Some(NumberType::Plain(DType::I64))),
    (28, "F64", Some(NumberType::Plain(DType::F64))),
    (29, "IQ1_M", None),
    (30, "BF16", Some(NumberType::Plain(DType::BF16))),
    (31, "Q4_0_4_4", None),
    (32, "Q4_0_4_8", None),
    (33, "Q4_0_8_8", None),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
];

/// A tensor: its name, its shape as torch has it, and its type and bytes relative to the data, or
/// why it cannot be read.
type GgufTensor = (String, Vec<usize>, Result<(NumberType, (usize, usize)), String>);

/// The tensors of a file.
#[derive(Debug)]
pub(super) struct Gguf {
    pub(super) tensors: Vec<GgufTensor>,
    /// Offset of their data.
    pub(super) data: usize,
}

/// What remains of a header.
struct Header<'a>(&'a [u8]);

/// What of the metadata counts.
struct Metadata {
    alignment: usize,
    shapes: HashMap<String, Vec<usize>>,
}

impl Gguf {
    /// Reads the header of a file. The error reads on from the file's name.
    pub(super) fn read(file: &Bytes) -> Result<Self, String> {
        // How long the header is shows only at its end.
        let mut length = BEGIN_BYTES;
        loop {
            let begin = file.read(0..length.min(file.len())).map_err(|error| error.to_string())?;
            match Self::parse(&begin, file.len()) {
                Err(error) if error == SHORT && length < file.len() => {
                    length = length.saturating_mul(8);
                }
                read => return read,
            }
        }
    }

    /// From the beginning of a file of some length.
    fn parse(bytes: &[u8], length: usize) -> Result<Self, String> {
        let mut header = Header(bytes);
        if header.take(MAGIC.len())? != MAGIC {
            return Err("is no GGUF file".into());
        }
        let version = header.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("is GGUF of version {version}; only versions 2 and 3 are read"));
        }
        let (tensors, keys) = (header.u64()?, header.u64()?);
        let mut metadata = Metadata { alignment: 32, shapes: HashMap::new() };
        for _ in 0..keys {
            header.key(&mut metadata)?;
        }
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(header.tensor()?);
        }
        let used = bytes.len() - header.0.len();
        let data = used.div_ceil(metadata.alignment) * metadata.alignment;
        let room = length.saturating_sub(data);
        let mut whole = 0;
        let mut place = |(name, stored, kind, offset): (String, Vec<usize>, u32, u64)| {
            let known = TYPES.iter().find(|(number, ..)| *number == kind);
            let shape = metadata.shapes.get(&name).cloned().unwrap_or(stored.clone());
            let numbers = match known {
                Some((_, _, Some(numbers))) => *numbers,
                Some((_, kind, None)) => return (name, shape, Err(unread(kind))),
                None => return (name, shape, Err(unread(&format!("of number {kind}")))),
            };
            let count = |shape: &[usize]| shape.iter().try_fold(1, |n: usize, s| n.checked_mul(*s));
            let range = || {
                let count = count(&stored).filter(|n| Some(*n) == count(&shape))?;
                let start = usize::try_from(offset).ok()?;
                let aligned = start.is_multiple_of(metadata.alignment);
                let end = start.checked_add(numbers.bytes(count)?)?;
                aligned.then_some((start, end))
            };
            let range = range().ok_or_else(|| "has a shape or a place that cannot be".to_owned());
            if let Ok((_, end)) = range {
                whole = whole.max(end);
            }
            (name, shape, range.map(|range| (numbers, range)))
        };
        let tensors: Vec<_> = infos.into_iter().map(&mut place).collect();
        match whole > room {
            true => Err(cut(length, data.saturating_add(whole))),
            false => Ok(Self { tensors, data: data.min(length) }),
        }
    }
}

fn unread(kind: &str) -> String {
    let read = TYPES.iter().filter_map(|(_, name, numbers)| numbers.map(|_| *name));
    format!("is of GGUF's type {kind}; read are {}", read.collect::<Vec<_>>().join(", "))
}

fn cut(found: usize, whole: usize) -> String {
    format!("is cut short: {found} bytes of {whole}; the download is incomplete, fetch it again")
}

impl<'a> Header<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(size_of::<u32>())?;
        Ok(u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    fn u64(&mut self) -> Result<u64, String> {
        let bytes = self.take(size_of::<u64>())?;
        Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    /// A length that cannot be held is one behind the end of the file.
    fn length(&mut self) -> Result<usize, String> {
        Ok(usize::try_from(self.u64()?).unwrap_or(usize::MAX))
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    /// A key and its value.
    fn key(&mut self, metadata: &mut Metadata) -> Result<(), String> {
        let (key, kind) = (self.text()?, self.u32()?);
        let numbers = self.value(kind, 0)?;
        if key == "general.alignment" {
            let alignment = numbers.first().copied().unwrap_or_default();
            if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
                return Err(format!("general.alignment: {alignment} is not supported"));
            }
            metadata.alignment = alignment;
        } else if let Some(tensor) = key.strip_prefix(SHAPE) {
            metadata.shapes.insert(tensor.to_owned(), numbers);
        }
        Ok(())
    }

    /// A value of a type; what integers it holds, else nothing.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Vec<usize>, String> {
        let integer = |bytes: &[u8]| {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            usize::try_from(u64::from_le_bytes(whole)).unwrap_or(usize::MAX)
        };
        Ok(match kind {
            0 | 1 | 7 => vec![integer(self.take(1)?)],
            2 | 3 => vec![integer(self.take(2)?)],
            4 | 5 => vec![integer(self.take(4)?)],
            10 | 11 => vec![integer(self.take(8)?)],
            6 => self.take(4).map(|_| Vec::new())?,
            12 => self.take(8).map(|_| Vec::new())?,
            8 => self.text().map(|_| Vec::new())?,
            9 if depth < MAX_DEPTH => {
                let (kind, length) = (self.u32()?, self.length()?);
                let mut numbers = Vec::new();
                for _ in 0..length {
                    numbers.extend(self.value(kind, depth + 1)?);
                }
                numbers
            }
            _ => return Err(format!("is no GGUF file that can be read: a value of type {kind}")),
        })
    }

    /// A tensor: name, shape as torch has it, type, offset.
    fn tensor(&mut self) -> Result<(String, Vec<usize>, u32, u64), String> {
        let (name, dimensions) = (self.text()?, self.u32()?);
        if dimensions > MAX_DIMENSIONS {
            return Err(format!("tensor {name}: has {dimensions} dimensions"));
        }
        let mut shape: Vec<_> =
            (0..dimensions).map(|_| self.length()).collect::<Result<_, String>>()?;
        // The fastest dimension is the first there.
        shape.reverse();
        Ok((name, shape, self.u32()?, self.u64()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A file of one tensor a (4, 2) of f16, stored as (8), and an alignment of 64.
    fn file() -> Vec<u8> {
        let alignment = [&4_u32.to_le_bytes()[..], &64_u32.to_le_bytes()].concat();
        let sides = [4_u32, 2].map(u32::to_le_bytes).concat();
        let shape = [9_u32, 5].map(u32::to_le_bytes).concat();
        let tensor = [1_u64, 8].map(u64::to_le_bytes).concat();
        let mut file = [
            b"GGUF\x03\0\0\0",
            &[1_u64, 2].map(u64::to_le_bytes).concat()[..],
            &text("general.alignment"),
            &alignment,
            &text("comfy.gguf.orig_shape.a"),
            &shape,
            &2_u64.to_le_bytes(),
            &sides,
            &text("a"),
            &1_u32.to_le_bytes(),
            &tensor[8..],
            &1_u32.to_le_bytes(),
            &0_u64.to_le_bytes(),
        ]
        .concat();
        file.resize(file.len().div_ceil(64) * 64 + 16, 0);
        file
    }

    #[test]
    fn a_tensor_has_the_shape_that_it_had() {
        let file = file();
        let gguf = Gguf::parse(&file, file.len()).expect("a sound file");
        assert_eq!(gguf.data, file.len() - 16);
        let numbers = Ok((NumberType::Plain(DType::F16), (0, 16)));
        assert_eq!(gguf.tensors, [("a".to_owned(), vec![4, 2], numbers)]);
        for end in 0..file.len() {
            let error = Gguf::parse(&file[..end], end).expect_err("a part of it");
            assert!(error.contains("cut short"), "{end}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_read_or_refused(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut file = file();
            for (place, byte) in changes {
                let place = place.index(file.len());
                file[place] = byte;
            }
            if let Ok(gguf) = Gguf::parse(&file, file.len()) {
                for (_, _, numbers) in gguf.tensors {
                    let end = numbers.map_or(0, |(_, (_, end))| end);
                    prop_assert!(gguf.data + end <= file.len());
                }
            }
        }
    }
}

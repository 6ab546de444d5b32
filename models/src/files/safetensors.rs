//! Safetensors files: the names, types, shapes and byte ranges of their tensors, from their headers.

use std::collections::HashMap;

use candle_core::DType;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::bytes::Bytes;
use super::container::Place;
use super::numbers::{EXPECTED, NumberType};

/// What the header of a file tells.
pub(super) struct Safetensors {
    /// Name and shape of each tensor, and the place of its numbers in the data.
    pub(super) tensors: Vec<(String, Vec<usize>, Place)>,
    /// The metadata.
    pub(super) notes: HashMap<String, String>,
    /// Offset of the data.
    pub(super) data: usize,
    /// Bytes behind the data, which belong to nothing.
    pub(super) behind: usize,
}

/// The advice for files that are cut short.
const FETCH: &str = "the download is incomplete, fetch the file again";

impl Safetensors {
    /// Reads a header. The ranges of its tensors follow each other without gaps, and have the lengths
    /// of their shapes. The error reads on from the file's name.
    pub(super) fn read(bytes: &Bytes) -> Result<Self, String> {
        let length = bytes.len();
        let (data, metadata) = header(bytes)?;
        let whole = data.saturating_add(metadata.data_len());
        if whole > length {
            return Err(format!("is cut short: {length} bytes of {whole}: {FETCH}"));
        }
        let tensor = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let numbers = number_type(info.dtype).map(|kind| (kind, info.data_offsets));
            (name, info.shape.clone(), numbers)
        };
        Ok(Self {
            tensors: metadata.tensors().into_iter().map(tensor).collect(),
            notes: metadata.metadata().clone().unwrap_or_default(),
            data,
            behind: length - whole,
        })
    }
}

fn number_type(dtype: Dtype) -> Result<NumberType, String> {
    Ok(match dtype {
        Dtype::F32 => NumberType::Plain(DType::F32),
        Dtype::F16 => NumberType::Plain(DType::F16),
        Dtype::BF16 => NumberType::Plain(DType::BF16),
        Dtype::F64 => NumberType::Plain(DType::F64),
        Dtype::I64 => NumberType::Plain(DType::I64),
        Dtype::I32 => NumberType::Plain(DType::I32),
        Dtype::I16 => NumberType::Plain(DType::I16),
        Dtype::U32 => NumberType::Plain(DType::U32),
        Dtype::U8 | Dtype::BOOL => NumberType::Plain(DType::U8),
        Dtype::F8_E4M3 => NumberType::E4m3,
        Dtype::F8_E5M2 => NumberType::E5m2,
        other => return Err(format!("type {other:?}, {EXPECTED}")),
    })
}

/// The header of a file, and the offset of the data behind it.
fn header(bytes: &Bytes) -> Result<(usize, Metadata), String> {
    const PREFIX: usize = size_of::<u64>();
    let read = |range| bytes.read(range).map_err(|error| error.to_string());
    let cut = || format!("is cut short within its header, at {} bytes: {FETCH}", bytes.len());
    let prefix = read(0..PREFIX.min(bytes.len()))?;
    let prefix = prefix.as_ref().try_into().map_err(|_| cut())?;
    let length = usize::try_from(u64::from_le_bytes(prefix)).ok();
    let data = length.and_then(|length| length.checked_add(PREFIX));
    let data = data.filter(|data| *data <= bytes.len()).ok_or_else(cut)?;
    let text = read(PREFIX..data)?;
    let metadata = serde_json::from_slice(&text).map_err(|error: serde_json::Error| {
        let what = if error.is_data() { "does not describe tensors" } else { "is no JSON" };
        format!("not a safetensors file: its header {what}")
    });
    Ok((data, metadata?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use serde_json::json;

    use crate::error::Result;
    use crate::files::Weights;

    /// Types and their sizes in bytes.
    const TYPES: [(&str, usize); 4] = [("F32", 4), ("F16", 2), ("BF16", 2), ("I64", 8)];

    type Header = BTreeMap<String, (usize, Vec<usize>)>;

    /// The type's index and the shape of each tensor.
    fn any_header() -> impl Strategy<Value = Header> {
        btree_map("[a-z.é]{1,12}", (0..TYPES.len(), vec(0..5_usize, 0..5)), 0..6)
    }

    /// A file of these tensors, filled with zeros.
    fn file(header: &Header) -> Vec<u8> {
        let mut end = 0;
        let mut entries = serde_json::Map::new();
        for (name, (kind, shape)) in header {
            let (dtype, bytes) = TYPES[*kind];
            let begin = end;
            end += shape.iter().product::<usize>() * bytes;
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] });
            entries.insert(name.clone(), entry);
        }
        let text = serde_json::Value::Object(entries).to_string();
        let length = (text.len() as u64).to_le_bytes();
        [&length[..], text.as_bytes(), &vec![0; end]].concat()
    }

    /// Reads the tensors of a file, and each tensor's numbers.
    fn read(bytes: &[u8]) -> Result<BTreeMap<String, Vec<usize>>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.safetensors");
        std::fs::write(&path, bytes).expect("it is written");
        let weights = Weights::whole(&path)?;
        let names: Vec<_> = weights.names().map(str::to_owned).collect();
        let shape = |name: &String| weights.shape(name).expect("it is there").to_vec();
        let read: BTreeMap<_, _> = names.iter().map(|name| (name.clone(), shape(name))).collect();
        for (name, shape) in &read {
            let _ = weights.tensor(name, shape);
        }
        Ok(read)
    }

    #[test]
    fn headers_that_are_no_list_of_tensors_are_told_so() {
        let file = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let told = |text: &str| read(&file(text)).map(drop).expect_err(text).to_string();
        let damaged = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,2]}}"#;
        for text in [r#"{"a":1}"#, r#"{"a":{"dtype":"X","shape":[]}}"#, damaged] {
            let told = told(text);
            assert!(told.ends_with("its header does not describe tensors"), "{told}");
        }
        for text in ["{", "{a"] {
            assert!(told(text).ends_with("its header is no JSON"), "{}", told(text));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(300)
        })]

        #[test]
        fn a_file_has_the_tensors_of_its_header(header in any_header()) {
            let read = read(&file(&header)).expect("a sound file");
            let shapes = header.into_iter().map(|(name, (_, shape))| (name, shape));
            prop_assert_eq!(read, shapes.collect());
        }

        #[test]
        fn a_damaged_file_is_read_or_refused_by_name(
            header in any_header(),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = file(&header);
            for (place, byte) in changes {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Err(error) = read(&bytes) {
                prop_assert!(error.to_string().contains("a.safetensors"), "{error}");
            }
        }
    }
}

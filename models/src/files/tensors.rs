//! The tensors of a network by name and shape. Those of models are memory-mapped. Each layer packs
//! its own, one at a time, and their pages are released, so that a model is never in memory twice.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::fingerprint::Fingerprint;
use super::ldm::{LdmCheckpoint, Renamed};
use super::mapped::{Bytes, map};
use super::pickle;
use crate::error::{Error, Result};
use crate::ops::{Geometry, TensorData, Weight};

/// A weight to which a LoRA may add.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoraTarget {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Of a convolution; `None` for a linear layer.
    pub(crate) geometry: Option<Geometry>,
}

impl LoraTarget {
    pub(crate) fn linear(inputs: usize, outputs: usize) -> Self {
        Self { inputs, outputs, geometry: None }
    }
}

/// The LoRA targets of a network, by the name of their weight.
pub(crate) type LoraTargets = BTreeMap<String, LoraTarget>;

struct TensorFile {
    name: String,
    bytes: Bytes,
    /// Offset of the tensors' data.
    data: usize,
}

struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// Relative to the file's data.
    range: (usize, usize),
}

/// The tensors of one network.
#[derive(Default)]
pub struct Weights {
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// Names of tensors that were read; [`Weights::finish`] reports the others.
    read: RefCell<BTreeSet<String>>,
    /// The LoRA targets of the layers built so far.
    lora_targets: RefCell<LoraTargets>,
    /// Metadata of the files' headers.
    notes: BTreeMap<String, String>,
}

/// Whether the weights of networks are stored in this type.
fn is_network_type(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Maximum length of a file that is copied: more than the largest LoRAs of these models.
const MAX_COPY_BYTES: u64 = 2 << 30;

impl Weights {
    /// All tensors of a single file, under their names in the file.
    pub(crate) fn whole(path: &Path) -> Result<Self> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        Self::of(path, Bytes::Mapped(map(path).map_err(failed)?))
    }

    /// All tensors of a single file that may be replaced while it is read.
    pub(crate) fn copied(path: &Path) -> Result<Self> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_COPY_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_COPY_BYTES {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Err(Error::config(name, format!("is larger than {MAX_COPY_BYTES} bytes")));
        }
        Self::of(path, Bytes::Copied(bytes))
    }

    fn of(path: &Path, bytes: Bytes) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut weights = Self::default();
        if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
            weights.add(name, bytes)?;
        } else {
            let tensors = pickle::tensors(path, bytes.all().len() as u64);
            let tensors = tensors.map_err(|reason| Error::config(&name, reason))?;
            for (tensor, dtype, shape, range) in tensors {
                weights.entries.insert(tensor, Entry { file: 0, dtype, shape, range });
            }
            weights.files.push(TensorFile { name, bytes, data: 0 });
        }
        Ok(weights)
    }

    pub(super) fn outline(&self) -> LdmCheckpoint<'_> {
        let shapes = self.entries.iter().map(|(name, entry)| (name.as_str(), &entry.shape[..]));
        LdmCheckpoint::new(&self.files[0].name, shapes.collect())
    }

    /// The tensors renamed, without those that get no name.
    pub(super) fn renamed(mut self, rename: impl Fn(&str, &[usize]) -> Vec<Renamed>) -> Self {
        for (name, entry) in std::mem::take(&mut self.entries) {
            for Renamed { name, shape, part: (k, parts) } in rename(&name, &entry.shape) {
                let Entry { file, dtype, range: (start, end), .. } = entry;
                let length = (end - start) / parts;
                let range = (start + k * length, start + (k + 1) * length);
                self.entries.insert(name, Entry { file, dtype, shape, range });
            }
        }
        self
    }

    pub(super) fn add(&mut self, name: String, bytes: Bytes) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(bytes.all())
            .map_err(|e| Error::config(&name, format!("not a safetensors file: {e}")))?;
        for (tensor, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::F64 => DType::F64,
                Dtype::I64 => DType::I64,
                Dtype::I32 => DType::I32,
                Dtype::I16 => DType::I16,
                Dtype::U32 => DType::U32,
                Dtype::U8 | Dtype::BOOL => DType::U8,
                other => {
                    let reason = format!("type {other:?}, expected F32, F16 or BF16");
                    return Err(Error::Tensor { file: name, tensor, reason });
                }
            };
            let (file, shape, range) = (self.files.len(), info.shape.clone(), info.data_offsets);
            self.entries.insert(tensor, Entry { file, dtype, shape, range });
        }
        self.notes.extend(metadata.metadata().clone().unwrap_or_default());
        // read_metadata has checked that the header and all data lie inside the file.
        let data = header + size_of::<u64>();
        self.files.push(TensorFile { name, bytes, data });
        Ok(())
    }

    /// Number of parameters.
    pub(crate) fn parameters(&self) -> u64 {
        self.entries.values().map(|e| e.shape.iter().product::<usize>() as u64).sum()
    }

    /// The names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of this name.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.entries.get(name)?.shape)
    }

    /// The metadata of a key.
    pub(crate) fn note(&self, key: &str) -> Option<&str> {
        self.notes.get(key).map(String::as_str)
    }

    /// Registers the weight of this name as a LoRA target.
    pub(crate) fn add_lora_target(&self, name: String, target: LoraTarget) {
        self.lora_targets.borrow_mut().insert(name, target);
    }

    /// The LoRA targets, once the network is built.
    pub(crate) fn lora_targets(&self) -> LoraTargets {
        self.lora_targets.borrow().clone()
    }

    /// Adds the files to the fingerprint of their model.
    pub(crate) fn add_to(&self, fingerprint: &mut Fingerprint) {
        for file in &self.files {
            fingerprint.add(&file.name, file.bytes.all());
        }
    }

    pub(crate) fn file_names(&self) -> String {
        self.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// A tensor as f32 on the CPU.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = self.stored(name, shape)?;
        Ok(Tensor::from_vec(stored.numbers.floats(), shape, &Device::Cpu)?)
    }

    /// A tensor of any type as f32 on the CPU, in the shape that it has.
    pub(crate) fn widened(&self, name: &str) -> Result<Tensor> {
        let shape = self.shape(name).unwrap_or_default().to_vec();
        let Some(entry) = self.entries.get(name).filter(|entry| !is_network_type(entry.dtype))
        else {
            return self.tensor(name, &shape);
        };
        self.read.borrow_mut().insert(name.to_owned());
        let file = &self.files[entry.file];
        let bytes = &file.bytes.all()[file.data + entry.range.0..file.data + entry.range.1];
        let tensor = Tensor::from_raw_buffer(bytes, entry.dtype, &shape, &Device::Cpu)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    pub(crate) fn stored(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let error = |file: &str, reason: String| Error::Tensor {
            file: file.to_owned(),
            tensor: name.to_owned(),
            reason,
        };
        let entry = self.entries.get(name).ok_or_else(|| {
            error(&self.file_names(), format!("missing; expected shape {shape:?}"))
        })?;
        let file = &self.files[entry.file];
        if entry.shape != shape {
            let reason = format!("expected shape {shape:?}, found {:?}", entry.shape);
            return Err(error(&file.name, reason));
        }
        self.read.borrow_mut().insert(name.to_owned());
        let range = file.data + entry.range.0..file.data + entry.range.1;
        let numbers = TensorData::new(&file.bytes.all()[range.clone()], entry.dtype);
        let numbers = numbers.ok_or_else(|| {
            error(&file.name, format!("type {:?}, expected F32, F16 or BF16", entry.dtype))
        })?;
        Ok(StoredTensor { numbers, shape: &entry.shape, bytes: &file.bytes, range })
    }

    /// Checks that every tensor was read, except those that `unused` accepts.
    pub fn finish(&self, unused: impl Fn(&str) -> bool) -> Result<()> {
        let read = self.read.borrow();
        match self.entries.iter().find(|(name, _)| !read.contains(*name) && !unused(name)) {
            None => Ok(()),
            Some((name, entry)) => Err(Error::Tensor {
                file: self.files[entry.file].name.clone(),
                tensor: name.clone(),
                reason: "no part of the network that the configuration describes".into(),
            }),
        }
    }
}

/// A tensor in its file, until it is packed or copied. Its pages are released when it is dropped.
pub(crate) struct StoredTensor<'a> {
    pub(crate) numbers: TensorData<'a>,
    pub(crate) shape: &'a [usize],
    bytes: &'a Bytes,
    range: Range<usize>,
}

impl<'a> From<&StoredTensor<'a>> for Weight<'a> {
    fn from(stored: &StoredTensor<'a>) -> Self {
        Self::Data(stored.numbers, stored.shape)
    }
}

impl Drop for StoredTensor<'_> {
    fn drop(&mut self) {
        self.bytes.release(self.range.clone());
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

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

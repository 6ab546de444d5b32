//! The tensors of a network by name and shape. Each layer reads and packs its own, one at a time, so
//! that a model is never in memory twice.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::bytes::{Bytes, OpenFile, open};
use super::container::{Container, Place};
use super::fingerprint::Fingerprint;
use super::gguf::Gguf;
use super::numbers::NumberType;
use super::pickle;
use super::stored::{Numbers, StoredTensor};
use crate::error::{Error, Result};
use crate::ops::{Geometry, TensorData};

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
    shape: Vec<usize>,
    numbers: Place,
}

/// A tensor under another name, or one of the equal parts of its rows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Renamed {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Which part, of how many.
    pub(crate) part: (usize, usize),
}

/// The tensors of one network.
#[derive(Default)]
pub struct Weights {
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// Names of tensors that were read; [`Weights::finish`] notes the others.
    read: RefCell<BTreeSet<String>>,
    /// What is odd about the files and does not keep the network from being built.
    warnings: RefCell<Vec<String>>,
    /// The LoRA targets of the layers built so far.
    lora_targets: RefCell<LoraTargets>,
    /// Metadata of the files' headers.
    notes: BTreeMap<String, String>,
}

/// Number of bytes by which the kind of a file is told.
const BEGIN_BYTES: usize = 4096;

/// Maximum length of a tensor's name. Messages repeat names.
const MAX_NAME_BYTES: usize = 1024;

/// Maximum length of a file that is copied: more than the largest LoRAs of these models.
const MAX_COPY_BYTES: u64 = 2 << 30;

impl Weights {
    /// All tensors of a single file, under their names in the file.
    pub(crate) fn whole(path: &Path) -> Result<Self> {
        let failed = |reason| Error::File { path: path.to_owned(), reason };
        Self::of(path, Bytes::Opened(OpenFile::open(path).map_err(failed)?))
    }

    /// All tensors of a single file that may be replaced while it is read.
    pub(crate) fn copied(path: &Path) -> Result<Self> {
        let failed = |reason| Error::File { path: path.to_owned(), reason };
        let mut bytes = Vec::new();
        let file = open(path).map_err(failed)?;
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
        weights.add(name, bytes)?;
        Ok(weights)
    }

    /// The tensors renamed, without those that get no name.
    pub(super) fn renamed(mut self, rename: impl Fn(&str, &[usize]) -> Vec<Renamed>) -> Self {
        for (name, entry) in std::mem::take(&mut self.entries) {
            for Renamed { name, shape, part: (k, parts) } in rename(&name, &entry.shape) {
                let part = |(start, end)| {
                    let length = (end - start) / parts;
                    (start + k * length, start + (k + 1) * length)
                };
                let numbers = entry.numbers.clone().map(|(dtype, range)| (dtype, part(range)));
                self.entries.insert(name, Entry { file: entry.file, shape, numbers });
            }
        }
        self
    }

    /// Adds the tensors of a file, which is read for what it is, whatever its name ends in.
    pub(super) fn add(&mut self, name: String, bytes: Bytes) -> Result<()> {
        let named = |reason: String| Error::config(&name, reason);
        let begin = bytes.read(0..bytes.len().min(BEGIN_BYTES));
        let begin = begin.map_err(|error| named(error.to_string()))?;
        let data = match Container::of(&begin).map_err(named)? {
            Container::Safetensors => self.add_safetensors(&name, &bytes).map_err(named)?,
            Container::Archive => {
                for (tensor, shape, numbers) in pickle::tensors(&bytes).map_err(named)? {
                    self.insert(tensor, shape, numbers).map_err(named)?;
                }
                0
            }
            Container::Gguf => {
                let Gguf { tensors, data } = Gguf::read(&bytes).map_err(named)?;
                for (tensor, shape, numbers) in tensors {
                    self.insert(tensor, shape, numbers).map_err(named)?;
                }
                data
            }
        };
        drop(begin);
        self.files.push(TensorFile { name, bytes, data });
        Ok(())
    }

    /// Adds a tensor of the file that is being added. The error reads on from the file's name.
    fn insert(
        &mut self,
        name: String,
        shape: Vec<usize>,
        numbers: Place,
    ) -> std::result::Result<(), String> {
        if name.len() > MAX_NAME_BYTES {
            let length = name.len();
            return Err(format!(
                "holds a tensor with a name of {length} bytes; at most {MAX_NAME_BYTES} are read"
            ));
        }
        if name.contains(char::is_control) {
            return Err(format!("holds a tensor with control characters in its name, {name:?}"));
        }
        self.entries.insert(name, Entry { file: self.files.len(), shape, numbers });
        Ok(())
    }

    /// Returns the offset of the data.
    fn add_safetensors(&mut self, name: &str, bytes: &Bytes) -> std::result::Result<usize, String> {
        let length = bytes.len();
        let (data, metadata) = header(bytes)?;
        let whole = data.saturating_add(metadata.data_len());
        if whole > length {
            return Err(format!("is cut short: {length} bytes of {whole}: {FETCH}"));
        }
        if let behind @ 1.. = length - whole {
            let warning = format!("{name}: {behind} bytes behind its tensors are not used");
            self.warnings.get_mut().push(warning);
        }
        for (tensor, info) in metadata.tensors() {
            let numbers = match info.dtype {
                Dtype::F32 => Ok(NumberType::Plain(DType::F32)),
                Dtype::F16 => Ok(NumberType::Plain(DType::F16)),
                Dtype::BF16 => Ok(NumberType::Plain(DType::BF16)),
                Dtype::F64 => Ok(NumberType::Plain(DType::F64)),
                Dtype::I64 => Ok(NumberType::Plain(DType::I64)),
                Dtype::I32 => Ok(NumberType::Plain(DType::I32)),
                Dtype::I16 => Ok(NumberType::Plain(DType::I16)),
                Dtype::U32 => Ok(NumberType::Plain(DType::U32)),
                Dtype::U8 | Dtype::BOOL => Ok(NumberType::Plain(DType::U8)),
                Dtype::F8_E4M3 => Ok(NumberType::E4m3),
                Dtype::F8_E5M2 => Ok(NumberType::E5m2),
                other => Err(format!("type {other:?}, {EXPECTED}")),
            };
            let numbers = numbers.map(|kind| (kind, info.data_offsets));
            self.insert(tensor, info.shape.clone(), numbers)?;
        }
        self.notes.extend(metadata.metadata().clone().unwrap_or_default());
        Ok(data)
    }

    /// Number of parameters.
    pub(crate) fn parameters(&self) -> u64 {
        self.entries.values().map(|e| product(&e.shape)).fold(0, u64::saturating_add)
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

    /// Adds the files to the fingerprint of their model. Fails if one was written to since it was
    /// opened.
    pub(crate) fn add_to(&self, fingerprint: &mut Fingerprint) -> Result<()> {
        self.files.iter().try_for_each(|TensorFile { name, bytes, .. }| {
            let added = fingerprint.add_file(name, bytes).and_then(|()| bytes.check_unchanged());
            added.map_err(|error| Error::config(name, error.to_string()))
        })
    }

    pub(crate) fn file_names(&self) -> String {
        self.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// A tensor as f32 on the CPU.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.stored(name, shape)?.floats(), shape, &Device::Cpu)?)
    }

    /// A tensor of any type as f32 on the CPU, in the shape that it has.
    pub(crate) fn widened(&self, name: &str) -> Result<Tensor> {
        let shape = self.shape(name).unwrap_or_default().to_vec();
        let stored = self.read(name, &shape, true)?;
        Ok(Tensor::from_vec(stored.floats(), shape, &Device::Cpu)?)
    }

    /// A tensor that layers compute with.
    pub(crate) fn stored(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        self.read(name, shape, false)
    }

    fn read(&self, name: &str, shape: &[usize], integers: bool) -> Result<StoredTensor<'_>> {
        let error = |file: &str, reason: String| Error::Tensor {
            file: file.to_owned(),
            tensor: name.to_owned(),
            reason,
        };
        let entry = self.entries.get(name).ok_or_else(|| {
            error(&self.file_names(), format!("missing; expected shape {shape:?}"))
        })?;
        let file = &self.files[entry.file];
        let refuse = |reason: String| Err(error(&file.name, reason));
        let (kind, range) = match &entry.numbers {
            Ok(place) => *place,
            Err(reason) => return refuse(reason.clone()),
        };
        if entry.shape != shape {
            return refuse(format!("expected shape {shape:?}, found {:?}", entry.shape));
        }
        if let NumberType::Plain(dtype) = kind
            && dtype.is_int()
            && !integers
        {
            return refuse(format!("type {dtype:?}, {EXPECTED}"));
        }
        self.read.borrow_mut().insert(name.to_owned());
        let bytes = self.bytes(name, entry.file, range)?;
        let numbers = match kind.of_network().and_then(TensorData::view) {
            Some(view) => Numbers::Stored(bytes, view),
            None => {
                let values = kind.values(&bytes).map_err(|reason| error(&file.name, reason))?;
                Numbers::Widened(self.scaled(values, name, kind)?)
            }
        };
        Ok(StoredTensor { numbers, shape: &entry.shape })
    }

    /// The values of a weight times its scale, if it is of fp8 and a tensor beside it holds one: one
    /// number, or one for each row.
    fn scaled(&self, mut values: Vec<f32>, name: &str, kind: NumberType) -> Result<Vec<f32>> {
        let stem = name.strip_suffix("weight").filter(|_| kind.is_fp8());
        let names = stem.map(|stem| FP8_SCALES.map(|end| format!("{stem}{end}")));
        let mut names = names.into_iter().flatten();
        let Some(scale) = names.find(|name| self.entries.contains_key(name)) else {
            return Ok(values);
        };
        let scales = self.widened(&scale)?.flatten_all()?.to_vec1::<f32>()?;
        let rows = self.shape(name).and_then(|shape| shape.first().copied()).unwrap_or(1);
        if ![1, rows].contains(&scales.len()) {
            let reason = format!("expected one number or {rows}, found {}", scales.len());
            return Err(Error::Tensor { file: self.file_names(), tensor: scale, reason });
        }
        let run = values.len().div_ceil(scales.len().max(1)).max(1);
        for (values, scale) in values.chunks_mut(run).zip(scales) {
            values.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(values)
    }

    /// The bytes of a tensor, by its range in the data of a file.
    fn bytes(&self, name: &str, file: usize, range: (usize, usize)) -> Result<Cow<'_, [u8]>> {
        let TensorFile { name: file, bytes, data } = &self.files[file];
        bytes.read(data + range.0..data + range.1).map_err(|error| Error::Tensor {
            file: file.clone(),
            tensor: name.to_owned(),
            reason: error.to_string(),
        })
    }

    /// A weight of a network: a tensor of finite numbers.
    pub(crate) fn weight(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let stored = self.stored(name, shape)?;
        if stored.numbers().are_finite() {
            return Ok(stored);
        }
        let reason = "holds NaN or infinite numbers: the file is damaged".into();
        Err(Error::Tensor { file: self.file_names(), tensor: name.to_owned(), reason })
    }

    /// Notes the tensors that were not read, except those that `unused` accepts.
    pub fn finish(&self, unused: impl Fn(&str) -> bool) {
        let read = self.read.borrow();
        let of_fp8 = |name: &str| FP8_INPUTS.iter().any(|end| name.ends_with(end));
        let mut others = self
            .entries
            .iter()
            .filter(|(name, _)| !read.contains(*name) && !unused(name) && !of_fp8(name));
        let Some((first, entry)) = others.next() else { return };
        let file = &self.files[entry.file].name;
        let (which, verb) = match others.count() {
            0 => (format!("tensor {first}"), "is"),
            more => (format!("tensor {first} and {more} more"), "are"),
        };
        let warning = format!("{file}: {which} {verb} of no part of the network, and not used");
        let mut warnings = self.warnings.borrow_mut();
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    /// What is odd about the files and does not keep the network from being built, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.borrow().clone()
    }
}

/// The number of elements of a shape, which may be one that no file can hold.
fn product(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product, side| product.saturating_mul(*side as u64))
}

/// The advice for files that are cut short.
const FETCH: &str = "the download is incomplete, fetch the file again";

/// The types whose numbers are read.
const EXPECTED: &str = "expected F32, F16, BF16, F64 or fp8";

/// The header of a safetensors file, and the offset of the data behind it. The ranges of its tensors
/// follow each other without gaps, and have the lengths of their shapes.
fn header(bytes: &Bytes) -> std::result::Result<(usize, Metadata), String> {
    const PREFIX: usize = size_of::<u64>();
    let read = |range| bytes.read(range).map_err(|error| error.to_string());
    let cut = || format!("is cut short within its header, at {} bytes: {FETCH}", bytes.len());
    let prefix = read(0..PREFIX.min(bytes.len()))?;
    let prefix = prefix.as_ref().try_into().map_err(|_| cut())?;
    let length = usize::try_from(u64::from_le_bytes(prefix)).ok();
    let data = length.and_then(|length| length.checked_add(PREFIX));
    let data = data.filter(|data| *data <= bytes.len()).ok_or_else(cut)?;
    let text = read(PREFIX..data)?;
    let metadata = serde_json::from_slice(&text);
    Ok((data, metadata.map_err(|error| format!("not a safetensors file: {error}"))?))
}

/// Names of the scales of fp8 weights, in place of `weight`.
const FP8_SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// Ends of names of what accompanies fp8 weights and only products in fp8 need.
const FP8_INPUTS: [&str; 4] = ["scale_input", "input_scale", "scaled_fp8", "comfy_quant"];

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

    #[test]
    fn a_file_that_is_changed_while_it_is_read_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.safetensors");
        let header = BTreeMap::from([("w".to_owned(), (0, vec![1 << 16]))]);
        let open = || {
            std::fs::write(&path, file(&header)).expect("it is written");
            Weights::whole(&path).expect("a sound file")
        };
        let weights = open();
        assert!(weights.tensor("w", &[1 << 16]).is_ok());
        let changed = |error: Error, words: &str| {
            let said = error.to_string();
            assert!(said.contains(words) && said.contains("was changed"), "{said}");
        };
        std::fs::write(&path, "shorter").expect("it is written");
        changed(weights.tensor("w", &[1 << 16]).expect_err("shorter"), "a.safetensors: tensor w");
        let mut fingerprint = Fingerprint::default();
        changed(weights.add_to(&mut fingerprint).expect_err("shorter"), "a.safetensors");
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

//! The tensors of a network by name and shape. Each layer reads and packs its own, one at a time, so
//! that a model is never in memory twice.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::bytes::{Bytes, OpenFile, open};
use super::container::{Container, Place};
use super::fingerprint::Fingerprint;
use super::gguf::Gguf;
use super::numbers::{EXPECTED, NumberType};
use super::pickle::{self, PickledTensor};
use super::safetensors::Safetensors;
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
    /// The shape and the strides in which the file has the numbers, if not in order.
    order: Option<(Vec<usize>, Vec<usize>)>,
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
                let mut numbers = entry.numbers.clone().map(|(dtype, range)| (dtype, part(range)));
                let order = entry.order.clone();
                if parts > 1 && order.is_some() {
                    numbers =
                        Err("is not contiguous: save the file with contiguous tensors".into());
                }
                self.entries.insert(name, Entry { file: entry.file, shape, numbers, order });
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
            Container::Safetensors => {
                let Safetensors { tensors, notes, data, behind } =
                    Safetensors::read(&bytes).map_err(named)?;
                if behind > 0 {
                    self.warn(format!("{name}: {behind} bytes behind its tensors are not used"));
                }
                self.notes.extend(notes);
                self.add_entries(tensors).map_err(named)?;
                data
            }
            Container::Archive => {
                let tensors = pickle::tensors(&bytes).map_err(named)?;
                self.add_pickled(&name, tensors).map_err(named)?;
                0
            }
            Container::OldPickle => {
                let tensors = pickle::old_tensors(&bytes).map_err(named)?;
                self.add_pickled(&name, tensors).map_err(named)?;
                0
            }
            Container::Gguf => {
                let Gguf { tensors, data } = Gguf::read(&bytes).map_err(named)?;
                self.add_entries(tensors).map_err(named)?;
                data
            }
        };
        drop(begin);
        self.files.push(TensorFile { name, bytes, data });
        Ok(())
    }

    /// Adds tensors of the next file. The error reads on from the file's name.
    fn add_entries(
        &mut self,
        tensors: Vec<(String, Vec<usize>, Place)>,
    ) -> std::result::Result<(), String> {
        let file = self.files.len();
        tensors.into_iter().try_for_each(|(name, shape, numbers)| {
            self.insert(name, Entry { file, shape, numbers, order: None })
        })
    }

    /// Adds a tensor. The error reads on from the file's name.
    fn insert(&mut self, name: String, entry: Entry) -> std::result::Result<(), String> {
        if name.len() > MAX_NAME_BYTES {
            let length = name.len();
            return Err(format!(
                "holds a tensor with a name of {length} bytes; at most {MAX_NAME_BYTES} are read"
            ));
        }
        if name.contains(char::is_control) {
            return Err(format!("holds a tensor with control characters in its name, {name:?}"));
        }
        self.entries.insert(name, entry);
        Ok(())
    }

    /// Adds the tensors of a pickle, which are in the next file. Numbers that the pickle itself holds
    /// are in a file of their own, before it.
    fn add_pickled(
        &mut self,
        name: &str,
        tensors: Vec<PickledTensor>,
    ) -> std::result::Result<(), String> {
        let mut given = Vec::new();
        let any = tensors.iter().any(|tensor| matches!(tensor.numbers, pickle::Numbers::Given(_)));
        let (own, file) = (self.files.len(), self.files.len() + usize::from(any));
        for PickledTensor { name, shape, numbers } in tensors {
            let entry = match numbers {
                pickle::Numbers::Stored(numbers) => Entry { file, shape, numbers, order: None },
                pickle::Numbers::Strided(numbers, strides) => {
                    let order = Some((shape.clone(), strides));
                    Entry { file, shape, numbers, order }
                }
                pickle::Numbers::Given(number) => {
                    let start = given.len();
                    given.extend(number.to_le_bytes());
                    let numbers = Ok((NumberType::Plain(DType::F64), (start, given.len())));
                    Entry { file: own, shape, numbers, order: None }
                }
            };
            self.insert(name, entry)?;
        }
        if any {
            self.files.push(TensorFile { name: name.into(), bytes: Bytes::Copied(given), data: 0 });
        }
        Ok(())
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

    /// Adds what is odd about the files.
    pub(super) fn warn(&mut self, warning: String) {
        self.warnings.get_mut().push(warning);
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
        let mut names: Vec<_> = self.files.iter().map(|file| file.name.as_str()).collect();
        names.dedup();
        names.join(", ")
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
        if let Some(what) = self.quantised(name) {
            return refuse(format!(
                "is quantized by bitsandbytes ({what}), which is not read: {TAKE}"
            ));
        }
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
        let mut bytes = self.bytes(name, entry.file, range)?;
        if let (Some((shape, strides)), Some(width)) = (&entry.order, kind.bytes(1)) {
            bytes = Cow::Owned(in_order(&bytes, width, shape, strides));
        }
        let numbers = match kind.of_network().and_then(TensorData::view) {
            Some(view) => Numbers::Stored(bytes, view),
            None => {
                let values = kind.values(&bytes).map_err(|reason| error(&file.name, reason))?;
                Numbers::Widened(self.scaled(values, name, kind)?)
            }
        };
        Ok(StoredTensor { numbers, shape: &entry.shape })
    }

    /// What bitsandbytes calls the blocks of a weight, if it has quantized it.
    fn quantised(&self, name: &str) -> Option<&'static str> {
        let has = |end: &str| self.entries.contains_key(&format!("{name}.{end}"));
        let stem = name.strip_suffix("weight").unwrap_or(name);
        match () {
            () if has("quant_state.bitsandbytes__nf4") => Some("NF4"),
            () if has("quant_state.bitsandbytes__fp4") => Some("FP4"),
            () if has("absmax") || has("quant_map") => Some("blocks of 4 bits"),
            () if self.entries.contains_key(&format!("{stem}SCB")) => Some("LLM.int8"),
            () => None,
        }
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

    /// The names of the tensors that were not read.
    pub(crate) fn unread(&self) -> Vec<&str> {
        let read = self.read.borrow();
        self.names().filter(|name| !read.contains(*name)).collect()
    }

    /// What is odd about the files and does not keep the network from being built, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.borrow().clone()
    }
}

/// The numbers of a tensor in order, from those that begin at `bytes` with these strides.
fn in_order(bytes: &[u8], width: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(shape.iter().product::<usize>() * width);
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product() {
        let place: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
        ordered.extend_from_slice(&bytes[place * width..(place + 1) * width]);
        for (i, side) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *side {
                break;
            }
            *i = 0;
        }
    }
    ordered
}

/// The number of elements of a shape, which may be one that no file can hold.
fn product(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product, side| product.saturating_mul(*side as u64))
}

/// The advice for files whose blocks are not read.
const TAKE: &str = "take the file in f16, fp8 or GGUF";

/// Names of the scales of fp8 weights, in place of `weight`.
const FP8_SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// Ends of names of what accompanies fp8 weights and only products in fp8 need.
const FP8_INPUTS: [&str; 4] = ["scale_input", "input_scale", "scaled_fp8", "comfy_quant"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_changed_while_it_is_read_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.safetensors");
        let tensors = [("w", Tensor::zeros(1 << 16, DType::F32, &Device::Cpu).expect("zeros"))];
        let tensors = tensors.into_iter().collect();
        let open = || {
            candle_core::safetensors::save(&tensors, &path).expect("it is written");
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
}

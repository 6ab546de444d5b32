//! The files of a model: where they are, and tensors out of safetensors by name and shape.
//!
//! A model is a directory in diffusers' layout, a single file (`checkpoint`), or the
//! built-in one. Tensors lie in memory maps, from which each layer packs its own, one at a time;
//! then their pages are let go, so that a model is never in memory twice.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::{Dtype, SafeTensors};

use crate::checkpoint::{Outline, Renamed};
use crate::error::{Error, Result};
use crate::lora::{Site, Sites};
use crate::ops::{Conv2d, Geglu, Geometry, GroupNorm, LayerNorm, Linear, Numbers, Weight};
use crate::pipeline::Checking;
use crate::{config, demo, pickle, safety};

/// Where a model's files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The model that is part of the binary.
    Demo,
    /// A directory in diffusers' layout.
    Directory(PathBuf),
    /// A single file in the names of the original code: `.safetensors`, or a pickle, of which
    /// nothing is executed.
    Checkpoint(Checkpoint),
}

/// A single-file checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The file.
    pub file: PathBuf,
    /// A directory with CLIP's `vocab.json` and `merges.txt`, which such a file lacks.
    pub vocabulary: Option<PathBuf>,
}

impl Checkpoint {
    /// The file of that name in diffusers' layout beside the checkpoint.
    fn beside(&self, name: &str) -> PathBuf {
        self.file.with_file_name(name)
    }

    /// A small file: what lies beside the checkpoint, or else what can be inferred from it.
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let vocabulary = name.strip_prefix("tokenizer/").zip(self.vocabulary.as_ref());
        let vocabulary = vocabulary.map(|(name, directory)| directory.join(name));
        for path in [Some(self.beside(name)), vocabulary].into_iter().flatten() {
            if let Some(bytes) = read(path)? {
                return Ok(Some(bytes));
            }
        }
        let described = Weights::whole(&self.file)?.outline().describe(name)?;
        Ok(described.map(|value| Cow::Owned(value.to_string().into_bytes())))
    }
}

/// A file; `None` if there is no such file.
fn read(path: PathBuf) -> Result<Option<Cow<'static, [u8]>>> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { path, source }),
    }
}

impl Source {
    /// Reads a small file whole; `None` if the model has no such file.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Demo => Ok(demo::file(name).map(Cow::Borrowed)),
            Self::Directory(root) => read(root.join(name)),
            Self::Checkpoint(checkpoint) => checkpoint.read(name),
        }
    }

    /// Reads a small file that every model must have.
    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::File {
            path: self.path(name),
            source: io::Error::from(io::ErrorKind::NotFound),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Demo => Path::new("demo").join(name),
            Self::Directory(root) => root.join(name),
            Self::Checkpoint(checkpoint) => checkpoint.beside(name),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Bytes>> {
        if let Self::Demo = self {
            return Ok(demo::file(name).map(Bytes::Static));
        }
        let path = self.path(name);
        match map(&path) {
            Ok(map) => Ok(Some(Bytes::Mapped(map))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { path, source }),
        }
    }
}

#[expect(unsafe_code, reason = "the one memory map")]
fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is read only. Truncating the file while it is mapped would be a bus error;
    // model directories are immutable in every deployment that we describe.
    unsafe { Mmap::map(&file) }
}

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }

    /// Lets go of the pages of a range, so that what has been packed is not in memory twice.
    #[cfg(unix)]
    #[expect(unsafe_code, reason = "the one memory map")]
    fn release(&self, range: Range<usize>) {
        if let Self::Mapped(map) = self {
            // SAFETY: the map is read only and backed by the file: pages that are asked for again
            // are read again. An error leaves them where they are.
            let _ = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }

    #[cfg(not(unix))]
    fn release(&self, _: Range<usize>) {}
}

struct TensorFile {
    name: String,
    bytes: Bytes,
    /// Where the tensors' data begins.
    data: usize,
}

struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// Relative to the file's data.
    range: (usize, usize),
}

/// How many numbers the networks of a model hold, by the headers of its files.
pub fn parameters(source: &Source, half: bool, checking: Checking) -> Result<u64> {
    let mut networks = vec![
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ];
    if checking != Checking::Never && config::check_pipeline(source)? {
        networks.push((safety::FOLDER, "model"));
    }
    networks.into_iter().try_fold(0, |sum, (folder, stem)| {
        let weights = Weights::open(source, folder, stem, half)?;
        let numbers = weights.entries.values().map(|e| e.shape.iter().product::<usize>() as u64);
        Ok(sum + numbers.sum::<u64>())
    })
}

/// The tensors of one network.
pub struct Weights {
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// What has been asked for: the rest is reported by [`Weights::finish`].
    read: RefCell<BTreeSet<String>>,
    /// The weights of the layers that were built for LoRAs to add to.
    sites: RefCell<Sites>,
    /// What the headers of the files say beside tensors.
    notes: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `folder`'s safetensors: `stem.safetensors`, its `.fp16` variant, or shards named by
    /// an index. The variant comes first if `half` says that f16 is enough.
    pub fn open(source: &Source, folder: &str, stem: &str, half: bool) -> Result<Self> {
        // A safety checker is in no single file, but it may lie beside one.
        if let Source::Checkpoint(checkpoint) = source
            && folder != safety::FOLDER
        {
            let whole = Self::whole(&checkpoint.file)?;
            let rename = whole.outline().renamer(folder);
            return Ok(whole.renamed(rename));
        }
        let plain = [format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json")];
        let variant =
            [format!("{stem}.fp16.safetensors"), format!("{stem}.safetensors.index.fp16.json")];
        let names = if half { [variant, plain] } else { [plain, variant] }.concat();
        for name in &names {
            let name = format!("{folder}/{name}");
            if name.ends_with(".json") {
                if let Some(index) = source.read(&name)? {
                    return Self::load(source, shards(&name, &index, folder)?);
                }
            } else if source.open(&name)?.is_some() {
                return Self::load(source, vec![name]);
            }
        }
        Err(Error::File {
            path: source.path(&format!("{folder}/{}", names[0])),
            source: io::Error::new(
                io::ErrorKind::NotFound,
                format!("no such file, nor any of {}", names[1..].join(", ")),
            ),
        })
    }

    /// All tensors of a single file under the names that they have there.
    pub(crate) fn whole(path: &Path) -> Result<Self> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = Bytes::Mapped(map(path).map_err(failed)?);
        let mut weights = Self::empty();
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

    fn empty() -> Self {
        let (entries, read, sites, notes) = Default::default();
        Self { files: Vec::new(), entries, read, sites, notes }
    }

    fn outline(&self) -> Outline<'_> {
        let shapes = self.entries.iter().map(|(name, entry)| (name.as_str(), &entry.shape[..]));
        Outline::new(&self.files[0].name, shapes.collect())
    }

    /// The tensors under other names, without those that get none.
    fn renamed(mut self, rename: impl Fn(&str, &[usize]) -> Vec<Renamed>) -> Self {
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

    fn load(source: &Source, names: Vec<String>) -> Result<Self> {
        let mut weights = Self::empty();
        for name in names {
            let bytes = source.open(&name)?.ok_or_else(|| Error::File {
                path: source.path(&name),
                source: io::Error::from(io::ErrorKind::NotFound),
            })?;
            weights.add(name, bytes)?;
        }
        Ok(weights)
    }

    fn add(&mut self, name: String, bytes: Bytes) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(bytes.all())
            .map_err(|e| Error::config(&name, format!("not a safetensors file: {e}")))?;
        for (tensor, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::I64 => DType::I64,
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

    /// The names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of this name.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.entries.get(name)?.shape)
    }

    /// What a header says under this key.
    pub(crate) fn note(&self, key: &str) -> Option<&str> {
        self.notes.get(key).map(String::as_str)
    }

    /// The weights that LoRAs may add to, once the network is built.
    pub(crate) fn sites(&self) -> Sites {
        self.sites.borrow().clone()
    }

    pub(crate) fn file_names(&self) -> String {
        self.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// A tensor as f32 on the CPU.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = self.stored(name, shape)?;
        Ok(Tensor::from_vec(stored.numbers.floats(), shape, &Device::Cpu)?)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Stored<'_>> {
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
        let numbers = Numbers::new(&file.bytes.all()[range.clone()], entry.dtype);
        let numbers = numbers.ok_or_else(|| {
            error(&file.name, format!("type {:?}, expected F32, F16 or BF16", entry.dtype))
        })?;
        Ok(Stored { numbers, shape: &entry.shape, bytes: &file.bytes, range })
    }

    /// Checks that every tensor was asked for; `unused` says which ones are known to be idle.
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

/// A tensor where its file holds it, until it has been packed or copied.
struct Stored<'a> {
    numbers: Numbers<'a>,
    shape: &'a [usize],
    bytes: &'a Bytes,
    range: Range<usize>,
}

impl<'a> From<&Stored<'a>> for Weight<'a> {
    fn from(stored: &Stored<'a>) -> Self {
        Self::Stored(stored.numbers, stored.shape)
    }
}

impl Drop for Stored<'_> {
    fn drop(&mut self) {
        self.bytes.release(self.range.clone());
    }
}

/// A linear layer where its file holds it.
pub(crate) struct LinearPart<'a> {
    weight: Stored<'a>,
    bias: Option<Tensor>,
}

impl LinearPart<'_> {
    pub(crate) fn outputs(&self) -> usize {
        self.weight.shape[0]
    }
}

fn shards(name: &str, index: &[u8], folder: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index =
        serde_json::from_slice(index).map_err(|e| Error::config(name, e.to_string()))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(file) = files.iter().find(|f| f.contains('/') || f.contains("..")) {
        return Err(Error::config(name, format!("weight_map: {file:?} is not a file name")));
    }
    Ok(files.into_iter().map(|file| format!("{folder}/{file}")).collect())
}

/// A place in a network's tree of names, from which layers are built for a device.
#[derive(Clone)]
pub struct Params<'a> {
    weights: &'a Weights,
    prefix: String,
    device: &'a Device,
    dtype: DType,
}

impl<'a> Params<'a> {
    /// The root of the tree.
    pub fn new(weights: &'a Weights, device: &'a Device, dtype: DType) -> Self {
        Self { weights, prefix: String::new(), device, dtype }
    }

    /// A child: `pp("down_blocks").pp(0)` is `down_blocks.0`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let prefix = match self.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}.{name}"),
        };
        Self { prefix, ..self.clone() }
    }

    /// Whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.weights.entries.contains_key(&self.pp(name).prefix)
    }

    /// The first of the names under which the file has a weight: old files use other words.
    pub fn either<'n>(&self, names: [&'n str; 2]) -> &'n str {
        if self.pp(names[1]).has("weight") { names[1] } else { names[0] }
    }

    /// Notes down that LoRAs may add to the weight of this place, and returns its name.
    pub(crate) fn site(&self, site: Site) -> String {
        // Older and newer files of text encoders differ in it.
        let name = self.prefix.strip_prefix("text_model.").unwrap_or(&self.prefix).to_owned();
        self.weights.sites.borrow_mut().insert(name.clone(), site);
        name
    }

    /// A tensor as f32 on the CPU.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.tensor(&self.pp(name).prefix, shape)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Stored<'a>> {
        self.weights.stored(&self.pp(name).prefix, shape)
    }

    /// A tensor on the device, in the type of the network.
    pub(crate) fn placed(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let dtype = activation_dtype(self.device, self.dtype);
        Ok(self.tensor(name, shape)?.to_dtype(dtype)?.to_device(self.device)?)
    }

    pub(crate) fn linear(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        let weight = self.stored("weight", &[outputs, inputs])?;
        let bias = self.tensor("bias", &[outputs])?;
        Ok(Linear::new(&weight, Some(&bias), self.device, self.dtype)?)
    }

    pub(crate) fn geglu(&self, inputs: usize, outputs: usize) -> Result<Geglu> {
        let weight = self.stored("weight", &[2 * outputs, inputs])?;
        let bias = self.tensor("bias", &[2 * outputs])?;
        Ok(Geglu::new(&weight, &bias, self.device, self.dtype)?)
    }

    /// Several linear layers over one input as one, their outputs side by side.
    pub(crate) fn linears(
        &self,
        names: &[&str],
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Linear> {
        let parts = names.iter().map(|name| self.pp(name).part(inputs, outputs, bias));
        Ok(self.stack(&parts.collect::<Result<Vec<_>>>()?)?)
    }

    /// A linear layer that is to be computed with others.
    pub(crate) fn part(&self, inputs: usize, outputs: usize, bias: bool) -> Result<LinearPart<'a>> {
        let weight = self.stored("weight", &[outputs, inputs])?;
        let bias = bias.then(|| self.tensor("bias", &[outputs])).transpose()?;
        Ok(LinearPart { weight, bias })
    }

    /// Linear layers over one input as one, their outputs side by side. All have a bias, or none.
    pub(crate) fn stack(&self, parts: &[LinearPart<'_>]) -> candle_core::Result<Linear> {
        let numbers: Vec<_> = parts.iter().map(|part| part.weight.numbers).collect();
        let inputs = parts.first().map_or(0, |part| part.weight.shape[1]);
        let shape = [parts.iter().map(LinearPart::outputs).sum(), inputs];
        let biases: Option<Vec<_>> = parts.iter().map(|part| part.bias.as_ref()).collect();
        let bias = biases.map(|biases| Tensor::cat(&biases, 0)).transpose()?;
        let weight = Weight::Stored(Numbers::Parts(&numbers), &shape);
        Linear::new(weight, bias.as_ref(), self.device, self.dtype)
    }

    /// A linear layer that the file may hold as a convolution of kernel 1.
    pub(crate) fn linear_or_conv(
        &self,
        inputs: usize,
        outputs: usize,
        conv: bool,
    ) -> Result<Linear> {
        if !conv {
            return self.linear(inputs, outputs);
        }
        let weight = self.stored("weight", &[outputs, inputs, 1, 1])?;
        let bias = self.tensor("bias", &[outputs])?;
        Ok(Linear::new(&weight, Some(&bias), self.device, self.dtype)?)
    }

    pub(crate) fn conv(&self, inputs: usize, outputs: usize, geometry: Geometry) -> Result<Conv2d> {
        let kernel = geometry.kernel;
        let weight = self.stored("weight", &[outputs, inputs, kernel, kernel])?;
        let bias = self.tensor("bias", &[outputs])?;
        Ok(Conv2d::new(&weight, &bias, geometry, self.device, self.dtype)?)
    }

    pub(crate) fn group_norm(&self, channels: usize, groups: usize, eps: f64) -> Result<GroupNorm> {
        let (weight, bias) = self.affine(channels)?;
        Ok(GroupNorm::new(&weight, &bias, groups, eps, self.device)?)
    }

    pub(crate) fn layer_norm(&self, channels: usize, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = self.affine(channels)?;
        Ok(LayerNorm::new(&weight, &bias, eps, self.device)?)
    }

    fn affine(&self, channels: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.tensor("weight", &[channels])?, self.tensor("bias", &[channels])?))
    }
}

/// The type of activations: f32 on the CPU, that of the weights elsewhere.
pub fn activation_dtype(device: &Device, dtype: DType) -> DType {
    if device.is_cpu() { DType::F32 } else { dtype }
}

//! Where the files of a model are: a directory in the Diffusers format, a single-file checkpoint
//! ([`super::ldm`]), or the built-in model.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::bytes::{Bytes, OpenFile, open};
use super::demo;
use super::ldm::LdmCheckpoint;
use super::original_config::OriginalConfig;
use super::tensors::Weights;
use super::unet_file;
use crate::error::{Error, Result};

/// Files of a tokenizer's words.
const WORDS: [&str; 3] = ["added_tokens.json", "merges.txt", "vocab.json"];

/// Folder of the safety checker, which may be beside a single-file checkpoint.
pub(crate) const SAFETY_CHECKER: &str = "safety_checker";

/// Where a model's files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The built-in model.
    Demo,
    /// Its variant for four steps.
    DemoLcm,
    /// A directory in the Diffusers format.
    Directory(PathBuf),
    /// A directory with the files of one network, as its folder in a directory of the Diffusers
    /// format has them.
    Network(PathBuf),
    /// A single-file checkpoint in the original (LDM) format: `.safetensors`, or a pickle, which is
    /// parsed but never executed.
    Checkpoint(Checkpoint),
    /// A file with a UNet, of which nothing else is used.
    UNet(PathBuf),
}

/// A single-file checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The file.
    pub file: PathBuf,
    /// A directory with CLIP's `vocab.json` and `merges.txt`, which are not in the checkpoint.
    pub vocabulary: Option<PathBuf>,
}

impl Checkpoint {
    /// Fails if the file is not a whole model: LoRAs and single networks have the same extensions.
    pub fn check(&self) -> Result<()> {
        LdmCheckpoint::new(&Weights::whole(&self.file)?, None).check()
    }

    /// The configuration of the original code, `NAME.yaml` beside the checkpoint.
    fn original_config(&self) -> Result<Option<OriginalConfig>> {
        let path = self.file.with_extension("yaml");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        read(path)?.map(|bytes| OriginalConfig::parse(&name, &bytes)).transpose()
    }

    /// The path beside the checkpoint of a file of the Diffusers format.
    fn beside(&self, name: &str) -> PathBuf {
        self.file.with_file_name(name)
    }

    /// A configuration file: the one beside the checkpoint, else one inferred from the checkpoint.
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let vocabulary = name.strip_prefix("tokenizer/").zip(self.vocabulary.as_ref());
        let vocabulary = vocabulary.map(|(name, directory)| directory.join(name));
        // The words of both tokenizers of Stable Diffusion XL are the same.
        let words = |folder| name.strip_prefix(folder).filter(|name| WORDS.contains(name));
        if let Some(words) = words("tokenizer_2/") {
            return match read(self.beside(name))? {
                Some(bytes) => Ok(Some(bytes)),
                None => self.read(&format!("tokenizer/{words}")),
            };
        }
        let second = words("tokenizer/").map(|words| self.beside(&format!("tokenizer_2/{words}")));
        for path in [Some(self.beside(name)), vocabulary, second].into_iter().flatten() {
            if let Some(bytes) = read(path)? {
                return Ok(Some(bytes));
            }
        }
        let weights = Weights::whole(&self.file)?;
        let described = LdmCheckpoint::new(&weights, self.original_config()?).describe(name)?;
        Ok(described.map(|value| Cow::Owned(value.to_string().into_bytes())))
    }
}

/// A file; `None` if there is no such file.
fn read(path: PathBuf) -> Result<Option<Cow<'static, [u8]>>> {
    let mut bytes = Vec::new();
    match open(&path).and_then(|mut file| file.read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(Cow::Owned(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(Error::File { path, reason }),
    }
}

impl Source {
    /// The ControlNets that come with the model.
    pub fn controlnets(&self) -> &'static [&'static str] {
        match self {
            Self::Demo | Self::DemoLcm => demo::CONTROLNETS,
            _ => &[],
        }
    }

    /// Reads a small file whole; `None` if the model has no such file.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Demo => Ok(demo::file(name).map(Cow::Borrowed)),
            Self::DemoLcm => Ok(demo::lcm_file(name).map(Cow::Borrowed)),
            Self::Directory(_) | Self::Network(_) => read(self.path(name)),
            Self::Checkpoint(checkpoint) => checkpoint.read(name),
            Self::UNet(file) if name == "unet/config.json" => {
                if let Some(bytes) = read(self.path(name))? {
                    return Ok(Some(bytes));
                }
                let config = unet_file::config(file)?;
                Ok(config.map(|value| Cow::Owned(value.to_string().into_bytes())))
            }
            Self::UNet(_) => Ok(None),
        }
    }

    /// The name of a file of the model's owner: beside a single-file checkpoint `STEM.NAME` if
    /// there is one, since other checkpoints may lie there too.
    pub fn own_name(&self, name: &str) -> String {
        let own = match self {
            Self::Checkpoint(checkpoint) => checkpoint.file.with_extension(name),
            _ => return name.into(),
        };
        let found = own.file_name().filter(|_| own.is_file());
        found.map_or_else(|| name.into(), |own| own.to_string_lossy().into_owned())
    }

    /// Reads a small file that every model must have.
    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::File {
            path: self.path(name),
            reason: io::Error::new(io::ErrorKind::NotFound, "no such file"),
        })
    }

    /// The name of a file as messages have it: that of a network alone lies in no folder of a model.
    fn told<'n>(&self, name: &'n str) -> &'n str {
        match (self, name.split_once('/')) {
            (Self::Network(_), Some((_, name))) => name,
            _ => name,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Demo => Path::new("demo").join(name),
            Self::DemoLcm => Path::new("demo-lcm").join(name),
            Self::Directory(root) => root.join(name),
            Self::Network(root) => root.join(self.told(name)),
            Self::Checkpoint(checkpoint) => checkpoint.beside(name),
            // In diffusers' folder of the network.
            Self::UNet(file) => file.with_file_name(name.rsplit('/').next().unwrap_or(name)),
        }
    }

    /// A large file; `None` if the model has no such file.
    fn open(&self, name: &str) -> Result<Option<Bytes>> {
        if let Self::Demo | Self::DemoLcm = self {
            return Ok(demo::file(name).map(Bytes::Static));
        }
        let path = self.path(name);
        match OpenFile::open(&path) {
            Ok(file) => Ok(Some(Bytes::Opened(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(reason) => Err(Error::File { path, reason }),
        }
    }

    /// The tensors of a network, from the files in `folder`: `stem.safetensors`, its `.fp16`
    /// variant, or the shards of an index, else pickles in their place. The variant comes first if
    /// `half` says that f16 is enough.
    pub fn weights(&self, folder: &str, stem: &str, half: bool) -> Result<Weights> {
        if let Self::UNet(file) = self {
            return unet_file::weights(file);
        }
        // No checkpoint contains a safety checker, but its folder may be beside one.
        if let Self::Checkpoint(checkpoint) = self
            && folder != SAFETY_CHECKER
        {
            let mut whole = Weights::whole(&checkpoint.file)?;
            let strays = LdmCheckpoint::new(&whole, None).strays().filter(|_| folder == "unet");
            strays.into_iter().for_each(|warning| whole.warn(warning));
            let rename = LdmCheckpoint::new(&whole, None).renamer(folder);
            return Ok(whole.renamed(rename));
        }
        if let (Self::DemoLcm, "unet") = (self, folder) {
            let mut weights = Weights::default();
            weights
                .add(format!("{folder}/{stem}.safetensors"), Bytes::Copied(demo::lcm_unet()?))?;
            return Ok(weights);
        }
        let names = weight_files(stem, half);
        for name in &names {
            let is_twin = name.contains(".fp16.");
            let name = format!("{folder}/{name}");
            let files = match name.ends_with(".json") {
                true => self.read(&name)?.map(|index| shards(&name, &index, folder)).transpose()?,
                false => self.open(&name)?.map(|_| vec![name.clone()]),
            };
            let Some(files) = files else { continue };
            let mut weights = self.load(files)?;
            if is_twin && !half {
                let name = self.told(&name);
                weights.warn(format!(
                    "{name}: only the weights rounded to f16 are there: they were taken for all"
                ));
            }
            return Ok(weights);
        }
        Err(Error::File {
            path: self.path(&format!("{folder}/{}", names[0])),
            reason: io::Error::new(
                io::ErrorKind::NotFound,
                format!("no such file, nor any of {}", names[1..].join(", ")),
            ),
        })
    }

    fn load(&self, names: Vec<String>) -> Result<Weights> {
        let mut weights = Weights::default();
        for name in names {
            let bytes = self.open(&name)?.ok_or_else(|| Error::File {
                path: self.path(&name),
                reason: io::Error::new(io::ErrorKind::NotFound, "no such file"),
            })?;
            weights.add(self.told(&name).to_owned(), bytes)?;
        }
        Ok(weights)
    }
}

/// The files in which a network's weights may be, the preferred ones first: safetensors before
/// pickles, and the f16 variant first if `half`. Each whole, or as the index of its shards.
fn weight_files(stem: &str, half: bool) -> Vec<String> {
    // Pickles of transformers' networks have another name.
    let pickled = if stem == "model" { "pytorch_model" } else { stem };
    let containers = [(stem, "safetensors"), (pickled, "bin")];
    let names = containers.into_iter().flat_map(|(stem, ending)| {
        let plain = [format!("{stem}.{ending}"), format!("{stem}.{ending}.index.json")];
        let variant = [format!("{stem}.fp16.{ending}"), format!("{stem}.{ending}.index.fp16.json")];
        if half { [variant, plain] } else { [plain, variant] }
    });
    names.flatten().collect()
}

fn shards(name: &str, index: &[u8], folder: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index)
        .map_err(|_| Error::config(name, "not JSON with a weight_map of names of files"))?;
    if index.weight_map.is_empty() {
        return Err(Error::config(name, "weight_map: names no file"));
    }
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(file) = files.iter().find(|f| f.contains('/') || f.contains("..")) {
        return Err(Error::config(name, format!("weight_map: {file:?} is not a file name")));
    }
    Ok(files.into_iter().map(|file| format!("{folder}/{file}")).collect())
}

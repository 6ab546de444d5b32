//! Where a model's files come from: this binary, a directory, a single file, the local cache of the
//! hub, or the hub itself.

mod checkpoint;
mod hub;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use sd_models::{
    AddOns, Checkpoint, DeviceName, LoadOptions, Pipeline, Precision, SafetyMode, Source,
};

pub(crate) use checkpoint::is_checkpoint;
pub(crate) use hub::{Download, Hub, files_to_fetch, is_hub_id};

/// A model, where it runs and where it may come from.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Which model.
    pub place: ModelLocation,
    /// A VAE in place of its own: a single file, or a directory with one in `vae/`.
    pub vae: Option<PathBuf>,
    /// The device.
    pub device: DeviceName,
    /// The numbers it computes in.
    pub precision: Precision,
    /// Whether its safety checker is loaded.
    pub checking: SafetyMode,
    /// CPU threads; all cores when absent.
    pub threads: Option<usize>,
    /// What requests can add to it by name.
    pub add_ons: AddOns,
    /// The hub and its cache.
    pub hub: Hub,
}

impl ModelConfig {
    /// Bytes of a number of its weights.
    pub fn weight_bytes(&self) -> u64 {
        self.precision.weight_bytes(self.half())
    }

    /// Whether f16 files will do.
    pub fn half(&self) -> bool {
        wants_half(self.device, self.precision)
    }
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelLocation {
    /// In this binary.
    Demo,
    /// In a directory: in the diffusers layout, there or one level below, or as a single file.
    Directory(PathBuf),
    /// In a single file in the names of the original code.
    Checkpoint(PathBuf),
    /// On the hub or in its cache.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

/// Finds the files of the configured model, fetching them if need be. Not for async threads.
pub(crate) fn locate(model: ModelConfig) -> Result<LoadOptions> {
    let (half, checking) = (model.half(), model.checking);
    let source = match model.place {
        ModelLocation::Demo => Source::Demo,
        ModelLocation::Directory(path) => within(path, &model.hub)?,
        ModelLocation::Checkpoint(file) => checkpoint::source(file, &model.hub)?,
        ModelLocation::Hub { id, revision } => {
            let download = Download { hub: model.hub, id, revision, half, checking };
            let cached = download.cached();
            Source::Directory(match cached {
                Some(path) => path,
                None => download.run()?,
            })
        }
    };
    let vae = model.vae.map(|path| match path.is_dir() {
        true => Source::Directory(path),
        false => Source::Checkpoint(Checkpoint { file: path, vocabulary: None }),
    });
    let ModelConfig { device, precision, threads, add_ons, .. } = model;
    Ok(LoadOptions { source, vae, device, precision, safety: checking, threads, add_ons })
}

/// Loads the configured model. Not for async threads.
pub(crate) fn load(model: ModelConfig) -> Result<Pipeline> {
    Ok(Pipeline::load(&locate(model)?)?)
}

/// The model in a directory: in diffusers' layout, perhaps one level below since tarballs often
/// hold one directory, or as the only single file.
fn within(path: PathBuf, hub: &Hub) -> Result<Source> {
    let is_model = |path: &PathBuf| path.join("model_index.json").is_file();
    if is_model(&path) {
        return Ok(Source::Directory(path));
    }
    let entries = path.read_dir().with_context(|| format!("cannot read {}", path.display()))?;
    let entries: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let inner: Vec<_> = entries.iter().filter(|path| is_model(path)).collect();
    let files: Vec<_> = entries.iter().filter(|path| is_checkpoint(path)).collect();
    match (&inner[..], &files[..]) {
        ([inner], _) => Ok(Source::Directory((*inner).clone())),
        ([], [file]) => checkpoint::source((*file).clone(), hub),
        _ => bail!(
            "{} holds no model: neither model_index.json nor exactly one .safetensors or .ckpt file",
            path.display()
        ),
    }
}

pub(crate) fn wants_half(device: DeviceName, precision: Precision) -> bool {
    match precision {
        Precision::F16 => true,
        Precision::Bf16 | Precision::F32 => false,
        Precision::Auto => match device {
            DeviceName::Cuda(_) => true,
            DeviceName::Cpu => false,
            DeviceName::Auto => cfg!(feature = "cuda"),
        },
    }
}

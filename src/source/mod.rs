//! Finds a model's files: in this binary, a directory, a single file, the local cache of the hub,
//! or the hub itself.

mod checkpoint;
mod hub;
mod repository;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use sd_models::{
    AddOns, Checkpoint, DeviceName, LoadOptions, Pipeline, Precision, SafetyMode, Source,
};

pub(crate) use checkpoint::is_checkpoint;
pub(crate) use hub::{Download, Hub, byte_bar, is_hub_id};
pub(crate) use repository::{Parts, files_to_fetch};

/// A model: its source, device and options.
#[derive(Debug, Clone)]
pub(crate) struct ModelConfig {
    /// The location of the model.
    pub(crate) location: ModelLocation,
    /// UNet that replaces the model's own: a file, its folder, or a directory with `unet/`.
    pub(crate) unet: Option<PathBuf>,
    /// VAE that replaces the model's own: a file, a directory of it or with `vae/`, or a repository.
    pub(crate) vae: Option<ModelLocation>,
    /// The device.
    pub(crate) device: DeviceName,
    /// Data type of the weights.
    pub(crate) precision: Precision,
    /// Whether its safety checker is loaded.
    pub(crate) checking: SafetyMode,
    /// Number of CPU threads; `None`: all cores.
    pub(crate) threads: Option<usize>,
    /// LoRAs and embeddings that requests can select by name.
    pub(crate) add_ons: AddOns,
    /// The hub and its cache.
    pub(crate) hub: Hub,
}

impl ModelConfig {
    /// Bytes per weight.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.precision.weight_bytes(self.half())
    }

    /// Which files of the model are needed.
    pub(crate) fn parts(&self) -> Parts {
        let (unet, vae) = (self.unet.is_none(), self.vae.is_none());
        Parts { half: self.half(), checking: self.checking, unet, vae }
    }

    /// Whether f16 files are preferred.
    pub(crate) fn half(&self) -> bool {
        wants_half(self.device, self.precision)
    }
}

/// The location of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelLocation {
    /// The model built into this binary.
    Demo,
    /// Its variant for four steps.
    DemoLcm,
    /// A directory: in Diffusers format, there or one level below, or with a single-file
    /// checkpoint.
    Directory(PathBuf),
    /// A single-file checkpoint in the original (LDM) format.
    Checkpoint(PathBuf),
    /// A model on the hub, or in its cache.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

/// Finds the files of the configured model and downloads them if necessary. Blocks.
pub(crate) fn locate(model: ModelConfig) -> Result<LoadOptions> {
    let parts = model.parts();
    let half = parts.half;
    let vae = model.vae.map(|vae| vae_source(vae, &model.hub, half)).transpose()?;
    let mut name = None;
    let source = match model.location {
        ModelLocation::Demo => Source::Demo,
        ModelLocation::DemoLcm => Source::DemoLcm,
        ModelLocation::Directory(path) => within(path, &model.hub)?,
        ModelLocation::Checkpoint(file) => checkpoint::source(file, &model.hub)?,
        ModelLocation::Hub { id, revision } => {
            name = Some(id.clone());
            let download = Download { hub: model.hub, id, revision, parts };
            Source::Directory(download.cached().map_or_else(|| download.run(), Ok)?)
        }
    };
    let unet = model.unet.map(|path| match path.is_dir() {
        true if path.join("unet/config.json").is_file() => Source::Directory(path),
        true => Source::Network(path),
        false => Source::UNet(path),
    });
    let ModelConfig { device, precision, threads, add_ons, .. } = model;
    Ok(LoadOptions {
        name,
        source,
        unet,
        vae,
        device,
        precision,
        safety: parts.checking,
        threads,
        add_ons,
    })
}

/// Finds the files of a VAE and downloads them if necessary. Blocks.
fn vae_source(location: ModelLocation, hub: &Hub, half: bool) -> Result<Source> {
    let path = match location {
        ModelLocation::Demo | ModelLocation::DemoLcm => return Ok(Source::Demo),
        ModelLocation::Checkpoint(file) => {
            return Ok(Source::Checkpoint(Checkpoint { file, vocabulary: None }));
        }
        ModelLocation::Directory(path) => path,
        ModelLocation::Hub { id, revision } => {
            let parts = Parts { half, checking: SafetyMode::Never, unet: false, vae: true };
            Download { hub: hub.clone(), id, revision, parts }.vae()?
        }
    };
    match path.join("vae/config.json").is_file() {
        true => Ok(Source::Directory(path)),
        false => Ok(Source::Network(path)),
    }
}

/// Loads the configured model. Blocks.
pub(crate) fn load(model: ModelConfig) -> Result<Pipeline> {
    Ok(Pipeline::load(&locate(model)?)?)
}

/// The model in a directory: in Diffusers format, also one level below since tarballs often contain
/// one directory, or the only single-file checkpoint.
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
            "{} holds no model: neither model_index.json nor exactly one .safetensors, .gguf or .ckpt file",
            path.display()
        ),
    }
}

pub(crate) fn wants_half(device: DeviceName, precision: Precision) -> bool {
    match (precision, device) {
        (Precision::F16, _) | (Precision::Auto, DeviceName::Cuda(_)) => true,
        (Precision::Bf16 | Precision::F32, _) | (Precision::Auto, DeviceName::Cpu) => false,
        (Precision::Auto, DeviceName::Auto) => cfg!(feature = "cuda"),
    }
}

//! The image encoder of IP-Adapters: CLIP's vision tower, from a folder near the adapter's file.
//!
//! Reference: diffusers 0.42 `loaders/ip_adapter.py`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::config::VisionConfig;
use super::vision::VisionTower;
use crate::error::{Error, Result};
use crate::files::{IpAdapterFile, Keys, Weights, encoder_source, encoder_weights};
use crate::layers::LayerBuilder;

/// The image encoder of adapters.
pub struct ImageEncoder {
    tower: VisionTower,
    bytes: u64,
    warnings: Vec<String>,
}

/// What an adapter takes of an image encoder: so many channels of the embedding, or of the hidden
/// states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Features {
    Embedding(usize),
    States(usize),
}

/// Where the image encoder of an adapter is, and what it is.
pub struct EncoderFolder {
    pub(crate) path: PathBuf,
    config: VisionConfig,
}

impl Features {
    fn of(weights: &Weights) -> Result<Self> {
        let inputs = |name: &str| weights.shape(&format!("image_proj.{name}.weight"))?.get(1);
        let states = || inputs("proj_in").or_else(|| inputs("proj.0"));
        let embedding = inputs("proj").map(|width| Self::Embedding(*width));
        embedding.or_else(|| states().map(|width| Self::States(*width))).ok_or_else(|| {
            let reason = "is an IP-Adapter of a kind that is not known: known are plain, plus and \
                          full ones";
            Error::config(weights.file_names(), reason)
        })
    }

    fn fits(self, config: &VisionConfig) -> bool {
        match self {
            Self::Embedding(width) => config.projection_dim == width,
            Self::States(width) => config.transformer.hidden_size == width,
        }
    }

    /// What is wanted, as a sentence goes on.
    fn wanted(self) -> String {
        let (what, width) = match self {
            Self::Embedding(width) => ("embeddings", width),
            Self::States(width) => ("hidden states", width),
        };
        let published = [
            (Self::Embedding(1024), "ViT-H"),
            (Self::States(1280), "ViT-H"),
            (Self::Embedding(1280), "ViT-bigG"),
            (Self::States(1664), "ViT-bigG"),
        ];
        let name = published.iter().find(|(features, _)| *features == self);
        let name = name.map(|(_, name)| format!(", CLIP {name}")).unwrap_or_default();
        format!("an image encoder with {what} of {width} channels{name}")
    }
}

impl EncoderFolder {
    /// That of an adapter: the nearest that fits. Blocks: reads folders and headers.
    ///
    /// # Errors
    /// There is none, or none that fits.
    pub fn find(file: &IpAdapterFile) -> Result<Self> {
        let weights = file.weights()?;
        let features = Features::of(&weights)?;
        let mut others = Vec::new();
        for path in file.encoders() {
            let what = match described(&path) {
                Ok(config) if features.fits(&config) => return Ok(Self { path, config }),
                Ok(config) => format!(
                    "{} has embeddings of {} and hidden states of {}",
                    short(&path),
                    config.projection_dim,
                    config.transformer.hidden_size
                ),
                Err(error) => format!("{}: {error}", short(&path)),
            };
            others.push(what);
        }
        let found = match &others[..] {
            [] => "there is none".to_owned(),
            others => others.join("; "),
        };
        let reason = format!(
            "needs {} as image_encoder/ (config.json, model.safetensors) in its folder or beside \
             that; {found}",
            features.wanted()
        );
        Err(Error::config(weights.file_names(), reason))
    }

    /// Pixels of its pictures, along one side.
    pub fn side(&self) -> usize {
        self.config.image_size
    }
}

/// The end of a path: clients are told no more of it.
fn short(path: &Path) -> String {
    let names = path.components().rev().take(2).collect::<Vec<_>>();
    names.into_iter().rev().collect::<PathBuf>().display().to_string()
}

/// The configuration of the image encoder in a folder.
fn described(folder: &Path) -> Result<VisionConfig> {
    let (source, name) = encoder_source(folder);
    let file = format!("{name}/config.json");
    if source.read(&file)?.is_some() {
        return VisionConfig::parse(Keys::read(&source, &file)?);
    }
    let weights = encoder_weights(folder, false)?;
    VisionConfig::infer(&weights, VisionTower::prefix(&weights))
}

impl ImageEncoder {
    /// Reads the encoder of a folder.
    ///
    /// # Errors
    /// Files that are no CLIP vision tower, and those of more than `max_bytes`.
    pub fn read(
        folder: &EncoderFolder,
        (device, dtype): (&Device, DType),
        max_bytes: u64,
    ) -> Result<Self> {
        let weights = encoder_weights(&folder.path, dtype == DType::F16)?;
        let bytes = bytes_of(&weights, dtype);
        if bytes > max_bytes {
            let reason = format!(
                "takes {bytes} bytes of memory; beside its adapter at most {max_bytes} are allowed \
                 (--max-ip-adapter-bytes)"
            );
            return Err(Error::config(weights.file_names(), reason));
        }
        let root = LayerBuilder::new(&weights, device, dtype);
        let tower = VisionTower::load(&root, folder.config.clone())?;
        weights.finish(|name| {
            let of_text = name.starts_with("text_model.") || name == "text_projection.weight";
            of_text || name == "logit_scale" || name.ends_with("embeddings.position_ids")
        });
        Ok(Self { tower, bytes, warnings: weights.warnings() })
    }

    /// Bytes of its weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pixels of its pictures, along one side.
    pub(super) fn side(&self) -> usize {
        self.tower.config().image_size
    }

    pub(super) fn tower(&self) -> &VisionTower {
        &self.tower
    }

    /// What is odd about its files.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// Bytes of the weights in a type.
pub(super) fn bytes_of(weights: &Weights, dtype: DType) -> u64 {
    weights.parameters().saturating_mul(dtype.size_in_bytes() as u64)
}

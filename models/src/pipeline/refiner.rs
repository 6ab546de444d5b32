//! A refiner: a second model that takes an image over from the first on its way, such as the refiner
//! of Stable Diffusion XL. It has its own prompts, UNet and VAE, and the latents of the first model;
//! what an image needs of it in a pass is in `run`.
//!
//! Reference: diffusers 0.42 `pipeline_stable_diffusion_xl_img2img.py` with `denoising_start`, which
//! begins a run of its own; and stable-diffusion-webui 1.10 `modules/sd_samplers_common.py`
//! `apply_refiner`, where the sampler goes on.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};

use super::drawing_model::DrawingModel;
use super::load::{LoadedModel, parameters};
use super::options::{AddOns, FreeBytes, LoadOptions, SafetyMode};
use super::pass_loras::PassLoras;
use super::refiner_spec::Refiner;
use super::spec::{PromptSyntax, Spec};
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetDir, Checkpoint, Source};
use crate::layers::LoraStack;
use crate::networks::{UNetConfig, VaeConfig};

/// The field of a request that names a refiner.
const FIELD: &str = "refiner";

/// The refiners that requests can name, with an LRU cache. Usable from any thread.
pub(super) struct RefinerCache {
    cache: AssetCache<DrawingModel>,
    /// Those of the model.
    options: LoadOptions,
    vae: VaeConfig,
    unet: UNetConfig,
    device: Device,
    dtype: DType,
}

/// A refiner, and the LoRAs that an image has with it.
#[derive(Clone)]
pub(crate) struct LoadedRefiner {
    pub(super) model: Arc<DrawingModel>,
    pub(super) loras: LoraStack,
}

impl LoadedRefiner {
    /// What is odd about its files.
    pub(super) fn warnings(&self) -> impl Iterator<Item = String> {
        let info = &self.model.model.info;
        info.warnings.iter().map(|warning| format!("refiner {:?}: {warning}", info.name))
    }
}

impl RefinerCache {
    /// An empty cache for a model that was loaded with these options.
    pub(super) fn new(options: &LoadOptions, model: &LoadedModel) -> Result<Self> {
        let most = options.add_ons.max_refiner_bytes;
        Ok(Self {
            cache: AssetCache::new(AssetDir::default(), most),
            vae: model.vae.config().clone(),
            unet: model.unet.config().clone(),
            device: model.device.clone(),
            dtype: options.precision.resolve(&model.device)?,
            options: options.clone(),
        })
    }

    /// Bytes of the weights of those that are there.
    pub(super) fn bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// The refiner of a spec with its LoRAs, read if they are not cached. Blocks.
    pub(super) fn get(&self, refiner: &Refiner, spec: &Spec) -> Result<LoadedRefiner> {
        let model = match path(&refiner.source) {
            Some(path) => {
                let read = || self.read(refiner);
                self.cache.get_at(FIELD, (&refiner.name, path), |_| read())?
            }
            None => Arc::new(self.read(refiner)?.0),
        };
        let read = PassLoras::reader(&model.model.loras, spec);
        let read = read.filter(|_| self.has_loras(&model, spec));
        let loras = read.map_or_else(|| Ok(PassLoras::default()), |read| read())?;
        let loras = if spec.hires.is_some() { loras.hires } else { loras.base };
        Ok(LoadedRefiner { model, loras })
    }

    /// Whether the LoRAs of an image are those of its refiner too: as in AUTOMATIC1111, if its layers
    /// are those of the model.
    fn has_loras(&self, refiner: &DrawingModel, spec: &Spec) -> bool {
        spec.prompt_syntax == PromptSyntax::A1111 && *refiner.model.unet.config() == self.unet
    }

    /// Reads a refiner. Returns the bytes of its weights with it.
    fn read(&self, refiner: &Refiner) -> Result<(DrawingModel, u64)> {
        let LoadOptions { add_ons, device, precision, vae, threads, .. } = self.options.clone();
        let options = LoadOptions {
            name: Some(refiner.name.clone()),
            source: refiner.source.clone(),
            unet: None,
            vae,
            device,
            precision,
            safety: SafetyMode::Never,
            threads,
            add_ons,
        };
        let (half, bytes) = (self.dtype == DType::F16, self.dtype.size_in_bytes() as u64);
        let bytes = parameters(&options, half)?.saturating_mul(bytes);
        self.make_room(refiner, bytes)?;
        // A device that is opened once more would have a stream of its own.
        let model = DrawingModel::load(&options, self.device.clone())?;
        self.check(refiner, &model)?;
        Ok((model, bytes))
    }

    /// Makes room for the weights of a refiner, whose memory those that are cached may have.
    fn make_room(&self, refiner: &Refiner, bytes: u64) -> Result<()> {
        let AddOns { max_refiner_bytes: most, free_host_bytes, .. } = &self.options.add_ons;
        let refuse = |reason: String| {
            let reason = format!("{:?} takes {bytes} bytes of memory; {reason}", refiner.name);
            Err(Error::Spec { field: FIELD, reason })
        };
        if bytes > *most {
            return refuse(format!("at most {most} are allowed (--max-refiner-bytes)"));
        }
        let free = || free_host_bytes.and_then(|FreeBytes(free)| free());
        let has_room = |cached: u64| {
            cached.saturating_add(bytes) <= *most && free().is_none_or(|free| bytes <= free)
        };
        // Of those that images still use the memory is not free yet; its limit holds all the same
        // once they are drawn.
        self.cache.evict_until(has_room);
        match free() {
            Some(free) if bytes > free => refuse(format!("{free} are free")),
            _ => Ok(()),
        }
    }

    /// Checks that a refiner can take images of the model over.
    fn check(&self, refiner: &Refiner, model: &DrawingModel) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::Spec { field: FIELD, reason: format!("{:?} {reason}", refiner.name) })
        };
        let (own, other) = (&self.vae, model.model.vae.config());
        let [own_scale, other_scale] = [own, other].map(|vae| vae.scaling_factor);
        if own_scale != other_scale {
            return refuse(format!(
                "has other latents than the model: its scaling_factor is {other_scale}, the model's \
                 {own_scale}"
            ));
        }
        let space = |vae: &VaeConfig| (vae.latent_channels, vae.scale(), vae.latents.clone());
        if space(own) != space(other) {
            return refuse("has other latents than the model".into());
        }
        let takes_mask = |unet: &UNetConfig| unet.in_channels > unet.out_channels;
        if takes_mask(model.model.unet.config()) {
            return refuse("has an inpainting UNet, which cannot be a refiner".into());
        }
        if takes_mask(&self.unet) {
            return refuse("cannot take over from an inpainting UNet".into());
        }
        let embeds = |unet: &UNetConfig| unet.time_cond_proj_dim.is_some();
        if embeds(model.model.unet.config()) != embeds(&self.unet) {
            return refuse(
                "takes the guidance scale as an input and the model does not, or the other way \
                 round"
                    .into(),
            );
        }
        Ok(())
    }
}

/// Where the files of a model are; none of a built-in one.
fn path(source: &Source) -> Option<&Path> {
    match source {
        Source::Demo | Source::DemoLcm => None,
        Source::Directory(path) | Source::Network(path) | Source::UNet(path) => Some(path),
        Source::Checkpoint(Checkpoint { file, .. }) => Some(file),
    }
}

//! The networks of a model and its settings, read from its files.

use std::io;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation};

use super::control::ControlNetCache;
use super::defaults::Defaults;
use super::index::PipelineIndex;
use super::info::{MemoryEstimate, ModelInfo, SingleFiles};
use super::options::{AddOns, LoadOptions, SafetyMode};
use super::read_files::{ReadFiles, fingerprint_of, open_again, reopen};
use super::upscaler_cache::UpscalerCache;
use super::vae::Vae;
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetFile, Checkpoint, SAFETY_CHECKER, Source, Weights};
use crate::layers::{LoraCache, TargetIndex};
use crate::networks::{
    ClipTextConfig, ClipTextModel, SafetyChecker, UNet2DConditionModel, UNetConfig, VaeConfig,
};
use crate::sampling::SchedulerConfig;
use crate::text::{ClipTokenizer, Embeddings};

/// A model in memory.
pub(super) struct LoadedModel {
    pub(super) info: ModelInfo,
    pub(super) device: Device,
    pub(super) tokenizer: ClipTokenizer,
    pub(super) text_encoder: ClipTextModel,
    pub(super) unet: UNet2DConditionModel,
    pub(super) vae: Vae,
    pub(super) safety_checker: Option<SafetyChecker>,
    pub(super) scheduler: SchedulerConfig,
    pub(super) loras: Arc<LoraCache>,
    pub(super) controlnets: Arc<ControlNetCache>,
    pub(super) upscalers: Arc<UpscalerCache>,
}

impl LoadedModel {
    /// Reads a model from its files. Takes seconds.
    pub(super) fn load(options: &LoadOptions) -> Result<Self> {
        set_threads(options.threads);
        let source = &options.source;
        let device = options.device.open()?;
        let dtype = options.precision.resolve(&device)?;
        let index = PipelineIndex::read(source)?;
        let half = dtype == DType::F16;
        let mut files = ReadFiles::default();
        let weights = source.weights("text_encoder", "model", half)?;
        let (tokenizer, text_encoder, embeddings) =
            read_text(options, &weights, &device, dtype, &mut files)?;
        let (text_targets, text_print) = (weights.lora_targets(), files.note(&weights)?);
        let unet_source = options.unet.as_ref().unwrap_or(source);
        let weights = unet_source.weights("unet", "diffusion_pytorch_model", half)?;
        let described = unet_source.read("unet/config.json")?.is_some();
        let unet = UNetConfig::read(if described { unet_source } else { source })?;
        let unet = UNet2DConditionModel::load(unet, &weights, &device, dtype);
        let unet = if described { unet? } else { unet.map_err(of_another_shape)? };
        let unet_targets = (weights.lora_targets(), unet.config().layers_per_block);
        let base = reopen([source, unet_source], half, [text_print, files.note(&weights)?]);
        let targets = TargetIndex::new(unet_targets, text_targets, base, &device, dtype);
        let vae_source = options.vae.as_ref().unwrap_or(source);
        let vae = read_vae(vae_source, half, &device, dtype, &mut files)?;
        let memory = MemoryEstimate::of(&unet, &tokenizer, &vae, &device, dtype);
        check_widths(&text_encoder, &unet, vae.config())?;
        let checked = options.safety.loads_checker(index.has_checker)?;
        let checker = checked.then(|| read_checker(source, half, &device, dtype, &mut files));
        let safety_checker = checker.transpose()?;
        let scheduler = read_scheduler(source, &index, &mut files)?;
        let scale = vae.config().scale();
        let name = options.name.clone().unwrap_or_else(|| name(source));
        let text = &text_encoder.config().transformer;
        let sizes = (unet.config(), scale, text.num_hidden_layers);
        let (defaults, named) = Defaults::read(source, &name, sizes, &scheduler)?;
        files.warnings.extend(named);
        let info = ModelInfo {
            name,
            fingerprint: files.fingerprint.finish(),
            files: single_files(source, options.vae.as_ref())?,
            device: device_name(&device),
            precision: dtype.as_str().into(),
            defaults,
            multiple: scale.max(8),
            unsuited: scheduler.unsuited(),
            embeds_guidance: unet.config().time_cond_proj_dim.is_some(),
            gives_strength_to_scheduler: index.gives_strength_to_scheduler(),
            text_layers: text.num_hidden_layers,
            text_width: text.hidden_size,
            most_steps: scheduler.most_steps(),
            checked,
            memory,
            add_ons: options.add_ons.clone(),
            embeddings,
            warnings: files.warnings,
        };
        let AddOns { loras, max_lora_bytes, .. } = options.add_ons.clone();
        let controlnets =
            ControlNetCache::new(&options.add_ons, (unet.config(), scale), (&device, dtype));
        Ok(Self {
            info,
            upscalers: Arc::new(UpscalerCache::new(&options.add_ons, &device, dtype)),
            device,
            tokenizer,
            text_encoder,
            unet,
            vae,
            safety_checker,
            scheduler,
            loras: Arc::new(LoraCache { cache: AssetCache::new(loras, max_lora_bytes), targets }),
            controlnets: Arc::new(controlnets),
        })
    }
}

/// Sets the number of threads of the CPU kernels.
fn set_threads(threads: Option<usize>) {
    if let Some(threads) = threads {
        // An error means that the pool exists: the first model has set its size.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// The files of a model and of the VAE that replaces its own, where these are single ones.
fn single_files(model: &Source, vae: Option<&Source>) -> Result<SingleFiles> {
    let file = |source: Option<&Source>| match source {
        Some(Source::Checkpoint(Checkpoint { file, .. })) => {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            AssetFile::new(&name, file.clone()).map(Some)
        }
        _ => Ok(None),
    };
    Ok(SingleFiles { checkpoint: file(Some(model))?, vae: file(vae)? })
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        _ => "cpu".into(),
    }
}

/// The option that goes without the safety checker.
const WITHOUT_CHECKER: &str = "--safety-checker off goes without it";

/// Adds to the error of a tensor where the shapes are from.
fn of_another_shape(error: Error) -> Error {
    match error {
        Error::Tensor { file, tensor, reason } => {
            let reason = format!(
                "{reason}; the shapes are the model's own, as there is no config.json beside the file"
            );
            Error::Tensor { file, tensor, reason }
        }
        other => other,
    }
}

/// Adds to the error of a missing file what helps.
fn advise<T>(read: Result<T>, advice: &str) -> Result<T> {
    read.map_err(|error| match error {
        Error::File { path, reason } if reason.kind() == io::ErrorKind::NotFound => {
            let reason = io::Error::new(reason.kind(), format!("{reason}; {advice}"));
            Error::File { path, reason }
        }
        other => other,
    })
}

/// The scheduler configuration of the model, as its pipeline takes it.
fn read_scheduler(
    source: &Source,
    index: &PipelineIndex,
    files: &mut ReadFiles,
) -> Result<SchedulerConfig> {
    let name = "scheduler/scheduler_config.json";
    let file = source.require(name)?;
    // The same weights with another prediction type give another image.
    files.fingerprint.add(name, &file);
    let mut scheduler = SchedulerConfig::from_json(&String::from_utf8_lossy(&file))?;
    if scheduler.class_name.is_none() {
        scheduler.class_name.clone_from(&index.scheduler);
    }
    if index.sets_steps_offset() {
        scheduler.steps_offset = Some(1);
    }
    if index.clears_clip_sample() {
        scheduler.clip_sample = Some(false);
    }
    if index.sets_skip_prk_steps() {
        scheduler.skip_prk_steps = Some(true);
    }
    files.warnings.extend(scheduler.replace_unknown_class()?);
    Ok(scheduler)
}

/// The safety checker.
fn read_checker(
    source: &Source,
    half: bool,
    device: &Device,
    dtype: DType,
    files: &mut ReadFiles,
) -> Result<SafetyChecker> {
    let weights = advise(source.weights(SAFETY_CHECKER, "model", half), WITHOUT_CHECKER)?;
    let checker = advise(SafetyChecker::load(source, &weights, device, dtype), WITHOUT_CHECKER)?;
    files.note(&weights)?;
    Ok(checker)
}

/// The VAE.
fn read_vae(
    source: &Source,
    half: bool,
    device: &Device,
    dtype: DType,
    files: &mut ReadFiles,
) -> Result<Vae> {
    let advice = "--vae names another VAE";
    let weights = advise(source.weights("vae", "diffusion_pytorch_model", half), advice)?;
    let config = advise(VaeConfig::read(source), advice)?;
    let (source, known) = (source.clone(), fingerprint_of(&weights)?);
    let open = move || open_again(&source, ("vae", "diffusion_pytorch_model"), half, &known);
    let (vae, warning) = Vae::load(config, &weights, device, dtype, Box::new(open))?;
    files.note(&weights)?;
    files.warnings.extend(warning);
    Ok(vae)
}

/// Tokenizer and text encoder, with the textual inversion embeddings added to both.
fn read_text(
    LoadOptions { source, add_ons, .. }: &LoadOptions,
    weights: &Weights,
    device: &Device,
    dtype: DType,
    files: &mut ReadFiles,
) -> Result<(ClipTokenizer, ClipTextModel, Embeddings)> {
    let config = ClipTextConfig::read(source)?;
    let (ids, width) = (config.vocab_size, config.transformer.hidden_size);
    let mut tokenizer = ClipTokenizer::load(source, config.max_position_embeddings)?;
    files.warnings.extend(tokenizer.limit(ids)?);
    let mut encoder = ClipTextModel::load(config, weights, device, dtype)?;
    let (room, most) = (tokenizer.max_length() - 2, add_ons.max_embedding_bytes);
    let (embeddings, vectors) = Embeddings::read(&add_ons.embeddings, most, width, room)?;
    if let Some(vectors) = vectors {
        encoder.add_embeddings(&vectors)?;
        tokenizer.add_placeholders(&embeddings.words, ids);
    }
    Ok((tokenizer, encoder, embeddings))
}

/// Checks that the output of each network fits the next.
fn check_widths(text: &ClipTextModel, unet: &UNet2DConditionModel, vae: &VaeConfig) -> Result<()> {
    let (unet, text) = (unet.config(), text.config());
    let refuse = |key: &str, found: usize, other: &str, wanted: usize| {
        let reason = format!("{key}: {found}, but {other} is {wanted}");
        Err(Error::config("unet/config.json", reason))
    };
    if unet.cross_attention_dim != text.transformer.hidden_size {
        let (found, wanted) = (unet.cross_attention_dim, text.transformer.hidden_size);
        return refuse("cross_attention_dim", found, "the text encoder's hidden_size", wanted);
    }
    let latent = vae.latent_channels;
    if unet.out_channels != latent {
        return refuse("out_channels", unet.out_channels, "the VAE's latent_channels", latent);
    }
    // Latents alone; for inpainting also a mask and the latents of the masked image.
    if ![latent, 2 * latent + 1].contains(&unet.in_channels) {
        return refuse("in_channels", unet.in_channels, "the VAE's latent_channels", latent);
    }
    Ok(())
}

fn name(source: &Source) -> String {
    let (path, end) = match source {
        Source::Demo => return "demo".into(),
        Source::DemoLcm => return "demo-lcm".into(),
        Source::Directory(path) | Source::Network(path) => (path, path.file_name()),
        Source::Checkpoint(checkpoint) => (&checkpoint.file, checkpoint.file.file_stem()),
        Source::UNet(file) => (file, file.file_stem()),
    };
    end.map_or_else(|| path.display().to_string(), |end| end.to_string_lossy().into_owned())
}

/// Number of parameters of the networks that are loaded, from the headers of their files.
pub fn parameters(options: &LoadOptions, half: bool) -> Result<u64> {
    let LoadOptions { source, unet, vae, safety, .. } = options;
    let mut networks = vec![
        (source, "text_encoder", "model"),
        (unet.as_ref().unwrap_or(source), "unet", "diffusion_pytorch_model"),
        (vae.as_ref().unwrap_or(source), "vae", "diffusion_pytorch_model"),
    ];
    if *safety != SafetyMode::Never && PipelineIndex::read(source)?.has_checker {
        networks.push((source, SAFETY_CHECKER, "model"));
    }
    let count = |(source, folder, stem): (&Source, _, _)| {
        let weights = source.weights(folder, stem, half);
        let weights =
            if folder == SAFETY_CHECKER { advise(weights, WITHOUT_CHECKER) } else { weights };
        Ok(weights?.parameters())
    };
    networks.into_iter().map(count).sum()
}

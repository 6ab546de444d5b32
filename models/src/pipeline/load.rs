//! The networks of a model and its settings, read from its files.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation};

use super::index::PipelineIndex;
use super::info::{Defaults, MemoryEstimate, ModelInfo};
use super::options::{AddOns, LoadOptions, SafetyMode};
use crate::error::{Error, Result};
use crate::files::{AssetCache, Fingerprint, SAFETY_CHECKER, Source, Weights};
use crate::layers::{LoraCache, Network, Reopen, TargetIndex};
use crate::networks::{
    ClipTextConfig, ClipTextModel, Decoder, Encoder, SafetyChecker, UNet2DConditionModel,
    UNetConfig, VaeConfig,
};
use crate::picture::Size;
use crate::sampling::{SamplerName, SchedulerConfig};
use crate::text::{ClipTokenizer, Embeddings};

/// A model in memory.
pub(super) struct LoadedModel {
    pub(super) info: ModelInfo,
    pub(super) device: Device,
    pub(super) tokenizer: ClipTokenizer,
    pub(super) text_encoder: ClipTextModel,
    pub(super) unet: UNet2DConditionModel,
    /// Always loaded, also for text-to-image alone: it is a thirtieth of the model, and what is
    /// wrong with it should show at load rather than at the first request that needs it.
    pub(super) encoder: Encoder,
    pub(super) decoder: Decoder,
    pub(super) safety_checker: Option<SafetyChecker>,
    pub(super) scheduler: SchedulerConfig,
    pub(super) loras: Arc<LoraCache>,
}

impl LoadedModel {
    /// Reads a model from its files. Takes seconds.
    pub(super) fn load(options: &LoadOptions) -> Result<Self> {
        if let Some(threads) = options.threads {
            // An error means that the pool exists: the first model has set its size.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
        let source = &options.source;
        let device = options.device.open()?;
        let dtype = options.precision.resolve(&device)?;
        let index = PipelineIndex::read(source)?;
        let half = dtype == DType::F16;
        let mut warnings = Vec::new();
        let weights = source.weights("text_encoder", "model", half)?;
        let AddOns { loras, max_lora_bytes, .. } = options.add_ons.clone();
        let (tokenizer, text_encoder, embeddings) =
            read_text(options, &weights, &device, dtype, &mut warnings)?;
        warnings.extend(weights.warnings());
        let text_targets = weights.lora_targets();
        // Of the files as they are loaded, which may be replaced afterwards.
        let mut fingerprint = Fingerprint::default();
        weights.add_to(&mut fingerprint);
        let text_print = fingerprint_of(&weights);
        let weights = source.weights("unet", "diffusion_pytorch_model", half)?;
        let unet = UNetConfig::read(source)?;
        let unet = UNet2DConditionModel::load(unet, &weights, &device, dtype)?;
        let unet_targets = (weights.lora_targets(), unet.config().layers_per_block);
        warnings.extend(weights.warnings());
        weights.add_to(&mut fingerprint);
        let base = reopen(source.clone(), half, text_print, fingerprint_of(&weights));
        let targets = TargetIndex::new(unet_targets, text_targets, base, &device, dtype);
        let vae_source = options.vae.as_ref().unwrap_or(source);
        let weights = vae_source.weights("vae", "diffusion_pytorch_model", half);
        let weights = advise(weights, "--vae names another VAE")?;
        let vae = advise(VaeConfig::read(vae_source), "--vae names another VAE")?;
        let encoder = Encoder::load(vae.clone(), &weights, &device, dtype)?;
        let decoder = Decoder::load(vae, &weights, &device, dtype)?;
        weights.add_to(&mut fingerprint);
        warnings.extend(weights.warnings());
        let length = tokenizer.max_length();
        let memory = MemoryEstimate::of(&unet, length, decoder.config(), &device, dtype);
        check_widths(&text_encoder, &unet, &decoder)?;
        let checked = options.safety.loads_checker(index.has_checker)?;
        let safety_checker =
            checked.then(|| SafetyChecker::load(source, half, &device, dtype)).transpose();
        let safety_checker = advise(safety_checker, WITHOUT_CHECKER)?;
        if checked {
            source.weights(SAFETY_CHECKER, "model", half)?.add_to(&mut fingerprint);
        }
        let mut scheduler = read_scheduler(source, &index, &mut fingerprint)?;
        warnings.extend(scheduler.replace_unknown_class()?);
        // A single file is read once for each network.
        let mut said = BTreeSet::new();
        warnings.retain(|warning| said.insert(warning.clone()));
        let scale = decoder.config().scale();
        let defaults = defaults(unet.config(), scale, &scheduler)?;
        let info = ModelInfo {
            name: options.name.clone().unwrap_or_else(|| name(source)),
            fingerprint: fingerprint.finish(),
            device: device_name(&device),
            precision: dtype.as_str().into(),
            defaults,
            multiple: scale.max(8),
            embeds_guidance: unet.config().time_cond_proj_dim.is_some(),
            text_layers: text_encoder.config().transformer.num_hidden_layers,
            checked,
            memory,
            add_ons: options.add_ons.clone(),
            embeddings,
            warnings,
        };
        let loras = LoraCache { cache: AssetCache::new(loras, max_lora_bytes), targets };
        Ok(Self {
            info,
            device,
            tokenizer,
            text_encoder,
            unet,
            encoder,
            decoder,
            safety_checker,
            scheduler,
            loras: Arc::new(loras),
        })
    }
}

fn fingerprint_of(weights: &Weights) -> String {
    let mut fingerprint = Fingerprint::default();
    weights.add_to(&mut fingerprint);
    fingerprint.finish()
}

/// Opens the files of a network again, if they are still those with these fingerprints: the layers
/// keep the weights only as they compute with them.
fn reopen(source: Source, half: bool, text: String, unet: String) -> Reopen {
    Box::new(move |network| {
        let (folder, stem, known) = match network {
            Network::TextEncoder => ("text_encoder", "model", &text),
            Network::UNet => ("unet", "diffusion_pytorch_model", &unet),
        };
        let weights = source.weights(folder, stem, half)?;
        match fingerprint_of(&weights) == *known {
            true => Ok(weights),
            false => Err(Error::config(
                weights.file_names(),
                "has changed since the model was loaded; load the model again",
            )),
        }
    })
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        _ => "cpu".into(),
    }
}

/// The defaults of a request. `scale` is pixels per latent pixel.
fn defaults(unet: &UNetConfig, scale: usize, scheduler: &SchedulerConfig) -> Result<Defaults> {
    let side = unet.sample_size * scale;
    let size = Size::new(side, side).ok_or_else(|| {
        Error::config("unet/config.json", format!("sample_size: {side} pixels a side"))
    })?;
    let SamplerName { sampler, schedule } = scheduler.default_sampler()?;
    Ok(Defaults { size, steps: 50, guidance_scale: 7.5, sampler, schedule })
}

/// The option that goes without the safety checker.
const WITHOUT_CHECKER: &str = "--safety-checker off goes without it";

/// Adds to the error of a missing file what helps.
fn advise<T>(read: Result<T>, advice: &str) -> Result<T> {
    read.map_err(|error| match error {
        Error::File { path, source } if source.kind() == io::ErrorKind::NotFound => {
            let source = io::Error::new(source.kind(), format!("{source}; {advice}"));
            Error::File { path, source }
        }
        other => other,
    })
}

/// The scheduler configuration of the model, as its pipeline takes it.
fn read_scheduler(
    source: &Source,
    index: &PipelineIndex,
    fingerprint: &mut Fingerprint,
) -> Result<SchedulerConfig> {
    let name = "scheduler/scheduler_config.json";
    let file = source.require(name)?;
    // The same weights with another prediction type give another image.
    fingerprint.add(name, &file);
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
    Ok(scheduler)
}

/// Tokenizer and text encoder, with the textual inversion embeddings added to both.
fn read_text(
    LoadOptions { source, add_ons, .. }: &LoadOptions,
    weights: &Weights,
    device: &Device,
    dtype: DType,
    warnings: &mut Vec<String>,
) -> Result<(ClipTokenizer, ClipTextModel, Embeddings)> {
    let config = ClipTextConfig::read(source)?;
    let (ids, width) = (config.vocab_size, config.transformer.hidden_size);
    let mut tokenizer = ClipTokenizer::load(source, config.max_position_embeddings)?;
    warnings.extend(tokenizer.limit(ids)?);
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
fn check_widths(text: &ClipTextModel, unet: &UNet2DConditionModel, vae: &Decoder) -> Result<()> {
    let (unet, text, vae) = (unet.config(), text.config(), vae.config());
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
        Source::Directory(path) | Source::Network(path) => (path, path.file_name()),
        Source::Checkpoint(checkpoint) => (&checkpoint.file, checkpoint.file.file_stem()),
    };
    end.map_or_else(|| path.display().to_string(), |end| end.to_string_lossy().into_owned())
}

/// Number of parameters of a model's networks, from the headers of its files.
pub fn parameters(source: &Source, half: bool, safety: SafetyMode) -> Result<u64> {
    let mut networks = vec![
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ];
    if safety != SafetyMode::Never && PipelineIndex::read(source)?.has_checker {
        networks.push((SAFETY_CHECKER, "model"));
    }
    let count = |(folder, stem)| {
        let weights = source.weights(folder, stem, half);
        let weights =
            if folder == SAFETY_CHECKER { advise(weights, WITHOUT_CHECKER) } else { weights };
        Ok(weights?.parameters())
    };
    networks.into_iter().map(count).sum()
}

//! The networks of a model and its settings, read from its files.

use std::io;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation};

use super::control::ControlNetCache;
use super::defaults::Defaults;
use super::index::PipelineIndex;
use super::info::{MemoryEstimate, ModelInfo, SingleFiles};
use super::ip_adapter::IpAdapterCache;
use super::options::{LoadOptions, SafetyMode};
use super::read_files::{ReadFiles, fingerprint_of, open_again, reopen};
use super::text_encoders::{TextEncoder, TextEncoders};
use super::upscaler_cache::UpscalerCache;
use super::vae::Vae;
use super::xl::{SCORED, SIZES, Taken};
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetFile, Checkpoint, LoraTargets, SAFETY_CHECKER, Source};
use crate::layers::{LoraCache, TargetIndex};
use crate::networks::{
    AddedConfig, ClipTextConfig, ClipTextModel, SafetyChecker, UNet2DConditionModel, UNetConfig,
    VaeConfig,
};
use crate::sampling::SchedulerConfig;
use crate::text::{ClipTokenizer, Embeddings};

/// Scaling factors of the latents of Stable Diffusion 1.x and 2.x, and of XL.
const SCALING: f64 = 0.18215;
const XL_SCALING: f64 = 0.13025;

/// Folder of the second text encoder.
const SECOND: &str = "text_encoder_2";

/// A model in memory.
pub(super) struct LoadedModel {
    pub(super) info: ModelInfo,
    pub(super) device: Device,
    pub(super) texts: TextEncoders,
    /// Whether an absent negative prompt is zeros.
    pub(super) zeros_for_absent: bool,
    /// Whether the UNet takes a score in the place of the target's size.
    pub(super) is_scored: bool,
    pub(super) unet: UNet2DConditionModel,
    pub(super) vae: Vae,
    pub(super) safety_checker: Option<SafetyChecker>,
    pub(super) scheduler: SchedulerConfig,
    pub(super) loras: Arc<LoraCache>,
    pub(super) controlnets: Arc<ControlNetCache>,
    pub(super) ip_adapters: Arc<IpAdapterCache>,
    pub(super) upscalers: Arc<UpscalerCache>,
}

impl LoadedModel {
    /// Reads a model from its files onto a device, whatever the options say of that. Takes seconds.
    pub(super) fn load(options: &LoadOptions, device: Device) -> Result<Self> {
        set_threads(options.threads);
        let source = &options.source;
        let dtype = options.precision.resolve(&device)?;
        let index = PipelineIndex::read(source)?;
        let half = dtype == DType::F16;
        let mut files = ReadFiles::default();
        let ReadTexts { texts, embeddings, networks } =
            read_texts(options, &index, (&device, dtype), &mut files)?;
        let unet_source = options.unet.as_ref().unwrap_or(source);
        let weights = unet_source.weights("unet", "diffusion_pytorch_model", half)?;
        let (config, is_own) = unet_config([source, unet_source])?;
        let is_scored = check_texts(&texts, &config, &index)?;
        let unet = UNet2DConditionModel::load(config, &weights, &device, dtype);
        let unet = if is_own { unet? } else { unet.map_err(of_another_shape)? };
        let unet_targets = (weights.lora_targets(), unet.config().layers_per_block);
        let (text_targets, text_prints): (Vec<_>, Vec<_>) = networks.into_iter().unzip();
        let base = reopen([source, unet_source], half, text_prints, files.note(&weights)?);
        let targets = TargetIndex::new(unet_targets, text_targets, base, &device, dtype);
        let vae_source = options.vae.as_ref().unwrap_or(source);
        let vae = read_vae(vae_source, index.is_xl(), &device, dtype, &mut files)?;
        let memory = MemoryEstimate::of(&unet, texts.max_length(), &vae, &device, dtype);
        check_latents(unet.config(), vae.config())?;
        let checked = options.safety.loads_checker(index.has_checker)?;
        let safety_checker = read_checker(source, checked, (&device, dtype), &mut files)?;
        let scheduler = read_scheduler(source, &index, &mut files)?;
        let scale = vae.config().scale();
        let name = options.name.clone().unwrap_or_else(|| name(source));
        let add_ons = options.add_ons.beside(source);
        let sizes = (unet.config(), scale, texts.most_skipped());
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
            text_layers: texts.most_skipped(),
            text_width: texts.width(),
            is_xl: index.is_xl(),
            most_steps: scheduler.most_steps(),
            checked,
            memory,
            add_ons: add_ons.clone(),
            embeddings,
            warnings: files.warnings,
        };
        let loras = AssetCache::new(add_ons.loras.clone(), add_ons.max_lora_bytes);
        let controlnets = ControlNetCache::new(&add_ons, (unet.config(), scale), (&device, dtype));
        let ip_adapters = IpAdapterCache::new(&add_ons, unet.config(), (&device, dtype));
        Ok(Self {
            info,
            upscalers: Arc::new(UpscalerCache::new(&add_ons, &device, dtype)),
            device,
            texts,
            zeros_for_absent: index.zeros_for_absent,
            is_scored,
            unet,
            vae,
            safety_checker,
            scheduler,
            loras: Arc::new(LoraCache { cache: loras, targets }),
            controlnets: Arc::new(controlnets),
            ip_adapters: Arc::new(ip_adapters),
        })
    }
}

impl LoadedModel {
    /// What it takes of that which only Stable Diffusion XL does.
    pub(super) fn taken(&self) -> Taken {
        let sizes = self.unet.config().added.is_some();
        Taken {
            second_prompt: self.texts.second.is_some(),
            sizes,
            target_size: sizes && !self.is_scored,
            score: self.is_scored,
        }
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

/// The safety checker, if images are checked.
fn read_checker(
    source: &Source,
    checked: bool,
    (device, dtype): (&Device, DType),
    files: &mut ReadFiles,
) -> Result<Option<SafetyChecker>> {
    if !checked {
        return Ok(None);
    }
    let half = dtype == DType::F16;
    let weights = advise(source.weights(SAFETY_CHECKER, "model", half), WITHOUT_CHECKER)?;
    let checker = advise(SafetyChecker::load(source, &weights, device, dtype), WITHOUT_CHECKER)?;
    files.note(&weights)?;
    Ok(Some(checker))
}

/// The type of the VAE of a model in this type: that of Stable Diffusion XL overflows in f16, and says
/// so. The pipelines of 1.x and 2.x do not ask.
fn vae_dtype(is_xl: bool, config: &VaeConfig, dtype: DType) -> DType {
    match dtype {
        DType::F16 if is_xl && config.force_upcast => DType::F32,
        dtype => dtype,
    }
}

/// The VAE. That of Stable Diffusion XL is in f32 where its configuration asks for it.
fn read_vae(
    source: &Source,
    is_xl: bool,
    device: &Device,
    dtype: DType,
    files: &mut ReadFiles,
) -> Result<Vae> {
    let advice = "--vae names another VAE";
    // A file with a VAE alone does not tell how its latents are scaled: they are the model's.
    let is_file = matches!(source, Source::Checkpoint(_));
    let (own, other) = if is_xl { (XL_SCALING, SCALING) } else { (SCALING, XL_SCALING) };
    let config = VaeConfig::read_scaled(source, if is_file { own } else { SCALING });
    let config = advise(config, advice)?;
    if is_file && config.scaling_factor == other {
        let (this, models) = if is_xl { ("1.x or 2.x", "XL") } else { ("XL", "1.x or 2.x") };
        let reason = format!(
            "scaling_factor: {other}: this is a VAE of Stable Diffusion {this}, whose latents are \
             not those of a model of {models}"
        );
        return Err(Error::config("vae/config.json", reason));
    }
    if config.latents.is_some() && !is_xl {
        let reason = "latents_mean: is of the pipelines of Stable Diffusion XL only";
        return Err(Error::config("vae/config.json", reason));
    }
    let half = dtype == DType::F16;
    let dtype = vae_dtype(is_xl, &config, dtype);
    let weights = advise(source.weights("vae", "diffusion_pytorch_model", half), advice)?;
    let (source, known) = (source.clone(), fingerprint_of(&weights)?);
    let open = move || open_again(&source, ("vae", "diffusion_pytorch_model"), half, &known);
    let (vae, warning) = Vae::load(config, &weights, device, dtype, Box::new(open))?;
    files.note(&weights)?;
    files.warnings.extend(warning);
    Ok(vae)
}

/// What describes a UNet, in the source of its weights or else in that of the model; and whether it is
/// its own.
fn unet_config([model, own]: [&Source; 2]) -> Result<(UNetConfig, bool)> {
    let is_own = own.read("unet/config.json")?.is_some();
    Ok((UNetConfig::read(if is_own { own } else { model })?, is_own))
}

/// The text encoders, the textual inversion embeddings that were added to them, and by encoder what
/// LoRAs may add to and the fingerprint of its files.
struct ReadTexts {
    texts: TextEncoders,
    embeddings: Embeddings,
    networks: Vec<(LoraTargets, String)>,
}

fn read_texts(
    LoadOptions { source, add_ons, .. }: &LoadOptions,
    index: &PipelineIndex,
    (device, dtype): (&Device, DType),
    files: &mut ReadFiles,
) -> Result<ReadTexts> {
    let mut networks = Vec::new();
    let mut read = |folder: &str, tokenizer: &str| -> Result<TextEncoder> {
        let weights = source.weights(folder, "model", dtype == DType::F16)?;
        let config = ClipTextConfig::read_in(source, folder)?;
        let mut tokenizer =
            ClipTokenizer::load_in(source, tokenizer, config.max_position_embeddings)?;
        files.warnings.extend(tokenizer.limit(config.vocab_size)?);
        let load = match folder == SECOND {
            true => ClipTextModel::load_projected,
            false => ClipTextModel::load,
        };
        let model = load(config, &weights, device, dtype)?;
        networks.push((weights.lora_targets(), files.note(&weights)?));
        Ok(TextEncoder { tokenizer, model })
    };
    let mut first = match index.has_first {
        true => read("text_encoder", "tokenizer")?,
        false => read(SECOND, "tokenizer_2")?,
    };
    let has_second = index.is_xl() && index.has_first;
    let mut second = has_second.then(|| read(SECOND, "tokenizer_2")).transpose()?;
    if !index.has_first {
        // LoRAs know it as the second.
        networks.insert(0, (LoraTargets::default(), String::new()));
    }
    let length = first.tokenizer.max_length();
    if let Some(other) = second.as_ref().map(|second| second.tokenizer.max_length())
        && other != length
    {
        let reason = format!("model_max_length: {other}, but that of tokenizer is {length}");
        return Err(Error::config("tokenizer_2/tokenizer_config.json", reason));
    }
    let width = |encoder: &TextEncoder| encoder.model.config().transformer.hidden_size;
    let widths = match index.has_first {
        true => [Some(width(&first)), second.as_ref().map(width)],
        false => [None, Some(width(&first))],
    };
    let most = add_ons.max_embedding_bytes;
    let (embeddings, vectors) = Embeddings::read(&add_ons.embeddings, most, widths, length - 2)?;
    let encoders = std::iter::once(&mut first).chain(second.as_mut());
    for (encoder, vectors) in encoders.zip(vectors.iter().flatten()) {
        let ids = encoder.model.config().vocab_size;
        encoder.model.add_embeddings(vectors)?;
        encoder.tokenizer.add_placeholders(&embeddings.words, ids);
    }
    Ok(ReadTexts { texts: TextEncoders { first, second }, embeddings, networks })
}

/// Checks that the text encoders are those that the UNet was trained with. Returns whether it takes a
/// score in the place of the target's size.
fn check_texts(texts: &TextEncoders, unet: &UNetConfig, index: &PipelineIndex) -> Result<bool> {
    let refuse = |reason: String| Err(Error::config("unet/config.json", reason));
    let (found, wanted) = (unet.cross_attention_dim, texts.width());
    if found != wanted {
        let of = match texts.second {
            None => "the text encoder's hidden_size is",
            Some(_) => "the text encoders' hidden_size together is",
        };
        return refuse(format!("cross_attention_dim: {found}, but {of} {wanted}"));
    }
    match (unet.added, texts.pooled_width()) {
        (None, None) => Ok(false),
        (Some(_), None) => refuse(
            "addition_embed_type: text_time is of Stable Diffusion XL, which model_index.json does \
             not name"
                .into(),
        ),
        (None, Some(_)) => refuse(
            "addition_embed_type: must be text_time in a model of Stable Diffusion XL".into(),
        ),
        (Some(AddedConfig { size_width, inputs }), Some(pooled)) => {
            let [sizes, scored] = [SIZES, SCORED].map(|count| pooled + count * size_width);
            match inputs {
                _ if inputs == scored => Ok(true),
                _ if inputs == sizes && !index.requires_score => Ok(false),
                _ if inputs == sizes => refuse(format!(
                    "projection_class_embeddings_input_dim: {inputs} is of {SIZES} sizes, but \
                     requires_aesthetics_score of model_index.json asks for a score in the place of \
                     two of them"
                )),
                _ => refuse(format!(
                    "projection_class_embeddings_input_dim: {inputs}; it must be {sizes}, the \
                     projection_dim of text_encoder_2 and {SIZES} sizes, or {scored} of a refiner"
                )),
            }
        }
    }
}

/// Checks that the VAE's latents are those of the UNet.
fn check_latents(unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    let latent = vae.latent_channels;
    let refuse = |key: &str, found: usize| {
        let reason = format!("{key}: {found}, but the VAE's latent_channels is {latent}");
        Err(Error::config("unet/config.json", reason))
    };
    if unet.out_channels != latent {
        return refuse("out_channels", unet.out_channels);
    }
    // Latents alone; for inpainting also a mask and the latents of the masked image.
    if ![latent, 2 * latent + 1].contains(&unet.in_channels) {
        return refuse("in_channels", unet.in_channels);
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
        (unet.as_ref().unwrap_or(source), "unet", "diffusion_pytorch_model"),
        (vae.as_ref().unwrap_or(source), "vae", "diffusion_pytorch_model"),
    ];
    let index = PipelineIndex::read(source)?;
    if index.has_first {
        networks.push((source, "text_encoder", "model"));
    }
    if index.is_xl() {
        networks.push((source, SECOND, "model"));
    }
    if *safety != SafetyMode::Never && index.has_checker {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vae_of_xl_is_wide_where_it_asks_for_it() {
        let asks = VaeConfig::read(&Source::Demo).expect("a configuration");
        let fixed = VaeConfig { force_upcast: false, ..asks.clone() };
        assert!(asks.force_upcast, "the default of its class");
        for (is_xl, config, dtype, wanted) in [
            (true, &asks, DType::F16, DType::F32),
            (true, &asks, DType::BF16, DType::BF16),
            (true, &fixed, DType::F16, DType::F16),
            (false, &asks, DType::F16, DType::F16),
        ] {
            assert_eq!(vae_dtype(is_xl, config, dtype), wanted);
        }
    }
}

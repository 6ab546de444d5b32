//! `sd-server generate`: generates images from one prompt into files, with the engine of the
//! server.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use sd_models::MAX_STEPS;
use serde_json::Value;
use tokio::sync::watch;

use crate::engine::{Engine, EngineConfig, JobError, Progress, Safety};
use crate::image::{self, Format, Origin};
use crate::request::{DrawRequest, Fields, ImageFile, Limits, Names, OneOrMany, ValidationError};
use crate::source::{self, ModelConfig};

/// No limits except the model's own: the user's own machine.
const LIMITS: Limits = Limits {
    max_pixels: usize::MAX,
    max_steps: MAX_STEPS,
    max_images: 1000,
    max_prompt_bytes: usize::MAX,
    max_input_pixels: 1 << 30,
    max_loras: usize::MAX,
    max_controlnets: usize::MAX,
};

/// Rows per UNet call: four guided images.
const MAX_BATCH_ROWS: usize = 8;

/// Configuration of `generate`.
#[derive(Debug)]
pub(crate) struct Generate {
    /// The model.
    pub(crate) model: ModelConfig,
    /// The model that takes the images over, if one does.
    pub(crate) refiner: Option<ModelConfig>,
    /// The action on flagged images.
    pub(crate) safety: Safety,
    /// The fields of the request, as a JSON object.
    pub(crate) fields: Value,
    /// The files that were read.
    pub(crate) inputs: Inputs,
    /// The output file.
    pub(crate) output: PathBuf,
    /// The format, from the extension of the file.
    pub(crate) format: Format,
}

/// The files of the pictures of a command line.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The input image.
    pub(crate) image: Option<Vec<u8>>,
    /// The mask.
    pub(crate) mask: Option<Vec<u8>>,
    /// The control pictures.
    pub(crate) controls: Vec<Vec<u8>>,
    /// The pictures of the IP-Adapters.
    pub(crate) adapters: Vec<Vec<u8>>,
}

pub(crate) async fn run(config: Generate) -> Result<()> {
    let settings = EngineConfig {
        unload_after: None,
        max_queue: LIMITS.max_images,
        max_batch_rows: MAX_BATCH_ROWS,
        // No memory budget except the device's own: the user's own machine.
        memory_budget_bytes: Some(u64::MAX),
        vae_tiling: false,
        safety: config.safety,
    };
    let spinner = ProgressBar::new_spinner().with_message("loading the model");
    spinner.enable_steady_tick(Duration::from_millis(100));
    let engine = Engine::start(settings, move || source::load(config.model))?;
    let model = engine.ready().await?;
    spinner.finish_and_clear();

    let named = |error: ValidationError| error.renamed(option_of_item);
    let mut request = request(config.fields).map_err(named)?;
    if let Some(refiner) = config.refiner {
        let files = tokio::task::spawn_blocking(|| source::locate(refiner)).await?;
        request.refiner_files = Some(files.context("--refiner")?.source);
    }
    config.inputs.add_to(&mut request);
    request.find_ip_adapters(&model.add_ons.ip_adapters)?;
    let seed = getrandom::u32().map_err(|error| anyhow!("no random numbers: {error}"))?;
    let specs = request.specs(&LIMITS, &model, seed.into()).map_err(named)?;
    specs.iter().try_for_each(|spec| request.check_format(spec, config.format))?;
    request.check_files(&specs, &model)?;
    let began = Instant::now();
    let ticket = engine.submit(specs.clone())?;
    let bar = tokio::spawn(show(ticket.progress()));
    let images = ticket.wait().await.map_err(|error| match error {
        JobError::Spec { field, reason } => anyhow!("{} {reason}", request.names.of(field)),
        other => other.into(),
    });
    // The sender of progress is dropped with the tasks, so the bar ends.
    let _ = bar.await;

    let (mut out, hashes) = (std::io::stdout(), image::Hashes::default());
    for (k, (spec, generated)) in specs.iter().zip(&images?).enumerate() {
        let path = numbered(&config.output, k, specs.len());
        let loras = hashes.of(&generated.loras);
        let (name, parameters) = (&model.name, &request.parameters);
        let file = spec.refiner.as_ref().and_then(|refiner| refiner.file());
        let refiner_hash = file.and_then(|file| hashes.whole(&file));
        let controls = &request.control_maps.origins[..];
        let origin = Origin {
            model: name,
            loras: &loras,
            refiner_hash: refiner_hash.as_deref(),
            parameters,
            controls,
            ..Origin::default()
        };
        let infotext = image::infotext(spec, origin);
        let rgb = match &request.overlay {
            Some(overlay) => &overlay.over(&generated.rgb),
            None => &generated.rgb,
        };
        let file = image::encode(rgb, config.format, None, &infotext)?;
        std::fs::write(&path, file).with_context(|| format!("cannot write {}", path.display()))?;
        let own = generated.warnings.iter().map(|warning| request.names.told(warning));
        for warning in request.warnings.iter().cloned().chain(own) {
            tracing::warn!("{warning}");
        }
        writeln!(out, "{} (seed {})", path.display(), spec.seed)?;
    }
    writeln!(out, "{:.1} s", began.elapsed().as_secs_f64())?;
    Ok(())
}

impl Inputs {
    fn add_to(self, request: &mut DrawRequest) {
        let file = |bytes: Vec<u8>| ImageFile::Bytes(bytes.into());
        request.image = self.image.map(file);
        request.mask = self.mask.map(file);
        for (net, bytes) in request.controlnets.iter_mut().flatten().zip(self.controls) {
            net.image = Some(file(bytes));
        }
        let adapters = request.ip_adapter.iter_mut().flat_map(OneOrMany::all_mut);
        for (adapter, bytes) in adapters.zip(self.adapters) {
            adapter.image = Some(OneOrMany::One(file(bytes)));
        }
    }
}

/// The request of these fields, whose errors name the options.
fn request(fields: Value) -> Result<DrawRequest, ValidationError> {
    let (mut read, mut names) = (Fields::default(), Names::default());
    for name in ["image", "mask"] {
        names.insert(name, option(name));
    }
    let Value::Object(fields) = fields else { return DrawRequest::read(read, &LIMITS) };
    for (name, value) in fields {
        names.insert(&name, option(&name));
        read.add(&name, option(&name), value);
    }
    Ok(DrawRequest { names, ..DrawRequest::read(read, &LIMITS)? })
}

/// The option of a field.
fn option(field: &str) -> String {
    match field {
        "prompt" => "the prompt".into(),
        "num_inference_steps" => "--steps".into(),
        "num_images_per_prompt" => "--num-images".into(),
        "loras" => "--lora".into(),
        "controlnets" => "--controlnet".into(),
        other => format!("--{}", other.replace('_', "-")),
    }
}

/// The option of a field of a net, from its name in a list of options: of `--controlnet[1].scale` the
/// second `--control-scale`.
fn option_of_item(name: &str) -> Option<String> {
    let (list, rest) = name.split_once('[')?;
    let (place, field) = rest.split_once("].")?;
    let kind = match list {
        "--controlnet" => "control",
        "--ip-adapter" => "ip",
        _ => return None,
    };
    let option = format!("--{kind}-{}", field.replace('_', "-"));
    Some(match place.parse().unwrap_or(0_usize) {
        0 => option,
        place => format!("{option} number {}", place + 1),
    })
}

/// Shows progress on a terminal until the job ends.
async fn show(mut progress: watch::Receiver<Progress>) {
    let bar = ProgressBar::new(0);
    let template = "{wide_bar} step {pos}/{len} {rate} {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.with_key(
            "rate",
            |state: &ProgressState, text: &mut dyn fmt::Write| {
                let _ = write!(text, "{:.2} it/s", state.per_sec());
            },
        ));
    }
    while progress.changed().await.is_ok() {
        let Progress { completed, total, .. } = *progress.borrow_and_update();
        bar.set_length(total as u64);
        bar.set_position(completed as u64);
    }
    bar.finish_and_clear();
}

/// The path of image `k`: `out.png`, or `out-0.png`, ... if there are several.
fn numbered(path: &Path, k: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.into();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{k}.{extension}"))
}

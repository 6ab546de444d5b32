//! The command line: converts arguments (`args`) and environment (`environment`) into the work of a
//! subcommand. Nothing else reads the arguments.

mod args;
mod bench;
mod controlnets;
mod environment;
mod generate;
mod healthcheck;
mod package;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::parser::ValueSource::DefaultValue;
use clap::{ArgMatches, FromArgMatches as _};
use sd_models::files::IpAdapterFile;
use sd_models::{
    AddOns, AssetDir, DeviceName, FreeBytes, Precision, REAL_ESRGAN, SafetyMode, Upscaler,
};
use serde_json::{Value, json};

use crate::engine::Safety;
use crate::host::{gpu, memory};
use crate::image::Format;
use crate::server::{Serve, listen_and_serve};
use crate::source::{
    Download, ModelConfig, ModelLocation, Parts, is_checkpoint, is_hub_id, wants_half,
};
use crate::telemetry::LogFormat;
use args::{Args, Command, GenerateArgs, ModelArgs, SafetyChecker, ServeArgs};
pub use environment::library_path;
use environment::{
    command, hub, in_words, name_variable, port, read_file, unknown_variables, usage,
    with_trimmed_variables,
};
use generate::{Generate, Inputs};

/// The default model.
const DEFAULT_MODEL: &str = "CompVis/stable-diffusion-v1-4";

/// The directory of SageMaker's model files.
const SAGEMAKER_MODEL: &str = "/opt/ml/model";

/// The configuration of a run.
pub struct Config {
    /// The subcommand.
    pub(crate) action: Action,
    /// The format of the log.
    pub log_format: LogFormat,
    /// The log filter, in the syntax of tracing's `EnvFilter`.
    pub log_filter: String,
    /// What is to be logged first.
    pub(crate) warnings: Vec<String>,
}

/// The work of a subcommand, with its configuration.
pub(crate) type Action = Box<dyn FnOnce() -> anyhow::Result<()>>;

/// Reads the command line and the environment.
pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Config, clap::Error> {
    let args = with_command(args.into_iter().collect());
    let read = command().try_get_matches_from(with_trimmed_variables(args.clone()));
    let mut matches = read.map_err(|error| in_words(name_variable(error, &args)))?;
    let serving = matches.subcommand_matches("serve");
    let is_default = |limit| serving.is_some_and(|m| m.value_source(limit) == Some(DefaultValue));
    let open = ["max_pixels", "max_images"].map(is_default);
    let mut warnings = unknown_variables();
    warnings.extend(unused_revision(&matches));
    let args = Args::from_arg_matches_mut(&mut matches)?;
    let mut log_format = LogFormat::Text;
    let mut log_filter = "warn".to_owned();
    let action: Action = match args.command {
        Command::Serve(serve) => {
            log_format = serve.log.log_format;
            log_filter.clone_from(&serve.log.log);
            let on_gpu = is_gpu(serve.model.device);
            let mut serve = serve.resolve()?;
            if on_gpu {
                serve.http.limits.raise(open);
            }
            Box::new(|| block_on(listen_and_serve(serve)))
        }
        Command::Generate(args) => {
            let generate = args.resolve()?;
            Box::new(|| block_on(generate::run(generate)))
        }
        Command::Download(args) => {
            let half = wants_half(args.device, args.dtype);
            let (id, revision) = (args.model, args.revision);
            let (checking, _) = safety(args.safety_checker);
            let parts = Parts { half, checking, unet: true, vae: true };
            let download = Download { hub: hub()?, id, revision, parts };
            Box::new(move || print(&download.run()?))
        }
        Command::Package(args) => {
            let model = ModelConfig {
                checking: safety(args.safety_checker).0,
                unet: None,
                vae: None,
                location: location(Some(args.model), args.revision)?,
                device: DeviceName::Cpu,
                precision: args.dtype,
                threads: None,
                add_ons: AddOns::default(),
                hub: hub()?,
            };
            let package = args.package;
            package.check().map_err(usage)?;
            Box::new(|| print(&package.run(model)?))
        }
        Command::Bench(args) if args.verify => {
            let model = ModelConfig { checking: SafetyMode::Never, ..args.model.resolve()?.0 };
            let (timing, json) = (args.timing, args.load.json);
            Box::new(move || bench::device::run(model, &timing, json))
        }
        Command::Bench(args) => Box::new(|| block_on(bench::load::run(args.load))),
        Command::Healthcheck(args) => {
            let address = format!("{}:{}", args.host, port(args.port)?);
            Box::new(move || healthcheck::run(&address))
        }
    };
    Ok(Config { action, log_format, log_filter, warnings })
}

/// The warning of a revision beside a model that is no id on the hub.
fn unused_revision(matches: &ArgMatches) -> Option<String> {
    let (_, chosen) = matches.subcommand()?;
    let model = chosen.try_get_one::<String>("model").ok()??;
    let revision = chosen.try_get_one::<String>("revision").ok()??;
    if chosen.value_source("revision") == Some(DefaultValue) {
        return None;
    }
    let found = location(Some(model.clone()), revision.clone()).ok()?;
    let is_hub = matches!(found, ModelLocation::Hub { .. });
    let warning = || format!("--revision {revision} has no effect: {model} is no id on the hub");
    (!is_hub).then(warning)
}

fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // The model thread may be in the middle of a step; it is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    done
}

fn print(path: &Path) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{}", path.display())?)
}

/// Inserts `serve` if no subcommand is given.
fn with_command(mut args: Vec<OsString>) -> Vec<OsString> {
    let asks = ["-h", "--help", "-V", "--version"];
    let bare = args.get(1).is_none_or(|first| {
        let first = first.to_string_lossy();
        first.starts_with('-') && !asks.contains(&first.as_ref())
    });
    if bare {
        args.insert(args.len().min(1), "serve".into());
    }
    args
}

impl ServeArgs {
    fn resolve(self) -> Result<Serve, clap::Error> {
        let Self { mut models, mut engine, host, drain_timeout, http, .. } = self;
        let chosen = self.model.model.is_some();
        let (model, safety) = self.model.resolve()?;
        engine.safety = safety;
        models.drain_timeout = drain_timeout;
        models.unload_after = engine.unload_after.filter(|_| !models.multi_model);
        engine.unload_after = models.unload_after;
        if let Some(folder) = &models.folder {
            if models.multi_model {
                return Err(usage(
                    "--models-dir cannot be used with --multi-model (SAGEMAKER_MULTI_MODEL), in \
                     which SageMaker names the models",
                ));
            }
            readable("--models-dir", folder)?;
        }
        let preload = chosen || !(models.multi_model || models.folder.is_some());
        let port = port(self.port)?;
        if http.access.lock_invocations && http.access.api_keys.is_empty() {
            return Err(usage("--lock-invocations needs --api-key"));
        }
        Ok(Serve { model, preload, models, host, port, http, engine, drain_timeout })
    }
}

impl GenerateArgs {
    /// The file of the upscaler, if one was typed, which is then selected by its name. A built-in
    /// name is none of a file that happens to be in the current directory.
    fn upscaler_file(&mut self) -> Result<Option<PathBuf>, clap::Error> {
        let is_built_in =
            |name: &str| Upscaler::built_in().any(|own| own.eq_ignore_ascii_case(name.trim()));
        let typed = self.hires_upscaler.as_mut().filter(|typed| !is_built_in(typed));
        let file = typed.as_ref().and_then(|typed| std::path::absolute(&**typed).ok());
        let (Some(typed), Some(file)) = (typed, file.filter(|file| file.is_file())) else {
            return Ok(None);
        };
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else { return Ok(None) };
        if is_built_in(name) {
            return Err(usage(format!(
                "--hires-upscaler {typed}: the file is called like an upscaler that is built in; \
                 give it an ending, such as .safetensors"
            )));
        }
        name.clone_into(typed);
        Ok(Some(file))
    }

    fn resolve(mut self) -> Result<Generate, clap::Error> {
        let extension = self.output.extension().unwrap_or_default().to_string_lossy();
        let format = extension.parse::<Format>().map_err(|_| {
            usage(format!("{}: the name must end in .png, .jpg or .webp", self.output.display()))
        })?;
        let directory = self.output.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(missing) = directory.filter(|directory| !directory.is_dir()) {
            return Err(usage(format!("{} is not a directory", missing.display())));
        }
        let (mut files, mut loras): (Vec<PathBuf>, Vec<Value>) = Default::default();
        for (file, name, scale) in self.lora.iter().map(|typed| lora(typed)) {
            // A file is selected by its name, which must be unique.
            let other = |known: &&PathBuf| {
                file.as_ref().is_some_and(|f| f != *known && f.file_stem() == known.file_stem())
            };
            if let Some(other) = files.iter().find(other) {
                return Err(usage(format!("--lora: {} is also named {name}", other.display())));
            }
            files.extend(file);
            loras.push(json!({ "name": name, "scale": scale }));
        }
        let nets = self.nets()?;
        let adapters = self.adapters()?;
        let upscaler = self.upscaler_file()?;
        let mut fields = json!(self);
        fields["loras"] = loras.into();
        fields["controlnets"] = nets.fields.into();
        if !adapters.fields.is_empty() {
            fields["ip_adapter"] = adapters.fields.into();
        }
        let revision = self.model.revision.clone();
        let (mut model, safety) = self.model.resolve()?;
        let refiner = self.refiner.as_ref().map(|typed| named_refiner(typed, revision, &model));
        let refiner = refiner.transpose()?;
        if let Some((name, _)) = &refiner {
            fields["refiner"] = name.as_str().into();
        }
        model.add_ons.loras.files = files;
        model.add_ons.controlnets.files = nets.files;
        model.add_ons.ip_adapters.files = adapters.files;
        model.add_ons.upscalers.files = upscaler.into_iter().collect();
        let image = self.image.as_deref().map(read_file).transpose()?;
        let mask = self.mask.as_deref().map(read_file).transpose()?;
        let inputs = Inputs { image, mask, controls: nets.pictures, adapters: adapters.pictures };
        let refiner = refiner.map(|(_, refiner)| refiner);
        Ok(Generate { model, refiner, safety, fields, inputs, output: self.output, format })
    }
}

/// A refiner and its name: that of its file or directory, or its id on the hub.
fn named_refiner(
    typed: &str,
    revision: String,
    model: &ModelConfig,
) -> Result<(String, ModelConfig), clap::Error> {
    let location = location_of("--refiner", typed.to_owned(), revision)?;
    let path = Path::new(typed);
    let name = match location {
        ModelLocation::Directory(_) => path.file_name(),
        ModelLocation::Checkpoint(_) => path.file_stem(),
        _ => None,
    };
    let name = name.map_or(typed.into(), |name| name.to_string_lossy().into_owned());
    let (unet, vae) = (None, None);
    Ok((name, ModelConfig { location, unet, vae, ..model.clone() }))
}

impl ModelArgs {
    fn resolve(self) -> Result<(ModelConfig, Safety), clap::Error> {
        let (checking, safety) = safety(self.safety_checker);
        check_device(self.device, self.dtype)?;
        let model = ModelConfig {
            checking,
            location: location(self.model, self.revision)?,
            unet: self.unet.map(unet).transpose()?,
            vae: self.vae.map(|vae| vae_location(&vae)).transpose()?,
            device: self.device,
            precision: self.dtype,
            threads: self.threads,
            add_ons: AddOns {
                loras: assets(
                    "--loras-dir",
                    self.loras_dir,
                    &["safetensors", "gguf", "pt", "ckpt", "bin"],
                )?,
                max_lora_bytes: self.max_lora_bytes as u64,
                controlnets: AssetDir {
                    folders: true,
                    ..assets(
                        "--controlnets-dir",
                        self.controlnets_dir,
                        &["safetensors", "pth", "pt", "ckpt", "bin"],
                    )?
                },
                max_controlnet_bytes: self.max_controlnet_bytes as u64,
                ip_adapters: AssetDir {
                    skipped: IpAdapterFile::ENCODER_FOLDERS,
                    ..assets(
                        "--ip-adapters-dir",
                        self.ip_adapters_dir,
                        &["safetensors", "bin", "pth", "pt"],
                    )?
                },
                max_ip_adapter_bytes: self.max_ip_adapter_bytes as u64,
                upscalers: AssetDir {
                    titles: REAL_ESRGAN,
                    ..assets("--upscalers-dir", self.upscalers_dir, &["safetensors", "pth", "pt"])?
                },
                max_upscaler_bytes: self.max_upscaler_bytes as u64,
                max_refiner_bytes: self.max_refiner_bytes as u64,
                free_host_bytes: (!is_gpu(self.device)).then_some(FreeBytes(memory::available)),
                embeddings: assets(
                    "--embeddings-dir",
                    self.embeddings_dir,
                    &["safetensors", "pt", "bin", "ckpt", "png"],
                )?,
                max_embedding_bytes: self.max_embedding_bytes as u64,
            },
            hub: hub()?,
        };
        Ok((model, safety))
    }
}

/// Whether a device is a GPU, as far as that is known before a model is loaded.
fn is_gpu(device: DeviceName) -> bool {
    match device {
        _ if !cfg!(feature = "cuda") => false,
        DeviceName::Cpu => false,
        DeviceName::Cuda(_) => true,
        DeviceName::Auto => !gpu::read().is_empty(),
    }
}

/// Checks that a device can compute in a type, as far as that is known without a GPU: it is opened
/// when a model is loaded.
fn check_device(device: DeviceName, dtype: Precision) -> Result<(), clap::Error> {
    if cfg!(feature = "cuda") && device != DeviceName::Cpu {
        return Ok(());
    }
    let checked = device.open().and_then(|opened| dtype.resolve(&opened));
    checked.map(drop).map_err(|error| {
        usage(format!("--device {device} (SD_DEVICE) with --dtype {dtype} (SD_DTYPE): {error}"))
    })
}

/// Whether a checker is loaded, and the action on flagged images. The default is to blur: the
/// checker has false positives, the other images of the request are still returned, and every API
/// has a field for an image.
fn safety(typed: Option<SafetyChecker>) -> (SafetyMode, Safety) {
    match typed {
        None => (SafetyMode::IfPresent, Safety::Blur),
        Some(SafetyChecker::Off) => (SafetyMode::Never, Safety::Flag),
        Some(SafetyChecker::Flag) => (SafetyMode::Required, Safety::Flag),
        Some(SafetyChecker::Blur) => (SafetyMode::Required, Safety::Blur),
        Some(SafetyChecker::Block) => (SafetyMode::Required, Safety::Block),
    }
}

fn location(typed: Option<String>, revision: String) -> Result<ModelLocation, clap::Error> {
    let Some(model) = typed else {
        let mounted = Path::new(SAGEMAKER_MODEL);
        let has_files = mounted.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        return Ok(if has_files {
            ModelLocation::Directory(mounted.into())
        } else {
            ModelLocation::Hub { id: DEFAULT_MODEL.into(), revision }
        });
    };
    location_of("--model", model, revision)
}

/// The location of a model that an option names.
fn location_of(
    option: &str,
    model: String,
    revision: String,
) -> Result<ModelLocation, clap::Error> {
    match model.as_str() {
        "demo" => return Ok(ModelLocation::Demo),
        "demo-lcm" => return Ok(ModelLocation::DemoLcm),
        _ => {}
    }
    if Path::new(&model).is_dir() {
        return Ok(ModelLocation::Directory(model.into()));
    }
    if is_checkpoint(Path::new(&model)) {
        return Ok(ModelLocation::Checkpoint(model.into()));
    }
    if is_hub_id(&model) {
        return Ok(ModelLocation::Hub { id: model, revision });
    }
    Err(usage(format!(
        "{option} {model}: neither `demo`, `demo-lcm`, nor a directory, nor a .safetensors, .gguf or .ckpt file, nor an id on the hub"
    )))
}

fn vae_location(vae: &str) -> Result<ModelLocation, clap::Error> {
    let path = Path::new(vae);
    let has_config = |name: &str| path.join(name).is_file();
    if is_checkpoint(path) {
        return Ok(ModelLocation::Checkpoint(path.into()));
    }
    if has_config("vae/config.json") || has_config("config.json") {
        return Ok(ModelLocation::Directory(path.into()));
    }
    if is_hub_id(vae) && !path.exists() {
        return Ok(ModelLocation::Hub { id: vae.into(), revision: "main".into() });
    }
    Err(usage(format!(
        "--vae {vae}: neither a .safetensors or .ckpt file, nor a directory with config.json or vae/, \
         nor an id on the hub"
    )))
}

/// The UNet of an option: a file, its folder in the Diffusers format, or a directory with that.
fn unet(path: PathBuf) -> Result<PathBuf, clap::Error> {
    let has_config = |name: &str| path.join(name).is_file();
    if has_config("config.json") || has_config("unet/config.json") || is_checkpoint(&path) {
        return Ok(path);
    }
    let path = path.display();
    Err(usage(format!(
        "--unet {path}: neither a .safetensors, .gguf or .ckpt file nor a directory with config.json"
    )))
}

/// The files in the directory of an option, which must be readable.
fn assets(
    option: &str,
    directory: Option<PathBuf>,
    endings: &'static [&'static str],
) -> Result<AssetDir, clap::Error> {
    directory.as_deref().map_or(Ok(()), |directory| readable(option, directory))?;
    Ok(AssetDir { directory, endings, ..AssetDir::default() })
}

/// Checks that the directory of an option can be read.
fn readable(option: &str, directory: &Path) -> Result<(), clap::Error> {
    let read = directory.read_dir().map(drop);
    read.map_err(|error| {
        let directory = directory.display();
        usage(format!("{option} {directory} cannot be read as a directory: {error}"))
    })
}

/// Parses `name`, `name:0.8`, `file` or `file:0.8` into file, name and scale.
fn lora(typed: &str) -> (Option<PathBuf>, String, f64) {
    let scaled = typed.rsplit_once(':').and_then(|(name, scale)| Some((name, scale.parse().ok()?)));
    let (name, scale) = scaled.unwrap_or((typed, 1.0));
    let path = Path::new(name);
    match path.file_stem().filter(|_| path.is_file()) {
        Some(stem) => (Some(path.into()), stem.to_string_lossy().into_owned(), scale),
        None => (None, name.into(), scale),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn serve_is_the_command_when_there_is_none() {
        let words = |line: &str| -> Vec<OsString> { line.split(' ').map(Into::into).collect() };
        let table = [
            ("sd-server", "sd-server serve"),
            ("sd-server serve", "sd-server serve"),
            ("sd-server --port 1", "sd-server serve --port 1"),
            ("sd-server --help", "sd-server --help"),
            ("sd-server train", "sd-server train"),
        ];
        for (typed, understood) in table {
            assert_eq!(with_command(words(typed)), words(understood));
        }
    }

    #[test]
    fn hub_ids_are_owner_and_name() {
        assert!(is_hub_id("CompVis/stable-diffusion-v1-4"));
        for other in ["demo2", "/opt/model", "./model", "a/b/c", "a b/c", "/", "../x"] {
            assert!(!is_hub_id(other), "{other}");
        }
    }
}

//! What was typed ([`Args`], private) and what is needed ([`Config`]). The only reader of the
//! environment and of the arguments.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand};
use sd_models::{DeviceName, MAX_STEPS, Precision, Scheduler};

use crate::api::Limits;
use crate::hub::{Download, Hub};
use crate::image::Format;
use crate::telemetry::LogFormat;
use crate::{engine, http};

/// The model when nothing else is said.
const DEFAULT_MODEL: &str = "CompVis/stable-diffusion-v1-4";
/// Where SageMaker puts the files of a model.
const SAGEMAKER_MODEL: &str = "/opt/ml/model";
const DEFAULT_PORT: u16 = 8080;

/// Everything that a run needs to know.
#[derive(Debug)]
pub struct Config {
    /// What to do.
    pub action: Action,
    /// The look of the log.
    pub log_format: LogFormat,
    /// Which events are logged, in the syntax of tracing's `EnvFilter`.
    pub log_filter: String,
}

/// One subcommand with its settings.
#[derive(Debug)]
pub enum Action {
    /// Answer HTTP requests.
    Serve(Box<Serve>),
    /// Draw one prompt into files.
    Generate(Box<Generate>),
    /// Fetch a model from the hub.
    Download(Box<Download>),
    /// Ask a running server whether it is ready.
    Healthcheck {
        /// Host and port.
        address: String,
    },
}

/// Settings of `serve`.
#[derive(Debug)]
pub struct Serve {
    /// The model.
    pub model: Model,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// Bounds of the HTTP side.
    pub http: http::Settings,
    /// Bounds of the engine.
    pub engine: engine::Settings,
    /// From SIGTERM to giving up what is not finished.
    pub drain_timeout: Duration,
}

/// Settings of `generate`.
#[derive(Debug)]
pub struct Generate {
    /// The model.
    pub model: Model,
    /// The request's fields under their names on the wire.
    pub fields: Vec<(String, String)>,
    /// Where the picture goes.
    pub output: PathBuf,
    /// The format that the file's extension stands for.
    pub format: Format,
}

/// A model, where it runs and where it may come from.
#[derive(Debug, Clone)]
pub struct Model {
    /// Which model.
    pub place: Place,
    /// The device.
    pub device: DeviceName,
    /// The numbers it computes in.
    pub precision: Precision,
    /// CPU threads; all cores when absent.
    pub threads: Option<usize>,
    /// The hub and its cache.
    pub hub: Hub,
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In this binary.
    Demo,
    /// In a directory in the diffusers layout, or one level below it.
    Directory(PathBuf),
    /// On the hub or in its cache.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

/// A native Stable Diffusion server: SageMaker, curl and the command line on one binary.
#[derive(Debug, Parser)]
#[command(
    name = "sd-server",
    version,
    max_term_width = 100,
    after_help = "Without a command, sd-server serves: `sd-server --model demo` is `sd-server \
                  serve --model demo`.\nEvery option can also be set in the environment: \
                  --max-steps is SD_MAX_STEPS."
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer HTTP requests (the default command)
    Serve(Box<ServeArgs>),
    /// Draw a prompt into an image file
    Generate(Box<GenerateArgs>),
    /// Fetch a model from the hub into the local cache
    Download(Box<DownloadArgs>),
    /// Exit with 0 if a server on this host is ready, for Docker's HEALTHCHECK
    Healthcheck(Box<HealthcheckArgs>),
}

#[derive(Debug, clap::Args)]
struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    log: LogArgs,
    /// Write prompts to the log; without this nothing that a user typed appears there
    #[arg(long, env = "SD_LOG_PROMPTS", value_parser = FalseyValueParser::new(), help_heading = "Log")]
    log_prompts: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
struct ModelArgs {
    /// `demo` (built in), a directory in the diffusers layout, or a hub id such as owner/name.
    /// When absent: /opt/ml/model if it has files, else CompVis/stable-diffusion-v1-4
    #[arg(long, env = "SD_MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a model on the hub
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    revision: String,
    /// auto, cpu, cuda or cuda:N; auto takes the first GPU if there is one
    #[arg(long, env = "SD_DEVICE", default_value = "auto", value_parser = parse::<DeviceName>)]
    device: DeviceName,
    /// auto, f16, bf16 or f32; auto is f16 on a GPU and f32 on the CPU
    #[arg(long, env = "SD_DTYPE", default_value = "auto", value_parser = parse::<Precision>)]
    dtype: Precision,
    /// CPU threads for the model; all cores when absent
    #[arg(long, env = "SD_THREADS", value_parser = at_least::<1>)]
    threads: Option<usize>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Address to listen on
    #[arg(long, env = "SD_HOST", default_value = "0.0.0.0")]
    host: String,
    /// Port to listen on; 0 picks a free one, which the first line of output names.
    /// When absent: SAGEMAKER_BIND_TO_PORT, else SD_PORT, else 8080
    #[arg(long)]
    port: Option<u16>,
    /// A request that is not answered after this is given up and answered with 504. SageMaker
    /// hangs up after 60 s; asynchronous endpoints may wait up to an hour
    #[arg(long, env = "SD_REQUEST_TIMEOUT_MS", default_value = "58000", value_parser = at_least::<1>)]
    request_timeout_ms: usize,
    /// After SIGTERM, what is not finished by then is answered with 503. SageMaker kills the
    /// process 30 s after SIGTERM
    #[arg(long, env = "SD_DRAIN_TIMEOUT_MS", default_value = "25000", value_parser = at_least::<0>)]
    drain_timeout_ms: usize,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Largest width x height of a picture; memory and time grow with it
    #[arg(long, env = "SD_MAX_PIXELS", default_value = "1048576", value_parser = at_least::<64>)]
    max_pixels: usize,
    /// Most sampler steps of a picture
    #[arg(long, env = "SD_MAX_STEPS", default_value = "150", value_parser = at_least::<1>)]
    max_steps: usize,
    /// Most pictures of one request
    #[arg(long, env = "SD_MAX_IMAGES", default_value = "8", value_parser = at_least::<1>)]
    max_images: usize,
    /// Longest prompt; the model reads 77 tokens in any case
    #[arg(long, env = "SD_MAX_PROMPT_BYTES", default_value = "16384", value_parser = at_least::<1>)]
    max_prompt_bytes: usize,
    /// Largest request body
    #[arg(long, env = "SD_MAX_BODY_BYTES", default_value = "26214400", value_parser = at_least::<1>)]
    max_body_bytes: usize,
    /// Pictures that may wait for their turn; beyond it requests are answered with 429
    #[arg(long, env = "SD_MAX_QUEUE", default_value = "64", value_parser = at_least::<1>)]
    max_queue: usize,
    /// Requests in service, waiting ones included; beyond it they are answered with 429 unread
    #[arg(long, env = "SD_MAX_REQUESTS", default_value = "256", value_parser = at_least::<1>)]
    max_requests: usize,
    /// Rows that share one evaluation of the UNet: a picture takes two, or one without guidance.
    /// More rows mean more pictures a second, later first pictures and more memory
    #[arg(long, env = "SD_MAX_BATCH_ROWS", default_value = "8", value_parser = at_least::<2>)]
    max_batch_rows: usize,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
struct LogArgs {
    /// text for people, json for log collectors; both go to standard error
    #[arg(long, env = "SD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as sd_server=debug
    #[arg(long, env = "SD_LOG", default_value = "info")]
    log: String,
}

#[derive(Debug, clap::Args)]
struct GenerateArgs {
    /// What the picture shows
    prompt: String,
    /// The file: .png, .jpg or .webp; several pictures become out-0.png, out-1.png, ...
    #[arg(short, long, default_value = "out.png")]
    output: PathBuf,
    /// What the picture should not show
    #[arg(long)]
    negative_prompt: Option<String>,
    /// Width in pixels, a multiple of 8; the model's own size when absent
    #[arg(short = 'W', long)]
    width: Option<u64>,
    /// Height in pixels, a multiple of 8; the model's own size when absent
    #[arg(short = 'H', long)]
    height: Option<u64>,
    /// Sampler steps; more are slower and, up to a point, better
    #[arg(long)]
    steps: Option<u64>,
    /// How closely to follow the prompt; 1 or less is twice as fast and ignores --negative-prompt
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// pndm, ddim, ddpm, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_karras, unipc or lcm
    #[arg(long, value_parser = parse::<Scheduler>)]
    scheduler: Option<Scheduler>,
    /// The same seed gives the same picture; random when absent
    #[arg(long)]
    seed: Option<u64>,
    /// How many pictures; picture k uses seed + k
    #[arg(short = 'n', long)]
    num_images: Option<u64>,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, clap::Args)]
struct DownloadArgs {
    /// The hub id: owner/name
    model: String,
    /// Branch, tag or commit
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    revision: String,
    /// Fetch the smaller f16 weights for this device if there are any
    #[arg(long, env = "SD_DEVICE", default_value = "auto", value_parser = parse::<DeviceName>)]
    device: DeviceName,
    /// Fetch the smaller f16 weights for f16 if there are any
    #[arg(long, env = "SD_DTYPE", default_value = "auto", value_parser = parse::<Precision>)]
    dtype: Precision,
}

#[derive(Debug, clap::Args)]
struct HealthcheckArgs {
    /// Host of the server
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port of the server; found as `serve` finds it
    #[arg(long)]
    port: Option<u16>,
}

/// Reads the command line and the environment.
pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Config, clap::Error> {
    let args = Args::try_parse_from(with_command(args.into_iter().collect()))?;
    let mut log_format = LogFormat::Text;
    let mut log_filter = "warn".to_owned();
    let action = match args.command {
        Command::Serve(serve) => {
            log_format = serve.log.log_format;
            log_filter.clone_from(&serve.log.log);
            Action::Serve(Box::new(serve.resolve()?))
        }
        Command::Generate(generate) => Action::Generate(Box::new(generate.resolve()?)),
        Command::Download(args) => {
            let half = wants_half(args.device, args.dtype);
            let (id, revision) = (args.model, args.revision);
            Action::Download(Box::new(Download { hub: hub()?, id, revision, half }))
        }
        Command::Healthcheck(args) => {
            Action::Healthcheck { address: format!("{}:{}", args.host, port(args.port)?) }
        }
    };
    Ok(Config { action, log_format, log_filter })
}

/// `serve` is understood where no command is given.
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
        let Self { network, limits, .. } = self;
        Ok(Serve {
            port: port(network.port)?,
            host: network.host,
            http: http::Settings {
                limits: Limits {
                    max_pixels: limits.max_pixels,
                    max_steps: limits.max_steps.min(MAX_STEPS),
                    max_images: limits.max_images,
                    max_prompt_bytes: limits.max_prompt_bytes,
                },
                max_body_bytes: limits.max_body_bytes,
                max_requests: limits.max_requests,
                request_timeout: Duration::from_millis(network.request_timeout_ms as u64),
                log_prompts: self.log_prompts,
            },
            engine: engine::Settings {
                max_queue: limits.max_queue,
                max_batch_rows: limits.max_batch_rows,
            },
            drain_timeout: Duration::from_millis(network.drain_timeout_ms as u64),
            model: self.model.resolve()?,
        })
    }
}

impl GenerateArgs {
    fn resolve(self) -> Result<Generate, clap::Error> {
        let extension = self.output.extension().unwrap_or_default().to_string_lossy();
        let format = extension.parse::<Format>().map_err(|_| {
            usage(format!("{}: the name must end in .png, .jpg or .webp", self.output.display()))
        })?;
        let directory = self.output.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(missing) = directory.filter(|directory| !directory.is_dir()) {
            return Err(usage(format!("{} is not a directory", missing.display())));
        }
        let text = |value: Option<&dyn fmt::Display>| value.map(ToString::to_string);
        let fields = [
            ("prompt", Some(self.prompt)),
            ("negative_prompt", self.negative_prompt),
            ("width", text(self.width.as_ref().map(|v| v as _))),
            ("height", text(self.height.as_ref().map(|v| v as _))),
            ("steps", text(self.steps.as_ref().map(|v| v as _))),
            ("guidance_scale", text(self.guidance_scale.as_ref().map(|v| v as _))),
            ("scheduler", text(self.scheduler.as_ref().map(|v| v as _))),
            ("seed", text(self.seed.as_ref().map(|v| v as _))),
            ("n", text(self.num_images.as_ref().map(|v| v as _))),
        ];
        let fields = fields
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect();
        Ok(Generate { model: self.model.resolve()?, fields, output: self.output, format })
    }
}

impl ModelArgs {
    fn resolve(self) -> Result<Model, clap::Error> {
        Ok(Model {
            place: place(self.model, self.revision)?,
            device: self.device,
            precision: self.dtype,
            threads: self.threads,
            hub: hub()?,
        })
    }
}

impl Model {
    /// Whether f16 files will do.
    pub fn half(&self) -> bool {
        wants_half(self.device, self.precision)
    }
}

fn wants_half(device: DeviceName, precision: Precision) -> bool {
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

fn place(typed: Option<String>, revision: String) -> Result<Place, clap::Error> {
    let Some(model) = typed else {
        let mounted = Path::new(SAGEMAKER_MODEL);
        let has_files = mounted.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        return Ok(if has_files {
            Place::Directory(mounted.into())
        } else {
            Place::Hub { id: DEFAULT_MODEL.into(), revision }
        });
    };
    if model == "demo" {
        return Ok(Place::Demo);
    }
    if Path::new(&model).is_dir() {
        return Ok(Place::Directory(model.into()));
    }
    if is_hub_id(&model) {
        return Ok(Place::Hub { id: model, revision });
    }
    Err(usage(format!("--model {model}: neither `demo`, nor a directory, nor an id on the hub")))
}

/// `owner/name` in the characters that the hub allows.
fn is_hub_id(text: &str) -> bool {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(owner, name)| word(owner) && word(name))
}

/// `--port`, else SageMaker's variable, else our own.
fn port(typed: Option<u16>) -> Result<u16, clap::Error> {
    if let Some(port) = typed {
        return Ok(port);
    }
    for name in ["SAGEMAKER_BIND_TO_PORT", "SD_PORT"] {
        if let Some(value) = variable(name) {
            let parsed = value.trim().parse();
            return parsed.map_err(|_| usage(format!("{name}={value} is not a port")));
        }
    }
    Ok(DEFAULT_PORT)
}

/// The hub as the Python libraries would find it.
fn hub() -> Result<Hub, clap::Error> {
    let home = || variable("HOME").map(|home| Path::new(&home).join(".cache/huggingface"));
    let root = variable("HF_HOME").map(PathBuf::from).or_else(home);
    let cache = variable("HF_HUB_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| root.as_ref().map(|root| root.join("hub")));
    let switched_on = |value: String| ["1", "true", "yes", "on"].contains(&&*value.to_lowercase());
    let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    Ok(Hub {
        // Without a home, as in some containers, what is fetched lasts as long as the container.
        cache: cache.unwrap_or_else(|| std::env::temp_dir().join("huggingface/hub")),
        endpoint: endpoint.trim_end_matches('/').to_owned(),
        token: variable("HF_TOKEN"),
        offline: variable("HF_HUB_OFFLINE").is_some_and(switched_on),
    })
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn parse<T: std::str::FromStr<Err = String>>(text: &str) -> Result<T, String> {
    text.parse()
}

fn at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= LEAST => Ok(number),
        _ => Err(format!("must be a whole number of at least {LEAST}")),
    }
}

fn usage(message: impl fmt::Display) -> clap::Error {
    Args::command().error(ErrorKind::ValueValidation, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
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

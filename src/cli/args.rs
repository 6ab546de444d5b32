//! What may be typed: the command line and its help, whose words explain consequences. What is
//! made of it is in the parent module.

use std::path::PathBuf;

use axum::http::HeaderValue;
use clap::builder::FalseyValueParser;
use clap::{Parser, Subcommand};
use sd_models::{DeviceName, Precision, SamplerName, Size};

use crate::http::ApiKey;
use crate::telemetry::LogFormat;

use super::package::Layout;

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
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Answer HTTP requests (the default command)
    Serve(Box<ServeArgs>),
    /// Draw a prompt into an image file
    Generate(Box<GenerateArgs>),
    /// Fetch a model from the hub into the local cache
    Download(Box<DownloadArgs>),
    /// Put a model's files into a model.tar.gz for SageMaker
    Package(Box<PackageArgs>),
    /// Put load on a running server and report latency and throughput
    Bench(Box<BenchArgs>),
    /// Exit with 0 if a server on this host is ready, for Docker's HEALTHCHECK
    Healthcheck(Box<HealthcheckArgs>),
}

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) models: ModelsArgs,
    #[command(flatten)]
    pub(super) network: NetworkArgs,
    #[command(flatten)]
    pub(super) access: AccessArgs,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
    /// Write prompts to the log; without this nothing that a user typed appears there
    #[arg(
        long,
        env = "SD_LOG_PROMPTS",
        value_parser = FalseyValueParser::new(),
        help_heading = "Log",
    )]
    pub(super) log_prompts: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArgs {
    /// `demo` (built in), a directory in the diffusers layout, a single checkpoint file
    /// (.safetensors, .ckpt), or a hub id such as owner/name.
    /// When absent: /opt/ml/model if it has files, else CompVis/stable-diffusion-v1-4
    #[arg(long, env = "SD_MODEL")]
    pub(super) model: Option<String>,
    /// A VAE in place of the model's own: a single file, or a directory that has vae/
    #[arg(long, env = "SD_VAE")]
    pub(super) vae: Option<PathBuf>,
    /// A folder of LoRAs (.safetensors of kohya's scripts, diffusers or PEFT) that requests can name
    /// by their files' names. They are read when they are asked for
    #[arg(long, env = "SD_LORAS_DIR")]
    pub(super) loras_dir: Option<PathBuf>,
    /// Memory that LoRAs may keep, for each model; beyond it the one used longest ago is read again
    /// when it is asked for
    #[arg(
        long,
        env = "SD_MAX_LORA_BYTES",
        default_value = "536870912",
        value_parser = at_least::<0>,
    )]
    pub(super) max_lora_bytes: usize,
    /// A folder of textual inversion embeddings (.safetensors, .pt, .bin of AUTOMATIC1111 or
    /// diffusers), read with the model: in a prompt a file's name, or the word in it, stands for
    /// its vectors
    #[arg(long, env = "SD_EMBEDDINGS_DIR")]
    pub(super) embeddings_dir: Option<PathBuf>,
    /// Memory that embeddings may take, for each model; files beyond it are left out, with a warning
    #[arg(
        long,
        env = "SD_MAX_EMBEDDING_BYTES",
        default_value = "67108864",
        value_parser = at_least::<0>,
    )]
    pub(super) max_embedding_bytes: usize,
    /// Branch, tag or commit of a model on the hub
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
    /// auto, cpu, cuda or cuda:N; auto takes the first GPU if there is one
    #[arg(long, env = "SD_DEVICE", default_value = "auto", value_parser = parse::<DeviceName>)]
    pub(super) device: DeviceName,
    /// auto, f16, bf16 or f32; auto is f16 on a GPU, bf16 on a CPU with
    /// AMX or AVX512-BF16, else f32
    #[arg(long, env = "SD_DTYPE", default_value = "auto", value_parser = parse::<Precision>)]
    pub(super) dtype: Precision,
    /// What becomes of a picture that the model's safety checker objects to. When absent: blur, if
    /// the model has a checker. When given, models that have none are refused
    #[arg(long, env = "SD_SAFETY_CHECKER")]
    pub(super) safety_checker: Option<SafetyChecker>,
    /// CPU threads for the model; all cores when absent
    #[arg(long, env = "SD_THREADS", value_parser = at_least::<1>)]
    pub(super) threads: Option<usize>,
}

/// What becomes of a picture that should not be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum SafetyChecker {
    /// Nothing: no checker is loaded
    Off,
    /// The client is told, and gets it
    Flag,
    /// The client is told, and gets it unrecognisable
    Blur,
    /// The request is answered with an error
    Block,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Several models")]
pub(super) struct ModelsArgs {
    /// A folder whose directories and single files are models that requests can name. They are loaded when they are
    /// asked for; the one that has not been used for longest makes room. The model of --model
    /// stays; without it none is loaded at the start
    #[arg(long, env = "SD_MODELS_DIR")]
    pub(super) models_dir: Option<PathBuf>,
    /// Models are loaded and unloaded by SageMaker, through /models
    #[arg(long, env = "SAGEMAKER_MULTI_MODEL", value_parser = FalseyValueParser::new())]
    pub(super) multi_model: bool,
    /// Models that may be loaded by name; beyond it one must go first, or SageMaker hears 507
    #[arg(long, env = "SD_MAX_MODELS", default_value = "8", value_parser = at_least::<1>)]
    pub(super) max_models: usize,
    /// Memory that the weights of these models may take. When absent: what is free (on a GPU: no
    /// bound but the device's own)
    #[arg(long, env = "SD_MODELS_MEMORY_BYTES", value_parser = at_least::<1>)]
    pub(super) models_memory_bytes: Option<usize>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub(super) struct NetworkArgs {
    /// Address to listen on
    #[arg(long, env = "SD_HOST", default_value = "0.0.0.0")]
    pub(super) host: String,
    /// Port to listen on; 0 picks a free one, which the first line of output names.
    /// When absent: SAGEMAKER_BIND_TO_PORT, else SD_PORT, else 8080
    #[arg(long)]
    pub(super) port: Option<u16>,
    /// A request that is not answered after this is given up and answered with 504; the header
    /// x-request-timeout-ms can ask for less. SageMaker hangs up after 60 s; asynchronous
    /// endpoints may wait up to an hour (3600000)
    #[arg(
        long,
        env = "SD_REQUEST_TIMEOUT_MS",
        default_value = "58000",
        value_parser = at_least::<1>,
    )]
    pub(super) request_timeout_ms: usize,
    /// The same for an answer that is a stream of events, in which something happens all the time.
    /// SageMaker allows a stream 8 minutes
    #[arg(
        long,
        env = "SD_STREAM_TIMEOUT_MS",
        default_value = "470000",
        value_parser = at_least::<1>,
    )]
    pub(super) stream_timeout_ms: usize,
    /// After SIGTERM, what is not finished by then is answered with 503. SageMaker kills the
    /// process 30 s after SIGTERM
    #[arg(long, env = "SD_DRAIN_TIMEOUT_MS", default_value = "25000", value_parser = at_least::<0>)]
    pub(super) drain_timeout_ms: usize,
    /// A connection on which the head of a request does not arrive for so long is closed
    #[arg(long, env = "SD_IDLE_TIMEOUT_MS", default_value = "75000", value_parser = at_least::<1>)]
    pub(super) idle_timeout_ms: usize,
    /// Open connections; beyond it new ones wait until one is closed
    #[arg(long, env = "SD_MAX_CONNECTIONS", default_value = "1024", value_parser = at_least::<1>)]
    pub(super) max_connections: usize,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Access")]
pub(super) struct AccessArgs {
    /// A key that opens /v1 and /sdapi; several are separated by commas. With any, these routes and
    /// the page answer 401 without one; /ping, /invocations and /metrics stay open, since
    /// SageMaker checks its callers itself: do not show them to the world
    #[arg(long, env = "SD_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub(super) api_key: Vec<ApiKey>,
    /// A web origin (https://example.org) whose pages may call from a browser, or * for all;
    /// several are separated by commas. Without any, browsers let only our own page call
    #[arg(long, env = "SD_CORS_ORIGIN", value_delimiter = ',', value_parser = origin)]
    pub(super) cors_origin: Vec<HeaderValue>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Largest width x height of a picture; memory and time grow with it
    #[arg(long, env = "SD_MAX_PIXELS", default_value = "1048576", value_parser = at_least::<64>)]
    pub(super) max_pixels: usize,
    /// Most sampler steps of a picture
    #[arg(long, env = "SD_MAX_STEPS", default_value = "150", value_parser = at_least::<1>)]
    pub(super) max_steps: usize,
    /// Most pictures of one request
    #[arg(long, env = "SD_MAX_IMAGES", default_value = "8", value_parser = at_least::<1>)]
    pub(super) max_images: usize,
    /// Longest prompt; the model reads 77 tokens of it, or eight times as many in a1111's syntax
    #[arg(long, env = "SD_MAX_PROMPT_BYTES", default_value = "16384", value_parser = at_least::<1>)]
    pub(super) max_prompt_bytes: usize,
    /// Largest width x height of a picture that comes in; it is decoded before it is resized
    #[arg(
        long,
        env = "SD_MAX_INPUT_PIXELS",
        default_value = "33554432",
        value_parser = at_least::<64>,
    )]
    pub(super) max_input_pixels: usize,
    /// Most LoRAs of a picture; each costs time
    #[arg(long, env = "SD_MAX_LORAS", default_value = "8", value_parser = at_least::<0>)]
    pub(super) max_loras: usize,
    /// Largest request body
    #[arg(
        long,
        env = "SD_MAX_BODY_BYTES",
        default_value = "26214400",
        value_parser = at_least::<1>,
    )]
    pub(super) max_body_bytes: usize,
    /// Pictures that may wait for their turn; beyond it requests are answered with 429. When the
    /// queue is full, the client with most of it makes room for one with less
    #[arg(long, env = "SD_MAX_QUEUE", default_value = "64", value_parser = at_least::<1>)]
    pub(super) max_queue: usize,
    /// Requests in service, waiting ones included; beyond it they are answered with 429 unread
    #[arg(long, env = "SD_MAX_REQUESTS", default_value = "256", value_parser = at_least::<1>)]
    pub(super) max_requests: usize,
    /// Jobs of /v1/jobs that are kept; the oldest result makes room for a new job
    #[arg(long, env = "SD_MAX_JOBS", default_value = "64", value_parser = at_least::<1>)]
    pub(super) max_jobs: usize,
    /// A job that has no result after this fails; the header x-request-timeout-ms can ask for less
    #[arg(
        long,
        env = "SD_JOB_TIMEOUT_MS",
        default_value = "3600000",
        value_parser = at_least::<1>,
    )]
    pub(super) job_timeout_ms: usize,
    /// How long the result of a job is kept
    #[arg(
        long,
        env = "SD_JOB_RETENTION_MS",
        default_value = "600000",
        value_parser = at_least::<1>,
    )]
    pub(super) job_retention_ms: usize,
    /// How long a picture is kept that was answered with a URL
    #[arg(
        long,
        env = "SD_URL_RETENTION_MS",
        default_value = "3600000",
        value_parser = at_least::<1>,
    )]
    pub(super) url_retention_ms: usize,
    /// Size of all pictures that are kept for their URL; beyond it the oldest makes room
    #[arg(long, env = "SD_MAX_URL_BYTES", default_value = "268435456", value_parser = at_least::<0>)]
    pub(super) max_url_bytes: usize,
    /// Rows that share one evaluation of the UNet: a picture takes two, or one without guidance.
    /// More rows mean more pictures a second, later first pictures and more memory
    #[arg(long, env = "SD_MAX_BATCH_ROWS", default_value = "8", value_parser = at_least::<2>)]
    pub(super) max_batch_rows: usize,
    /// Memory that one evaluation or decoding may take; fewer rows share one when they would need
    /// more, and pictures that can never fit are answered with 507. When absent: four fifths of
    /// what is free on the device once the model is loaded
    #[arg(long, env = "SD_MEMORY_BUDGET_BYTES", value_parser = at_least::<1>)]
    pub(super) memory_budget_bytes: Option<usize>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// text for people, json for log collectors; both go to standard error
    #[arg(long, env = "SD_LOG_FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as sd_server=debug
    #[arg(long, env = "SD_LOG", default_value = "info")]
    pub(super) log: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct GenerateArgs {
    /// What the picture shows
    pub(super) prompt: String,
    /// The file: .png, .jpg or .webp; several pictures become out-0.png, out-1.png, ...
    #[arg(short, long, default_value = "out.png")]
    pub(super) output: PathBuf,
    /// What the picture should not show
    #[arg(long)]
    pub(super) negative_prompt: Option<String>,
    /// plain, or a1111: (emphasis:1.3), [less], BREAK, <lora:name:0.8>, and prompts of more than 77
    /// tokens
    #[arg(long)]
    pub(super) prompt_syntax: Option<String>,
    /// A LoRA of --loras-dir by name, or a file, and how much it counts: style, style:0.8,
    /// path/style.safetensors:0.8; may be repeated
    #[arg(long)]
    pub(super) lora: Vec<String>,
    /// Width in pixels, a multiple of 8; the model's own size when absent
    #[arg(short = 'W', long)]
    pub(super) width: Option<u64>,
    /// Height in pixels, a multiple of 8; the model's own size when absent
    #[arg(short = 'H', long)]
    pub(super) height: Option<u64>,
    /// Sampler steps; more are slower and, up to a point, better
    #[arg(long)]
    pub(super) steps: Option<u64>,
    /// How closely to follow the prompt; 1 or less is twice as fast and ignores --negative-prompt
    #[arg(long)]
    pub(super) guidance_scale: Option<f64>,
    #[arg(long, value_parser = parse::<SamplerName>, help = SamplerName::list())]
    pub(super) scheduler: Option<SamplerName>,
    /// The same seed gives the same picture; random when absent
    #[arg(long)]
    pub(super) seed: Option<u64>,
    /// How many pictures; picture k uses seed + k
    #[arg(short = 'n', long)]
    pub(super) num_images: Option<u64>,
    /// A picture to begin with, in place of noise alone
    #[arg(long)]
    pub(super) image: Option<PathBuf>,
    /// What of --image is painted anew: white is, black is kept
    #[arg(long, requires = "image")]
    pub(super) mask: Option<PathBuf>,
    /// How much of --image is painted over, 0 to 1; 0.8 when absent
    #[arg(long, requires = "image")]
    pub(super) strength: Option<f64>,
    /// Draw again over the enlarged latents, to this width: a model draws best in its own size
    #[arg(long)]
    pub(super) hires_width: Option<u64>,
    /// And to this height; in the shape of the first pass where one of the two is absent
    #[arg(long)]
    pub(super) hires_height: Option<u64>,
    /// Steps of the second pass, of which --hires-strength is the share that is taken; --steps when
    /// absent
    #[arg(long)]
    pub(super) hires_steps: Option<u64>,
    /// How much of the enlarged latents is painted over, 0 to 1; 0.75 when absent
    #[arg(long)]
    pub(super) hires_strength: Option<f64>,
    /// How latents are enlarged: Latent, "Latent (nearest)" and so on, as AUTOMATIC1111 calls them
    #[arg(long)]
    pub(super) hires_upscaler: Option<String>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct DownloadArgs {
    /// The hub id: owner/name
    pub(super) model: String,
    /// Branch, tag or commit
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
    /// Fetch the smaller f16 weights for this device if there are any
    #[arg(long, env = "SD_DEVICE", default_value = "auto", value_parser = parse::<DeviceName>)]
    pub(super) device: DeviceName,
    /// Fetch the smaller f16 weights for f16 if there are any
    #[arg(long, env = "SD_DTYPE", default_value = "auto", value_parser = parse::<Precision>)]
    pub(super) dtype: Precision,
    /// off leaves the safety checker out
    #[arg(long, env = "SD_SAFETY_CHECKER")]
    pub(super) safety_checker: Option<SafetyChecker>,
}

#[derive(Debug, clap::Args)]
pub(super) struct PackageArgs {
    /// A directory in the diffusers layout, or a hub id, which is fetched first
    pub(super) model: String,
    /// What to make; model.tar.gz, or model for a directory, when absent
    #[arg(short, long)]
    pub(super) output: Option<PathBuf>,
    /// A tarball serves everywhere; a directory starts faster, but not for batch transform,
    /// serverless and multi-model endpoints
    #[arg(long, default_value = "tarball")]
    pub(super) layout: Layout,
    /// Which weights where there are several: f16 is half the size and what a GPU computes in
    #[arg(long, default_value = "f16", value_parser = parse::<Precision>)]
    pub(super) dtype: Precision,
    /// off leaves the safety checker out
    #[arg(long, env = "SD_SAFETY_CHECKER")]
    pub(super) safety_checker: Option<SafetyChecker>,
    /// Then upload it by the aws command: s3://bucket/model.tar.gz, or s3://bucket/prefix/
    #[arg(long)]
    pub(super) upload: Option<String>,
    /// Branch, tag or commit of a model on the hub
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    /// The server: http://host:port
    #[arg(required_unless_present = "verify", conflicts_with = "verify")]
    pub(super) url: Option<String>,
    /// No server: compare the pictures of a device with the CPU's, then time it on this model
    #[arg(long)]
    pub(super) verify: bool,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// With --verify: the pictures' size, as in 512x512; the model's own when absent
    #[arg(long, requires = "verify", value_parser = size)]
    pub(super) size: Option<Size>,
    /// With --verify: rows of the largest step that is timed, from 1 in powers of two
    #[arg(long, requires = "verify", default_value = "16", value_parser = at_least::<1>)]
    pub(super) max_rows: usize,
    /// With --verify: steps that are timed for each number of rows
    #[arg(long, requires = "verify", default_value = "10", value_parser = at_least::<1>)]
    pub(super) evaluations: usize,
    /// Requests a second, arriving at random (Poisson) whether or not earlier ones are answered.
    /// This shows what happens under more load than the server can bear
    #[arg(long, conflicts_with = "clients", value_parser = positive)]
    pub(super) rate: Option<f64>,
    /// Clients that each send their next request when the last is answered
    #[arg(long, default_value = "8", value_parser = at_least::<1>)]
    pub(super) clients: usize,
    /// For how long requests are sent
    #[arg(long, default_value = "30", value_parser = positive)]
    pub(super) duration_s: f64,
    /// The request, as JSON; each gets a seed of its own if it has none
    #[arg(long, default_value = r#"{"prompt":"a red house by the sea","steps":20}"#)]
    pub(super) body: String,
    /// A request that is not answered after this counts as unanswered
    #[arg(long, default_value = "120000", value_parser = at_least::<1>)]
    pub(super) timeout_ms: usize,
    /// The same number gives the same arrivals
    #[arg(long, default_value = "1")]
    pub(super) arrivals_seed: u64,
    /// Print JSON in place of the table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct HealthcheckArgs {
    /// Host of the server
    #[arg(long, default_value = "127.0.0.1")]
    pub(super) host: String,
    /// Port of the server; found as `serve` finds it
    #[arg(long)]
    pub(super) port: Option<u16>,
}

fn parse<T: std::str::FromStr<Err = String>>(text: &str) -> Result<T, String> {
    text.parse()
}

fn origin(text: &str) -> Result<HeaderValue, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let whole = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*']));
    let value = HeaderValue::try_from(text).ok().filter(|_| whole || text == "*");
    value.ok_or_else(|| "an origin is *, or http(s)://host with no path".into())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && number <= 1e6 => Ok(number),
        _ => Err("must be a positive number".into()),
    }
}

fn size(text: &str) -> Result<Size, String> {
    let sides = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides
        .and_then(|(width, height)| Size::new(width, height))
        .ok_or_else(|| "must be two multiples of 8, as in 512x512".into())
}

fn at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= LEAST => Ok(number),
        _ => Err(format!("must be a whole number of at least {LEAST}")),
    }
}

//! The command line: subcommands, options, their environment variables and help texts. Conversion to
//! configurations is in the parent module.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use sd_models::{DeviceName, Precision, SamplerName, SigmaSchedule};
use serde::Serialize;
use serde_json::Number;

use crate::engine::EngineConfig;
use crate::http::HttpConfig;
use crate::options::{millis, min, size};
use crate::registry::RegistryConfig;
use crate::request::{sampler, schedule};
use crate::telemetry::{LogFormat, log_filter};

use super::bench::device::TimingConfig;
use super::bench::load::LoadConfig;
use super::package::Package;

/// Stable Diffusion inference: an HTTP server and a command line in one native binary.
#[derive(Debug, Parser)]
#[command(
    name = "sd-server",
    version,
    max_term_width = 100,
    after_help = "The default command is serve: `sd-server --model demo` is `sd-server serve \
                  --model demo`.\nIts options can also be set by environment variables: \
                  --max-steps is SD_MAX_STEPS."
)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve HTTP requests (the default command)
    Serve(Box<ServeArgs>),
    /// Generate images from a prompt into files
    Generate(Box<GenerateArgs>),
    /// Download a model from the Hugging Face hub into the local cache
    Download(Box<DownloadArgs>),
    /// Package a model as model.tar.gz or a directory for SageMaker
    Package(Box<PackageArgs>),
    /// Send load to a running server, or verify and time a device
    Bench(Box<BenchArgs>),
    /// Exit with 0 if a server on this host is ready, for Docker's HEALTHCHECK
    Healthcheck(Box<HealthcheckArgs>),
}

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) models: RegistryConfig,
    /// Address to listen on
    #[arg(long, env = "SD_HOST", default_value = "0.0.0.0", help_heading = "Network")]
    pub(super) host: String,
    /// Port to listen on; 0 picks a free port, which the first line of output names. Default:
    /// SAGEMAKER_BIND_TO_PORT, else SD_PORT, else 8080
    #[arg(long, help_heading = "Network")]
    pub(super) port: Option<u16>,
    /// Time to finish accepted requests after SIGTERM, or before a model is unloaded, in
    /// milliseconds; after it unfinished requests get 503. SageMaker kills the process 30 s after
    /// SIGTERM
    #[arg(long = "drain-timeout-ms", env = "SD_DRAIN_TIMEOUT_MS", default_value = "25000")]
    #[arg(value_parser = millis::<0>, help_heading = "Network")]
    pub(super) drain_timeout: Duration,
    #[command(flatten)]
    pub(super) http: HttpConfig,
    #[command(flatten)]
    pub(super) engine: EngineConfig,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArgs {
    /// Model: `demo` or `demo-lcm` (built in; the second takes four steps), a directory in Diffusers
    /// format, a single-file checkpoint (.safetensors, .gguf, .ckpt), or a Hugging Face model ID such
    /// as owner/name. Default: /opt/ml/model if it has files, else CompVis/stable-diffusion-v1-4
    #[arg(long, env = "SD_MODEL")]
    pub(super) model: Option<String>,
    /// UNet that replaces the model's own: a file (.safetensors, .gguf, .ckpt) of it or of a whole
    /// checkpoint, its folder in Diffusers format, or a directory that has unet/
    #[arg(long, env = "SD_UNET")]
    pub(super) unet: Option<PathBuf>,
    /// VAE that replaces the model's own: a single file, a directory of a VAE or one that has vae/,
    /// or a Hugging Face model ID
    #[arg(long, env = "SD_VAE")]
    pub(super) vae: Option<String>,
    /// Directory of LoRAs (.safetensors, .pt, .ckpt, .bin in the formats of kohya, diffusers, PEFT
    /// and LyCORIS) that requests can select by file name. A file is read when it is first requested
    #[arg(long, env = "SD_LORAS_DIR")]
    pub(super) loras_dir: Option<PathBuf>,
    /// Memory for the LoRAs of each model, in bytes. At the limit, the least recently used LoRA is
    /// evicted, and read again on its next use. A file, or the LoRAs of one image, that would take
    /// more are refused
    #[arg(long, env = "SD_MAX_LORA_BYTES", default_value = "1073741824", value_parser = size::<0>)]
    pub(super) max_lora_bytes: usize,
    /// Directory of ControlNets that requests can select by name: files (.safetensors, .pth, .pt, .ckpt,
    /// .bin) and directories in Diffusers format. A net is read when it is first requested
    #[arg(long, env = "SD_CONTROLNETS_DIR")]
    pub(super) controlnets_dir: Option<PathBuf>,
    /// Memory for the ControlNets of each model, in bytes. At the limit, the least recently used net
    /// is evicted, and read again on its next use. A net, or those of one image, that would take
    /// more are refused
    #[arg(long, env = "SD_MAX_CONTROLNET_BYTES", default_value = "4294967296")]
    #[arg(value_parser = size::<0>)]
    pub(super) max_controlnet_bytes: usize,
    /// Directory of IP-Adapters (.safetensors, .bin, .pth, .pt: plain, Plus and full-face ones) that
    /// requests can select by file name. A file is read when it is first requested, with the image
    /// encoder beside it: a folder whose name begins with image_encoder or clip_vision in the file's
    /// folder, in the one above, or in models or sdxl_models there
    #[arg(long, env = "SD_IP_ADAPTERS_DIR")]
    pub(super) ip_adapters_dir: Option<PathBuf>,
    /// Memory for the IP-Adapters of each model and their image encoders, in bytes. At the limit, the
    /// least recently used adapter is evicted, and read again on its next use. An adapter, or those of
    /// one image, that would take more are refused
    #[arg(long, env = "SD_MAX_IP_ADAPTER_BYTES", default_value = "6442450944")]
    #[arg(value_parser = size::<0>)]
    pub(super) max_ip_adapter_bytes: usize,
    /// Directory of upscalers (.safetensors, .pth, .pt of the ESRGAN family: ESRGAN, Real-ESRGAN,
    /// BSRGAN) that requests can select by file name. A file is read when it is first requested
    #[arg(long, env = "SD_UPSCALERS_DIR")]
    pub(super) upscalers_dir: Option<PathBuf>,
    /// Memory for the upscalers of each model, in bytes. At the limit, the least recently used one
    /// is evicted, and read again on its next use. A file that would take more is refused
    #[arg(long, env = "SD_MAX_UPSCALER_BYTES", default_value = "536870912", value_parser = size::<0>)]
    pub(super) max_upscaler_bytes: usize,
    /// Memory for the refiners of each model, in bytes: other models that take its images over. At the
    /// limit, the least recently used one is evicted, and read again on its next use. One that would
    /// take more is refused
    #[arg(long, env = "SD_MAX_REFINER_BYTES", default_value = "17179869184")]
    #[arg(value_parser = size::<0>)]
    pub(super) max_refiner_bytes: usize,
    /// Directory of textual inversion embeddings (.safetensors, .pt, .bin in the AUTOMATIC1111 or
    /// diffusers format, .png pictures of AUTOMATIC1111), read with the model. The file name, or the
    /// placeholder token in the file, can be used in prompts
    #[arg(long, env = "SD_EMBEDDINGS_DIR")]
    pub(super) embeddings_dir: Option<PathBuf>,
    /// Maximum memory for the embeddings of each model, in bytes. Files beyond it are skipped with
    /// a warning
    #[arg(long, env = "SD_MAX_EMBEDDING_BYTES", default_value = "67108864")]
    #[arg(value_parser = size::<0>)]
    pub(super) max_embedding_bytes: usize,
    /// Branch, tag or commit of a Hugging Face model ID
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
    /// Device: auto, cpu, cuda or cuda:N. auto is the first GPU if there is one, else the CPU
    #[arg(long, env = "SD_DEVICE", default_value = "auto")]
    pub(super) device: DeviceName,
    /// Data type of the weights: auto, f16, bf16 or f32. auto is f16 on a GPU, bf16 on a CPU with
    /// AMX, else f32
    #[arg(long, env = "SD_DTYPE", default_value = "auto")]
    pub(super) dtype: Precision,
    /// What to do with images that the model's safety checker flags as NSFW. Default: blur, if the
    /// model has a checker. If set to other than off, models without a checker are rejected
    #[arg(long, env = "SD_SAFETY_CHECKER")]
    pub(super) safety_checker: Option<SafetyChecker>,
    /// Number of CPU threads for the model. Default: all cores
    #[arg(long, env = "SD_THREADS", value_parser = min::<1>)]
    pub(super) threads: Option<usize>,
}

/// The action on images that the safety checker flags as NSFW.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum SafetyChecker {
    /// Load no checker
    Off,
    /// Return the image unchanged, marked as NSFW
    Flag,
    /// Return the image blurred, marked as NSFW
    Blur,
    /// Fail the request with an error
    Block,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Format of the log on standard error: text, or json for log collectors
    #[arg(long, env = "SD_LOG_FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
    /// What to log: error, warn, info, debug, trace, off, or a filter such as warn,sd_server=debug
    #[arg(long, env = "SD_LOG", default_value = "info", value_parser = log_filter)]
    pub(super) log: String,
}

// All but the skipped fields are those of the request.
#[derive(Debug, clap::Args, Serialize)]
pub(super) struct GenerateArgs {
    /// Prompt
    pub(super) prompt: String,
    /// Output file: .png, .jpg or .webp. Several images become out-0.png, out-1.png, ...
    #[arg(short, long, default_value = "out.png")]
    #[serde(skip)]
    pub(super) output: PathBuf,
    /// Negative prompt: what the image should not show
    #[arg(long)]
    pub(super) negative_prompt: Option<String>,
    /// Prompt of the second text encoder of Stable Diffusion XL. Default: the prompt
    #[arg(long)]
    pub(super) prompt_2: Option<String>,
    /// Negative prompt of its second text encoder. Default: --negative-prompt
    #[arg(long)]
    pub(super) negative_prompt_2: Option<String>,
    /// Model that takes the image over on its way, such as the refiner of Stable Diffusion XL: as
    /// --model names one
    #[arg(long, value_name = "MODEL")]
    pub(super) refiner: Option<String>,
    /// Share of the noise levels after which --refiner takes over, 0 to 1. Default: 0.8
    #[arg(long, requires = "refiner", value_parser = finite)]
    pub(super) refiner_switch_at: Option<f64>,
    /// Share of the noise levels at which the image begins, from --image as if that were under noise
    /// already
    #[arg(long, requires = "image", value_parser = finite)]
    pub(super) denoising_start: Option<f64>,
    /// Share of the noise levels after which the image ends, with the noise that is left
    #[arg(long, value_parser = finite)]
    pub(super) denoising_end: Option<f64>,
    /// Prompt syntax: plain, or a1111 for (emphasis:1.3), [less], BREAK, <lora:name:0.8> and
    /// prompts of more than 77 tokens. Default: plain
    #[arg(long)]
    pub(super) prompt_syntax: Option<String>,
    /// LoRA, by name in --loras-dir or as a file, with an optional scale: style, style:0.8,
    /// path/style.safetensors:0.8. Can be repeated
    #[arg(long)]
    #[serde(skip)]
    pub(super) lora: Vec<String>,
    /// ControlNet: a file, a directory in Diffusers format, a name in --controlnets-dir, or `canny`,
    /// which the built-in model has. Can be repeated; the k-th value of each of the following options
    /// is the k-th net's
    #[arg(long, value_name = "DIR_OR_FILE", requires = "control_image")]
    #[serde(skip)]
    pub(super) controlnet: Vec<PathBuf>,
    /// The picture by which a ControlNet steers, resized to the image; each net has one
    #[arg(long, value_name = "FILE", requires = "controlnet")]
    #[serde(skip)]
    pub(super) control_image: Vec<PathBuf>,
    /// Factor of what a ControlNet adds. Default: 1
    #[arg(long, requires = "controlnet", value_parser = finite, allow_negative_numbers = true)]
    #[serde(skip)]
    pub(super) control_scale: Vec<f64>,
    /// Share of the steps before which a ControlNet adds nothing, 0 to 1. Default: 0
    #[arg(long, requires = "controlnet", value_parser = finite)]
    #[serde(skip)]
    pub(super) control_start: Vec<f64>,
    /// Share of the steps after which a ControlNet adds nothing, 0 to 1. Default: 1
    #[arg(long, requires = "controlnet", value_parser = finite)]
    #[serde(skip)]
    pub(super) control_end: Vec<f64>,
    /// What is made of a control picture first: none, canny, invert or threshold. Default: none
    #[arg(long, value_name = "NAME", requires = "controlnet")]
    #[serde(skip)]
    pub(super) control_preprocessor: Vec<String>,
    /// Follow the ControlNets more than the prompt, as diffusers' guess mode; holds for all nets
    #[arg(long, requires = "controlnet", action = clap::ArgAction::Count)]
    #[serde(skip)]
    pub(super) guess_mode: u8,
    /// IP-Adapter: a file, or a name in --ip-adapters-dir. Can be repeated; the k-th value of each of
    /// the following options is the k-th adapter's
    #[arg(long, value_name = "FILE", requires = "ip_image")]
    #[serde(skip)]
    pub(super) ip_adapter: Vec<PathBuf>,
    /// The picture that the image is to look like, of which an IP-Adapter sees the middle square; each
    /// adapter has one
    #[arg(long, value_name = "FILE", requires = "ip_adapter")]
    #[serde(skip)]
    pub(super) ip_image: Vec<PathBuf>,
    /// Factor of what an IP-Adapter adds. Default: 1
    #[arg(long, requires = "ip_adapter", value_parser = finite, allow_negative_numbers = true)]
    #[serde(skip)]
    pub(super) ip_scale: Vec<f64>,
    /// Share of the steps before which an IP-Adapter adds nothing, 0 to 1. Default: 0
    #[arg(long, requires = "ip_adapter", value_parser = finite)]
    #[serde(skip)]
    pub(super) ip_start: Vec<f64>,
    /// Share of the steps after which an IP-Adapter adds nothing, 0 to 1. Default: 1
    #[arg(long, requires = "ip_adapter", value_parser = finite)]
    #[serde(skip)]
    pub(super) ip_end: Vec<f64>,
    /// Width in pixels, a multiple of 8. Default: the model's own, or the width of --image or of the
    /// first --control-image
    #[arg(short = 'W', long)]
    pub(super) width: Option<u64>,
    /// Height in pixels, a multiple of 8. Default: the model's own, or the height of --image or of the
    /// first --control-image
    #[arg(short = 'H', long)]
    pub(super) height: Option<u64>,
    /// Number of sampler steps; more are slower and, up to a point, better. Default: the model's
    /// own
    #[arg(long)]
    #[serde(rename = "num_inference_steps")]
    pub(super) steps: Option<u64>,
    /// Guidance scale (CFG): how closely to follow the prompt. 1 or less disables guidance, which
    /// is twice as fast and ignores --negative-prompt; in the syntax a1111 only 1 does. Default: the
    /// model's own
    #[arg(long, value_parser = finite)]
    pub(super) guidance_scale: Option<f64>,
    #[arg(
        long,
        value_parser = |name: &str| sampler(name, "--schedule").map(|name| name.to_string()),
        help = format!("Sampler: {}. Default: the model's own", SamplerName::list()),
    )]
    pub(super) scheduler: Option<String>,
    #[arg(
        long,
        value_parser = |name: &str| match name.trim().eq_ignore_ascii_case("automatic") {
            true => Ok(name.to_owned()),
            false => schedule(name, "--scheduler").map(|name| name.to_string()),
        },
        help = format!(
            "Schedule, the spacing of the noise levels: {}. Default: the model's own",
            SigmaSchedule::list()
        ),
    )]
    pub(super) schedule: Option<String>,
    /// The share of its noise that the sampler draws anew at each step, 0 to 1; for samplers that
    /// have one. Default: the sampler's own
    #[arg(long, value_parser = finite)]
    pub(super) eta: Option<f64>,
    /// Seed; the same seed gives the same image. Default, and at -1: random
    #[arg(long, value_parser = seed)]
    pub(super) seed: Option<Number>,
    /// Layers of the text encoder to skip at its end; 1 is AUTOMATIC1111's clip skip 2. Applies to
    /// the prompt, and with --prompt-syntax a1111 to the negative prompt too. Default: 0
    #[arg(long)]
    pub(super) clip_skip: Option<u64>,
    /// How far guidance is scaled back to the contrast of the prompt alone, 0 to 1; against
    /// overexposure. Default: 0
    #[arg(long, value_parser = finite)]
    pub(super) guidance_rescale: Option<f64>,
    /// Seed of a second noise that is mixed into the first noise. Default, and at -1: random
    #[arg(long, requires = "variation_strength", value_parser = seed)]
    pub(super) variation_seed: Option<Number>,
    /// Share of the second noise: 0 is the image of --seed, 1 that of --variation-seed. Default: 0
    #[arg(long, value_parser = finite)]
    pub(super) variation_strength: Option<f64>,
    /// Make the opposite edges of the image meet, so that it can be laid beside itself
    #[arg(long)]
    pub(super) tiling: bool,
    /// Let the VAE encode and decode in tiles what is larger than one: less memory, and an image that
    /// differs a little
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) vae_tiling: bool,
    /// Number of images; image k uses seed + k. Default: 1
    #[arg(short = 'n', long)]
    #[serde(rename = "num_images_per_prompt")]
    pub(super) num_images: Option<u64>,
    /// Input image for image-to-image
    #[arg(long)]
    #[serde(skip)]
    pub(super) image: Option<PathBuf>,
    /// Inpainting mask for --image: white areas are inpainted, black areas are preserved
    #[arg(long, requires = "image")]
    #[serde(skip)]
    pub(super) mask: Option<PathBuf>,
    /// Blur of --mask in pixels. Default: 0
    #[arg(long, requires = "mask", value_parser = finite)]
    pub(super) mask_blur: Option<f64>,
    /// Generate the masked area alone, in the output size, with so many pixels around it, and put it
    /// back into --image
    #[arg(long, requires = "mask")]
    pub(super) mask_padding: Option<u64>,
    /// What the masked area begins as: original, fill (the colours around it), noise or nothing.
    /// Default: original
    #[arg(long, requires = "mask")]
    pub(super) mask_fill: Option<String>,
    /// Inpaint the black areas of --mask and preserve the white ones
    #[arg(long, requires = "mask")]
    pub(super) mask_invert: bool,
    /// Denoising strength for --image, 0 to 1; higher values change more. Default: 0.8; of Stable
    /// Diffusion XL 0.3, and 0.9999 with --mask
    #[arg(long, requires = "image", value_parser = finite)]
    pub(super) strength: Option<f64>,
    /// What is added to the seed for the noise that the sampler draws at its steps. Default: 0
    #[arg(long, allow_negative_numbers = true)]
    pub(super) eta_noise_seed_delta: Option<i64>,
    /// Output width of the hires pass, which continues from the upscaled image of the base pass.
    /// Default: from --hires-height, in the aspect ratio of the base pass
    #[arg(long)]
    pub(super) hires_width: Option<u64>,
    /// Output height of the hires pass. Default: from --hires-width, in the aspect ratio of the
    /// base pass
    #[arg(long)]
    pub(super) hires_height: Option<u64>,
    /// Number of sampler steps of the hires pass; the share --hires-strength of them is run.
    /// Default: --steps
    #[arg(long)]
    pub(super) hires_steps: Option<u64>,
    /// Denoising strength of the hires pass, 0 to 1. Default: 0.75
    #[arg(long, value_parser = finite)]
    pub(super) hires_strength: Option<f64>,
    /// Upscaler of the hires pass: Latent, "Latent (nearest)" and others of AUTOMATIC1111's family
    /// for its latents; Lanczos, Nearest or a file (of --upscalers-dir by its name) for the picture.
    /// Default: Latent
    #[arg(long)]
    pub(super) hires_upscaler: Option<String>,
    /// Prompt of the hires pass. Default: PROMPT
    #[arg(long)]
    pub(super) hires_prompt: Option<String>,
    /// Negative prompt of the hires pass. Default: --negative-prompt
    #[arg(long)]
    pub(super) hires_negative_prompt: Option<String>,
    /// Guidance scale of the hires pass. Default: --guidance-scale
    #[arg(long, value_parser = finite)]
    pub(super) hires_guidance_scale: Option<f64>,
    /// Sampler of the hires pass. Default: --scheduler
    #[arg(long)]
    pub(super) hires_scheduler: Option<String>,
    /// Schedule of the hires pass. Default: --schedule, with --hires-scheduler the model's own
    #[arg(long)]
    pub(super) hires_schedule: Option<String>,
    #[command(flatten)]
    #[serde(skip)]
    pub(super) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct DownloadArgs {
    /// Hugging Face model ID: owner/name
    pub(super) model: String,
    /// Branch, tag or commit
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
    /// Device the weights are for: on a GPU, the smaller f16 files are downloaded if available
    #[arg(long, env = "SD_DEVICE", default_value = "auto")]
    pub(super) device: DeviceName,
    /// Data type the weights are for: for f16, the smaller f16 files are downloaded if available
    #[arg(long, env = "SD_DTYPE", default_value = "auto")]
    pub(super) dtype: Precision,
    /// off omits the safety checker. Any other value of `serve` includes it, as does none
    #[arg(long, env = "SD_SAFETY_CHECKER", value_name = "off", hide_possible_values = true)]
    pub(super) safety_checker: Option<SafetyChecker>,
}

#[derive(Debug, clap::Args)]
pub(super) struct PackageArgs {
    /// Directory in Diffusers format, or a Hugging Face model ID, which is downloaded first
    pub(super) model: String,
    #[command(flatten)]
    pub(super) package: Package,
    /// Data type of the weights to include if there are several: f16 is half the size and what a
    /// GPU uses
    #[arg(long, default_value = "f16")]
    pub(super) dtype: Precision,
    /// off omits the safety checker. Any other value of `serve` includes it, as does none
    #[arg(long, env = "SD_SAFETY_CHECKER", value_name = "off", hide_possible_values = true)]
    pub(super) safety_checker: Option<SafetyChecker>,
    /// Branch, tag or commit of a Hugging Face model ID
    #[arg(long, env = "SD_REVISION", default_value = "main")]
    pub(super) revision: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    /// Without a server: time a device, then compare its images with those of the CPU
    #[arg(long)]
    pub(super) verify: bool,
    #[command(flatten)]
    pub(super) load: LoadConfig,
    #[command(flatten)]
    pub(super) timing: TimingConfig,
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct HealthcheckArgs {
    /// Host of the server
    #[arg(long, default_value = "127.0.0.1")]
    pub(super) host: String,
    /// Port of the server. Default: as for `serve`
    #[arg(long)]
    pub(super) port: Option<u16>,
}

fn seed(text: &str) -> Result<Number, String> {
    let seed =
        text.parse::<u64>().map(Number::from).or_else(|_| text.parse::<i64>().map(Into::into));
    seed.map_err(|_| format!("must be a whole number of at most {}, or -1", u64::MAX))
}

fn finite(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| "must be a number".into())
}

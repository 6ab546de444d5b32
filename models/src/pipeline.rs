//! A model, and the pictures under way in it.
//!
//! The sampler's loop is the caller's: [`Pipeline::step`] takes one evaluation of any number of
//! trajectories, each at its own step of its own schedule, in a single call of the UNet. A
//! trajectory with guidance takes two rows of that call, one without takes one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use candle_core::{DType, Device, Tensor};

use crate::adapted::Mix;
use crate::config::{self, ClipTextConfig, UNetConfig, VaeConfig};
use crate::denoiser::{combine, guide};
use crate::device::{DeviceName, Precision, Work};
use crate::error::{Error, Result};
use crate::hires::{Enlarged, Second};
use crate::info::{Defaults, Memory, ModelInfo};
use crate::lora::{LoraShelf, Target};
use crate::noise::Noise;
use crate::ops::{device_kernels, device_name, device_work, free_device_bytes, keep_freed_memory};
use crate::preview::Preview;
use crate::prompt;
use crate::safety::SafetyChecker;
use crate::sampler::Sampler;
use crate::schedule::SchedulerConfig;
use crate::shelf::{Folder, Shelf};
use crate::spec::{Hires, PromptSyntax, Rgb, Size, Spec};
use crate::start::{Beginning, Kept, Painter};
use crate::text_encoder::ClipTextModel;
use crate::textual_inversion::Learned;
use crate::tokenizer::ClipTokenizer;
use crate::unet::UNet2DConditionModel;
use crate::vae::{Decoder, Encoder};
use crate::weights::{Source, Weights};

/// What to load, and onto what.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The model's files.
    pub source: Source,
    /// Where the VAE comes from, when it is not the model's own.
    pub vae: Option<Source>,
    /// Where it runs.
    pub device: DeviceName,
    /// In which numbers.
    pub precision: Precision,
    /// Whether a safety checker is loaded with it.
    pub checking: Checking,
    /// Threads of the CPU's kernels; all processors if `None`. Only the first model loaded in a
    /// process sets it.
    pub threads: Option<usize>,
    /// What requests can add to the model by name.
    pub extras: Extras,
}

/// What requests can add to a model by name, from files that are read when they are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// LoRAs.
    pub loras: Folder,
    /// What the LoRAs in memory may take; the one used longest ago makes room.
    pub max_lora_bytes: u64,
    /// Words learned by textual inversion; read with the model.
    pub embeddings: Folder,
    /// What their vectors may take; files beyond it are left out.
    pub max_embedding_bytes: u64,
}

/// Whether a safety checker is loaded with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checking {
    /// None, even if the model has one.
    Never,
    /// If the model has one.
    IfThere,
    /// A model that has none is refused.
    Required,
}

impl Checking {
    /// Whether the checker of a model is to be loaded.
    fn decide(self, there: bool) -> Result<bool> {
        match self {
            Self::Required if !there => {
                let reason = "safety_checker: none is named, but one is required";
                Err(Error::config("model_index.json", reason))
            }
            Self::Never => Ok(false),
            Self::IfThere | Self::Required => Ok(there),
        }
    }
}

/// One picture under way.
pub struct Trajectory {
    size: Size,
    guidance_scale: f64,
    /// (1, C, h, w) f32
    latents: Tensor,
    /// Keys and values of the prompt (1, L, ..), and of the negative one where there is guidance.
    kv: Arc<Tensor>,
    negative: Option<Arc<Tensor>>,
    mix: Mix,
    kept: Option<Kept>,
    /// Stacked onto the latents before the UNet.
    condition: Option<Tensor>,
    sampler: Sampler,
    /// What the UNet makes of the sampler's timesteps (evaluations, ..).
    times: Tensor,
    noise: Noise,
    /// The latents and the guided output of the last evaluation, both (1, C, h, w) f32.
    seen: Option<(Tensor, Tensor)>,
    /// What comes after this pass.
    second: Option<Second>,
    /// Evaluations of the pass before this one.
    earlier: usize,
    warnings: Vec<String>,
}

/// What a step makes of a trajectory.
struct Advanced {
    latents: Tensor,
    seen: (Tensor, Tensor),
    sampler: Sampler,
    noise: Noise,
    /// Whether the second pass begins.
    turned: bool,
}

impl Trajectory {
    /// Whether nothing but decoding is left to do.
    pub fn done(&self) -> bool {
        self.sampler.next().is_none()
    }

    /// Evaluations of the UNet behind it, and in all. Heun takes two a step, PNDM one more than
    /// steps.
    pub fn progress(&self) -> (usize, usize) {
        let second = self.second.as_ref().map_or(0, |second| second.sampler.evaluations());
        let all = self.earlier + self.sampler.evaluations() + second;
        (self.earlier + self.sampler.completed(), all)
    }

    /// Pixels times evaluations that are to be made.
    pub fn work_left(&self) -> usize {
        let left = self.sampler.evaluations() - self.sampler.completed();
        let work = |second: &Second| second.size.pixels() * second.sampler.evaluations();
        self.size.pixels() * left + self.second.as_ref().map_or(0, work)
    }

    /// Rows that it takes in a call of the UNet.
    pub fn rows(&self) -> usize {
        1 + usize::from(self.negative.is_some())
    }

    /// The size of the picture in this pass.
    pub fn size(&self) -> Size {
        self.size
    }

    /// What the user should know although the picture is drawn.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The latents as they are now, (1, C, h, w) f32.
    pub fn latents(&self) -> &Tensor {
        &self.latents
    }

    /// The latents without noise as far as they can be told, (1, C, h, w) f32.
    fn foreseen(&self) -> Result<Tensor> {
        match &self.seen {
            Some((x, output)) if !self.done() => {
                let seen = self.sampler.denoised(x, output)?;
                self.kept.as_ref().map_or(Ok(seen.clone()), |kept| kept.put_back_clean(&seen))
            }
            _ => Ok(self.latents.clone()),
        }
    }

    fn advance(&mut self, advanced: Advanced) {
        let Advanced { latents, seen, sampler, noise, turned } = advanced;
        if turned && let Some(second) = self.second.take() {
            self.earlier = self.sampler.evaluations();
            self.size = second.size;
            self.times = second.times;
        }
        self.latents = latents;
        self.seen = Some(seen);
        self.sampler = sampler;
        self.noise = noise;
    }
}

/// A loaded model.
pub struct Pipeline {
    info: ModelInfo,
    device: Device,
    tokenizer: ClipTokenizer,
    text_encoder: ClipTextModel,
    unet: UNet2DConditionModel,
    /// Loaded whether pictures come in or not: it is a thirtieth of the model, and a server should
    /// fail when it starts rather than at the first request that needs it.
    encoder: Encoder,
    decoder: Decoder,
    safety_checker: Option<SafetyChecker>,
    scheduler: SchedulerConfig,
    /// Fitted when it is first asked for.
    preview: OnceLock<Preview>,
    loras: Arc<LoraShelf>,
    /// The prompts encoded last, the newest at the end.
    encoded: Mutex<VecDeque<(Prompt, Encoded)>>,
}

/// Prompts whose encoding is kept: the empty negative prompt, and those that come in series.
const KEPT_PROMPTS: usize = 32;

/// A prompt as it came, how it is read, and with which LoRAs.
type Prompt = (String, PromptSyntax, Vec<(u64, f64)>);

/// A prompt as the UNet takes it.
struct Encoded {
    /// (1, L, D) f32
    context: Tensor,
    /// Keys and values (1, L, ..): shared by the pictures under way that have this prompt, and gone
    /// with the last of them, since they are far larger than the context (33 times in v1.4).
    kv: Weak<Tensor>,
    warning: Option<String>,
}

impl Pipeline {
    /// Reads a model from its files. Takes seconds.
    pub fn load(options: &LoadOptions) -> Result<Self> {
        if let Some(threads) = options.threads {
            // An error says that the pool exists already: the first model has set its size.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
        keep_freed_memory();
        let source = &options.source;
        let device = options.device.open()?;
        let dtype = options.precision.resolve(&device)?;
        let has_checker = config::check_pipeline(source)?;
        let half = dtype == DType::F16;
        let open = |folder, stem| Weights::open(source, folder, stem, half);
        let weights = open("text_encoder", "model")?;
        let Extras { loras, max_lora_bytes, .. } = options.extras.clone();
        let (tokenizer, text_encoder, learned) = read_text(options, &weights, &device, dtype)?;
        let text_sites = weights.sites();
        let weights = open("unet", "diffusion_pytorch_model")?;
        let unet = UNetConfig::read(source)?;
        let unet = UNet2DConditionModel::load(unet, &weights, &device, dtype)?;
        let unet_sites = (weights.sites(), unet.config().layers_per_block);
        let target = Target::new(unet_sites, text_sites, &device, dtype);
        let of_vae = options.vae.as_ref().unwrap_or(source);
        let weights = Weights::open(of_vae, "vae", "diffusion_pytorch_model", half)?;
        let vae = VaeConfig::read(of_vae)?;
        let encoder = Encoder::load(vae.clone(), &weights, &device, dtype)?;
        let decoder = Decoder::load(vae, &weights, &device, dtype)?;
        let window = tokenizer.window();
        let memory = Memory::of(unet.config(), window, decoder.config(), &device, dtype);
        agree(&text_encoder, &unet, &decoder)?;
        let checked = options.checking.decide(has_checker)?;
        let safety_checker =
            checked.then(|| SafetyChecker::load(source, half, &device, dtype)).transpose()?;
        let scheduler = read_scheduler(source)?;
        let scale = decoder.config().scale();
        let side = unet.config().sample_size * scale;
        let size = Size::new(side, side).ok_or_else(|| {
            Error::config("unet/config.json", format!("sample_size: {side} pixels a side"))
        })?;
        let defaults = Defaults {
            size,
            steps: 50,
            guidance_scale: 7.5,
            scheduler: scheduler.default_scheduler()?,
        };
        let info = ModelInfo {
            name: name(source),
            device: match device.location() {
                candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
                _ => "cpu".into(),
            },
            precision: dtype.as_str().into(),
            defaults,
            multiple: scale.max(8),
            checked,
            memory,
            extras: options.extras.clone(),
            learned,
        };
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
            preview: OnceLock::new(),
            loras: Arc::new(LoraShelf { read: Shelf::new(loras, max_lora_bytes), target }),
            encoded: Mutex::default(),
        })
    }

    /// What is known of the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Bytes that are free on the GPU; `None` on the CPU, whose memory is the system's.
    pub fn free_device_bytes(&self) -> Option<u64> {
        free_device_bytes(&self.device)
    }

    /// The GPU's own name; `None` on the CPU.
    pub fn device_name(&self) -> Option<String> {
        device_name(&self.device)
    }

    /// What our kernels were loaded from, as "cubin 8.6" or "PTX 8.0"; `None` on the CPU.
    pub fn device_kernels(&self) -> Option<String> {
        device_kernels(&self.device)
    }

    /// Waits until the device has done all that it was asked to.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    /// What our kernels on GPUs were asked to do since the program began, by their kind.
    pub fn work() -> Vec<(&'static str, Work)> {
        device_work()
    }

    /// Whether the model can draw this.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        self.info.check(spec)
    }

    /// What has to be read from files before [`Self::begin`] finds all of it in memory: work for
    /// another thread. Nothing for most pictures. What cannot be read is for `begin` to tell.
    pub fn files(&self, spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        let (_, named) = spec.text().ok()?;
        let names = spec.loras.iter().chain(&named).map(|(name, _)| name);
        let missing: Vec<_> = names.filter(|name| !self.loras.has(name)).cloned().collect();
        let loras = Arc::clone(&self.loras);
        if missing.is_empty() {
            return None;
        }
        let read = move |name: String| drop(loras.get("loras", &name));
        Some(Box::new(move || missing.into_iter().for_each(read)))
    }

    /// Encodes the prompts and what there is of a picture, and draws the noise.
    pub fn begin(&self, spec: &Spec) -> Result<Trajectory> {
        self.check(spec)?;
        let skipped = spec.skipped_steps();
        let sampler = Sampler::after(skipped, spec.scheduler, &self.scheduler, spec.steps)?;
        let (prompt, named) = spec.text()?;
        let mix = self.mix(&spec.loras, &named)?;
        let mut warnings = Vec::new();
        let mut encode = |field, prompt: &str| -> Result<_> {
            let (kv, warning) = self.encode(prompt, spec.prompt_syntax, &mix)?;
            warnings.extend(warning.map(|warning| format!("{field} {warning}")));
            Ok(kv)
        };
        let kv = encode("prompt", &prompt)?;
        let guided = spec.rows() == 2;
        let negative = guided.then(|| encode("negative_prompt", &spec.negative_prompt));
        let negative = negative.transpose()?;
        let mut noise = Noise::new(spec.seed);
        let inpainting = self.unet.config().in_channels > self.unet.config().out_channels;
        let painter = Painter { encoder: &self.encoder, device: &self.device, inpainting };
        let Beginning { latents, kept, condition } = painter.begin(spec, &sampler, &mut noise)?;
        let (size, guidance_scale) = (spec.size, spec.guidance_scale);
        let times = self.times(&sampler, &mix)?;
        let second = spec.hires.as_ref().map(|hires| self.second(hires, spec, &mix)).transpose()?;
        Ok(Trajectory {
            size,
            guidance_scale,
            latents,
            kv,
            negative,
            mix,
            kept,
            condition,
            sampler,
            times,
            noise,
            seen: None,
            second,
            earlier: 0,
            warnings,
        })
    }

    /// The LoRAs that were asked for, those that a prompt named among them.
    fn mix(&self, asked: &[(String, f64)], named: &[(String, f64)]) -> Result<Mix> {
        let mut loras = Vec::new();
        for (field, used) in [("loras", asked), ("prompt", named)] {
            for (name, scale) in used {
                loras.push((self.loras.get(field, name)?, *scale));
            }
        }
        Ok(Mix::new(loras))
    }

    /// The second pass of a picture.
    fn second(&self, hires: &Hires, spec: &Spec, mix: &Mix) -> Result<Second> {
        let unet = self.unet.config();
        if unet.in_channels > unet.out_channels {
            let reason = "is not for a UNet that was trained for inpainting".into();
            return Err(Error::Spec { field: "hires_width", reason });
        }
        let (skipped, steps) = (hires.skipped_steps(), hires.steps);
        let sampler = Sampler::after(skipped, spec.scheduler, &self.scheduler, steps)?;
        let times = self.times(&sampler, mix)?;
        Ok(Second::new(hires, sampler, times, spec.seed))
    }

    /// What the UNet makes of a sampler's timesteps (evaluations, ..).
    fn times(&self, sampler: &Sampler, mix: &Mix) -> Result<Tensor> {
        let timesteps: Vec<_> = sampler.timesteps().collect();
        self.unet.times(&timesteps, &vec![mix.clone(); timesteps.len()])
    }

    /// Keys and values of a prompt (1, L, ..), and what the user should know of it.
    fn encode(
        &self,
        prompt: &str,
        syntax: PromptSyntax,
        mix: &Mix,
    ) -> Result<(Arc<Tensor>, Option<String>)> {
        let mut kept = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (prompt.to_owned(), syntax, mix.key());
        let found = kept.iter().position(|(known, _)| *known == key);
        let mut entry = match found.and_then(|place| kept.remove(place)) {
            Some(entry) => entry,
            None => {
                let encoded = match syntax {
                    PromptSyntax::Plain => self.encode_plain(prompt, mix)?,
                    PromptSyntax::A1111 => self.encode_weighed(prompt, mix)?,
                };
                (key, encoded)
            }
        };
        let encoded = &mut entry.1;
        let kv = match encoded.kv.upgrade() {
            Some(kv) => kv,
            None => Arc::new(self.unet.keys_values(&encoded.context, std::slice::from_ref(mix))?),
        };
        encoded.kv = Arc::downgrade(&kv);
        let warning = encoded.warning.clone();
        kept.push_back(entry);
        if kept.len() > KEPT_PROMPTS {
            kept.pop_front();
        }
        Ok((kv, warning))
    }

    fn encode_plain(&self, prompt: &str, mix: &Mix) -> Result<Encoded> {
        let tokens = self.tokenizer.encode(prompt)?;
        let window = tokens.ids.len();
        let warning =
            tokens.cut.map(|cut| format!("is longer than {window} tokens; ignored: {cut:?}"));
        let context = self.text_encoder.forward(&[tokens.ids], mix)?;
        Ok(Encoded { context, kv: Weak::new(), warning })
    }

    fn encode_weighed(&self, prompt: &str, mix: &Mix) -> Result<Encoded> {
        let (windows, cut) = prompt::windows(prompt, &self.tokenizer)?;
        let count = windows.len();
        let warning = (cut > 0)
            .then(|| format!("is longer than {count} windows of tokens; {cut} more are ignored"));
        let context = prompt::encode(windows, &self.text_encoder, mix)?;
        Ok(Encoded { context, kv: Weak::new(), warning })
    }

    /// One evaluation of the UNet for each trajectory that is not done; all of one size. An error
    /// leaves every trajectory as it was, so that the step can be tried again.
    pub fn step(&self, batch: &mut [&mut Trajectory]) -> Result<()> {
        let (mut latents, mut kv, mut times) = (Vec::new(), Vec::new(), Vec::new());
        let mut mixes = Vec::new();
        let mut active: Vec<&mut Trajectory> = Vec::new();
        for trajectory in batch.iter_mut() {
            let Some(evaluation) = trajectory.sampler.next() else { continue };
            let mut input = combine(&[(evaluation.input_scale, &trajectory.latents)])?;
            if let Some(condition) = &trajectory.condition {
                input = Tensor::cat(&[&input, condition], 1)?;
            }
            let time = trajectory.times.narrow(0, trajectory.sampler.completed(), 1)?;
            // diffusers' order: the unconditional row first.
            for of_row in trajectory.negative.iter().chain([&trajectory.kv]) {
                latents.push(input.clone());
                kv.push(Tensor::clone(of_row));
                times.push(time.clone());
                mixes.push(trajectory.mix.clone());
            }
            active.push(trajectory);
        }
        if active.is_empty() {
            return Ok(());
        }
        let (latents, times) = (Tensor::cat(&latents, 0)?, Tensor::cat(&times, 0)?);
        let output = self.unet.forward(&latents, &times, &stacked(&kv)?, &mixes)?;
        let mut row = 0;
        let mut advanced = Vec::new();
        for trajectory in &active {
            let rows = trajectory.rows();
            let output = output.narrow(0, row, rows)?;
            row += rows;
            let output = match rows {
                1 => output,
                _ => guide(
                    &output.narrow(0, 0, 1)?,
                    &output.narrow(0, 1, 1)?,
                    trajectory.guidance_scale,
                )?,
            };
            let (mut sampler, mut noise) = (trajectory.sampler.clone(), trajectory.noise.clone());
            let mut latents = sampler.advance(&trajectory.latents, &output, &mut noise)?;
            if let Some(kept) = &trajectory.kept {
                latents = kept.put_back(&latents, &sampler)?;
            }
            let seen = (trajectory.latents.clone(), output);
            let next = trajectory.second.as_ref().filter(|_| sampler.next().is_none());
            advanced.push(match next {
                None => Advanced { latents, seen, sampler, noise, turned: false },
                Some(second) => {
                    let scale = self.decoder.config().scale();
                    let begun = second.begin(&latents, trajectory.size, scale)?;
                    let Enlarged { picture, latents, noise } = begun;
                    // Until there is an output, a look shows what was enlarged.
                    let seen = (picture.clone(), picture);
                    let sampler = second.sampler.clone();
                    Advanced { latents, seen, sampler, noise, turned: true }
                }
            });
        }
        // Only now, when nothing can fail any more.
        for (trajectory, advanced) in active.into_iter().zip(advanced) {
            trajectory.advance(advanced);
        }
        Ok(())
    }

    /// A small look at a trajectory: one pixel for each latent pixel, from the picture that the
    /// UNet saw behind the noise at the last evaluation, or from the latents when nothing is left
    /// to evaluate. The first call decodes a picture of 32 x 32 latent pixels and takes as long;
    /// later ones take next to nothing.
    pub fn preview(&self, trajectory: &Trajectory) -> Result<Rgb> {
        let preview = match self.preview.get() {
            Some(preview) => preview,
            None => {
                let fitted = Preview::fit(&self.decoder, &self.device)?;
                self.preview.get_or_init(|| fitted)
            }
        };
        preview.draw(&trajectory.foreseen()?)
    }

    /// The picture of a trajectory; of one that is not done, what the UNet saw of it behind the
    /// noise at the last evaluation, as AUTOMATIC1111 gives it out when it is interrupted.
    pub fn decode(&self, trajectory: &Trajectory) -> Result<Rgb> {
        let latents = (trajectory.foreseen()? / self.decoder.config().scaling_factor)?;
        let picture = self.decoder.forward(&latents)?; // (1, H, W, 3)
        let (_, height, width, _) = picture.dims4()?;
        let values = picture.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|v| v.is_nan()) {
            return Err(Error::Compute(candle_core::Error::Msg(
                "the picture holds values that are not numbers".into(),
            )));
        }
        // Halves to even, as numpy rounds.
        let byte = |v: f32| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        Ok(Rgb { width, height, data: values.into_iter().map(byte).collect() })
    }

    /// Whether a picture should not be shown; `None` where there is no safety checker to say so.
    pub fn judge(&self, picture: &Rgb) -> Result<Option<bool>> {
        let checker = self.safety_checker.as_ref();
        checker.map(|checker| Ok(checker.judge(picture)?.nsfw())).transpose()
    }
}

/// The noise levels that the model was trained on.
fn read_scheduler(source: &Source) -> Result<SchedulerConfig> {
    let file = source.require("scheduler/scheduler_config.json")?;
    let mut scheduler = SchedulerConfig::from_json(&String::from_utf8_lossy(&file))?;
    // What diffusers' StableDiffusionPipeline sets whatever the scheduler's class says.
    scheduler.steps_offset.get_or_insert(1);
    scheduler.clip_sample.get_or_insert(false);
    Ok(scheduler)
}

/// Tokenizer and text encoder, and the words that they have learned since.
fn read_text(
    LoadOptions { source, extras, .. }: &LoadOptions,
    weights: &Weights,
    device: &Device,
    dtype: DType,
) -> Result<(ClipTokenizer, ClipTextModel, Learned)> {
    let config = ClipTextConfig::read(source)?;
    let (ids, width) = (config.vocab_size, config.hidden_size);
    let mut tokenizer = ClipTokenizer::load(source, config.max_position_embeddings)?;
    let mut encoder = ClipTextModel::load(config, weights, device, dtype)?;
    let (room, most) = (tokenizer.window() - 2, extras.max_embedding_bytes);
    let (learned, vectors) = Learned::read(&extras.embeddings, most, width, room)?;
    if let Some(vectors) = vectors {
        encoder.learn(&vectors)?;
        tokenizer.learn(&learned.words, ids);
    }
    Ok((tokenizer, encoder, learned))
}

/// Keys and values of rows (1, L, ..), those neighbours stacked whose L is one: (b, L, ..).
fn stacked(kv: &[Tensor]) -> Result<Vec<Tensor>> {
    let runs = kv.chunk_by(|a, b| a.dims() == b.dims());
    runs.map(|run| Ok(Tensor::cat(run, 0)?)).collect()
}

/// What one network hands to the next must fit.
fn agree(text: &ClipTextModel, unet: &UNet2DConditionModel, vae: &Decoder) -> Result<()> {
    let (unet, text, vae) = (unet.config(), text.config(), vae.config());
    let refuse = |key: &str, found: usize, other: &str, wanted: usize| {
        let reason = format!("{key}: {found}, but {other} is {wanted}");
        Err(Error::config("unet/config.json", reason))
    };
    if unet.cross_attention_dim != text.hidden_size {
        let (found, wanted) = (unet.cross_attention_dim, text.hidden_size);
        return refuse("cross_attention_dim", found, "the text encoder's hidden_size", wanted);
    }
    let latent = vae.latent_channels;
    if unet.out_channels != latent {
        return refuse("out_channels", unet.out_channels, "the VAE's latent_channels", latent);
    }
    // Latents alone, or for inpainting with a mask and the latents of the masked picture.
    if ![latent, 2 * latent + 1].contains(&unet.in_channels) {
        return refuse("in_channels", unet.in_channels, "the VAE's latent_channels", latent);
    }
    Ok(())
}

fn name(source: &Source) -> String {
    let (path, end) = match source {
        Source::Demo => return "demo".into(),
        Source::Directory(path) => (path, path.file_name()),
        Source::Checkpoint(checkpoint) => (&checkpoint.file, checkpoint.file.file_stem()),
    };
    end.map_or_else(|| path.display().to_string(), |end| end.to_string_lossy().into_owned())
}

#[cfg(test)]
pub(crate) mod tests;

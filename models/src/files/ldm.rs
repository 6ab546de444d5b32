//! Single-file checkpoints in the original (LDM) format of CompVis and Stability, presented in the
//! Diffusers format: the name of each tensor there, and the configuration files that such a
//! checkpoint lacks, from the shapes of its tensors.
//!
//! Reference: diffusers 0.42 `loaders/single_file_utils.py`. Inferred from shapes: widths, levels
//! and attention of UNet and VAE, SD 1.x, 2.x or XL, inpainting. Assumed, since no shape shows it: 8
//! heads (1.x) or heads of 64 channels (2.x, XL), norms of 32 groups (or the largest power of two that
//! divides all widths), 64 latent pixels a side (2.x with v-prediction: 96; XL: 128). For the prediction see
//! [`LdmCheckpoint::prediction`]. A file of the Diffusers format beside the checkpoint, such as
//! `unet/config.json`, overrides all of it.

use serde_json::{Value, json};

use super::family::{self, UNET};
use super::names;
use super::original_config::OriginalConfig;
use super::tensors::{Renamed, Weights};
use crate::error::{Error, Result};

/// Scaling factors of the latents of Stable Diffusion 1.x and 2.x, and of XL.
const SCALING: f64 = 0.18215;
const XL_SCALING: f64 = 0.13025;

/// Prefixes of CLIP's and OpenCLIP's text towers.
const CLIP: [&str; 2] = ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."];
const OPEN_CLIP: [&str; 2] = ["cond_stage_model.model.", "conditioner.embedders.0.model."];

/// Beginnings of names of what training leaves in a checkpoint, and of its text encoders.
const OF_TRAINING: [&str; 16] = [
    "cond_stage_model.",
    "conditioner.",
    "model_ema.",
    "denoiser.",
    "optimizer",
    "alphas_",
    "betas",
    "sqrt_",
    "log_one_minus_",
    "posterior_",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "embedding_manager.",
    "v_pred",
    "ztsnr",
];

/// Layers of OpenCLIP's ViT-H text tower that SD 2.x uses: all but the last.
const OPEN_CLIP_LAYERS: usize = 23;

/// Deviation of [`VELOCITY_BIAS`] above which ComfyUI takes a UNet of SD 2.x for one of velocities.
const VELOCITY_DEVIATION: f64 = 0.09;
/// Tensors without elements that say of a model of Stable Diffusion XL that it predicts velocities,
/// and that it was trained with a last timestep of noise alone.
const VELOCITY: &str = "v_pred";
const ZERO_SNR: &str = "ztsnr";
const VELOCITY_BIAS: &str = "output_blocks.11.1.transformer_blocks.0.norm1.bias";

/// A checkpoint, as far as the names and shapes of its tensors tell.
pub(crate) struct LdmCheckpoint<'a> {
    file: String,
    weights: &'a Weights,
    /// The original code's configuration beside the checkpoint.
    config: Option<OriginalConfig>,
}

/// The levels of a UNet.
struct Levels {
    channels: Vec<usize>,
    down_attention: Vec<bool>,
    up_attention: Vec<bool>,
    layers: usize,
}

/// Where the text encoder is, and in whose names.
enum TextTower {
    Clip(String),
    OpenClip(String),
}

impl<'a> LdmCheckpoint<'a> {
    pub(super) fn new(weights: &'a Weights, config: Option<OriginalConfig>) -> Self {
        Self { file: weights.file_names(), weights, config }
    }

    fn find(&self, name: &str) -> Option<&'a [usize]> {
        self.weights.shape(name)
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Fails if this is not a checkpoint of a whole model, and says what it is instead.
    pub(super) fn check(&self) -> Result<()> {
        let Some(what) = family::other(self.weights) else { return Ok(()) };
        let wanted = "a model must be a checkpoint of Stable Diffusion 1.x, 2.x or XL";
        Err(Error::config(&self.file, format!("this is {what}; {wanted}")))
    }

    /// A warning for tensors of the checkpoint that are of no network and of nothing that training
    /// leaves in it, if there are any.
    pub(super) fn strays(&self) -> Option<String> {
        let known = [UNET, self.vae_prefix()].into_iter().chain(OF_TRAINING);
        let known: Vec<_> = known.filter(|start| !start.is_empty()).collect();
        let is_stray = |name: &&str| !known.iter().any(|start| name.starts_with(start));
        let mut strays = self.weights.names().filter(is_stray);
        let first = strays.next()?;
        let more = match strays.count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Some(format!("{}: {first}{more}: of no part of the model, and not used", self.file))
    }

    /// One dimension of a tensor that every checkpoint has.
    fn side(&self, name: &str, dimension: usize) -> Result<usize> {
        let shape = self.find(name).ok_or_else(|| Error::Tensor {
            file: self.file.clone(),
            tensor: name.to_owned(),
            reason: "missing; this is no checkpoint of Stable Diffusion 1.x, 2.x or XL".into(),
        })?;
        Ok(shape.get(dimension).copied().unwrap_or(1))
    }

    /// The first index without a tensor.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).find(|i| !self.has(&name(*i))).unwrap_or_default()
    }

    /// Whether it is of Stable Diffusion XL.
    fn is_xl(&self) -> bool {
        family::is_xl(self.weights)
    }

    /// Where the second text encoder of Stable Diffusion XL is.
    fn second_tower(&self) -> &'static str {
        match family::is_refiner(self.weights) {
            true => family::REFINER_TOWER,
            false => family::SECOND_TOWER,
        }
    }

    /// Whether the UNet is one of SD 2.x: by the width of its prompts, or in models of other widths
    /// by its linear projections. The names of the text encoder do not tell.
    fn is_second(&self) -> bool {
        match family::context_width(self.weights) {
            _ if self.is_xl() => false,
            Some(768) => false,
            Some(1024) => true,
            _ => {
                let projection =
                    |name: &&str| name.starts_with(UNET) && name.ends_with("proj_in.weight");
                let name = self.weights.names().find(projection);
                name.and_then(|name| self.find(name)).is_some_and(|shape| shape.len() == 2)
            }
        }
    }

    fn text_tower(&self) -> Option<TextTower> {
        let open = |prefix: &&&str| self.has(&format!("{prefix}token_embedding.weight"));
        if let Some(prefix) = OPEN_CLIP.iter().find(open) {
            return Some(TextTower::OpenClip((*prefix).to_owned()));
        }
        // Some tools write the tower without its name.
        let towers = CLIP
            .iter()
            .flat_map(|prefix| ["text_model.", ""].map(|name| format!("{prefix}{name}")));
        let mut towers =
            towers.filter(|tower| self.has(&format!("{tower}embeddings.token_embedding.weight")));
        towers.next().map(TextTower::Clip)
    }

    /// The prefix of the VAE's names, which may be alone in its file.
    fn vae_prefix(&self) -> &'a str {
        let end = "decoder.conv_in.weight";
        let found = self.weights.names().find_map(|name| name.strip_suffix(end));
        found.unwrap_or("first_stage_model.")
    }

    /// A configuration file of the Diffusers format; none if it is optional.
    pub(super) fn describe(&self, name: &str) -> Result<Option<Value>> {
        Ok(Some(match name {
            // As that of stabilityai/stable-diffusion-xl-refiner-1.0.
            "model_index.json" if family::is_refiner(self.weights) => json!({
                "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [null, null],
                "force_zeros_for_empty_prompt": false, "requires_aesthetics_score": true,
            }),
            "model_index.json" if self.is_xl() => {
                json!({ "_class_name": "StableDiffusionXLPipeline" })
            }
            "model_index.json" => json!({ "_class_name": "StableDiffusionPipeline" }),
            "unet/config.json" => self.unet()?,
            "vae/config.json" => self.vae()?,
            "text_encoder/config.json" => self.text_encoder(self.text_tower().as_ref())?,
            "text_encoder_2/config.json" if self.is_xl() => {
                let tower = self.second_tower().to_owned();
                self.text_encoder(Some(&TextTower::OpenClip(tower)))?
            }
            "scheduler/scheduler_config.json" => self.scheduler()?,
            "tokenizer/special_tokens_map.json" if self.is_second() => json!({ "pad_token": "!" }),
            "tokenizer_2/special_tokens_map.json" if self.is_xl() => json!({ "pad_token": "!" }),
            _ => return Ok(None),
        }))
    }

    /// Residual blocks of a level of the UNet's way down.
    pub(super) fn layers(&self) -> usize {
        self.levels().layers
    }

    fn levels(&self) -> Levels {
        let block = |i: usize, rest: &str| format!("{UNET}input_blocks.{i}.{rest}");
        let (mut channels, mut down_attention, mut counts) = (Vec::new(), Vec::new(), vec![0]);
        let mut i = 1;
        loop {
            if let Some(shape) = self.find(&block(i, "0.out_layers.3.weight")) {
                let level = counts.len() - 1;
                channels.resize(level + 1, shape.first().copied().unwrap_or_default());
                down_attention.resize(level + 1, self.has(&block(i, "1.norm.weight")));
                counts[level] += 1;
            } else if self.has(&block(i, "0.op.weight")) {
                counts.push(0);
            } else {
                break;
            }
            i += 1;
        }
        let layers = counts[0];
        let norm =
            |level: usize| format!("{UNET}output_blocks.{}.1.norm.weight", level * (layers + 1));
        let up_attention = (0..channels.len()).map(|level| self.has(&norm(level))).collect();
        Levels { channels, down_attention, up_attention, layers }
    }

    fn unet(&self) -> Result<Value> {
        let Levels { channels, down_attention, up_attention, layers } = self.levels();
        let second = self.is_second();
        let middle = match ["0.in_layers.0.weight", "1.norm.weight"]
            .map(|name| self.has(&format!("{UNET}middle_block.{name}")))
        {
            [_, true] => Some("UNetMidBlock2DCrossAttn"),
            [true, false] => Some("UNetMidBlock2D"),
            [false, false] => None,
        };
        let blocks = |attention: Vec<bool>, way: &str| -> Vec<String> {
            let name = |cross| format!("{}{way}Block2D", if cross { "CrossAttn" } else { "" });
            attention.into_iter().map(name).collect()
        };
        let heads = match second || self.is_xl() {
            true => channels.iter().map(|c| (c / 64).max(1)).collect(),
            false => vec![8; channels.len()],
        };
        let projection = |name: &&str| name.starts_with(UNET) && name.ends_with("proj_in.weight");
        let projection = self.weights.names().find(projection).and_then(|name| self.find(name));
        let mut down_depths = self.depths("input_blocks", 1, (channels.len(), layers));
        // The number of the last level is that of the middle block too.
        if let Some(last) = down_depths.last_mut().filter(|depths| depths.first() == Some(&0)) {
            let block = |k| format!("{UNET}middle_block.1.transformer_blocks.{k}.norm1.weight");
            last.fill(self.count(block));
        }
        Ok(json!({
            "in_channels": self.side(&format!("{UNET}input_blocks.0.0.weight"), 1)?,
            "out_channels": self.side(&format!("{UNET}out.2.weight"), 0)?,
            "cross_attention_dim": family::context_width(self.weights),
            "down_block_types": blocks(down_attention, "Down"),
            "mid_block_type": middle,
            "up_block_types": blocks(up_attention, "Up"),
            "layers_per_block": layers,
            "attention_head_dim": heads,
            "norm_num_groups": groups(&channels),
            "use_linear_projection": projection.is_some_and(|shape| shape.len() == 2),
            "sample_size": match second && self.prediction()? == "v_prediction" {
                _ if self.is_xl() => 128,
                true => 96,
                false => 64,
            },
            "transformer_layers_per_block": down_depths,
            "reverse_transformer_layers_per_block":
                self.depths("output_blocks", 0, (channels.len(), layers + 1)),
            "addition_embed_type": self.is_xl().then_some("text_time"),
            "addition_time_embed_dim": self.is_xl().then(|| self.size_width()),
            "projection_class_embeddings_input_dim": self.added_inputs(),
            "block_out_channels": channels,
        }))
    }

    /// Transformer blocks of the layers of each level, whose blocks follow each other from `first`
    /// on.
    fn depths(&self, way: &str, first: usize, (levels, layers): (usize, usize)) -> Vec<Vec<usize>> {
        // A block between the levels of the way down, none between those of the way up.
        let between = usize::from(way == "input_blocks");
        let depth = |level: usize, layer: usize| {
            let block = first + level * (layers + between) + layer;
            self.count(|k| format!("{UNET}{way}.{block}.1.transformer_blocks.{k}.norm1.weight"))
        };
        (0..levels).map(|level| (0..layers).map(|layer| depth(level, layer)).collect()).collect()
    }

    /// Width of the pooled prompt and the sizes of Stable Diffusion XL.
    fn added_inputs(&self) -> Option<usize> {
        let shape = self.find(&format!("{UNET}{}", family::LABEL)).filter(|_| self.is_xl())?;
        shape.get(1).copied()
    }

    /// Width of the embedding of each size: what the pooled prompt leaves to the six of them, or to
    /// the five of a refiner.
    fn size_width(&self) -> usize {
        const USUAL: usize = 256;
        let pooled = self.projection(self.second_tower());
        let left = pooled.and_then(|pooled| self.added_inputs()?.checked_sub(pooled));
        let sizes = if family::is_refiner(self.weights) { 5 } else { 6 };
        left.map_or(USUAL, |left| left / sizes)
    }

    /// Channels that the projection of an OpenCLIP tower gives, if it has one: a matrix (in, out), or
    /// a linear layer (out, in).
    fn projection(&self, tower: &str) -> Option<usize> {
        let side = |name: &str, dimension: usize| {
            self.find(&format!("{tower}text_projection{name}"))?.get(dimension).copied()
        };
        side("", 1).or_else(|| side(".weight", 0))
    }

    fn vae(&self) -> Result<Value> {
        let prefix = self.vae_prefix();
        let has = |name: &str| self.has(&format!("{prefix}{name}"));
        let latent =
            self.find(&format!("{prefix}decoder.conv_in.weight")).ok_or_else(
                || match family::other(self.weights) {
                    Some(what) => {
                        Error::config(&self.file, format!("this is {what}; it has no VAE"))
                    }
                    None => {
                        let reason =
                            "has no VAE (decoder.conv_in.weight is missing): name one with --vae";
                        Error::config(&self.file, reason)
                    }
                },
            )?;
        let attention = match self.vae_is_renamed() {
            true => "encoder.mid_block.attentions.0.group_norm.weight",
            false => "encoder.mid.attn_1.norm.weight",
        };
        let block = |i: usize, j: usize| self.vae_block(i, j);
        let channels = (0..self.count(|i| block(i, 0)))
            .map(|i| self.side(&block(i, 0), 0))
            .collect::<Result<Vec<_>>>()?;
        let scale = self.config.as_ref().and_then(|config| config.scale_factor);
        // Nothing tells it of a VAE alone.
        let whole = self.has(&format!("{UNET}input_blocks.0.0.weight"));
        let known = whole.then(|| if self.is_xl() { XL_SCALING } else { SCALING });
        let scale = scale.or(known);
        Ok(json!({
            "latent_channels": latent.get(1),
            "layers_per_block": self.count(|j| block(0, j)),
            "down_block_types": vec!["DownEncoderBlock2D"; channels.len()],
            "up_block_types": vec!["UpDecoderBlock2D"; channels.len()],
            "norm_num_groups": groups(&channels),
            "mid_block_add_attention":
                has(attention) || has("encoder.mid.attn_1.group_norm.weight"),
            "use_quant_conv": has("quant_conv.weight"),
            "use_post_quant_conv": has("post_quant_conv.weight"),
            "scaling_factor": scale,
            // As in the configurations that diffusers takes for such files.
            "sample_size": match whole && self.is_second() && self.prediction()? == "v_prediction" {
                _ if whole && self.is_xl() => 1024,
                true => 768,
                false => 512,
            },
            "block_out_channels": channels,
        }))
    }

    /// Whether the VAE has the Diffusers format's names.
    fn vae_is_renamed(&self) -> bool {
        let prefix = self.vae_prefix();
        self.has(&format!("{prefix}encoder.down_blocks.0.resnets.0.conv2.weight"))
    }

    /// A tensor of a residual block of the VAE's encoder.
    fn vae_block(&self, level: usize, block: usize) -> String {
        let prefix = self.vae_prefix();
        match self.vae_is_renamed() {
            true => format!("{prefix}encoder.down_blocks.{level}.resnets.{block}.conv2.weight"),
            false => format!("{prefix}encoder.down.{level}.block.{block}.conv2.weight"),
        }
    }

    fn text_encoder(&self, tower: Option<&TextTower>) -> Result<Value> {
        let second = self.is_second();
        let mut projection = None;
        let is_open = matches!(tower, Some(TextTower::OpenClip(_)));
        let (tokens, positions, inner, layers) = match tower {
            Some(TextTower::OpenClip(tower)) => {
                let inner = |i| format!("{tower}transformer.resblocks.{i}.mlp.c_fc.weight");
                let layers = self.count(inner);
                // A whole tower has its projection behind the layer that the UNet does not use.
                projection = self.projection(tower);
                let last = usize::from(second && projection.is_some() && layers < OPEN_CLIP_LAYERS);
                let token = format!("{tower}token_embedding.weight");
                (
                    token,
                    format!("{tower}positional_embedding"),
                    inner(0),
                    layers.saturating_sub(last),
                )
            }
            Some(TextTower::Clip(tower)) => {
                let inner = |i| format!("{tower}encoder.layers.{i}.mlp.fc1.weight");
                let embedding = |kind| format!("{tower}embeddings.{kind}_embedding.weight");
                (embedding("token"), embedding("position"), inner(0), self.count(inner))
            }
            None => {
                let reason = "has no text encoder in the names of CLIP or OpenCLIP";
                return Err(Error::config(&self.file, reason));
            }
        };
        let width = self.side(&tokens, 1)?;
        Ok(json!({
            "vocab_size": self.side(&tokens, 0)?,
            "hidden_size": width,
            "max_position_embeddings": self.side(&positions, 0)?,
            "intermediate_size": self.side(&inner, 0)?,
            "num_hidden_layers": if second { layers.min(OPEN_CLIP_LAYERS) } else { layers },
            "num_attention_heads": (width / 64).max(1),
            "hidden_act": if second || self.is_xl() && is_open { "gelu" } else { "quick_gelu" },
            "projection_dim": projection,
            // As the published configurations have it.
            "eos_token_id": (self.is_xl() && is_open).then_some(2),
        }))
    }

    /// `prediction_type` of the UNet: as the original configuration has it. Without one, that of SD
    /// 1.x and of inpainting models is the noise. That of others of SD 2.x is by ComfyUI's test of a
    /// bias where the UNet has it, else the velocity, as diffusers assumes.
    fn prediction(&self) -> Result<&'static str> {
        if let Some(config) = &self.config {
            return config.prediction().map_err(|reason| Error::config(&self.file, reason));
        }
        if self.has(VELOCITY) {
            return Ok("v_prediction");
        }
        let inputs = self.side(&format!("{UNET}input_blocks.0.0.weight"), 1)?;
        if !self.is_second() || inputs == 9 {
            return Ok("epsilon");
        }
        let name = format!("{UNET}{VELOCITY_BIAS}");
        let Some(shape) = self.find(&name) else { return Ok("v_prediction") };
        let bias: Vec<f32> = self.weights.tensor(&name, shape)?.flatten_all()?.to_vec1()?;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / bias.len() as f64;
        let middle = mean(&mut bias.iter().map(|value| f64::from(*value)));
        let variance = mean(&mut bias.iter().map(|value| (f64::from(*value) - middle).powi(2)));
        let velocity = variance.sqrt() > VELOCITY_DEVIATION;
        Ok(if velocity { "v_prediction" } else { "epsilon" })
    }

    fn scheduler(&self) -> Result<Value> {
        let config = self.config.clone().unwrap_or_default();
        // Trained to the last timestep, where sampling is to begin.
        let zero_snr = self.has(ZERO_SNR);
        Ok(json!({
            "_class_name": match self.is_second() {
                _ if self.is_xl() => "EulerDiscreteScheduler",
                true => "DDIMScheduler",
                false => "PNDMScheduler",
            },
            "rescale_betas_zero_snr": zero_snr,
            "timestep_spacing": if zero_snr { "trailing" } else { "leading" },
            "prediction_type": self.prediction()?,
            "num_train_timesteps": config.timesteps.unwrap_or(1000),
            "beta_schedule": config.betas().map_err(|reason| Error::config(&self.file, reason))?,
            "beta_start": config.linear_start.unwrap_or(0.00085),
            "beta_end": config.linear_end.unwrap_or(0.012),
            "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
            "clip_sample": false,
        }))
    }

    /// The names of a folder's tensors in the Diffusers format; none for tensors of other folders
    /// and unused ones.
    pub(super) fn renamer(&self, folder: &str) -> impl Fn(&str, &[usize]) -> Vec<Renamed> + use<> {
        let (folder, prefix) = (folder.to_owned(), self.vae_prefix().to_owned());
        let text = match folder.as_str() {
            SECOND_ENCODER => Some(TextTower::OpenClip(self.second_tower().to_owned())),
            _ => self.text_tower(),
        };
        let layers = self.levels().layers;
        let (levels, renamed) = (self.count(|i| self.vae_block(i, 0)), self.vae_is_renamed());
        move |name, shape| {
            let whole = |name: Option<String>| -> Vec<Renamed> {
                let shape = shape.to_vec();
                name.map(|name| Renamed { name, shape, part: (0, 1) }).into_iter().collect()
            };
            match (folder.as_str(), &text) {
                ("unet", _) => whole(name.strip_prefix(UNET).map(|name| names::unet(name, layers))),
                ("vae", _) => {
                    let name = name.strip_prefix(&prefix).and_then(|name| match renamed {
                        true => Some(name.to_owned()),
                        false => names::vae(name, levels),
                    });
                    let mut renamed = whole(name);
                    for tensor in &mut renamed {
                        // Linear layers are 1x1 convolutions there.
                        if tensor.name.contains(".attentions.") && tensor.shape.ends_with(&[1, 1]) {
                            tensor.shape.truncate(2);
                        }
                    }
                    renamed
                }
                (folder, Some(TextTower::OpenClip(tower))) => {
                    let projected = folder == SECOND_ENCODER;
                    let name = name.strip_prefix(tower);
                    name.map_or_else(Vec::new, |name| names::open_clip(name, shape, projected))
                }
                (_, Some(TextTower::Clip(tower))) => {
                    let name = name.strip_prefix(tower);
                    name.map_or_else(Vec::new, |name| names::clip(name, shape))
                }
                (_, None) => Vec::new(),
            }
        }
    }
}

/// Folder of the second text encoder.
const SECOND_ENCODER: &str = "text_encoder_2";

/// Number of groups of the norms, for these channels.
fn groups(channels: &[usize]) -> usize {
    let divides = |groups: &usize| channels.iter().all(|c| c % groups == 0);
    [32, 16, 8, 4, 2].into_iter().find(divides).unwrap_or(1)
}

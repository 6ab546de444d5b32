//! Single-file checkpoints in the original (LDM) format of CompVis and Stability, presented in the
//! Diffusers format: the name of each tensor there, and the configuration files that such a
//! checkpoint lacks, from the shapes of its tensors.
//!
//! Reference: diffusers 0.42 `loaders/single_file_utils.py`. Inferred from shapes: widths, levels
//! and attention of UNet and VAE, SD 1.x or 2.x, inpainting. Assumed, since no shape shows it: 8
//! heads (1.x) or heads of 64 channels (2.x), norms of 32 groups (or the largest power of two that
//! divides all widths), 64 latent pixels a side (2.x: 96), epsilon prediction (2.x: v-prediction).
//! A file of the Diffusers format beside the checkpoint, such as `unet/config.json`, overrides all
//! of it.

use serde_json::{Value, json};

use crate::error::{Error, Result};

const UNET: &str = "model.diffusion_model.";
const CLIP: &str = "cond_stage_model.transformer.";
const OPEN_CLIP: &str = "cond_stage_model.model.";

/// The name in the Diffusers format of a tensor, or of one of the equal parts of its rows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Renamed {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Which part, of how many.
    pub(crate) part: (usize, usize),
}

/// A checkpoint, as far as the names and shapes of its tensors tell.
pub(crate) struct LdmCheckpoint<'a> {
    file: &'a str,
    shapes: Vec<(&'a str, &'a [usize])>,
}

/// The levels of a UNet.
struct Levels {
    channels: Vec<usize>,
    down_attention: Vec<bool>,
    up_attention: Vec<bool>,
    layers: usize,
}

impl<'a> LdmCheckpoint<'a> {
    pub(crate) fn new(file: &'a str, mut shapes: Vec<(&'a str, &'a [usize])>) -> Self {
        shapes.sort_unstable();
        Self { file, shapes }
    }

    fn find(&self, name: &str) -> Option<&'a [usize]> {
        let place = self.shapes.binary_search_by(|(known, _)| (*known).cmp(name)).ok()?;
        Some(self.shapes[place].1)
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Fails if this is not a checkpoint of a whole model, and says what it is instead.
    pub(crate) fn check(&self) -> Result<()> {
        let any = |test: &dyn Fn(&str) -> bool| self.shapes.iter().any(|(name, _)| test(name));
        if any(&|name| name.starts_with(UNET)) {
            return Ok(());
        }
        let lora = |name: &str| name.contains("lora") || name.ends_with(".alpha");
        let found = if any(&lora) {
            "this is a LoRA, which adds to a model, and no model"
        } else if any(&|name| name.ends_with("decoder.conv_in.weight")) {
            "this is a VAE, and no whole model"
        } else {
            "this is no checkpoint of Stable Diffusion: it has no UNet in the original (LDM) format"
        };
        Err(Error::config(self.file, found))
    }

    /// One dimension of a tensor that every checkpoint has.
    fn side(&self, name: &str, dimension: usize) -> Result<usize> {
        let shape = self.find(name).ok_or_else(|| Error::Tensor {
            file: self.file.to_owned(),
            tensor: name.to_owned(),
            reason: "missing; this is no checkpoint of Stable Diffusion 1.x or 2.x".into(),
        })?;
        Ok(shape.get(dimension).copied().unwrap_or(1))
    }

    /// The first index without a tensor.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).find(|i| !self.has(&name(*i))).unwrap_or_default()
    }

    /// Whether the text encoder is OpenCLIP's, as in SD 2.x.
    fn is_second(&self) -> bool {
        self.has(&format!("{OPEN_CLIP}token_embedding.weight"))
    }

    /// The prefix of the VAE's names, which may be alone in its file.
    fn vae_prefix(&self) -> &'a str {
        let end = "decoder.conv_in.weight";
        let found = self.shapes.iter().find_map(|(name, _)| name.strip_suffix(end));
        found.unwrap_or("first_stage_model.")
    }

    /// A configuration file of the Diffusers format; none if it is optional.
    pub(crate) fn describe(&self, name: &str) -> Result<Option<Value>> {
        Ok(Some(match name {
            "model_index.json" => json!({ "_class_name": "StableDiffusionPipeline" }),
            "unet/config.json" => self.unet()?,
            "vae/config.json" => self.vae()?,
            "text_encoder/config.json" => self.text_encoder()?,
            "scheduler/scheduler_config.json" => self.scheduler(),
            "tokenizer/special_tokens_map.json" if self.is_second() => json!({ "pad_token": "!" }),
            _ => return Ok(None),
        }))
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
        let middle = format!("{UNET}middle_block.1.");
        let blocks = |attention: Vec<bool>, way: &str| -> Vec<String> {
            let name = |cross| format!("{}{way}Block2D", if cross { "CrossAttn" } else { "" });
            attention.into_iter().map(name).collect()
        };
        let heads = match second {
            true => channels.iter().map(|c| (c / 64).max(1)).collect(),
            false => vec![8; channels.len()],
        };
        let proj_in = self.find(&format!("{middle}proj_in.weight"));
        Ok(json!({
            "in_channels": self.side(&format!("{UNET}input_blocks.0.0.weight"), 1)?,
            "out_channels": self.side(&format!("{UNET}out.2.weight"), 0)?,
            "cross_attention_dim":
                self.side(&format!("{middle}transformer_blocks.0.attn2.to_k.weight"), 1)?,
            "down_block_types": blocks(down_attention, "Down"),
            "up_block_types": blocks(up_attention, "Up"),
            "layers_per_block": layers,
            "attention_head_dim": heads,
            "norm_num_groups": groups(&channels),
            "use_linear_projection": proj_in.is_some_and(|shape| shape.len() == 2),
            "sample_size": if second { 96 } else { 64 },
            "block_out_channels": channels,
        }))
    }

    fn vae(&self) -> Result<Value> {
        let prefix = self.vae_prefix();
        let block = |i: usize, j: usize| format!("{prefix}encoder.down.{i}.block.{j}.conv2.weight");
        let channels = (0..self.count(|i| block(i, 0)))
            .map(|i| self.side(&block(i, 0), 0))
            .collect::<Result<Vec<_>>>()?;
        let has = |name: &str| self.has(&format!("{prefix}{name}"));
        Ok(json!({
            "latent_channels": self.side(&format!("{prefix}decoder.conv_in.weight"), 1)?,
            "layers_per_block": self.count(|j| block(0, j)),
            "down_block_types": vec!["DownEncoderBlock2D"; channels.len()],
            "up_block_types": vec!["UpDecoderBlock2D"; channels.len()],
            "norm_num_groups": groups(&channels),
            "mid_block_add_attention": has("encoder.mid.attn_1.norm.weight"),
            "use_quant_conv": has("quant_conv.weight"),
            "use_post_quant_conv": has("post_quant_conv.weight"),
            "block_out_channels": channels,
        }))
    }

    fn text_encoder(&self) -> Result<Value> {
        // Some tools write the tower without its name.
        let named = self.has(&format!("{CLIP}text_model.final_layer_norm.weight"));
        let tower = format!("{CLIP}{}", if named { "text_model." } else { "" });
        let second = self.is_second();
        let (tokens, positions, inner, layers) = match second {
            true => (
                format!("{OPEN_CLIP}token_embedding.weight"),
                format!("{OPEN_CLIP}positional_embedding"),
                format!("{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"),
                // The last layer is dropped: the UNet attends to the output of the one before.
                self.open_clip_layers().saturating_sub(1),
            ),
            false => (
                format!("{tower}embeddings.token_embedding.weight"),
                format!("{tower}embeddings.position_embedding.weight"),
                format!("{tower}encoder.layers.0.mlp.fc1.weight"),
                self.count(|i| format!("{tower}encoder.layers.{i}.mlp.fc1.weight")),
            ),
        };
        let width = self.side(&tokens, 1)?;
        Ok(json!({
            "vocab_size": self.side(&tokens, 0)?,
            "hidden_size": width,
            "max_position_embeddings": self.side(&positions, 0)?,
            "intermediate_size": self.side(&inner, 0)?,
            "num_hidden_layers": layers,
            "num_attention_heads": (width / 64).max(1),
            "hidden_act": if second { "gelu" } else { "quick_gelu" },
        }))
    }

    fn open_clip_layers(&self) -> usize {
        self.count(|i| format!("{OPEN_CLIP}transformer.resblocks.{i}.mlp.c_fc.weight"))
    }

    fn scheduler(&self) -> Value {
        let (class, prediction) = match self.is_second() {
            true => ("DDIMScheduler", "v_prediction"),
            false => ("PNDMScheduler", "epsilon"),
        };
        json!({
            "_class_name": class, "prediction_type": prediction, "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
            "clip_sample": false,
        })
    }

    /// The names of a folder's tensors in the Diffusers format; none for tensors of other folders
    /// and unused ones.
    pub(crate) fn renamer(&self, folder: &str) -> impl Fn(&str, &[usize]) -> Vec<Renamed> + use<> {
        let (folder, prefix) = (folder.to_owned(), self.vae_prefix().to_owned());
        let (layers, last) = (self.levels().layers, self.open_clip_layers().saturating_sub(1));
        let levels = self.count(|i| format!("{prefix}encoder.down.{i}.block.0.conv2.weight"));
        move |name, shape| {
            let whole = |name: Option<String>| -> Vec<Renamed> {
                let shape = shape.to_vec();
                name.map(|name| Renamed { name, shape, part: (0, 1) }).into_iter().collect()
            };
            match folder.as_str() {
                "unet" => whole(name.strip_prefix(UNET).map(|name| unet(name, layers))),
                "vae" => {
                    let mut renamed =
                        whole(name.strip_prefix(&prefix).and_then(|n| vae(n, levels)));
                    for tensor in &mut renamed {
                        // Linear layers are 1x1 convolutions there.
                        if tensor.name.contains(".attentions.") {
                            tensor.shape.truncate(2);
                        }
                    }
                    renamed
                }
                _ => match name.strip_prefix(OPEN_CLIP) {
                    Some(name) => open_clip(name, shape, last),
                    None => whole(name.strip_prefix(CLIP).map(str::to_owned)),
                },
            }
        }
    }
}

/// Number of groups of the norms, for these channels.
fn groups(channels: &[usize]) -> usize {
    let divides = |groups: &usize| channels.iter().all(|c| c % groups == 0);
    [32, 16, 8, 4, 2].into_iter().find(divides).unwrap_or(1)
}

/// The first component of a name and the rest.
fn cut(name: &str) -> (&str, &str) {
    name.split_once('.').unwrap_or((name, ""))
}

/// The name of a UNet tensor in the Diffusers format.
pub(crate) fn unet(name: &str, layers: usize) -> String {
    let fixed = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("middle_block.0.", "mid_block.resnets.0."),
        ("middle_block.1.", "mid_block.attentions.0."),
        ("middle_block.2.", "mid_block.resnets.1."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
    ];
    for (theirs, ours) in fixed {
        if let Some(rest) = name.strip_prefix(theirs) {
            return format!("{ours}{}", resnet(rest));
        }
    }
    let (way, rest) = cut(name);
    let (number, rest) = cut(rest);
    let (part, rest) = cut(rest);
    let Ok(number) = number.parse::<usize>() else { return name.to_owned() };
    // Input block 0 is conv_in.
    let (blocks, number) = match way {
        "input_blocks" => ("down_blocks", number.saturating_sub(1)),
        _ => ("up_blocks", number),
    };
    let (level, layer) = (number / (layers + 1), number % (layers + 1));
    let p = format!("{blocks}.{level}");
    if let Some(rest) = rest.strip_prefix("op.") {
        return format!("{p}.downsamplers.0.conv.{rest}");
    }
    match (part, rest.strip_prefix("conv.")) {
        ("0", _) => format!("{p}.resnets.{layer}.{}", resnet(rest)),
        (_, Some(rest)) => format!("{p}.upsamplers.0.conv.{rest}"),
        _ => format!("{p}.attentions.{layer}.{rest}"),
    }
}

fn resnet(name: &str) -> String {
    let layers = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    let renamed = layers
        .iter()
        .find_map(|(theirs, ours)| name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")));
    renamed.unwrap_or_else(|| name.to_owned())
}

/// None for tensors that only training uses.
fn vae(name: &str, levels: usize) -> Option<String> {
    let (half, rest) = cut(name);
    if half == "loss" || half.starts_with("model_ema") {
        return None;
    }
    let mut rest = rest.to_owned();
    for (theirs, ours) in [
        ("mid.block_1.", "mid_block.resnets.0."),
        ("mid.block_2.", "mid_block.resnets.1."),
        ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
        ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
        ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
        ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
        ("norm_out.", "conv_norm_out."),
    ] {
        if let Some(end) = rest.strip_prefix(theirs) {
            rest = format!("{ours}{end}");
        }
    }
    let (way, tail) = cut(&rest);
    if let ("down" | "up", Some((Ok(level), tail))) =
        (way, tail.split_once('.').map(|(level, tail)| (level.parse::<usize>(), tail)))
    {
        // Up blocks are numbered from the outermost level there.
        let level =
            if way == "up" { levels.saturating_sub(level.saturating_add(1)) } else { level };
        let tail = tail
            .replace("block.", "resnets.")
            .replace("downsample.", "downsamplers.0.")
            .replace("upsample.", "upsamplers.0.");
        rest = format!("{way}_blocks.{level}.{tail}");
    }
    Some(format!("{half}.{}", rest.replace("nin_shortcut", "conv_shortcut")))
}

fn open_clip(name: &str, shape: &[usize], last: usize) -> Vec<Renamed> {
    let whole = |name: String| vec![Renamed { name, shape: shape.to_vec(), part: (0, 1) }];
    match name {
        "positional_embedding" => return whole("embeddings.position_embedding.weight".into()),
        "token_embedding.weight" => return whole("embeddings.token_embedding.weight".into()),
        "text_projection" | "logit_scale" => return Vec::new(),
        _ => {}
    }
    if let Some(rest) = name.strip_prefix("ln_final.") {
        return whole(format!("final_layer_norm.{rest}"));
    }
    let Some(rest) = name.strip_prefix("transformer.resblocks.") else { return Vec::new() };
    let (layer, rest) = cut(rest);
    if layer.parse() == Ok(last) {
        return Vec::new();
    }
    let p = format!("encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let mut third = shape.to_vec();
        if let Some(rows) = third.first_mut() {
            *rows /= 3;
        }
        let part = |(k, name): (usize, &str)| Renamed {
            name: format!("{p}.self_attn.{name}.{kind}"),
            shape: third.clone(),
            part: (k, 3),
        };
        return ["q_proj", "k_proj", "v_proj"].into_iter().enumerate().map(part).collect();
    }
    let rest = rest
        .replace("attn.out_proj", "self_attn.out_proj")
        .replace("ln_", "layer_norm")
        .replace("c_fc", "fc1")
        .replace("c_proj", "fc2");
    whole(format!("{p}.{rest}"))
}

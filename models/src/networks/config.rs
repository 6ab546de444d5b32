//! The networks' configuration files, field for field under the same names.
//!
//! Unknown keys and unsupported values are errors that name file and key: nothing that could change
//! the image is ignored. Keys that only record how a file was made or trained are listed as such.

use serde_json::json;

use crate::error::Result;
use crate::files::{Keys, Source};
use crate::ops::Activation;

/// Maximum of the `sample_size` of a UNet, in latent pixels.
const MAX_SAMPLE_SIZE: usize = 8192;

/// Maximum number of levels of a UNet or a VAE, each of which halves the sides.
const MAX_LEVELS: usize = 8;

/// Maximum number of channels of a level.
const MAX_CHANNELS: usize = 65_536;

/// Maximum number of transformer blocks of a layer.
const MAX_DEPTH: usize = 100;

/// Checks the channels of the levels of a UNet or a VAE.
fn check_levels(keys: &Keys, channels: &[usize]) -> Result<()> {
    let key = "block_out_channels";
    if !(1..=MAX_LEVELS).contains(&channels.len()) {
        return Err(keys.invalid(key, format!("{} must be 1 to {MAX_LEVELS}", channels.len())));
    }
    match channels.iter().find(|channels| !(1..=MAX_CHANNELS).contains(*channels)) {
        Some(found) => Err(keys.invalid(key, format!("{found} must be 1 to {MAX_CHANNELS}"))),
        None => Ok(()),
    }
}

/// One value for all blocks, or one for each.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum OneOrEach {
    One(usize),
    Each(Vec<usize>),
}

impl OneOrEach {
    fn each(self, count: usize) -> Option<Vec<usize>> {
        match self {
            Self::One(value) => Some(vec![value; count]),
            Self::Each(values) => (values.len() == count).then_some(values),
        }
    }
}

/// `unet/config.json` of a `UNet2DConditionModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Height and width in latent pixels that it was trained on.
    pub sample_size: usize,
    /// Input channels: latents, and mask and masked image of an inpainting UNet.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// Whether each down block has cross attention.
    pub down_cross_attention: Vec<bool>,
    /// Whether there is a middle block.
    pub mid_block: bool,
    /// Whether each up block has cross attention.
    pub up_cross_attention: Vec<bool>,
    /// Residual blocks of a down block; an up block has one more.
    pub layers_per_block: usize,
    /// Attention heads of each level: what the JSON's `attention_head_dim` means in SD 1.x and 2.x.
    pub heads: Vec<usize>,
    /// Transformer blocks of each cross-attention layer, by level.
    pub transformer_layers_per_block: Vec<usize>,
    /// Channels of the text encoder's output.
    pub cross_attention_dim: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Whether `proj_in` and `proj_out` are linear layers rather than 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Whether cosines come before sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the time embedding's frequencies.
    pub freq_shift: f64,
    /// Width of the embedding of the guidance scale, which a distilled UNet takes as an input.
    pub time_cond_proj_dim: Option<usize>,
}

impl UNetConfig {
    /// Reads `unet/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        Self::parse(Keys::read(source, "unet/config.json")?)
    }

    fn parse(mut keys: Keys) -> Result<Self> {
        keys.only("_class_name", &[json!("UNet2DConditionModel")])?;
        let block_out_channels: Vec<usize> =
            keys.take("block_out_channels", vec![320, 640, 1280, 1280])?;
        let levels = block_out_channels.len();
        let down = blocks(&mut keys, "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"])?;
        let up = blocks(&mut keys, "up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"])?;
        if down.len() != levels || up.len() != levels {
            return Err(keys.invalid("block_out_channels", "another length than the block types"));
        }
        let heads = keys.take("attention_head_dim", OneOrEach::One(8))?;
        let heads = keys.take("num_attention_heads", heads)?.each(levels);
        let heads = heads.ok_or_else(|| keys.invalid("attention_head_dim", "wrong length"))?;
        let depths = keys.take("transformer_layers_per_block", OneOrEach::One(1))?.each(levels);
        let depths =
            depths.ok_or_else(|| keys.invalid("transformer_layers_per_block", "wrong length"))?;
        // As diffusers: files of its first releases have 32 here, and mean 64.
        let least = if keys.text("_diffusers_version").is_some_and(is_old) { 64 } else { 0 };
        let sample_size = keys.count("sample_size", 1, 64)?;
        if sample_size > MAX_SAMPLE_SIZE {
            let reason = format!("{sample_size} must be 1 to {MAX_SAMPLE_SIZE}");
            return Err(keys.invalid("sample_size", reason));
        }
        let config = Self {
            sample_size: sample_size.max(least),
            mid_block: !keys.is_null("mid_block_type"),
            in_channels: keys.count("in_channels", 1, 4)?,
            out_channels: keys.count("out_channels", 1, 4)?,
            down_cross_attention: down,
            up_cross_attention: up,
            layers_per_block: keys.count("layers_per_block", 1, 2)?,
            transformer_layers_per_block: depths,
            cross_attention_dim: keys.count("cross_attention_dim", 1, 1280)?,
            norm_num_groups: keys.count("norm_num_groups", 1, 32)?,
            norm_eps: keys.take("norm_eps", 1e-5)?,
            use_linear_projection: keys.take("use_linear_projection", false)?,
            flip_sin_to_cos: keys.take("flip_sin_to_cos", true)?,
            freq_shift: keys.take("freq_shift", 0.0)?,
            time_cond_proj_dim: keys.take("time_cond_proj_dim", None)?,
            block_out_channels,
            heads,
        };
        config.check(&keys)?;
        refuse_other_unets(&mut keys)?;
        keys.finish()?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<()> {
        let groups = self.norm_num_groups;
        check_levels(keys, &self.block_out_channels)?;
        if self.transformer_layers_per_block.iter().any(|depth| !(1..=MAX_DEPTH).contains(depth)) {
            let reason = format!("each must be 1 to {MAX_DEPTH}");
            return Err(keys.invalid("transformer_layers_per_block", reason));
        }
        if self.time_cond_proj_dim.is_some_and(|width| width < 4) {
            return Err(keys.invalid("time_cond_proj_dim", "must be at least 4"));
        }
        for (channels, heads) in self.block_out_channels.iter().zip(&self.heads) {
            if groups == 0 || *channels == 0 || channels % groups != 0 {
                let reason = format!("{groups} does not divide {channels} channels");
                return Err(keys.invalid("norm_num_groups", reason));
            }
            if *heads == 0 || channels % heads != 0 {
                let reason = format!("{heads} heads do not divide {channels} channels");
                return Err(keys.invalid("attention_head_dim", reason));
            }
        }
        Ok(())
    }
}

/// Whether a version of diffusers is older than 0.9.
fn is_old(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(0)), Some(Ok(..9))))
}

/// Whether each block of a list is of the second of two types; any other type is rejected.
fn blocks(keys: &mut Keys, key: &str, types: [&str; 2]) -> Result<Vec<bool>> {
    let names: Vec<String> = keys.take(key, Vec::new())?;
    let names = if names.is_empty() { defaults(types) } else { names };
    names
        .iter()
        .map(|name| match types.iter().position(|known| known == name) {
            Some(index) => Ok(index == 1),
            None => Err(keys.invalid(key, format!("{name:?} is not supported"))),
        })
        .collect()
}

/// SD 1.x: three blocks with cross attention; the innermost has none.
fn defaults(types: [&str; 2]) -> Vec<String> {
    let mut names = vec![types[1].to_owned(); 3];
    let inner = if types[0].starts_with("Up") { 0 } else { names.len() };
    names.insert(inner, types[0].to_owned());
    names
}

/// Rejects features of other members of the family (SDXL, unCLIP, Kandinsky).
fn refuse_other_unets(keys: &mut Keys) -> Result<()> {
    const NULL: [&str; 14] = [
        "addition_embed_type",
        "addition_time_embed_dim",
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "mid_block_only_cross_attention",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "reverse_transformer_layers_per_block",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
        "resnet_pre_norm",
    ];
    for key in NULL {
        keys.only(key, &[json!(false), json!(null)])?;
    }
    keys.only("act_fn", &[json!("silu"), json!("swish")])?;
    keys.only("attention_type", &[json!("default")])?;
    keys.only("conv_in_kernel", &[json!(3)])?;
    keys.only("conv_out_kernel", &[json!(3)])?;
    keys.only("downsample_padding", &[json!(1)])?;
    keys.only("mid_block_scale_factor", &[json!(1), json!(1.0)])?;
    keys.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")])?;
    keys.only("only_cross_attention", &[json!(false)])?;
    keys.only("resnet_out_scale_factor", &[json!(1), json!(1.0)])?;
    keys.only("resnet_time_scale_shift", &[json!("default")])?;
    keys.only("time_embedding_type", &[json!("positional")])?;
    // Scores and softmax accumulate in f32 everywhere, as upcast_attention asks for.
    keys.drop_idle(&["addition_embed_type_num_heads", "dropout", "upcast_attention"]);
    Ok(())
}

/// `vae/config.json` of an `AutoencoderKL`.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of an input image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, outermost first; every level but the last halves the sides.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Factor of the latents after encoding.
    pub scaling_factor: f64,
    /// Whether the mid block has attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        let mut keys = Keys::read(source, "vae/config.json")?;
        keys.only("_class_name", &[json!("AutoencoderKL")])?;
        let block_out_channels: Vec<usize> = keys.take("block_out_channels", vec![64])?;
        for (key, name) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            let types: Vec<String> = keys.take(key, vec![name.into()])?;
            if types.len() != block_out_channels.len() || types.iter().any(|t| t != name) {
                let count = block_out_channels.len();
                return Err(keys.invalid(key, format!("{types:?} must be {count} times {name:?}")));
            }
        }
        keys.only("act_fn", &[json!("silu"), json!("swish")])?;
        keys.only("latents_mean", &[])?;
        keys.only("latents_std", &[])?;
        keys.only("shift_factor", &[json!(0), json!(0.0)])?;
        let scaling_factor: f64 = keys.take("scaling_factor", 0.18215)?;
        // In f32, in which latents are divided by it.
        let in_f32 = scaling_factor as f32;
        if in_f32 == 0.0 || !in_f32.is_finite() || !in_f32.recip().is_finite() {
            return Err(keys.invalid("scaling_factor", format!("{scaling_factor} is no scale")));
        }
        let config = Self {
            in_channels: keys.count("in_channels", 1, 3)?,
            out_channels: keys.count("out_channels", 1, 3)?,
            latent_channels: keys.count("latent_channels", 1, 4)?,
            layers_per_block: keys.count("layers_per_block", 0, 1)?,
            norm_num_groups: keys.count("norm_num_groups", 1, 32)?,
            scaling_factor,
            mid_block_add_attention: keys.take("mid_block_add_attention", true)?,
            use_quant_conv: keys.take("use_quant_conv", true)?,
            use_post_quant_conv: keys.take("use_post_quant_conv", true)?,
            block_out_channels,
        };
        let groups = config.norm_num_groups;
        check_levels(&keys, &config.block_out_channels)?;
        if let Some(channels) =
            config.block_out_channels.iter().find(|c| groups == 0 || **c == 0 || **c % groups != 0)
        {
            let reason = format!("{groups} does not divide {channels} channels");
            return Err(keys.invalid("norm_num_groups", reason));
        }
        if config.out_channels != 3 || config.in_channels != 3 {
            return Err(keys.invalid("out_channels", "must be 3, the channels of an image"));
        }
        keys.drop_idle(&["force_upcast", "sample_size"]);
        keys.finish()?;
        Ok(config)
    }

    /// Pixels per latent pixel, along one side.
    pub fn scale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Keys about training, and settings of text generation in old files.
pub(crate) const IDLE_TEXT_KEYS: [&str; 34] = [
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "dropout",
    "dtype",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "projection_dim",
    "repetition_penalty",
    "return_dict",
    "temperature",
    "tie_word_embeddings",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers_version",
    "typical_p",
];

/// The transformer of a CLIP tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Channels of the hidden states.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads of a layer.
    pub num_attention_heads: usize,
    /// The MLP's activation.
    pub(crate) hidden_act: Activation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
}

impl ClipConfig {
    /// Takes its keys; `hidden`, `inner` and `heads` are the defaults of the tower's class.
    pub(crate) fn take(
        keys: &mut Keys,
        (hidden, inner, heads): (usize, usize, usize),
    ) -> Result<Self> {
        let config = Self {
            hidden_size: keys.count("hidden_size", 1, hidden)?,
            intermediate_size: keys.count("intermediate_size", 1, inner)?,
            num_hidden_layers: keys.count("num_hidden_layers", 0, 12)?,
            num_attention_heads: keys.count("num_attention_heads", 1, heads)?,
            hidden_act: match keys.take("hidden_act", "quick_gelu".to_owned())?.as_str() {
                "quick_gelu" => Activation::QuickGelu,
                "gelu" => Activation::Gelu,
                other => {
                    let reason = format!("{other:?} is not quick_gelu or gelu");
                    return Err(keys.invalid("hidden_act", reason));
                }
            },
            layer_norm_eps: keys.take("layer_norm_eps", 1e-5)?,
        };
        let heads = config.num_attention_heads;
        if heads == 0 || !config.hidden_size.is_multiple_of(heads) {
            let reason = format!("{heads} heads do not divide {} channels", config.hidden_size);
            return Err(keys.invalid("num_attention_heads", reason));
        }
        Ok(config)
    }
}

/// `text_encoder/config.json` of a `CLIPTextModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipTextConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Maximum number of tokens of a sequence.
    pub max_position_embeddings: usize,
    /// The layers between embeddings and final norm.
    pub transformer: ClipConfig,
}

impl ClipTextConfig {
    /// Reads `text_encoder/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        let mut keys = Keys::read(source, "text_encoder/config.json")?;
        keys.only("model_type", &[json!("clip_text_model")])?;
        keys.only("use_attention_mask", &[json!(false)])?;
        let config = Self {
            vocab_size: keys.count("vocab_size", 1, 49408)?,
            max_position_embeddings: keys.count("max_position_embeddings", 1, 77)?,
            transformer: ClipConfig::take(&mut keys, (512, 2048, 8))?,
        };
        keys.drop_idle(&IDLE_TEXT_KEYS);
        keys.finish()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_model_is_understood() {
        let unet = UNetConfig::read(&Source::Demo).unwrap();
        assert_eq!(unet.block_out_channels, [64, 128, 192]);
        assert_eq!(unet.down_cross_attention, [true, true, false]);
        assert_eq!(unet.heads, [4, 4, 4]);
        assert_eq!(VaeConfig::read(&Source::Demo).unwrap().scale(), 8);
        assert_eq!(ClipTextConfig::read(&Source::Demo).unwrap().transformer.hidden_size, 128);
    }

    #[test]
    fn old_files_mean_64_latent_pixels() {
        let size = |version: &str| {
            let file = json!({ "sample_size": 32, "_diffusers_version": version });
            UNetConfig::parse(Keys::new("unet/config.json", file).unwrap()).unwrap().sample_size
        };
        let sizes = ["0.6.0", "0.8.0.dev0", "0.9.0.dev0", "0.10.2", "1.0.0"].map(size);
        assert_eq!(sizes, [64, 64, 32, 32, 32]);
    }

    #[test]
    fn transformers_may_be_deeper_at_some_levels() {
        let file = |depths| {
            json!({
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": depths,
            })
        };
        let parse = |depths| UNetConfig::parse(Keys::new("unet/config.json", file(depths))?);
        let depths = |depths| parse(depths).unwrap().transformer_layers_per_block;
        assert_eq!(depths(json!([1, 2, 10])), [1, 2, 10]);
        assert_eq!(depths(json!(1)), [1, 1, 1]);
        let error = parse(json!([1, 2])).unwrap_err().to_string();
        assert!(error.starts_with("unet/config.json: transformer_layers_per_block: "), "{error}");
    }

    #[test]
    fn counts_out_of_range_are_refused_by_name() {
        let cases = [
            (json!({ "sample_size": u64::MAX / 4 }), "sample_size"),
            (json!({ "sample_size": 0 }), "sample_size"),
            (json!({ "transformer_layers_per_block": 0 }), "transformer_layers_per_block"),
            (json!({ "cross_attention_dim": 0 }), "cross_attention_dim"),
            (json!({ "in_channels": u64::MAX / 2 }), "in_channels"),
            (json!({ "layers_per_block": 0 }), "layers_per_block"),
            (json!({ "block_out_channels": [32, 32, 32, 1u64 << 60] }), "block_out_channels"),
        ];
        for (file, key) in cases {
            let keys = Keys::new("unet/config.json", file).unwrap();
            let error = UNetConfig::parse(keys).unwrap_err().to_string();
            assert!(error.starts_with(&format!("unet/config.json: {key}: ")), "{error}");
        }
    }
}
